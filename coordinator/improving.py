"""A bounded second chance for what found no place, in this order:

1. Workers that only presumed what they take (`Unit.presumed`) give up as much as is lacking on one slot; those that
   run only to the first of a stage.
2. In a small fleet, with few workers to place, all ways to place them are tried beside what runs: up to `SEARCH_TASKS`
   tasks on `SEARCH_SLOTS` slots, in `SEARCH_STEPS` steps. Where the search ends within them, a refusal means that no
   way places all, as far as single workers go; a group is tried at each host's best slots alone.
3. One worker, or two, move elsewhere, so that a third fits where they were. One that runs only moves for the first of a
   stage: without that its pipeline would stand still, while a further one is not worth a restart. `MOVE_TRIALS` trials
   in all; chains of moves are not tried.
4. So they move, too, where the first group of a stage would else have its shards on several hosts (`unite`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import partial
from itertools import combinations

from torchrelay.coordinator.board import Board, Kind, Option, Placed, Task
from torchrelay.coordinator.room import HostRoom, SlotRoom, Want
from torchrelay.coordinator.words import chosen

__all__ = ["MOVE_TRIALS", "SEARCH_SLOTS", "SEARCH_STEPS", "SEARCH_TASKS", "improve", "unite"]

SEARCH_TASKS, SEARCH_SLOTS, SEARCH_STEPS = 12, 48, 4000
MOVE_TRIALS = 200
_SLOTS_TRIED, _VICTIMS_TRIED = 24, 6


def improve(board: Board, refused: Sequence[Task]) -> list[Task]:
    """Places what it can of what was refused; the rest, in order."""
    left = _each(board, refused, lambda task: _from_presumed(board, task))
    if left and _search(board, left):
        return []
    trials = [MOVE_TRIALS]
    return _each(board, left, lambda task: _again(board, task) or _by_moving(board, task, trials))


def _each(board: Board, tasks: Sequence[Task], attempt: Callable[[Task], bool]) -> list[Task]:
    """Those for which the attempt failed; it is not repeated for the same kind while nothing changed."""
    hopeless: dict[int, int] = {}
    found = []
    for task in tasks:
        if hopeless.get(id(task.kind)) == board.version or not attempt(task):
            hopeless[id(task.kind)] = board.version
            found.append(task)
    return found


def _again(board: Board, task: Task) -> bool:
    option = board.best(task.kind) or board.best_squeezed(task.kind)
    if option is not None:
        _book(board, task, option)
    return option is not None


def _book(board: Board, task: Task, option: Option, why: str = "") -> Placed:
    text = chosen(board, task.kind, option)
    return board.book(Placed(task, option.slots, option.wants, why=f"{why}; {text}" if why else text))


def _slots(board: Board, kind: Kind) -> Iterator[SlotRoom]:
    for host in kind.hosts:
        if not board.barred(kind, host):
            yield from kind.slots_of(host)


def _lack(want: Want, slot: SlotRoom) -> Want:
    host = slot.host
    left = slot.compute, slot.memory - slot.others, host.cpus, host.memory - host.others
    return Want(*(max(0, need - room) if need else 0 for need, room in zip(want, left, strict=True)))


def _from_presumed(board: Board, task: Task) -> bool:
    """Takes what lacks from workers of one slot that make do with less."""
    kind = task.kind
    if len(kind.wants) > 1:
        return False
    first = task.units[0].replica == 0
    for slot in sorted(_slots(board, kind), key=lambda s: (sum(_lack(kind.want_on(s), s)), s.host.order, s.order)):
        want = kind.want_on(slot)
        lack = _lack(want, slot)
        if lack.memory or lack.host_memory or (slot.on_cpu and lack.compute):
            continue
        others = [p for p in slot.host.placed if (p.new or first) and p.task.kind.key != kind.key]
        givers = [p for p in others if p.task.kind.loose(p.slots[0])]
        compute = [p for p in givers if p.slots[0] is slot and not slot.on_cpu]
        cpus = [p for p in givers if p.slots[0].on_cpu]
        if sum(p.wants[0].compute for p in compute) < lack.compute or sum(p.wants[0].cpus for p in cpus) < lack.cpus:
            continue
        _shrink(board, compute, "compute", lack.compute)
        _shrink(board, cpus, "cpus", lack.cpus)
        _book(board, task, Option((), (slot,), (want,)))
        return True
    return False


def _shrink(board: Board, givers: Sequence[Placed], name: str, lack: int) -> None:
    for placed in sorted(givers, key=lambda p: (not p.new, -getattr(p.wants[0], name))):
        given = min(lack, getattr(placed.wants[0], name))
        if given:
            board.unbook(placed)
            placed.wants = (placed.wants[0]._replace(**{name: getattr(placed.wants[0], name) - given}),)
            board.book(placed)
            lack -= given


def _search(board: Board, refused: Sequence[Task]) -> bool:
    """Tries all ways to place what is new; leaves the board as it was where none places all."""
    before = [p for p in board.placed if p.new]
    tasks = [p.task for p in before] + list(refused)
    if len(tasks) > SEARCH_TASKS or sum(len(host.slots) for host in board.hosts) > SEARCH_SLOTS:
        return False
    version = board.version
    for placed in before:
        board.unbook(placed)
    tasks.sort(key=lambda t: (t.kind.units[0].presumed, -len(t.units), *(-n for n in t.kind.wants[0]), t.kind.key))
    # What got all that it asks for is not cut here.
    whole = {id(p.task) for p in before if len(p.slots) > 1 or p.wants[0] == p.task.kind.want_on(p.slots[0])}
    found = _Search(board, tasks, whole).run()
    if found is None:
        for placed in before:
            board.book(placed)
        board.version = version
        return False
    cut = [
        task.kind.loose(option.slots[0]) and id(task) not in whole for task, option in zip(tasks, found, strict=True)
    ]
    # What makes do takes what the others leave.
    for i in sorted(range(len(tasks)), key=lambda i: bool(cut[i])):
        _book(board, tasks[i], _full(tasks[i].kind, found[i]))
    return True


def _full(kind: Kind, option: Option) -> Option:
    if len(option.slots) > 1:
        return option
    return Option(option.score, option.slots, (kind.most(option.slots[0]),))


class _Search:
    """Depth first, over slots that differ in what is left of them."""

    def __init__(self, board: Board, tasks: Sequence[Task], whole: Set[int]) -> None:
        self._board = board
        self._tasks = tasks
        self._whole = whole
        self._steps = SEARCH_STEPS

    def run(self) -> list[Option] | None:
        """An option for each task; None where there is no way, or it was not found in time."""
        chosen: list[Option] = []
        return chosen if self._down(0, chosen) else None

    def _down(self, index: int, chosen: list[Option]) -> bool:
        if index == len(self._tasks):
            return True
        task = self._tasks[index]
        for option in self._options(task.kind, id(task) in self._whole):
            self._steps -= 1
            if self._steps < 0:
                return False
            placed = self._board.book(Placed(task, option.slots, option.wants))
            chosen.append(option)
            done = self._down(index + 1, chosen)
            self._board.unbook(placed)
            if done:
                return True
            chosen.pop()
        return False

    def _options(self, kind: Kind, whole: bool) -> Iterable[Option]:
        board = self._board
        if len(kind.wants) > 1:
            found = [option for host in kind.hosts if (option := board.option(kind, host)) is not None]
            over = board.best(kind)
            return found if found or over is None else [over]
        seen: set[object] = set()
        options = []
        for slot in _slots(board, kind):
            want = kind.want_on(slot) if whole else kind.least(slot)
            state = (_state(slot), *_host_state(slot.host))
            if slot.fits(want) and state not in seen:
                seen.add(state)
                tight = slot.compute - want.compute, slot.memory - want.memory, slot.host.cpus - want.cpus
                options.append(Option((*tight, slot.host.order, slot.order), (slot,), (want,)))
        return sorted(options, key=lambda option: option.score)


def _state(slot: SlotRoom) -> tuple[object, ...]:
    return slot.on_cpu, slot.compute, slot.memory - slot.others, tuple(sorted(slot.aside))


def _host_state(host: HostRoom) -> tuple[object, ...]:
    """Hosts of which this is equal are one as good as the other."""
    report = host.report
    counts = tuple(sorted(item for item in host.counts.items() if item[1]))
    gpus = tuple(sorted(map(_state, host.gpus)))
    joined = tuple(tuple(slot.order for slot in group) for group in host.links)
    fixed = report.labels, report.refs, report.draining, report.allow_cpu, _state(host.processors)
    return host.cpus, host.memory - host.others, counts, gpus, joined, fixed


def _by_moving(board: Board, task: Task, trials: list[int]) -> bool:
    """Moves one worker or two elsewhere to make room."""
    kind = task.kind
    if len(kind.wants) > 1:
        return False
    first = task.units[0].replica == 0
    slots = sorted(_slots(board, kind), key=lambda s: (_weight(kind, s), s.host.order, s.order))
    for slot in slots[:_SLOTS_TRIED]:
        want = kind.least(slot)
        lack = _lack(want, slot)
        others = [p for p in slot.host.placed if (p.new or first) and p.task.kind.key != kind.key]
        beside = [p for p in others if len(p.slots) == 1 and _helps(p, slot, lack)]
        beside.sort(key=lambda p: (not p.new, sum(p.wants[0]), p.task.kind.key, p.task.units[0].replica))
        several = beside[:_VICTIMS_TRIED]
        for victims in [(p,) for p in several] + list(combinations(several, 2)):
            if trials[0] <= 0:
                return False
            trials[0] -= 1
            # What is left of the slot is known once they are gone.
            if _move(board, task, victims, partial(_on_slot, kind, slot, want)):
                return True
    return False


def _weight(kind: Kind, slot: SlotRoom) -> float:
    want = kind.want_on(slot)
    return sum(lack / need for lack, need in zip(_lack(want, slot), want, strict=True) if lack)


def _helps(placed: Placed, slot: SlotRoom, lack: Want) -> bool:
    """Whether its leaving gives this slot some of what it lacks."""
    want, same = placed.wants[0], placed.slots[0] is slot
    on_slot = same and ((lack.compute and want.compute) or (lack.memory and want.memory))
    return bool(on_slot or (lack.cpus and want.cpus) or (lack.host_memory and want.host_memory))


def _on_slot(kind: Kind, slot: SlotRoom, want: Want) -> Option | None:
    return _full(kind, Option((), (slot,), (want,))) if slot.fits(want) else None


def _move(
    board: Board,
    task: Task,
    victims: Sequence[Placed],
    find: Callable[[], Option | None],
    *,
    squeezed: bool = True,
) -> bool:
    """Places the task where `find` says once the victims are gone, and these elsewhere; with `squeezed` also where they
    make do with less. Leaves the board as it was where one of them finds no place."""
    version = board.version
    for victim in victims:
        board.unbook(victim)
    done: list[Placed] = []
    place = find()
    if place is not None:
        done.append(_book(board, task, place))
        why = f"moved to make room for {task.kind.key[1]}"
        for victim in victims:
            option = board.best(victim.task.kind) or (board.best_squeezed(victim.task.kind) if squeezed else None)
            if option is None:
                break
            done.append(_book(board, victim.task, option, "" if victim.new else why))
    if len(done) == 1 + len(victims):
        return True
    for placed in reversed(done):
        board.unbook(placed)
    for victim in victims:
        board.book(victim)
    board.version = version
    return False


def unite(board: Board) -> None:
    """Brings new groups whose shards are on several hosts to one, where one or two workers can make room there. A
    group that runs stays as it is: it would have to load its model again."""
    trials = [MOVE_TRIALS]
    for placed in [p for p in board.placed if p.new and len({slot.host for slot in p.slots}) > 1]:
        version = board.version
        board.unbook(placed)
        if not _on_one_host(board, placed.task, trials):
            board.book(placed)
            board.version = version


def _on_one_host(board: Board, task: Task, trials: list[int]) -> bool:
    kind, first = task.kind, task.units[0].replica == 0
    hosts = [host for host in kind.hosts if not board.barred(kind, host)]
    for host in sorted(hosts, key=lambda h: (-board.fitting(kind, h), h.order)):
        slots = set(kind.slots_of(host))
        beside = [
            p
            for p in host.placed
            if (p.new or first) and p.task.kind.key != kind.key and len(p.slots) == 1 and (p.slots[0] in slots)
        ]
        beside.sort(key=lambda p: (not p.new, sum(p.wants[0]), p.task.kind.key, p.task.units[0].replica))
        several = beside[:_VICTIMS_TRIED]
        for victims in [(p,) for p in several] + list(combinations(several, 2)):
            if trials[0] <= 0:
                return False
            trials[0] -= 1
            if _move(board, task, victims, partial(board.option, kind, host), squeezed=False):
                return True
    return False
