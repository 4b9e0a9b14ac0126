"""What came to a group of stages lately. Pure.

Where somebody submits the next job when one is done, what comes is what gets done: a stage that becomes slow, or loses
workers, sees its own slowness as a lower rate, and so do all the others. So what came a moment ago is remembered: it
comes again as soon as there are workers for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchrelay.coordinator.loads import NodeLoad
from torchrelay.coordinator.signals import sane

__all__ = ["Lately", "looped"]

# Longer than it takes to find out that a cost has moved, to start workers that load quickly, and to see what they do.
_MEMORY_S = 20.0
_ALIKE = 0.15
# As much waits as all workers do in so long.
_WAITS_S = 1.0


@dataclass(frozen=True, slots=True)
class Lately:
    """The rates of the last seconds, newest last, without those that a later one exceeds."""

    rates: tuple[tuple[float, float], ...] = ()

    def seen(self, rate: float, at_s: float) -> Lately:
        rate = sane(rate)
        kept = [(at, one) for at, one in self.rates if at_s - _MEMORY_S <= at < at_s and one > rate]
        return Lately((*kept, (at_s, rate)))

    @property
    def highest(self) -> float:
        return self.rates[0][1] if self.rates else 0.0


def looped(load: NodeLoad) -> bool:
    """Whether as much comes as gets done, while rows wait for all workers: so it is where results are waited for.
    What comes by itself is more than that while a backlog grows, and less while it is cleared."""
    came, done = sane(load.arrivals_per_s), sane(load.rows_per_s)
    batch_s = sane(load.seconds_per_batch)
    waits_s = sane(load.ready_rows) * sane(load.seconds_per_row, 1e9) / max(load.ready, 1)
    return waits_s >= max(_WAITS_S, 2.0 * batch_s) and abs(came - done) <= _ALIKE * max(came, done)
