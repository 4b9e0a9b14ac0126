"""How much longer a row takes a worker than its forwards' time says. Pure.

Workers report how long they compute. What they lose between two forwards (claims, copies, commits, a processor that
others use too) shows only while rows wait for all of them all the time: then what they get done is all that they can.
A stage that is given workers by its forwards alone would stand at its limit, and a short wave would stay for minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torchrelay.coordinator.loads import NodeLoad
from torchrelay.coordinator.signals import sane

__all__ = ["Pace", "jammed"]

# As much work as workers do in so long must wait, at both ends of a look, for none of them to have been idle.
_WAITS_S = 0.5
# Each worker is thought to lose nothing for so long before it is measured; and what was measured is believed so long,
# while more is measured and while nothing is.
_DOUBT_S, _MEMORY_S, _IDLE_MEMORY_S = 6.0, 90.0, 1800.0
_MOST = 1.5


@dataclass(frozen=True, slots=True)
class Pace:
    """Of one group: seconds that its workers had while all were in demand, and those that the rows then done took to
    compute; and what the last look saw."""

    spent_s: float = 0.0
    computed_s: float = 0.0
    ready: int = 0
    at_s: float = -math.inf
    in_demand: bool = False

    def seen(self, load: NodeLoad, at_s: float, *, gated: bool) -> Pace:
        """With one more look. `gated` where the workers may stand still because of what is behind them."""
        seconds = min(max(at_s - self.at_s, 0.0), 60.0)
        row_s = sane(load.seconds_per_row, 1e9)
        least_s = max(_WAITS_S, sane(load.seconds_per_batch))
        in_demand = load.ready > 0 and sane(load.ready_rows) * row_s >= least_s * load.ready and not gated
        measured = in_demand and self.in_demand and load.ready == self.ready and seconds > 0 and load.done_rows > 0
        kept = math.exp(-seconds / (_MEMORY_S if measured else _IDLE_MEMORY_S))
        pace = replace(self, ready=load.ready, at_s=at_s, in_demand=in_demand)
        spent_s, computed_s = kept * self.spent_s, kept * self.computed_s
        if measured:
            spent_s += load.ready * seconds
            computed_s += sane(load.done_rows) * row_s
        return replace(pace, spent_s=spent_s, computed_s=computed_s)

    @property
    def factor(self) -> float:
        """Seconds that a row takes a worker for each that it is computed: 1 where nothing is known, never less."""
        doubt_s = _DOUBT_S * max(self.ready, 1)
        return min(max((self.spent_s + doubt_s) / (self.computed_s + doubt_s), 1.0), _MOST)


def jammed(load: NodeLoad) -> bool:
    """Whether so much stands before a stage that those before it may have been stopped."""
    waits_s = sane(load.ready_rows) * sane(load.seconds_per_row, 1e9) / max(load.ready, 1)
    return waits_s > max(2.0 * _WAITS_S, 2.0 * sane(load.seconds_per_batch))
