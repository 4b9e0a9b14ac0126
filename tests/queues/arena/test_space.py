"""Runs of pages: against a plain model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.queues.arena.space import PAGE_BYTES, Space, pages_of


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_runs_never_overlap_and_the_lowest_that_fits_is_taken(steps: list[tuple[bool, int]]) -> None:
    """Whatever is taken and given back, a run is free before it is taken, and None means that no run fits."""
    space, taken = Space(128), [False] * 128
    runs: list[tuple[int, int]] = []
    for take, pages in steps:
        if not take and runs:
            first, length = runs.pop(pages % len(runs))
            space.give(first, length)
            taken[first : first + length] = [False] * length
            continue
        fits = [i for i in range(129 - pages) if not any(taken[i : i + pages])]
        first_page = space.take(pages)
        assert first_page == (fits[0] if fits else None)
        if first_page is not None:
            taken[first_page : first_page + pages] = [True] * pages
            runs.append((first_page, pages))
        assert space.free_pages == taken.count(False)


def test_a_run_can_be_claimed_once_and_only_inside() -> None:
    """What a control slot says is believed only where it names free pages of the segment."""
    space = Space(16)
    assert space.claim(4, 4)
    assert not space.claim(7, 2)
    assert not space.claim(15, 2)
    assert not space.claim(-1, 1)
    assert not space.claim(0, 0)
    assert space.take(5) == 8


def test_pages_of_bytes() -> None:
    """Nothing is rounded down, and nothing takes no page."""
    assert [pages_of(n) for n in (0, 1, PAGE_BYTES, PAGE_BYTES + 1)] == [1, 1, 1, 2]
