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
    return _interim(hosts, wanted, current)


def _interim(hosts, wanted, current):  # type: ignore
    from torchrelay.config.fleet import CPU
    from torchrelay.queues.keys import new_token

    left = list(current)
    placed, refused, fresh = [], [], []
    names = {host.name for host in hosts if not host.draining}
    for unit in wanted:
        stays = next((a for a in left if (a.ref, a.stage) == (unit.ref, unit.stage) and a.host in names), None)
        if stays is None:
            fresh.append(unit)
        else:
            left.remove(stays)
            placed.append(stays)
    for unit in fresh:
        best = None
        for host in hosts:
            if host.draining or unit.ref not in host.refs:
                continue
            for slot in [gpu.slot for gpu in host.gpus] if unit.device == "gpu" else [CPU]:
                here = [a for a in placed if a.host == host.name and a.slot == slot]
                if unit.device == "gpu" and here:
                    continue
                if unit.device == "cpu" and sum(a.need.cpus for a in here) + unit.need.cpus > host.cpus:
                    continue
                if any((t.slot, t.ref, t.stage) == (slot, unit.ref, unit.stage) for t in host.trouble):
                    continue
                choice = (len(here), host.name, slot)
                best = choice if best is None else min(best, choice)
        if best is None:
            refused.append(Refusal(unit, "cpus", 1.0, "no slot"))
        else:
            placed.append(
                Assignment(new_token(8), best[1], best[2], unit.ref, unit.stage, need=unit.need, why="fewest workers")
            )
    return Allocation(tuple(placed), tuple(refused))
