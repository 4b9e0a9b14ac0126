"""`cut_evenly` against every possible way to cut."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.stages.splitting.balance import cut_evenly

SLACK = 1.02


def largest(costs: list[float], cuts: tuple[int, ...] | list[int]) -> float:
    bounds = [0, *cuts, len(costs)]
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


@given(
    costs=st.lists(st.integers(0, 50).map(float), min_size=1, max_size=9),
    crossing=st.lists(st.sampled_from([1.0, 2.0, 7.0, math.inf]), min_size=9, max_size=9),
    count=st.integers(2, 4),
)
def test_the_largest_part_is_as_small_as_can_be_and_then_the_least_crosses(
    costs: list[float], crossing: list[float], count: int
) -> None:
    """Never at a place where nothing can cross; None where there are too few places."""
    places = [p for p in range(1, len(costs)) if math.isfinite(crossing[p])]
    ways = list(combinations(places, count - 1))
    cuts = cut_evenly(costs, crossing[: len(costs)], count)
    if not ways:
        assert cuts is None
        return
    assert cuts is not None
    assert tuple(cuts) in ways
    best = min(largest(costs, way) for way in ways)
    within = [way for way in ways if largest(costs, way) <= best * SLACK + 1e-9]
    assert largest(costs, cuts) <= best * SLACK + 1e-9
    assert sum(crossing[p] for p in cuts) == min(sum(crossing[p] for p in way) for way in within)


def test_a_slightly_larger_part_is_taken_where_much_less_crosses() -> None:
    assert cut_evenly([100.0, 1.0, 100.0], [0.0, 1000.0, 10.0], 2) == [2]
    assert cut_evenly([100.0, 9.0, 91.0], [0.0, 10.0, 1000.0], 2) == [1]
    assert cut_evenly([100.0, 9.0, 80.0], [0.0, 1000.0, 10.0], 2) == [1]
