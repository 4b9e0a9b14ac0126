"""Writers that die at every line, race, or stop past their lease: of a chunk there is one part, and it is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest

from tests.conftest import wait_until
from tests.dying import deaths_that_differ, die
from tests.stages.writing.support import (
    FORMATS,
    RUN,
    output_at,
    part,
    read_back,
    rows_of,
    unfinished,
    visible,
    write,
)
from torchrelay.stages import writing
from torchrelay.stages.writing import RowError, write_part
from torchrelay.stages.writing.found import scan
from torchrelay.stages.writing.staging import remove_dead
from torchrelay.stages.writing.stores import LocalStore

ROOT = Path(__file__).parents[3]
CODE = [str(Path(writing.__file__).parent)]
COUNT = 200


def values_of(fence: str) -> dict[str, object]:
    """Values that tell who wrote them."""
    start = sum(fence.encode()) * 1000
    return {"x": np.arange(start, start + COUNT), "text": [f"{fence}-{i}" for i in range(COUNT)]}


def in_a_small_process(name: str, *arguments: object) -> None:
    """Runs a function of this module in a fresh process: forks of it are quick."""
    code = f"import sys; from tests.stages.writing import test_deaths; test_deaths.{name}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_writer_may_die_at_any_line(tmp_path: Path, kind: str) -> None:
    """Nothing half is ever visible; the next writer leaves one whole part, and nothing of the dead one stays."""
    in_a_small_process("writers_die", tmp_path, kind)


def writers_die(folder: str, kind: str) -> None:
    def life(where: Path, fence: str) -> None:
        write_part(output_at(where, kind), part(), fence, rows_of(values_of(fence)), lambda: True)

    # What is imported at its first use is not to count.
    life(Path(folder) / "first", "w-1")
    dry = Path(folder) / "dry" / "out"
    dry.parent.mkdir()
    points = deaths_that_differ(partial(life, dry, "w-1"), CODE, dry.parent)
    assert len(points) > 10
    left, published = 0, 0
    for at in points:
        where = Path(folder) / f"at-{at}"
        die(partial(life, where, "w-1"), CODE, at)
        check_visible(where, kind)
        left += bool(unfinished(where))
        output = output_at(where, kind)
        written = write(output, values_of("w-2"), fence="w-2")
        published += written.adopted
        assert (written.rows, written.failed) == (COUNT, 0)
        whose = "w-1" if written.adopted else "w-2"
        assert read_back(output)["text"] == values_of(whose)["text"]
        assert isinstance(output.store, LocalStore)
        remove_dead(output.store)
        assert unfinished(where) == []
        check_visible(where, kind)
    # It died with files in the making, and with a part that was there already.
    assert left > 5
    assert published > 1


def check_visible(folder: Path, kind: str) -> None:
    """Whatever readers of the folder meet is whole."""
    names = visible(folder)
    if kind == "parquet" and folder.is_dir():
        assert pyarrow.dataset.dataset(folder).count_rows() == COUNT * len(names)
    for name in names:
        if name.endswith(".jsonl"):
            assert len([json.loads(line) for line in (folder / name).read_text().splitlines()]) == COUNT
        elif name.endswith(".npy"):
            assert len(np.load(folder / name)) == COUNT


@pytest.mark.parametrize("kind", FORMATS)
def test_processes_that_race_leave_one_part(tmp_path: Path, kind: str) -> None:
    """Three at once, for each of twenty chunks: all report the same part, whose rows are of one of them."""
    code = "import sys; from tests.stages.writing import test_deaths; test_deaths.race(*sys.argv[1:])"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), kind, f"w-{i}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    reports = [[json.loads(line) for line in racer.communicate(timeout=60)[0].splitlines()] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 3
    output = output_at(tmp_path / "out", kind)
    for chunk in range(20):
        told = [report[chunk] for report in reports]
        assert sum(not adopted for *_, adopted in told) == 1
        assert len({tuple(written[:-1]) for written in told}) == 1
        writer = told.index(next(t for t in told if not t[-1]))
        assert read_back(output, chunk)["text"] == values_of(f"w-{writer}")["text"]
    assert unfinished(tmp_path / "out") == []
    assert len(scan(output, RUN).parts) == 20


def race(folder: str, kind: str, fence: str) -> None:
    """What each racer runs; they meet before every chunk."""
    output = output_at(Path(folder) / "out", kind)
    for chunk in range(20):
        meet(Path(folder) / f"meet-{chunk}", fence, 3)
        print(json.dumps(write(output, values_of(fence), chunk, fence)))


def meet(place: Path, name: str, count: int) -> None:
    place.mkdir(exist_ok=True)
    (place / name).touch()
    deadline = time.monotonic() + 10
    while len(list(place.iterdir())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.0002)  # the others need the processors too


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stopped_writer_that_wakes_writes_nothing_over_a_part(tmp_path: Path, kind: str) -> None:
    """It is stopped right after it was told that it holds the lease; another writes meanwhile; it wakes and adopts."""
    out = tmp_path / "out"
    output = output_at(out, kind)
    sleeper = os.fork()
    if sleeper == 0:

        def ours() -> bool:
            os.kill(os.getpid(), signal.SIGSTOP)
            return True

        status = 1
        try:
            written = write_part(output_at(out, kind), part(), "w-1", rows_of(values_of("w-1")), ours)
            status = 0 if written is not None and written.adopted else 2
        finally:
            os._exit(status)
    wait_until(lambda: os.waitpid(sleeper, os.WUNTRACED | os.WNOHANG)[0])
    # Its files are ready; a driver that cleans up leaves them to it, for it lives.
    assert isinstance(output.store, LocalStore)
    assert unfinished(out)
    assert remove_dead(output.store) == 0
    errors = [RowError(0, 999, "s", "E", "t", 1)]
    assert not write(output, values_of("w-2"), fence="w-2", errors=errors).adopted
    before = state_of(out)
    os.kill(sleeper, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(sleeper, 0)[1]) == 0
    assert state_of(out) == before
    assert read_back(output)["text"] == values_of("w-2")["text"]
    assert unfinished(out) == []


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [folder / name for name in visible(folder)] + sorted((folder / "_run").rglob("*.json"))
    return {str(p): (p.stat().st_ino, p.read_bytes()) for p in files if p.parent.name != "tmp"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_writer_whose_lease_went_while_it_slept_writes_nothing(tmp_path: Path, kind: str) -> None:
    """Asked after it woke, the server says no."""

    def ours() -> bool:
        write(output_at(tmp_path, kind), values_of("w-2"), fence="w-2")
        return False

    output = output_at(tmp_path, kind)
    assert write_part(output, part(), "w-1", rows_of(values_of("w-1")), ours) is None
    assert read_back(output)["text"] == values_of("w-2")["text"]
    assert unfinished(tmp_path) == []


def test_a_cleaner_takes_only_what_is_dead(tmp_path: Path) -> None:
    """While writers work, one cleans as fast as it can: none of them fails, and at the end nothing is left."""
    output = output_at(tmp_path)
    assert isinstance(output.store, LocalStore)
    cleaner = os.fork()
    if cleaner == 0:
        while True:
            remove_dead(output.store)
    try:
        for chunk in range(40):
            # A new output each time: it looks anew whether the file system has links.
            assert not write(output_at(tmp_path), {"x": [1, 2]}, chunk).adopted
    finally:
        os.kill(cleaner, signal.SIGKILL)
        os.waitpid(cleaner, 0)
    assert len(visible(tmp_path)) == 40
    assert unfinished(tmp_path) == []
