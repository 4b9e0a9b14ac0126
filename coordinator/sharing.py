"""Who gets how many workers when there is not room for all that is wanted. Pure.

What there is room for is asked by a function, so that slots, memory and whatever else counts are its own business. It
must say yes to less of what it said yes to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Fits", "Wish", "share", "slots"]

Key = tuple[str, str]
Fits = Callable[[Mapping[Key, int]], bool]
"""Whether there is room for these numbers of workers."""
# Workers move from one stage to another only where that helps the worst off by so much.
_BETTER = 1.1


@dataclass(frozen=True, slots=True)
class Wish:
    """What one group wants: `wanted` workers, at least `least`. Of these, `spare` go if others are in need.

    `need` is by what the hardship of having fewer is measured.
    """

    key: Key
    least: int
    wanted: int
    current: int
    spare: int = 0
    need: float = 0.0


def slots(sizes: Mapping[str, float], takes: Mapping[Key, tuple[str, float]]) -> Fits:
    """Room in kinds of slots: `sizes` by kind, and per group which kind a worker takes and how much of it."""

    def fits(replicas: Mapping[Key, int]) -> bool:
        used: dict[str, float] = {}
        for key, count in replicas.items():
            kind, amount = takes[key]
            used[kind] = used.get(kind, 0.0) + amount * count
        return all(total <= sizes.get(kind, 0.0) + 1e-9 for kind, total in used.items())

    return fits


def share(wishes: Iterable[Wish], fits: Fits) -> dict[Key, int]:
    """All that is wanted if there is room; else what others can spare; else the same share of hardship for everybody.

    Never more than there is room for; of `least`, as many as have room, one by one.
    """
    all_ = list(wishes)
    wanted = {w.key: w.wanted for w in all_}
    if fits(wanted):
        return wanted
    giving = {w.key: min(max(w.wanted - w.spare, w.least), w.wanted) for w in all_}
    if fits(giving):
        return _between(giving, wanted, fits)
    least = {w.key: min(w.least, w.wanted) for w in all_}
    if not fits(least):
        return _one_by_one({w.key: 0 for w in all_}, least, all_, fits)
    found = _one_by_one(_evenly(least, giving, all_, fits), giving, all_, fits)
    current = {w.key: min(max(w.current, w.least), giving[w.key]) for w in all_}
    if fits(current) and _hardship(current, all_) <= _BETTER * _hardship(found, all_):
        return _one_by_one(current, giving, all_, fits)
    return found


def _between(low: Mapping[Key, int], high: Mapping[Key, int], fits: Fits) -> dict[Key, int]:
    """As near to `high` as there is room, all by the same part of the way."""

    def at(part: float) -> dict[Key, int]:
        return {key: low[key] + int(part * (high[key] - low[key]) + 1e-9) for key in low}

    yes, no = 0.0, 1.0
    for _ in range(24):
        middle = (yes + no) / 2.0
        yes, no = (middle, no) if fits(at(middle)) else (yes, middle)
    return at(yes)


def _evenly(low: Mapping[Key, int], high: Mapping[Key, int], wishes: list[Wish], fits: Fits) -> dict[Key, int]:
    """The same hardship for everybody, the least that there is room for; within these limits."""

    def at(hardship: float) -> dict[Key, int]:
        return {w.key: min(max(math.ceil(w.need / hardship - 1e-9), low[w.key]), high[w.key]) for w in wishes}

    least, most = 1e-3, max([w.need for w in wishes] + [1.0]) + 1.0
    for _ in range(40):
        middle = math.sqrt(least * most)
        least, most = (least, middle) if fits(at(middle)) else (middle, most)
    found = at(most)
    return found if fits(found) else dict(low)


def _hardship(counts: Mapping[Key, int], wishes: Iterable[Wish]) -> float:
    return max((w.need / max(counts[w.key], 0.1) for w in wishes if w.wanted > w.least), default=0.0)


def _one_by_one(start: Mapping[Key, int], end: Mapping[Key, int], wishes: list[Wish], fits: Fits) -> dict[Key, int]:
    """One more for whoever is worst off, as long as there is room."""
    found, open_ = dict(start), {w.key: w.need for w in wishes if start[w.key] < end[w.key]}
    while open_:
        # Names decide between equals, so that it is the same whoever asks.
        key = max(open_, key=lambda k: (open_[k] / max(found[k], 0.1), -found[k], k))
        found[key] += 1
        if not fits(found):
            found[key] -= 1
            del open_[key]
        elif found[key] >= end[key]:
            del open_[key]
    return found
