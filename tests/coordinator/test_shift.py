"""Work moves from one stage to another while slots are few: workers follow within seconds, and then stay.

The same as `benchmarks/fleet_shift.py` does with real processes, in many seeded cases of a simulated world.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.coordinator.shift_world import ShiftWorld

BACK_S, BEFORE_S, AFTER_S = 10.0, 20.0, 25.0
FAST_S, SLOW_S = 0.05, 0.2
OLD, NEW = {"first": 8, "second": 2}, {"first": 2, "second": 8}
BEST = 40.0  # jobs per second, of two workers that take 0.05 s and eight that take 0.2 s


def _shifted(seeds: range, sigma: float) -> Iterator[tuple[int, ShiftWorld]]:
    """Worlds in which the fast stage became the slow one after `BEFORE_S`."""
    for seed in seeds:
        world = ShiftWorld({"first": SLOW_S, "second": FAST_S}, seed, sigma=sigma)
        world.run(BEFORE_S)
        assert world.given() == OLD, f"seed {seed}"
        world.cost_s.update(first=FAST_S, second=SLOW_S)
        world.run(AFTER_S)
        yield seed, world


def test_throughput_is_back_within_ten_seconds_after_the_bottleneck_moved() -> None:
    """Nine tenths of what the best fixed workers do, in 97 of 100 cases; no slot is used twice on the way."""
    late = []
    for seed, world in _shifted(range(100), sigma=0.02):
        back_s = world.back_s(BEFORE_S, 0.9 * BEST)
        if back_s > BACK_S:
            late.append((seed, back_s))
        assert all(sum(plan.values()) <= world.slots for _, plan in world.plans), f"seed {seed}"
        assert world.rate(BEFORE_S + BACK_S, world.at_s) >= 0.95 * BEST, f"seed {seed}"
    assert len(late) <= 3, f"(seed, seconds): {late}"


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.6])
def test_workers_stay_once_they_have_followed(sigma: float) -> None:
    """However much the times scatter: the best numbers are there after ten seconds in 18 of 20 cases, and in as
    many none is changed after that."""
    late, moved = [], []
    for seed, world in _shifted(range(200, 220), sigma):
        then = [plan for at, plan in world.plans if at <= BEFORE_S + BACK_S][-1]
        if then != NEW:
            late.append((seed, then))
        if any(at > BEFORE_S + BACK_S for at, _ in world.plans):
            moved.append(seed)
    assert len(late) <= 2, f"(seed, numbers): {late}"
    assert len(moved) <= 2, f"seeds: {moved}"
