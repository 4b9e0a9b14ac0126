"""Counters of forwards and batches: every value has a bucket, and quantiles come back to within a fifth."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.queues.histogram import (
    FILL_BUCKETS,
    SERVICE_BUCKETS,
    fill_bucket,
    mean_fill,
    service_bucket,
    service_quantile,
)


@given(st.floats(2e-4, 1000.0), st.floats(0.01, 1.0))
def test_a_quantile_of_equal_times_is_that_time(seconds: float, q: float) -> None:
    """All forwards took as long: any quantile is that, to within the width of a bucket."""
    counts = [0] * SERVICE_BUCKETS
    counts[service_bucket(seconds)] = 7
    found = service_quantile(counts, q)
    assert found is not None
    assert seconds / 1.42 <= found <= seconds * 1.42


@given(st.lists(st.floats(1e-3, 100.0), min_size=50, max_size=200), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_quantiles_are_those_of_the_sorted_times(times: list[float], q: float) -> None:
    """Whatever the times, the quantile lies in the bucket of the sorted list's own."""
    counts = [0] * SERVICE_BUCKETS
    for t in times:
        counts[service_bucket(t)] += 1
    wanted = sorted(times)[max(math.ceil(q * len(times)) - 1, 0)]
    found = service_quantile(counts, q)
    assert found is not None
    assert wanted / 1.42 <= found <= wanted * 1.42


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_time_has_a_bucket(seconds: float) -> None:
    """NaN, negative and endless times too."""
    assert 0 <= service_bucket(seconds) < SERVICE_BUCKETS


@given(st.integers(-1, 10**6), st.integers(0, 10**6))
def test_every_batch_has_a_bucket(rows: int, max_rows: int) -> None:
    """Batches that are empty, full, or beyond what they may hold."""
    assert 0 <= fill_bucket(rows, max_rows) < FILL_BUCKETS


def test_nothing_counted_says_nothing() -> None:
    """No forward, no quantile; counters that ran backwards are as good as none."""
    assert service_quantile([], 0.5) is None
    assert service_quantile([0, 0], 0.5) is None
    assert mean_fill([]) is None
    assert mean_fill([0] * FILL_BUCKETS) is None
    assert mean_fill([0] * 9 + [4]) == 0.95
