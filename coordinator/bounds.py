"""How many workers of each stage have a place at most, as placing them has shown. Pure.

Scaling shares totals of processors and GPUs, and knows nothing of memory, labels or what must be apart. So a plan is
placed, and what has no place bounds the next one, until a plan is placed as it stands: others then get the room that
these cannot use. Only that last one is applied, so nobody loses a worker to one that has no place.

A bound holds for a while, and no longer than until there may be more room: a host comes or changes, or a stage has
fewer workers. A slot that was set aside is tried again at once, as its stage may have no other worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torchrelay.config.fleet import HostReport
from torchrelay.coordinator.allocate import Allocation
from torchrelay.coordinator.loads import Node

__all__ = ["HOLD_S", "Bound", "Bounds", "agree"]

T = TypeVar("T")
HOLD_S = 20.0
_MOST_TURNS = 6


@dataclass(frozen=True, slots=True)
class Bound:
    """So many workers have a place, and in words why no more. It ends at `until_s`."""

    workers: int
    why: str
    until_s: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """By stage, with what they depend on: the hosts, and how many workers of each stage were placed. They are `over`
    when one left room behind that it could have."""

    found: Mapping[Node, Bound] = field(default_factory=dict)
    hosts: Hashable = None
    placed: Mapping[Node, int] = field(default_factory=dict)
    over: bool = False

    def at(self, hosts: Iterable[HostReport], now_s: float) -> Bounds:
        """Those that still hold."""
        known = _lasting(hosts)
        if self.over or known != self.hosts:
            return Bounds(hosts=known, placed=self.placed)
        return replace(self, found={key: one for key, one in self.found.items() if now_s < one.until_s})

    @property
    def workers(self) -> dict[Node, int]:
        return {key: one.workers for key, one in self.found.items()}


def agree(
    propose: Callable[[Mapping[Node, int]], T], place: Callable[[T], Allocation], bounds: Bounds, now_s: float
) -> tuple[T, Allocation, Bounds]:
    """A plan that is placed as it stands, as far as there is one; where it is placed; the bounds that it kept to.

    Args:
        propose: a plan, given how many workers of some stages have a place at most.
        place: where its workers go.
        bounds: what `Bounds.at` gave for now.
    """
    found = dict(bounds.found)
    for _ in range(_MOST_TURNS):
        plan = propose({key: one.workers for key, one in found.items()})
        allocation = place(plan)
        counts = Counter((one.ref, one.stage) for one in allocation.assignments if one.shard == 0)
        why = {(one.unit.ref, one.unit.stage): one.why for one in allocation.refused}
        lower = [key for key in why if key not in found or counts[key] < found[key].workers]
        if not lower:
            break
        found.update((key, Bound(counts[key], why[key], now_s + HOLD_S)) for key in lower)
    # What must be, whatever its bound says, is tried each time.
    found = {key: replace(one, workers=max(one.workers, counts[key])) for key, one in found.items()}
    over = any(counts[key] < count for key, count in bounds.placed.items() if key not in found)
    return plan, allocation, Bounds(found, bounds.hosts, counts, over)


def _lasting(hosts: Iterable[HostReport]) -> Hashable:
    """What hosts offer, without what jitters: free memory and use."""
    return frozenset(
        (
            host.name,
            host.host_id,
            host.cpus,
            host.memory,
            tuple((gpu.slot, gpu.uuid, gpu.memory) for gpu in host.gpus),
            host.links,
            host.labels,
            host.refs,
            host.draining,
            host.allow_cpu,
            frozenset((one.slot, one.ref, one.stage) for one in host.trouble),
        )
        for host in hosts
    )
