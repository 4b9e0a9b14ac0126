"""From units to tasks: what is placed at once, in the order in which it is placed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchrelay.coordinator.board import Kind, Task
from torchrelay.coordinator.room import HostRoom, Key, Want
from torchrelay.coordinator.units import Unit
from torchrelay.errors import InputError

__all__ = ["tasks_of"]


def tasks_of(wanted: Sequence[Unit], rooms: Sequence[HostRoom]) -> tuple[list[Task], dict[Key, int]]:
    """The tasks, and how many units each stage has. Raises InputError for a group that is not whole."""
    groups: dict[tuple[object, ...], list[Unit]] = {}
    totals: dict[Key, int] = {}
    apart: dict[Key, set[Key]] = {}
    for unit in wanted:
        key = (unit.ref, unit.stage)
        totals[key] = totals.get(key, 0) + 1
        groups.setdefault((*key, unit.shards, unit.replica), []).append(unit)
        for name in unit.apart:
            apart.setdefault(key, set()).add((unit.ref, name))
            apart.setdefault((unit.ref, name), set()).add(key)
    kinds: dict[tuple[object, ...], Kind] = {}
    tasks: list[Task] = []
    for units in groups.values():
        tasks += [_task(parts, kinds, apart) for parts in _parts(units)]
    for kind in kinds.values():
        kind.hosts = [host for host in rooms if _may_ever(kind.units[0], host)]
    sizes = _sizes(kinds.values(), rooms)
    tasks.sort(key=lambda task: _order(task, sizes[id(task.kind)]))
    return tasks, totals


def _parts(units: list[Unit]) -> list[tuple[Unit, ...]]:
    if units[0].shards == 1:
        return [(unit,) for unit in units]
    units.sort(key=lambda unit: unit.shard)
    if [unit.shard for unit in units] != list(range(units[0].shards)):
        first = units[0]
        raise InputError(
            f"group {first.replica} of stage {first.stage!r} of {first.ref} has the shards "
            f"{[unit.shard for unit in units]!r:.80} of {first.shards}; each must be there once"
        )
    return [tuple(units)]


def _task(units: tuple[Unit, ...], kinds: dict[tuple[object, ...], Kind], apart: dict[Key, set[Key]]) -> Task:
    name = tuple(
        (u.ref, u.stage, u.need, u.device, u.presumed, u.labels, u.neighbours, u.one_host, u.kin, u.replica == 0)
        for u in units
    )
    kind = kinds.get(name)
    if kind is None:
        unit = units[0]
        key = (unit.ref, unit.stage)
        kind = kinds[name] = Kind(
            key,
            units,
            tuple(Want.of(u.need) for u in units),
            frozenset(apart.get(key, ())),
            tuple((unit.ref, n) for n in unit.neighbours),
            tuple((unit.ref, n) for n in unit.kin),
        )
    return Task(kind, units)


def _may_ever(unit: Unit, host: HostRoom) -> bool:
    report = host.report
    return not report.draining and unit.ref in report.refs and all(label in report.labels for label in unit.labels)


def _sizes(kinds: Iterable[Kind], rooms: Sequence[HostRoom]) -> dict[int, float]:
    """How much of the largest slot one of each kind takes, of what it takes most of."""
    largest = (
        1_000_000,
        max((gpu.memory for host in rooms for gpu in host.gpus), default=0),
        max((host.cpus for host in rooms), default=0),
        max((host.memory for host in rooms), default=0),
    )
    return {
        id(kind): max(need / (most or 1) for want in kind.wants for need, most in zip(want, largest, strict=True))
        for kind in kinds
    }


def _order(task: Task, size: float) -> tuple[object, ...]:
    unit = task.units[0]
    return unit.replica, unit.presumed, -len(task.units), -size, unit.ref, unit.stage
