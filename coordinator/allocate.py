"""Which slot of which host gets which worker: a pure decision over plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrelay.config.fleet import Assignment, HostReport
from torchrelay.coordinator.units import Unit, units_of

__all__ = ["Allocation", "Dropped", "Refusal", "Unit", "allocate", "units_of"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A unit that has no place. `what` is short by `missing`: a word of Need (`memory`, ...) in its unit, or why no
    slot counts at all (`hosts`, `version`, `labels`, `device`, `draining`, `trouble`, `apart`). `why` says it to
    people."""

    unit: Unit
    what: str
    missing: float
    why: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """An assignment of before that is no more, and why."""

    assignment: Assignment
    why: str


@dataclass(frozen=True, slots=True)
class Allocation:
    """All that is to run, ordered by host, ref, stage and id; what has no place; and what must end."""

    assignments: tuple[Assignment, ...]
    refused: tuple[Refusal, ...] = ()
    dropped: tuple[Dropped, ...] = ()


def allocate(
    hosts: Sequence[HostReport],
    wanted: Sequence[Unit],
    current: Sequence[Assignment],
    *,
    stamp: str = "",
    now: float | None = None,
) -> Allocation:
    """Where each wanted unit is to run.

    Args:
        hosts: the hosts that are alive; their order does not matter.
        wanted: everything that is to run, of all pipelines; what of `current` is not wanted ends.
        current: what runs, or is on its way to. What can stay keeps its id, slot and text.
        stamp: goes into new ids; a value that never comes twice (`epoch.number`) makes ids that never do.
        now: Redis's clock; troubles of slots (`SlotTrouble`) count for `set_aside_s`. Without it all of them count.
    """
    raise NotImplementedError
