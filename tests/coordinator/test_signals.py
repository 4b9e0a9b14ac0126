"""Steady figures out of noisy ones."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.coordinator.signals import Level, Service, sane

ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY, ANY, ANY), max_size=30))
def test_any_numbers_leave_a_level_finite(samples: list[tuple[float, float, float]]) -> None:
    """NaN, endless, negative and huge rates and times make no level that is none."""
    level = Level()
    for rate, seconds, grain in samples:
        level.add(rate, seconds, sane(grain, 1e6))
        assert math.isfinite(level.value)
        assert math.isfinite(level.now)
        assert level.now >= 0.0


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_a_level_little_and_a_jump_at_once(seed: int) -> None:
    """With a fifth of noise the level stays within a tenth; a doubled rate is seen within six samples."""
    draw = random.Random(seed)
    level = Level()
    for _ in range(300):
        level.add(100.0 * draw.gauss(1.0, 0.2), 2.0)
    assert 90.0 < level.now < 110.0
    for _ in range(6):
        level.add(200.0 * draw.gauss(1.0, 0.2), 2.0)
    assert 140.0 < level.value < 260.0


def test_a_ramp_is_followed_without_lag() -> None:
    """A rate that rises steadily: the slope is found, and what it is now."""
    level = Level()
    for step in range(100):
        level.add(100.0 + 1.0 * 2.0 * step, 2.0, 0.01)
    assert 0.8 < level.trend <= 1.1
    assert 280.0 < level.now < 330.0


def test_a_constant_rate_has_no_trend() -> None:
    """Nothing rises where nothing changes."""
    level = Level()
    for _ in range(200):
        level.add(50.0, 2.0)
    assert (level.value, level.trend) == (50.0, 0.0)


def test_the_cost_of_a_row_is_that_of_full_batches() -> None:
    """Batches of several sizes tell the fixed part; of batches twice as full as seen, the cost is known."""
    service = Service()
    for rows in (4, 8, 12, 16):
        service.add(10, 10 * rows, 10 * (0.1 + 0.01 * rows))
    assert service.seconds_per_row(16) == pytest.approx(0.1 / 16 + 0.01, rel=1e-3)
    # 64 are more than twice the mean of 10: the line is not trusted so far.
    assert service.seconds_per_row(64) == pytest.approx(0.1 / 20 + 0.01, rel=1e-3)


def test_alike_batches_tell_only_what_a_row_cost() -> None:
    """Without other sizes, all of the time is by row."""
    service = Service()
    for _ in range(10):
        service.add(5, 40, 1.0)
    assert service.seconds_per_row(32) == pytest.approx(0.025)


def test_a_cost_that_moved_is_followed_within_two_looks() -> None:
    """A stage that becomes three times as slow: what was measured before is forgotten, not averaged in."""
    service = Service()
    for _ in range(50):
        service.add(40, 320, 4.0)
        service.pass_time(2.0)
    for _ in range(2):
        service.add(40, 320, 12.0)
        service.pass_time(2.0)
    assert service.seconds_per_row(8) == pytest.approx(12.0 / 320, rel=0.05)


def test_idle_time_forgets_nothing() -> None:
    """A day without a batch leaves the cost as it was."""
    service = Service()
    service.add(40, 320, 4.0)
    for _ in range(43_200):
        service.pass_time(2.0)
    assert service.seconds_per_row(8) == pytest.approx(4.0 / 320)


@given(st.lists(st.tuples(ANY, ANY, ANY), max_size=20))
def test_any_counts_leave_a_cost_finite(counts: list[tuple[float, float, float]]) -> None:
    """Whatever reports say."""
    service = Service()
    for batches, rows, seconds in counts:
        service.add(batches, rows, seconds, [batches])
        service.pass_time(2.0)
        assert math.isfinite(service.seconds_per_row(32))
        assert math.isfinite(service.cv2)


def test_a_fall_is_no_steep_ramp() -> None:
    """A rate that climbs by two steps and then falls: at no look is it taken for far less than what comes."""
    level, seen = Level(), []
    for rate in (100.0, 175.0, 235.0, 77.0):
        for step in range(20):
            level.add(rate * (1.1 if step % 2 else 0.9), 2.0)
            seen.append(level.now)
    assert min(seen) > 0.6 * 77.0
    assert 0.85 * 77.0 < seen[-1] < 1.15 * 77.0
