"""The rows that end their worker, found by halves: all of them, nothing beside them, in a bounded number of tries."""

from __future__ import annotations

from math import log2

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.errors import JobCancelled, JobFailed
from torchrelay.producer.runs.halving import Halving, Span, is_struck

DIED = JobFailed("signal 11", job_id="j", stage="encode", error_type="WorkerDied")


def search(rows: int, fatal: set[int], *, patient: bool = True) -> tuple[Halving, int]:
    """What is found, and how many pieces died for it."""
    found = Halving(rows, DIED, patient)
    waiting: list[Span] = found.begin()
    deaths = 0
    while waiting and not found.over:
        span = waiting.pop(0)
        if fatal.isdisjoint(range(*span)):
            found.passed(span)
        else:
            deaths += 1
            waiting = found.died(span, DIED) + waiting
    assert found.over
    return found, deaths


@given(st.integers(1, 3000), st.booleans(), st.data())
def test_a_few_rows_are_charged_each_by_itself(rows: int, patient: bool, data: st.DataObject) -> None:
    fatal = data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=3))
    found, deaths = search(rows, fatal, patient=patient)
    if not found.hopeless:
        assert sorted((c.start, c.end) for c in found.charges) == [(n, n + 1) for n in sorted(fatal)]
    assert not (found.hopeless and patient)
    assert deaths <= len(fatal) * (log2(rows) + 1)


@given(st.integers(64, 3000), st.booleans(), st.data())
def test_of_many_rows_the_search_ends_and_what_passed_is_charged_nothing(
    rows: int, patient: bool, data: st.DataObject
) -> None:
    """Every row at fault is charged, by itself or with some beside it."""
    fatal = data.draw(st.sets(st.integers(0, rows // 2), min_size=4, max_size=100))
    found, deaths = search(rows, fatal, patient=patient)
    charged = [n for c in found.charges for n in range(c.start, c.end)]
    assert len(charged) == len(set(charged))
    assert found.hopeless or fatal <= set(charged)
    # Of what waits when there have been enough, one piece a level dies still.
    assert deaths <= 8 * (log2(rows) + 2) + log2(rows) + 1


def test_one_row_in_a_hundred_is_found_where_the_stage_is_known_to_work() -> None:
    """Wherever they lie, and each by itself."""
    found, _ = search(1000, set(range(50, 1000, 143)))
    assert sorted((c.start, c.end) for c in found.charges) == [(n, n + 1) for n in range(50, 1000, 143)]


def test_where_nothing_passes_the_stage_is_at_fault() -> None:
    """Soon, unless other chunks have passed it."""
    everything = set(range(1000))
    assert [(f.hopeless, n) for f, n in [search(1000, everything, patient=False)]] == [(True, 8)]
    found, deaths = search(1000, everything)
    assert found.hopeless
    assert deaths <= 25


def test_only_deaths_at_the_pipelines_own_stages_are_searched() -> None:
    assert is_struck(DIED)
    assert not is_struck(JobFailed("signal 11", job_id="j", stage="@read", error_type="WorkerDied"))
    assert not is_struck(JobFailed("why", job_id="j", stage="encode", error_type="ValueError"))
    assert not is_struck(JobCancelled("cancelled"))
