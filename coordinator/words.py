"""What an allocation says to people: why a worker is where it is, why one has no place, why one must go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torchrelay.config.fleet import CPU, Assignment, Need, SlotTrouble
from torchrelay.coordinator.board import Board, Kind, Option
from torchrelay.coordinator.room import HostRoom, SlotRoom, Want

__all__ = ["Shortage", "amounts", "chosen", "gone", "short"]

_FEW = 4
_MILLION = 1_000_000


class Shortage(NamedTuple):
    """`what` is short by how much, and the same in words; see `allocate.Refusal`."""

    what: str
    missing: float
    why: str


def gone(kind: Kind, one: Assignment, host: HostRoom | None) -> str:
    """Why this assignment cannot stay; '' where only room decides."""
    if host is None:
        return f"its host {one.host} is not there any more"
    problem = _bars(kind, host)
    if problem:
        return f"its host {host.name} {problem[1]}"
    slot = host.slots.get(one.slot)
    if slot is None:
        return f"{host.name} has no {one.slot} any more"
    if slot in kind.slots_of(host):
        return ""
    trouble = slot.trouble(kind.key)
    if trouble is not None:
        return f"{host.name} {slot.name} is set aside: {_failed(trouble)}"
    return f"it wants {'a GPU' if kind.gpu else 'processors'}, and was on {one.slot}"


def short(board: Board, kind: Kind) -> Shortage:
    """What a unit of this kind lacks, as the board stands."""
    who = f"stage {kind.units[0].stage} of {kind.units[0].ref}"
    if not board.hosts:
        return Shortage("hosts", 1, f"{who} has no host to run on; start one: torchrelay agent FILE")
    hosts = board.hosts
    for what, words in _NEVER.items():
        left = [host for host in hosts if _bar(kind, host, what) is None]
        if not left:
            return Shortage(what, 0, f"{who} {words(kind, hosts)}")
        hosts = left
    offering = [host for host in hosts if kind.slots_of(host)]
    if not offering:
        return _no_slot(who, kind, hosts)
    hosts = offering
    free = [host for host in hosts if board.barred(kind, host) is None]
    if not free:
        other = board.barred(kind, hosts[0])
        text = f"must be apart from {other[1] if other else ''}, which is on {_names(hosts)}; add a host"
        return Shortage("apart", 0, f"{who} {text}")
    if len(kind.wants) > 1:
        return _group_short(board, who, kind, free)
    return _most_room(who, kind, [slot for host in free for slot in kind.slots_of(host)])


def _bars(kind: Kind, host: HostRoom) -> tuple[str, str] | None:
    """Why no worker of this kind may be on this host."""
    for what in _NEVER:
        problem = _bar(kind, host, what)
        if problem is not None:
            return what, problem
    return None


def _bar(kind: Kind, host: HostRoom, what: str) -> str | None:
    unit = kind.units[0]
    if what == "version":
        return None if unit.ref in host.report.refs else f"does not have {unit.ref}"
    if what == "draining":
        return "drains" if host.report.draining else None
    missing = [label for label in unit.labels if label not in host.report.labels]
    return f"has no label {', '.join(missing)}" if missing else None


def _version_words(kind: Kind, hosts: Sequence[HostRoom]) -> str:
    return (
        f"cannot be run by any host ({_names(hosts)}): their agents lack this version; start one with its file: "
        "torchrelay agent FILE"
    )


def _draining_words(_: Kind, hosts: Sequence[HostRoom]) -> str:
    return f"could run on {_names(hosts)} only, which drain; add a host"


def _labels_words(kind: Kind, hosts: Sequence[HostRoom]) -> str:
    found = "; ".join(f"{h.name} has {', '.join(h.report.labels) or 'none'}" for h in hosts[:_FEW])
    return f"wants hosts with the labels {', '.join(kind.units[0].labels)}, and there is none: {found}"


_NEVER = {"version": _version_words, "draining": _draining_words, "labels": _labels_words}
"""What bars a host for good, in the order in which it is looked at."""


def _no_slot(who: str, kind: Kind, hosts: Sequence[HostRoom]) -> Shortage:
    offered = [slot for host in hosts for slot in (host.gpus if kind.gpu else [host.processors])]
    offered += [h.processors for h in hosts if kind.gpu and not h.gpus and h.report.allow_cpu]
    if not offered:
        text = f"needs a GPU, and {_names(hosts)} offers none; add one, or start the agent with --allow-cpu"
        return Shortage("device", 1, f"{who} {text}")
    told = [(slot, trouble) for slot in offered if (trouble := slot.trouble(kind.key)) is not None]
    slot, trouble = min(told, key=lambda t: (t[0].host.order, t[0].order))
    text = (
        f"is set aside on every slot that it could use ({len(told)}); {slot.host.name} {slot.name}: {_failed(trouble)}"
    )
    return Shortage("trouble", len(told), f"{who} {text}")


def _failed(trouble: SlotTrouble) -> str:
    times = "once" if trouble.failures == 1 else f"{trouble.failures} times"
    return f"{trouble.stage} failed {times}, last with: {trouble.reason:.200}"


def _lacks(want: Want, slot: SlotRoom) -> Want:
    """How much more of each this slot would need to have."""
    has = _has(slot)
    return Want(*(max(0, need - room) if need else 0 for need, room in zip(want, has, strict=True)))


def _has(slot: SlotRoom) -> Want:
    """What is left for a new worker."""
    host = slot.host
    left = slot.compute, slot.memory - slot.others, host.cpus, host.memory - host.others
    return Want(*(max(0, n) for n in left))


def _most_room(who: str, kind: Kind, slots: Sequence[SlotRoom]) -> Shortage:
    def measure(slot: SlotRoom) -> tuple[float, float, int, int]:
        want = kind.least(slot)
        parts = [lack / need for lack, need in zip(_lacks(want, slot), want, strict=True) if lack]
        return max(parts, default=0.0), sum(parts), slot.host.order, slot.order

    slot = min(slots, key=measure)
    want, has = kind.least(slot), _has(slot)
    lacks = _lacks(want, slot)
    fields = [name for name in Want._fields if getattr(lacks, name)]
    needs = " and ".join(amount(name, getattr(want, name)) for name in fields)
    found = " and ".join(amount(name, getattr(has, name), bare=True) for name in fields)
    missing = " and ".join(amount(name, getattr(lacks, name), bare=True) for name in fields)
    text = f"needs {needs}; the freest, {_place(slot)}, has {found}: {missing} short"
    text += _strangers(slot, fields)
    first = fields[0]
    return Shortage(first, _plain(first, getattr(lacks, first)), f"{who} {text}")


def _strangers(slot: SlotRoom, fields: Sequence[str]) -> str:
    taken = {"memory": slot.others, "host_memory": slot.host.others}
    told = [_bytes(taken[name]) for name in fields if taken.get(name)]
    return f" (other programs use {' and '.join(told)})" if told else ""


def _group_short(board: Board, who: str, kind: Kind, hosts: Sequence[HostRoom]) -> Shortage:
    count = len(kind.wants)
    fits = [(board.fitting(kind, host), host) for host in hosts]
    most, host = max(fits, key=lambda f: (f[0], -f[1].order))
    total = most if kind.units[0].one_host else min(count - 1, sum(n for n, _ in fits))
    each = " and ".join(amount(name, n) for name, n in zip(Want._fields, kind.wants[0], strict=True) if n)
    where = "one host" if kind.units[0].one_host else "all hosts"
    text = f"wants {count} shards at once, each {each or 'a slot'}; on {where} there is room for {total}"
    return Shortage("shards", count - total, f"{who} {text} (most on {host.name}, {most}): {count - total} short")


def chosen(board: Board, kind: Kind, option: Option) -> str:
    """Why this place is the best, before it is booked."""
    slot, key = option.slots[0], kind.key
    host = slot.host
    parts = []
    if len(option.slots) > 1:
        parts.append(_shards_words(board, kind, option))
    beside = sorted(k[1] for k in kind.neighbours if host.machine.counts.get(k))
    if board.near(kind, host) > 0:
        parts.append(f"shares memory with {', '.join(beside)}")
    elif board.totals.get(key, 1) > len(option.slots):
        mine = host.counts.get(key, 0)
        parts.append(f"spread: {mine} more of it here, as few as anywhere" if mine else "spread: no other of it here")
    parts += _far_from(board, kind, host)
    want, full = option.wants[0], kind.want_on(slot)
    for name in (name for name in Want._fields if getattr(want, name) < getattr(full, name)):
        had = amount(name, getattr(want, name), bare=True)
        parts.append(f"makes do with {had} of the {amount(name, getattr(full, name))} that it would take")
    if kind.gpu and slot.on_cpu:
        parts.append(f"{host.name} has no GPU and allows processors instead")
    if slot.on_cpu and not parts:
        parts.append("most processors free")
    if slot.on_cpu:
        parts.append(f"{amount('cpus', max(0, host.cpus - sum(w.cpus for w in option.wants)))} left")
    elif len(option.slots) == 1:
        left = slot.compute - want.compute
        free = f"{_number(left)} of the compute and {_bytes(slot.memory - want.memory)}"
        parts.append(
            f"tightest fit: {free} of {slot.name} stay free" if left else f"all of {slot.name}'s compute is used"
        )
    return "; ".join(parts)


def _shards_words(board: Board, kind: Kind, option: Option) -> str:
    hosts = {slot.host for slot in option.slots}
    if len(hosts) > 1:
        found = [_shards_on(board, kind, host) for host in board.hosts]
        more = f", and {len(found) - _FEW} more hosts" if len(found) > _FEW else ""
        told = ", ".join(found[:_FEW]) + more
        return f"shards on {len(hosts)} hosts, since none has room for all {len(option.slots)}: {told}"
    host = option.slots[0].host
    linked = any(set(option.slots) <= set(group) for group in host.links)
    return "shards on one host" + (", joined by NVLink" if linked else "")


def _shards_on(board: Board, kind: Kind, host: HostRoom) -> str:
    """For how many shards of a group this host has room, and why for none."""
    count = 0 if _bars(kind, host) or board.barred(kind, host) else board.fitting(kind, host)
    if count:
        return f"{host.name} for {count}"
    return f"{host.name} for none, which {_why_not(board, kind, host)}"


def _far_from(board: Board, kind: Kind, host: HostRoom) -> list[str]:
    """Why it does not go to a host where other parts of the same stage wait for it."""

    def waiting(there: HostRoom) -> list[str]:
        mine = there.counts.get(kind.key, 0)
        return sorted(key[1] for key in kind.kin if there.counts.get(key, 0) > mine)

    if not kind.kin or waiting(host):
        return []
    found = []
    for other in board.hosts:
        names = waiting(other) if other is not host else []
        why = _why_not(board, kind, other) if names else ""
        if why:
            found.append(f"not beside {', '.join(names)} on {other.name}, which {why}")
    return found[:_FEW]


def _why_not(board: Board, kind: Kind, host: HostRoom) -> str:
    """Why it has no place on this host; '' where it has one."""
    bars = _bars(kind, host)
    if bars is not None:
        return bars[1]
    barred = board.barred(kind, host)
    if barred is not None:
        return f"has {barred[1]}, from which it must be apart"
    slots = kind.slots_of(host)
    if not slots:
        return "has no slot that it may use"
    wants = [kind.want_on(slot) for slot in slots]
    if any(slot.fits(want) for slot, want in zip(slots, wants, strict=True)):
        return ""
    lacks = [_lacks(want, slot) for slot, want in zip(slots, wants, strict=True)]
    least = min(range(len(slots)), key=lambda i: [lack > 0 for lack in lacks[i]])
    fields = [name for name in Want._fields if getattr(lacks[least], name)]
    return "lacks " + " and ".join(amount(name, getattr(lacks[least], name)) for name in fields)


def _place(slot: SlotRoom) -> str:
    return slot.host.name if slot.name == CPU else f"{slot.host.name} {slot.name}"


def _names(hosts: Iterable[HostRoom]) -> str:
    names = [host.name for host in hosts]
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _plain(name: str, value: int) -> float:
    return value / _MILLION if name in ("compute", "cpus") else value


_OF = {"compute": "of a GPU's compute", "memory": "of a GPU", "cpus": "processors", "host_memory": "of a host's memory"}


def amount(name: str, value: int, *, bare: bool = False) -> str:
    """`40 GiB of a GPU`, of one field of Want; `bare` leaves out what of."""
    text = _number(value) if name in ("compute", "cpus") else _bytes(value)
    what = "processor" if name == "cpus" and text == "1" else _OF[name]
    return text if bare else f"{text} {what}"


def amounts(need: Need) -> str:
    """All that a worker takes, as people read it."""
    want = Want.of(need)
    parts = [amount(name, n) for name, n in zip(Want._fields, want, strict=True) if n]
    return ", ".join(parts) or "nothing that is counted"


def _number(millionths: int) -> str:
    return f"{millionths / _MILLION:.6f}".rstrip("0").rstrip(".")


def _bytes(value: int) -> str:
    size = float(value)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, {"bytes": "KiB", "KiB": "MiB", "MiB": "GiB", "GiB": "TiB"}[unit]
    text = f"{size:.0f}" if size == int(size) or unit == "bytes" else f"{size:.1f}"
    return f"{text} {unit}"
