"""What runs stays where it is, unless it must go: its host or slot is gone, drains, lacks what the unit asks for or set
the stage aside; there is no room any more; or fewer are wanted.

A group stays whole or goes whole. Of too many workers those go first that make do with less than is presumed, then one
of the host with most of its stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchrelay.config.fleet import Assignment
from torchrelay.coordinator.board import Board, Kind, Placed, Task
from torchrelay.coordinator.room import HostRoom, Key, SlotRoom, Want
from torchrelay.coordinator.words import gone

__all__ = ["keep"]

_Shape = tuple[str, str, int]
_Running = tuple[Assignment, ...]


def keep(
    board: Board, tasks: Sequence[Task], current: Sequence[Assignment]
) -> tuple[list[Task], dict[str, tuple[Assignment, str]]]:
    """Books what stays; the tasks that are still to be placed, in their order, and by id what must end, and why."""
    rooms = {host.name: host for host in board.hosts}
    dropped: dict[str, tuple[Assignment, str]] = {}
    by_shape: dict[_Shape, list[Task]] = {}
    for task in tasks:
        unit = task.units[0]
        by_shape.setdefault((unit.ref, unit.stage, unit.shards), []).append(task)
    pairs: list[tuple[Task, _Running]] = []
    for shape, found in _running(current).items():
        mine = by_shape.get(shape, [])
        staying = _allowed(found, mine, rooms, dropped)
        _thin_out(staying, len(mine), dropped)
        # Lower replicas may make do with less, so they are those that do.
        staying.sort(key=lambda run: (not mine or not _lacking(mine[0].kind, run, rooms), run[0].id))
        pairs += zip(mine, staying, strict=False)
    booked: set[int] = set()
    for task, run in sorted(pairs, key=lambda pair: (_lacking(pair[0].kind, pair[1], rooms), pair[1][0].id)):
        why = _stay(board, task, run, rooms)
        if why:
            dropped.update((one.id, (one, why)) for one in run)
        else:
            booked.add(id(task))
    return [task for task in tasks if id(task) not in booked], dropped


def _running(current: Sequence[Assignment]) -> dict[_Shape, list[_Running]]:
    """Workers, and groups of them, by the shape of what is wanted; in an order of their own."""
    groups: dict[tuple[str, str, int, str], list[Assignment]] = {}
    for one in sorted(current, key=lambda a: a.id):
        groups.setdefault((one.ref, one.stage, one.shards, one.group if one.shards > 1 else one.id), []).append(one)
    found: dict[_Shape, list[_Running]] = {}
    for key, members in groups.items():
        found.setdefault(key[:3], []).append(tuple(sorted(members, key=lambda a: a.shard)))
    return found


def _allowed(
    found: Sequence[_Running],
    tasks: Sequence[Task],
    rooms: dict[str, HostRoom],
    dropped: dict[str, tuple[Assignment, str]],
) -> list[_Running]:
    """Those that may stay as far as room is not concerned."""
    staying = []
    for run in found:
        why = "not wanted any more" if not tasks else ""
        if not why and [one.shard for one in run] != list(range(run[0].shards)):
            why = "its group is not whole"
        whys = ["" if why else gone(tasks[0].kind, one, rooms.get(one.host)) for one in run]
        why = why or next(filter(None, whys), "")
        if why:
            dropped.update((one.id, (one, why)) for one in run)
        else:
            staying.append(run)
    return staying


def _thin_out(staying: list[_Running], count: int, dropped: dict[str, tuple[Assignment, str]]) -> None:
    while len(staying) > count:
        hosts: dict[str, int] = {}
        for run in staying:
            hosts[run[0].host] = hosts.get(run[0].host, 0) + 1
        # Those that make do take less than the others.
        leaving = max(
            staying,
            key=lambda run: (-sum(one.need.compute + one.need.cpus for one in run), hosts[run[0].host], run[0].id),
        )
        staying.remove(leaving)
        dropped.update((one.id, (one, f"only {count} are wanted")) for one in leaving)


def _lacking(kind: Kind, run: _Running, rooms: dict[str, HostRoom]) -> bool:
    """Whether this worker, which may stay, makes do with less than it asks for there."""
    need, want = Want.of(run[0].need), kind.want_on(rooms[run[0].host].slots[run[0].slot])
    return need.cpus < want.cpus or need.compute < want.compute


def _stay(board: Board, task: Task, run: _Running, rooms: dict[str, HostRoom]) -> str:
    """Books it where it is; else why not."""
    kind = task.kind
    slots = tuple(rooms[one.host].slots[one.slot] for one in run)
    for host in {slot.host for slot in slots}:
        key: Key | None = board.barred(kind, host)
        if key is not None:
            return f"to be apart from {key[1]}, which is on {host.name} as well"
    if kind.gpu and len(slots) > 1 and len({s for s in slots if not s.on_cpu}) < sum(not s.on_cpu for s in slots):
        return "two shards of its group are on one GPU"
    if kind.units[0].one_host and len({slot.host for slot in slots}) > 1:
        return "the shards of its group are to be on one host"
    wants = _taken(kind, run, slots)
    if wants is None:
        return f"{slots[0].host.name} {slots[0].name} has no room for it any more"
    board.book(Placed(task, slots, wants, run))
    return ""


def _taken(kind: Kind, run: _Running, slots: Sequence[SlotRoom]) -> tuple[Want, ...] | None:
    """What they take where they are; None where that does not fit."""
    if len(slots) == 1:
        # What it made do with, as long as it can: a need that changes is one more thing that changes.
        want = kind.most(slots[0], Want.of(run[0].need))
        return (want,) if slots[0].fits(want, stays=True) else None
    booked: list[Want] = []
    fits = True
    for i, slot in enumerate(slots):
        booked.append(kind.want_on(slot, i))
        fits = fits and slot.fits(booked[-1], stays=True)
        slot.take(booked[-1], kind.key)
    for slot, want in zip(slots, booked, strict=True):
        slot.take(want, kind.key, -1)
    return tuple(booked) if fits else None
