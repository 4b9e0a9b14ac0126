"""Which slot of which host gets which worker: a pure decision over plain values.

1. What runs and may stay, stays (`keeping`). What is wanted beside it is placed: of each stage its first worker before
   anybody's second; what says its needs before what makes do; groups before single workers; the largest first.
2. Each goes to the best place by the order of `board`, and says why. None takes more of a slot or a host than is left.
3. What finds no place gets a bounded second chance (`improving`), at worst by moving workers that run; so does a group
   whose shards would be on several hosts.
4. A worker that makes do with less than is presumed moves to where it gets all, once there is such a place.
5. What is refused says what is short, and by how much, as things stand in the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torchrelay.config.fleet import Assignment, HostReport, Need
from torchrelay.coordinator.board import Board, Option, Placed, Task
from torchrelay.coordinator.improving import improve, unite
from torchrelay.coordinator.keeping import keep
from torchrelay.coordinator.room import rooms_of
from torchrelay.coordinator.tasks import tasks_of
from torchrelay.coordinator.units import Unit, units_of
from torchrelay.coordinator.words import Shortage, chosen, short

__all__ = ["Allocation", "Dropped", "Refusal", "Unit", "allocate", "units_of"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A unit that has no place, and in words why.

    `what` is short by `missing`: a field of Need, in its unit, or `shards`, in shards. Or it says why no slot counts at
    all: `hosts`, `version`, `draining`, `labels`, `device`, `trouble`, `apart`.
    """

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
        current: what runs, or is on its way to. What stays is given back as it came, id, slot, text and all; only where
            what it takes is no longer what its unit wants, its `need` differs.
        stamp: goes into new ids; a value that never comes twice (`epoch.number`) makes ids that never do.
        now: Redis's clock; troubles of slots (`SlotTrouble`) count for `set_aside_s`. Without it all of them count.

    Raises InputError for a group of which a shard is missing or there twice.
    """
    rooms = rooms_of(hosts, current, now)
    tasks, totals = tasks_of(wanted, rooms)
    board = Board(rooms, totals)
    waiting, dropped = keep(board, tasks, current)
    refused = [task for task in waiting if not place(board, task)]
    if refused:
        refused = improve(board, refused)
    unite(board)
    _settle(board, dropped)
    return Allocation(
        tuple(sorted(_named(board, current, stamp, dropped), key=lambda a: (a.host, a.ref, a.stage, a.id))),
        tuple(_refusals(board, refused)),
        tuple(Dropped(*dropped[name]) for name in sorted(dropped)),
    )


def place(board: Board, task: Task) -> bool:
    """Puts it where it is best; False where it fits nowhere."""
    option = board.best(task.kind) or board.best_squeezed(task.kind)
    if option is not None:
        board.book(Placed(task, option.slots, option.wants, why=chosen(board, task.kind, option)))
    return option is not None


def _settle(board: Board, dropped: dict[str, tuple[Assignment, str]]) -> None:
    """Moves what makes do with less to where it gets all that is presumed."""
    lacking = [p for p in board.placed if p.wants[0] != p.task.kind.want_on(p.slots[0]) and len(p.slots) == 1]
    for placed in lacking:
        kind = placed.task.kind
        board.unbook(placed)
        option: Option | None = board.best(kind)
        if option is None or option.slots == placed.slots:
            board.book(placed)
            continue
        why = "moved to where it gets all that is presumed"
        dropped.update((one.id, (one, why)) for one in placed.kept)
        text = chosen(board, kind, option)
        board.book(Placed(placed.task, option.slots, option.wants, (), f"{why}; {text}" if placed.kept else text))


def _named(
    board: Board, current: Sequence[Assignment], stamp: str, dropped: dict[str, tuple[Assignment, str]]
) -> Iterable[Assignment]:
    """The assignments of all that is placed; what runs and was moved is noted as dropped."""
    kept = {one.id for placed in board.placed for one in placed.kept}
    for one in current:
        if one.id not in kept:
            dropped.setdefault(one.id, (one, "moved, so that more have a place"))
    taken = {one.id for one in current} | {one.group for one in current}
    for placed in board.placed:
        if placed.kept:
            yield from (_as_needed(one, placed, i) for i, one in enumerate(placed.kept))
            continue
        name = _new_id(placed, stamp, taken)
        for i, (unit, slot) in enumerate(zip(placed.task.units, placed.slots, strict=True)):
            whole = len(placed.slots) == 1
            yield Assignment(
                id=name if whole else f"{name}.{unit.shard}",
                host=slot.host.name,
                slot=slot.name,
                ref=unit.ref,
                stage=unit.stage,
                shard=unit.shard,
                shards=unit.shards,
                group="" if whole else name,
                need=_need(placed, i),
                why=placed.why,
            )


def _need(placed: Placed, index: int) -> Need:
    want, unit = placed.wants[index], placed.task.units[index]
    return unit.need if want == placed.task.kind.wants[index] else want.need()


def _as_needed(one: Assignment, placed: Placed, index: int) -> Assignment:
    need = _need(placed, index)
    return one if one.need == need else replace(one, need=need)


def _new_id(placed: Placed, stamp: str, taken: set[str]) -> str:
    unit, slot = placed.task.units[0], placed.slots[0]
    for number in range(len(taken) + 1):
        text = "\0".join((stamp, unit.ref, unit.stage, slot.host.name, slot.name, str(number)))
        name = f"{unit.stage.lstrip('@')}-{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}"
        if name not in taken:
            break
    taken.add(name)
    return name


def _refusals(board: Board, refused: Sequence[Task]) -> Iterable[Refusal]:
    known: dict[int, Shortage] = {}
    for task in refused:
        if id(task.kind) not in known:
            known[id(task.kind)] = short(board, task.kind)
        for unit in task.units:
            yield Refusal(unit, *known[id(task.kind)])
