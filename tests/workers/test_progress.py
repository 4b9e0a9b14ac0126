"""The page between a child and its supervisor: whole states only, and the last words of the dead."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrelay.queues.histogram import service_bucket
from torchrelay.workers.progress import PAGE_BYTES, Progress, ProgressPage, Tallies

FENCES = st.lists(st.text("abcXYZ019-", min_size=1, max_size=12), max_size=8).map(tuple)
NUMBERS = st.integers(0, 2**63)
SECONDS = st.floats(0, 1e9)
ENTRIES = st.binary(max_size=400)
STATES = st.builds(
    Progress, st.integers(0, 2), SECONDS, SECONDS, NUMBERS, NUMBERS, NUMBERS, SECONDS, NUMBERS, FENCES, ENTRIES
)


@pytest.fixture
def page() -> Iterator[ProgressPage]:
    made = ProgressPage.create()
    yield made
    made.close(unlink=True)


@given(state=STATES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_what_is_written_is_read(page: ProgressPage, state: Progress) -> None:
    """Every field survives, fences and started entries of any length too, over what stood there before."""
    page.write(state)
    assert ProgressPage(page.path).read() == state


def test_a_fresh_page_reads_as_loading(page: ProgressPage) -> None:
    """A child that died before its first word was never ready and held nothing."""
    assert page.read() == Progress()
    assert page.read(dead=True) == Progress()


def test_a_write_cut_off_by_death_is_read_only_from_the_dead(page: ProgressPage) -> None:
    """The sequence number is odd while a write is under way; of the living, the state before it is read."""
    page.write(Progress(state=1, jobs=5))
    reader = ProgressPage(page.path)
    assert reader.read().jobs == 5
    page.write(Progress(state=1, jobs=6))
    page._map[0:8] = (5).to_bytes(8, "little")
    assert reader.read().jobs == 5
    assert reader.read(dead=True).jobs == 6


def write_for_ever(path: Path, stop: threading.Event) -> None:
    page = ProgressPage(path)
    number = 0
    while not stop.is_set():
        number += 1
        tail = b"%d " % (number % 7) * (number % 97)
        page.write(Progress(jobs=number, rows=number, batches=number, fences=(f"f-{number}",), started=tail))


def test_a_reader_sees_no_torn_state(page: ProgressPage) -> None:
    """A process writes as fast as it can while this one reads: the fields of each reading belong together."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writer = context.Process(target=write_for_ever, args=(page.path, stop))
    writer.start()
    try:
        seen: set[int] = set()
        while len(seen) < 60:
            got = page.read()
            n = got.jobs
            if n:
                assert (got.rows, got.batches, got.fences) == (n, n, (f"f-{n}",))
                assert got.started == b"%d " % (n % 7) * (n % 97)
                seen.add(n)
    finally:
        stop.set()
        writer.join(10)
        writer.kill()


def test_a_state_that_does_not_fit_is_refused(page: ProgressPage) -> None:
    """Before anything is written: the state before it stands."""
    page.write(Progress(jobs=1))
    with pytest.raises(ValueError, match="does not fit"):
        page.write(Progress(jobs=2, started=b"x" * PAGE_BYTES))
    assert page.read().jobs == 1


def test_tallies_stand_beside_what_is_written(page: ProgressPage) -> None:
    """Forwards are counted by their time and fill, and memory is told, whatever else the page says meanwhile."""
    reader = ProgressPage(page.path)
    assert reader.tallies() == Tallies()
    page.tally(0.010, 32, 32)
    page.write(Progress(state=1, jobs=5, fences=("f-1",), started=b"entry"))
    page.tally(0.011, 3, 32)
    page.tell_memory(1 << 30, 2 << 30, 80 << 30)
    found = reader.tallies()
    assert found.service[service_bucket(0.010)] == 2
    assert sum(found.service) == 2
    assert found.fills == (1, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert found.memory == (1 << 30, 2 << 30, 80 << 30)
    assert reader.read() == Progress(state=1, jobs=5, fences=("f-1",), started=b"entry")
    reader.close()
