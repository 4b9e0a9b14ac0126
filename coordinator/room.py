"""What is left on each host while workers are placed: the ledger of an allocation.

Shares and processors are counted in millionths, so that ten tenths are one. Memory that others use, by what the drivers
and the kernel say, bars new workers and drives out none: what is free jitters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchrelay.config.fleet import CPU, Assignment, HostReport, Need, SlotTrouble, set_aside_s

__all__ = ["HostRoom", "Key", "Machine", "SlotRoom", "Want", "rooms_of"]

Key = tuple[str, str]
"""A stage: its ref and its name."""
_MILLION = 1_000_000


class Want(NamedTuple):
    """A `Need` in whole numbers."""

    compute: int
    memory: int
    cpus: int
    host_memory: int

    @classmethod
    def of(cls, need: Need) -> Want:
        return cls(_millionths(need.compute), need.memory, _millionths(need.cpus), need.host_memory)

    def need(self) -> Need:
        return Need(self.compute / _MILLION, self.memory, self.cpus / _MILLION, self.host_memory)


def _millionths(value: float) -> int:
    return round(value * _MILLION)


@dataclass(eq=False, slots=True)
class Machine:
    """Hosts that share memory: what runs there by stage. `stamp` grows whenever something changes on one of them."""

    counts: dict[Key, int] = field(default_factory=dict)
    stamp: int = 0


@dataclass(eq=False, slots=True)
class SlotRoom:
    """What is left of one slot: of a GPU, or of none for the processors. `others` is memory that strangers use.

    `aside` tells which stages failed there lately; of a GPU on which several did, all stay away.
    """

    host: HostRoom
    name: str
    order: int
    compute: int = 0
    memory: int = 0
    others: int = 0
    workers: int = 0
    aside: dict[Key, SlotTrouble] = field(default_factory=dict)

    @property
    def on_cpu(self) -> bool:
        return self.name == CPU

    def trouble(self, key: Key) -> SlotTrouble | None:
        """Why this stage is not to run here."""
        if not self.aside:
            return None
        if key in self.aside:
            return self.aside[key]
        return next(iter(self.aside.values())) if len(self.aside) > 1 and not self.on_cpu else None

    def fits(self, want: Want, *, stays: bool = False) -> bool:
        """Whether there is room; what `stays` was there before strangers took theirs."""
        host = self.host
        return (
            want.compute <= self.compute
            and want.cpus <= host.cpus
            and (not want.memory or want.memory <= self.memory - (0 if stays else self.others))
            and (not want.host_memory or want.host_memory <= host.memory - (0 if stays else host.others))
        )

    def take(self, want: Want, key: Key, sign: int = 1) -> None:
        """Books a worker of this stage; with `sign` -1 it leaves."""
        host, machine = self.host, self.host.machine
        self.compute -= sign * want.compute
        self.memory -= sign * want.memory
        self.workers += sign
        host.cpus -= sign * want.cpus
        host.memory -= sign * want.host_memory
        host.counts[key] = host.counts.get(key, 0) + sign
        machine.counts[key] = machine.counts.get(key, 0) + sign
        machine.stamp += 1


@dataclass(eq=False, slots=True)
class HostRoom:
    """What is left of one host, beside its GPUs. `order` is its place among all, by name; `placed` is what the board
    put here."""

    report: HostReport
    machine: Machine
    order: int
    cpus: int
    memory: int
    others: int
    processors: SlotRoom = field(init=False)
    gpus: list[SlotRoom] = field(default_factory=list)
    counts: dict[Key, int] = field(default_factory=dict)
    links: list[list[SlotRoom]] = field(default_factory=list)
    slots: dict[str, SlotRoom] = field(default_factory=dict)
    placed: dict[Any, None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.report.name


def rooms_of(hosts: Iterable[HostReport], current: Sequence[Assignment], now: float | None) -> list[HostRoom]:
    """The hosts as they would be without our workers, ordered by name."""
    machines: dict[str, Machine] = {}
    booked: dict[str, list[Assignment]] = {}
    for one in current:
        booked.setdefault(one.host, []).append(one)
    reports = {report.name: report for report in sorted(hosts, key=lambda h: (h.name, h.incarnation))}
    rooms = []
    for order, report in enumerate(reports.values()):
        machine = machines.setdefault(report.host_id or f"={report.name}", Machine())
        rooms.append(_room(report, machine, order, booked.get(report.name, []), now))
    return rooms


def _room(report: HostReport, machine: Machine, order: int, mine: Sequence[Assignment], now: float | None) -> HostRoom:
    used = report.memory - report.free_memory - sum(one.need.host_memory for one in mine)
    host = HostRoom(report, machine, order, _millionths(report.cpus), report.memory, max(0, used))
    host.processors = SlotRoom(host, CPU, 0)
    for gpu in sorted(report.gpus, key=lambda g: g.index):
        used = gpu.memory - gpu.free - sum(one.need.memory for one in mine if one.slot == gpu.slot)
        host.gpus.append(SlotRoom(host, gpu.slot, 1 + gpu.index, _MILLION, gpu.memory, max(0, used)))
    host.slots = {slot.name: slot for slot in (host.processors, *host.gpus)}
    for one in report.trouble:
        if one.slot in host.slots and (now is None or now < one.since + set_aside_s(one.failures)):
            host.slots[one.slot].aside[one.ref, one.stage] = one
    linked = [[host.slots[f"cuda:{i}"] for i in sorted(group) if f"cuda:{i}" in host.slots] for group in report.links]
    host.links = sorted((group for group in linked if len(group) > 1), key=lambda group: [s.order for s in group])
    return host
