"""Cuts a row of steps into parts whose largest is as small as can be, and then where the least crosses. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["cut_evenly"]

# So much more than the best largest part may be taken for a cut where less crosses: measurements are no better.
_SLACK = 0.02


def cut_evenly(costs: Sequence[float], crossing: Sequence[float], count: int) -> list[int] | None:
    """Where to cut: before which steps the parts but the first begin.

    Args:
        costs: of each step, from 0.
        crossing: what it costs to cut before each step; infinite where that cannot be. The first counts not.
        count: how many parts.

    Returns: `count` - 1 rising numbers; None where there are too few places.
    """
    places = [0, *(p for p in range(1, len(costs)) if np.isfinite(crossing[p])), len(costs)]
    if len(places) - 1 < count:
        return None
    upto = np.concatenate([[0.0], np.cumsum(costs)])[places]
    weights = np.array([0.0, *(crossing[p] for p in places[1:-1]), 0.0])
    largest = _smallest_largest(upto, count)
    return [places[i] for i in _least_crossing(upto, weights, count, largest * (1 + _SLACK) + 1e-12)]


def _smallest_largest(upto: np.ndarray, count: int) -> float:
    best = upto.copy()  # of the largest of k parts that end at each place
    for _ in range(1, count):
        longer = np.full(len(upto), np.inf)
        for j in range(1, len(upto)):
            longer[j] = np.maximum(best[:j], upto[j] - upto[:j]).min()
        longer[0] = np.inf
        best = longer
        best[0] = np.inf
    return float(best[-1])


def _least_crossing(upto: np.ndarray, weights: np.ndarray, count: int, most: float) -> list[int]:
    """The places between, such that no part is larger than `most`, and the sum of their weights is the least."""
    reached = np.where(upto <= most, weights, np.inf)
    reached[0] = np.inf
    came: list[np.ndarray] = []
    for _ in range(1, count):
        further, before = np.full(len(upto), np.inf), np.zeros(len(upto), np.int64)
        for j in range(2, len(upto)):
            # Those within reach of one part that ends here.
            first = int(np.searchsorted(upto, upto[j] - most, side="left"))
            if first < j:
                i = first + int(np.argmin(reached[first:j]))
                further[j], before[j] = reached[i] + weights[j], i
        came.append(before)
        reached = further
    cuts, at = [], len(upto) - 1
    for before in reversed(came):
        at = int(before[at])
        cuts.append(at)
    return cuts[::-1]
