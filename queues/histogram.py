"""How long forwards took and how full batches were, as few counters that only grow: what workers report of themselves.

Differences of two reports are a histogram of the time between them. Pure; no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "FILL_BUCKETS",
    "SERVICE_BUCKETS",
    "fill_bucket",
    "mean_fill",
    "service_bucket",
    "service_middle_s",
    "service_quantile",
]

SERVICE_BUCKETS = 48
FILL_BUCKETS = 10
# The upper edge of the first bucket, in seconds. Each further one ends 2**0.5 later: the last begins at 23 minutes.
_FIRST_S = 1e-4


def service_bucket(seconds: float) -> int:
    """The bucket of a forward that took so long."""
    if not seconds > _FIRST_S:
        return 0
    # Not math.ceil of infinity.
    return SERVICE_BUCKETS - 1 if seconds > 2e3 else min(math.ceil(2.0 * math.log2(seconds / _FIRST_S)), 47)


def _edge_s(bucket: int) -> float:
    return _FIRST_S * math.exp2(bucket / 2.0)


def service_middle_s(bucket: int) -> float:
    """Seconds in the middle of a bucket."""
    return _edge_s(bucket) / 2.0**0.25 if bucket else _FIRST_S / 2.0


def service_quantile(counts: Sequence[float], q: float) -> float | None:
    """Seconds that a share `q` of the counted forwards took at most, to within a fifth; None where none was counted."""
    total = sum(counts)
    if total <= 0:
        return None
    wanted, below = q * total, 0.0
    for bucket, count in enumerate(counts):
        if count > 0 and below + count >= wanted:
            low, high = (_edge_s(bucket - 1) if bucket else 0.0), _edge_s(bucket)
            return low + (high - low) * min(max((wanted - below) / count, 0.0), 1.0)
        below += count
    return _edge_s(len(counts) - 1)


def fill_bucket(rows: int, max_rows: int) -> int:
    """The bucket of a batch of so many rows: tenths of what it may hold."""
    return min(max(-(-rows * FILL_BUCKETS // max(max_rows, 1)) - 1, 0), FILL_BUCKETS - 1)


def mean_fill(counts: Sequence[float]) -> float | None:
    """How full the counted batches were, 0 to 1, to within a twentieth; None where none was counted."""
    total = sum(counts)
    return None if total <= 0 else sum((i + 0.5) * n for i, n in enumerate(counts)) / FILL_BUCKETS / total
