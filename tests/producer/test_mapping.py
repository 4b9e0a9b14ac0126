"""The flow of map, without I/O: what is under way stays within its bound, and everything comes back once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.errors import InputError
from torchrelay.producer.mapping import Window, map_rows, yields_errors


class Job:
    """Stands in for a future: a number, and whether it is done."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.id = str(number)
        self.ended = False

    def done(self) -> bool:
        return self.ended


@given(
    rows=st.integers(0, 60),
    in_flight=st.integers(1, 20),
    ordered=st.booleans(),
    leave_after=st.integers(0, 70),
    data=st.data(),
)
def test_map_gives_every_row_once_within_its_bound(
    rows: int, in_flight: int, ordered: bool, leave_after: int, data: st.DataObject
) -> None:
    """However jobs end: in order where asked, never more under way than allowed; what is left over is cancelled."""
    window: Window[Any] = Window(in_flight, ordered)
    jobs: list[Job] = []
    taken: list[int] = []
    cancelled: list[str] = []
    drawn = 0

    def source() -> Any:
        nonlocal drawn
        for i in range(rows):
            drawn += 1
            yield {"n": i}

    def submit(part: list[Any], first: int) -> list[Any]:
        assert first == len(jobs)
        assert [row["n"] for row in part] == list(range(first, first + len(part)))
        made = [Job(row["n"]) for row in part]
        jobs.extend(made)
        return made

    def wait(oldest: Any, condition: Callable[[], bool]) -> None:
        assert not oldest.done()
        while not condition():
            going = [job for job in jobs if not job.ended]
            data.draw(st.sampled_from(going)).ended = True

    results = map_rows(source(), window, submit, wait, cancelled.extend)  # type: ignore[arg-type]
    for job in results:
        assert job.done()
        taken.append(job.number)  # type: ignore[attr-defined]
        assert drawn - (len(taken) - 1) <= in_flight
        if len(taken) > leave_after:
            break
    results.close()
    assert len(set(taken)) == len(taken)
    if ordered:
        assert taken == list(range(len(taken)))
    if rows <= leave_after:
        assert sorted(taken) == list(range(rows))
        assert drawn == rows
    assert set(cancelled) == {job.id for job in jobs if not job.ended}


@given(st.lists(st.tuples(st.integers(1, 5), st.sets(st.integers(0, 40))), max_size=15), st.booleans())
def test_a_window_gives_back_what_is_done(steps: list[tuple[int, set[int]]], ordered: bool) -> None:
    """In any mixture of adding and ending: `pending` and what `pop` gave are all that went in."""
    window: Window[Any] = Window(1000, ordered)
    jobs: list[Job] = []
    given_back: list[Job] = []
    for more, ending in steps:
        added = [Job(len(jobs) + i) for i in range(more)]
        jobs += added
        window.add(added)
        for number in ending:
            if number < len(jobs):
                jobs[number].ended = True
        while (job := window.pop()) is not None:
            given_back.append(job)
        done = [job for job in jobs if job.ended]
        if not ordered:
            assert set(given_back) == set(done)
        else:
            first_going = next((i for i, job in enumerate(jobs) if not job.ended), len(jobs))
            assert given_back == jobs[:first_going]
        assert len(window) == len(jobs) - len(given_back)
        assert window.pending() == [job for job in jobs if not job.ended]


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "8", None])
def test_a_senseless_bound_is_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="in_flight"):
        Window(bad)


def test_map_knows_two_ways_with_errors() -> None:
    assert yields_errors("return")
    assert not yields_errors("raise")
    with pytest.raises(InputError, match="on_error 'keep'"):
        yields_errors("keep")
