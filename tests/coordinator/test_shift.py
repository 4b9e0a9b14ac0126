"""Work moves from one stage to another while there are few slots: workers follow within seconds, and then stay."""

from __future__ import annotations

from tests.coordinator.shift_world import STAGES, ShiftWorld

CASES, BACK_S, LAST_S = 100, 10.0, 30.0
FAST_S, SLOW_S = 0.05, 0.2
OF_BEST = 0.9


def _shifted(seed: int, sigma: float) -> tuple[ShiftWorld, float]:
    """A world in which the fast stage became the slow one, and when."""
    world = ShiftWorld({"first": SLOW_S, "second": FAST_S}, seed, sigma=sigma)
    world.run(25.0)
    assert world.given() == {"first": 8, "second": 2}, f"seed {seed}"
    at_s = world.at_s
    world.cost_s.update(first=FAST_S, second=SLOW_S)
    world.run(LAST_S)
    return world, at_s
