"""The board on which workers are placed one after the other: where one of a kind fits, and which place is best.

Of the places that fit, in this order:

1. a GPU before the processors, for a stage that may use either (`allow_cpu`);
2. shards of a group on GPUs that NVLink joins, else on one host, else on as few hosts as it takes;
3. where neighbours share memory with it: the host whose share of the neighbours most exceeds its share of this stage,
   so that copies of a pipeline gather on one host each;
4. for a part of a stage that is cut (`shards`) a host with room for the other parts too, else for most of them;
5. the host with the fewest workers of this stage, so that one host's end leaves others; this costs no locality, for a
   host that has its share of them counts as far as any other;
6. for a GPU the tightest fit, so that whole GPUs, and whole hosts of them, stay free for what needs them; for
   processors hosts without GPUs, then the host with most processors left;
7. the first by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torchrelay.config.fleet import Assignment
from torchrelay.coordinator.room import HostRoom, Key, SlotRoom, Want
from torchrelay.coordinator.units import Unit

__all__ = ["Board", "Kind", "Option", "Placed", "Task"]

_ONE_CPU = 1_000_000


@dataclass(eq=False, slots=True)
class Kind:
    """Units, or groups of shards, that differ in their number alone. `elsewhere` is what each takes on processors that
    stand in for a GPU. `kin` are the other parts of what it is a part of. `hosts` are those that it may ever be on."""

    key: Key
    units: tuple[Unit, ...]
    wants: tuple[Want, ...]
    apart: frozenset[Key] = frozenset()
    neighbours: tuple[Key, ...] = ()
    kin: tuple[Key, ...] = ()
    hosts: list[HostRoom] = field(default_factory=list)
    options: dict[tuple[int, bool], tuple[int, Option | None]] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.units[0].device == "gpu"

    def slots_of(self, host: HostRoom) -> list[SlotRoom]:
        """Where on this host it may run, whether there is room or not."""
        if not self.gpu:
            found = [host.processors]
        elif host.gpus or not host.report.allow_cpu:
            found = host.gpus
        else:
            found = [host.processors]
        return [slot for slot in found if slot.trouble(self.key) is None] if any(s.aside for s in found) else found

    def want_on(self, slot: SlotRoom, shard: int = 0) -> Want:
        """What it takes there: on processors, a model for a GPU lies in the host's memory."""
        want = self.wants[shard]
        if self.gpu and slot.on_cpu:
            return Want(0, 0, want.cpus or _ONE_CPU, want.host_memory + want.memory)
        return want

    def loose(self, slot: SlotRoom) -> tuple[str, ...]:
        """What it may get less of there than it asks for; see `Unit.presumed`."""
        if len(self.units) > 1:
            return ()
        unit = self.units[0]
        if self.gpu and slot.on_cpu:
            return ("cpus",) if unit.replica == 0 and not unit.need.cpus else ()
        return () if not unit.presumed else ("cpus",) if slot.on_cpu else ("compute",)

    def least(self, slot: SlotRoom) -> Want:
        """What it takes there at least."""
        loose = self.loose(slot)
        return self.want_on(slot)._replace(**dict.fromkeys(loose, 0)) if loose else self.want_on(slot)

    def most(self, slot: SlotRoom, had: Want | None = None) -> Want:
        """What it gets there, of what it asks for and, with `had`, of what it had."""
        want = self.want_on(slot)
        left = {"compute": slot.compute, "cpus": slot.host.cpus}
        for name in self.loose(slot):
            bound = left[name] if had is None else min(left[name], getattr(had, name))
            want = want._replace(**{name: max(0, min(getattr(want, name), bound))})
        return want


class Task(NamedTuple):
    """One worker to place, or one group."""

    kind: Kind
    units: tuple[Unit, ...]


class Option(NamedTuple):
    """A place that fits; the lowest score is best."""

    score: tuple[float, ...]
    slots: tuple[SlotRoom, ...]
    wants: tuple[Want, ...]


@dataclass(eq=False, slots=True)
class Placed:
    """A task and where it is. `kept` are its assignments where it was there before."""

    task: Task
    slots: tuple[SlotRoom, ...]
    wants: tuple[Want, ...]
    kept: tuple[Assignment, ...] = ()
    why: str = ""

    @property
    def new(self) -> bool:
        return not self.kept


class Board:
    """All hosts, and what was placed. `totals` are the workers wanted of each stage; `version` tells of changes."""

    def __init__(self, hosts: Sequence[HostRoom], totals: dict[Key, int]) -> None:
        self.hosts = list(hosts)
        self.totals = totals
        self.placed: dict[Placed, None] = {}
        self.version = 0

    def book(self, one: Placed) -> Placed:
        for slot, want in zip(one.slots, one.wants, strict=True):
            slot.take(want, one.task.kind.key)
            slot.host.placed[one] = None
        self.placed[one] = None
        self.version += 1
        return one

    def unbook(self, one: Placed) -> None:
        for slot, want in zip(one.slots, one.wants, strict=True):
            slot.take(want, one.task.kind.key, -1)
            slot.host.placed.pop(one, None)
        del self.placed[one]
        self.version += 1

    def near(self, kind: Kind, host: HostRoom) -> float:
        """How much more of its neighbours than of its own kind shares the memory of this host: 0 for what is even."""
        counts, total = host.machine.counts, self.totals.get(kind.key, 1)
        mine = counts.get(kind.key, 0) / total
        found = 0.0
        for neighbour in kind.neighbours:
            theirs = counts.get(neighbour, 0)
            if theirs:
                found += max(0.0, theirs / max(self.totals.get(neighbour, 0), theirs) - mine)
        return round(found, 9)

    def best(self, kind: Kind, hosts: Iterable[HostRoom] | None = None) -> Option | None:
        """The best place for one of this kind."""
        found: Option | None = None
        for host in kind.hosts if hosts is None else hosts:
            option = self.option(kind, host)
            if option is not None and (found is None or option.score < found.score):
                found = option
        if found is None and len(kind.units) > 1 and not kind.units[0].one_host:
            return self._over_hosts(kind)
        return found

    def best_squeezed(self, kind: Kind) -> Option | None:
        """The place where one that makes do with less gets most of what it lacks."""
        found: Option | None = None
        for host in kind.hosts:
            option = self.option(kind, host, squeezed=True)
            if option is not None and (found is None or option.score < found.score):
                found = option
        return found

    def option(self, kind: Kind, host: HostRoom, squeezed: bool = False) -> Option | None:
        """The best place on this host, from the last time that nothing had changed there."""
        known = kind.options.get((host.order, squeezed))
        if known is not None and known[0] == host.machine.stamp:
            return known[1]
        option = None
        if not self.barred(kind, host):
            find = self._squeezed if squeezed else self._group if len(kind.wants) > 1 else self._single
            option = find(kind, host)
        kind.options[host.order, squeezed] = host.machine.stamp, option
        return option

    def barred(self, kind: Kind, host: HostRoom) -> Key | None:
        """A stage on this host that it must be apart from."""
        return next((key for key in kind.apart if host.counts.get(key)), None) if kind.apart else None

    def _single(self, kind: Kind, host: HostRoom) -> Option | None:
        found: tuple[tuple[int, int, int], SlotRoom, Want] | None = None
        for slot in kind.slots_of(host):
            want = kind.want_on(slot)
            if slot.fits(want):
                tight = (slot.compute - want.compute, slot.memory - slot.others - want.memory, slot.order)
                if found is None or tight < found[0]:
                    found = tight, slot, want
        if found is None:
            return None
        left, slot, want = found
        score = (float(kind.gpu and slot.on_cpu), 0.0, *self._where(kind, host), *self._left(slot, left), host.order)
        return Option(score, (slot,), (want,))

    def _where(self, kind: Kind, host: HostRoom) -> tuple[float, float, float]:
        return -self.near(kind, host), self._left_out(kind, host), host.counts.get(kind.key, 0)

    def _left_out(self, kind: Kind, host: HostRoom) -> int:
        """How many of the parts that belong to it would have no room on this host."""
        if not kind.kin:
            return 0
        mine = host.counts.get(kind.key, 0)
        coming = 1 + sum(host.counts.get(key, 0) <= mine for key in kind.kin)
        return coming - self._room_for(kind, host, coming)

    def _room_for(self, kind: Kind, host: HostRoom, most: int) -> int:
        """How many that take what it takes have room on this host, `most` of them at most."""
        found, cpus, host_memory = 0, host.cpus, host.memory - host.others
        for slot in kind.slots_of(host):
            want, compute, memory = kind.want_on(slot), slot.compute, slot.memory - slot.others
            while (
                found < most
                and want.compute <= compute
                and want.cpus <= cpus
                and (not want.memory or want.memory <= memory)
                and (not want.host_memory or want.host_memory <= host_memory)
            ):
                found += 1
                compute, memory = compute - want.compute, memory - want.memory
                cpus, host_memory = cpus - want.cpus, host_memory - want.host_memory
        return found

    def _left(self, slot: SlotRoom, tight: tuple[float, ...]) -> tuple[float, ...]:
        host = slot.host
        if slot.on_cpu:
            return bool(host.gpus), -host.cpus, -host.memory
        return tight[0], tight[1], sum(gpu.compute for gpu in host.gpus)

    def _squeezed(self, kind: Kind, host: HostRoom) -> Option | None:
        found: Option | None = None
        for slot in kind.slots_of(host):
            if not kind.loose(slot) or not slot.fits(kind.least(slot)):
                continue
            full, want = kind.want_on(slot), kind.most(slot)
            lacks = full.compute - want.compute + full.cpus - want.cpus
            score = (float(kind.gpu and slot.on_cpu), lacks, slot.workers, *self._where(kind, host), host.order)
            if found is None or score < found.score:
                found = Option(score, (slot,), (want,))
        return found

    def _group(self, kind: Kind, host: HostRoom) -> Option | None:
        allowed = kind.slots_of(host)
        if kind.gpu and len(allowed) < len(kind.wants) and not (allowed and allowed[0].on_cpu):
            return None
        found: Option | None = None
        for group in [*host.links, allowed]:
            usable = allowed if group is allowed else [slot for slot in group if slot in allowed]
            chosen = self._spots(kind, usable, range(len(kind.wants)))
            if len(chosen) == len(kind.wants):
                linked = group is not allowed
                score = (
                    float(kind.gpu and usable[0].on_cpu),
                    0.0 if linked else 1.0,
                    *self._where(kind, host),
                    *self._left(usable[0], (sum(slot.compute for slot in usable), 0.0)),
                    host.order,
                )
                if found is None or score < found.score:
                    slots = tuple(chosen[i] for i in range(len(kind.wants)))
                    found = Option(score, slots, tuple(kind.want_on(s, i) for i, s in enumerate(slots)))
        return found

    def _spots(self, kind: Kind, slots: Sequence[SlotRoom], shards: Iterable[int]) -> dict[int, SlotRoom]:
        """As many of these shards as fit on these slots of one host: one to a GPU, the largest first."""
        found: dict[int, SlotRoom] = {}
        cpus = memory = 0
        for shard in sorted(shards, key=lambda i: (*(-n for n in kind.wants[i]), i)):
            spots = []
            for slot in slots:
                want = kind.want_on(slot, shard)
                together = want._replace(cpus=want.cpus + cpus, host_memory=want.host_memory + memory)
                if slot.fits(together) and (slot.on_cpu or slot not in found.values()):
                    spots.append((slot.compute - want.compute, slot.memory - want.memory, slot.order, slot, together))
            if spots:
                spot = min(spots, key=lambda spot: spot[:3])
                found[shard] = spot[3]
                cpus, memory = spot[4].cpus, spot[4].host_memory
        return found

    def fitting(self, kind: Kind, host: HostRoom) -> int:
        """How many shards of a group this host has room for."""
        return len(self._spots(kind, kind.slots_of(host), range(len(kind.wants))))

    def _over_hosts(self, kind: Kind) -> Option | None:
        """Over as few hosts as a greedy choice takes."""
        left, chosen = set(range(len(kind.wants))), dict[int, SlotRoom]()
        fits = [(h, self._spots(kind, kind.slots_of(h), left)) for h in kind.hosts if not self.barred(kind, h)]
        fits = [(host, spots) for host, spots in fits if spots]
        for host, _ in sorted(fits, key=lambda f: (-len(f[1]), *self._where(kind, f[0]), f[0].order)):
            spots = self._spots(kind, kind.slots_of(host), left)
            chosen |= spots
            left -= spots.keys()
            if not left:
                slots = tuple(chosen[i] for i in range(len(kind.wants)))
                return Option((0.0, 2.0), slots, tuple(kind.want_on(s, i) for i, s in enumerate(slots)))
        return None
