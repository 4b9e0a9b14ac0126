"""Runs of pages: against a plain model."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.queues.arena.space import PAGE_BYTES, Space, pages_of


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60), st.sampled_from([0, 3, 100]))
def test_runs_never_overlap_and_any_that_fits_is_found(steps: list[tuple[bool, int]], recent_runs: int) -> None:
    """Whatever is taken and given back, a run is free before it is taken, and None means that no run fits."""
    space, taken = Space(128), [False] * 128
    runs: list[tuple[int, int]] = []
    with patch("torchrelay.queues.arena.space._RECENT_RUNS", recent_runs):
        for take, pages in steps:
            if not take and runs:
                first, length = runs.pop(pages % len(runs))
                space.give(first, length)
                taken[first : first + length] = [False] * length
                continue
            fits = [i for i in range(129 - pages) if not any(taken[i : i + pages])]
            first_page = space.take(pages)
            assert first_page in fits or (first_page is None and not fits)
            if first_page is not None:
                taken[first_page : first_page + pages] = [True] * pages
                runs.append((first_page, pages))
            assert space.free_pages == taken.count(False)


def test_the_run_given_back_last_is_taken_first() -> None:
    """A block of the same length finds the pages that were in use a moment ago, and other blocks the lowest ones."""
    space = Space(64)
    low, high = space.take(8), space.take(8)
    assert (low, high) == (0, 8)
    space.give(0, 8)
    space.give(8, 8)
    assert space.take(8) == 8
    assert space.take(4) == 16
    assert space.take(48) is None
    assert space.take(44) == 20


def test_neighbours_that_were_given_back_join() -> None:
    """Runs that wait to be taken again are room for a longer block all the same."""
    space = Space(16)
    for first in (0, 4, 8, 12):
        assert space.take(4) == first
    for first in (0, 12, 4, 8):
        space.give(first, 4)
    assert space.take(16) == 0


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
