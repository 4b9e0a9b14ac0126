"""Groups of processes that compute one stage together (`shards: {mode: tensor}`): who lives, and which epoch it is.

The supervisors of a group's ranks meet in one record, which scripts alone change. A group lives in *epochs*: an epoch
forms when all ranks live and none has a process of an older one, and is over when any rank is, whoever says so first.
What belongs to an epoch (an address) is written and read under it, so that two epochs never mix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import redis

from torchrelay.errors import ConfigError
from torchrelay.queues.keys import ControlKeys
from torchrelay.queues.registry import run
from torchrelay.queues.scripts import Arg, Call, script

__all__ = ["PRESENT_S", "GroupRecord", "GroupState", "GroupView", "Kind", "Member", "RankTaken", "check_group", "views"]

PRESENT_S: Final = 3.0
"""How long a rank's supervisor is taken to live after it was heard of."""
_KEPT_S: Final = 3600.0
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,100}")
_MOST_WHY: Final = 500

Kind = Literal["", "died", "hung", "room", "vanished", "drained", "hopeless"]
"""How an epoch ended. `died` and `hung`: the jobs under way may have done it. `room`: they did not fit. `vanished`: a
supervisor or host is gone. `hopeless`: a rank cannot start; nobody is to try again."""


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a group of so many, which computes the stage `of` (`pipeline@version/stage`)."""

    group: str
    rank: int
    size: int
    of: str = ""


@dataclass(frozen=True, slots=True)
class GroupState:
    """How a group stands. `ready` ranks live and are ready for `epoch`; `address` is where they meet, '' before that.
    `kind` and `why` say how the epoch before ended; `cap` is what a forward may have in rows, 0 for what it may."""

    epoch: int
    ready: int
    address: str = ""
    kind: Kind = ""
    why: str = ""
    cap: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class GroupView:
    """How a group stands, for people: `ready` and `waiting` are the ranks that live, by whether they have no process of
    an epoch before `epoch`; it is `formed` once all are. `kind` and `why` say how the epoch before ended."""

    group: str
    size: int
    epoch: int
    ready: tuple[int, ...]
    waiting: tuple[int, ...]
    kind: Kind = ""
    why: str = ""
    cap: int = 0

    @property
    def formed(self) -> bool:
        return len(self.ready) == self.size

    @property
    def missing(self) -> list[int]:
        """Ranks of which nothing is heard."""
        return [rank for rank in range(self.size) if rank not in self.ready and rank not in self.waiting]


class RankTaken(ConfigError):
    """Another process has the rank, or had it and is not taken for dead yet."""


def views(client: redis.Redis, control: ControlKeys, groups: Iterable[str]) -> dict[str, GroupView]:
    """Of these groups those that have a record."""
    names = sorted(groups)
    if not names:
        return {}
    seconds, micros = client.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(control.group(name))
        records: list[dict[bytes, bytes]] = pipe.execute()
    return {name: _view(name, record, now_ms) for name, record in zip(names, records, strict=True) if record}


def _view(name: str, record: dict[bytes, bytes], now_ms: int) -> GroupView:
    def number(key: str) -> int:
        return int(record.get(key.encode(), 0))

    size, epoch = number("size"), number("epoch")
    living = [rank for rank in range(size) if number(f"until:{rank}") > now_ms]
    ready = tuple(rank for rank in living if number(f"at:{rank}") == epoch)
    waiting = tuple(rank for rank in living if rank not in ready)
    kind: Any = _text(record.get(b"kind"))
    return GroupView(name, size, epoch, ready, waiting, kind, _text(record.get(b"why")), number("cap"))


def check_group(name: str) -> str:
    """The name; ConfigError for what cannot be one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"group {name!r:.120}: write 1 to 100 of A-Za-z0-9_.@-")
    return name


class GroupRecord:
    """Reads and changes the record of one group, for one of its ranks. Thread-safe, as the client's pool is."""

    def __init__(self, client: redis.Redis, control: ControlKeys, member: Member, who: str) -> None:
        self._client = client
        self._key = control.group(check_group(member.group))
        self.member = member
        self._who = who

    def _call(self, name: str, args: list[Arg]) -> Any:
        return run(self._client, Call(script(name), (self._key,), args, lambda value: value))

    def tend(self, ready_for: int, *, drain: bool = False, leave: bool = False) -> GroupState:
        """Says that this rank lives, and is ready for that epoch; with `drain`, that all are to end.

        Raises RankTaken while another process has the rank, ConfigError for a group of another size or stage.
        """
        member = self.member
        life = 0 if leave else round(PRESENT_S * 1000)
        args: list[Arg] = [member.size, member.rank, self._who, life, ready_for, round(_KEPT_S * 1000), int(drain)]
        args.append(member.of)
        found = self._call("group", args)
        if found[0] == 0:
            raise RankTaken(
                f"rank {member.rank} of group {member.group!r} is served by {_text(found[1])}; "
                "end that one first, or start this one with another --shard or --group"
            )
        if found[0] == -1:
            raise ConfigError(
                f"group {member.group!r} has {_text(found[1])} ranks, not {member.size}; take another name"
            )
        if found[0] == -2:
            raise ConfigError(
                f"group {member.group!r} computes {_text(found[1])}, and this rank is of {member.of}; end the ranks of "
                "that one first, or take another name"
            )
        kind: Any = _text(found[4])
        return GroupState(found[1], found[2], _text(found[3]), kind, _text(found[5]), found[6], bool(found[7]))

    def end(self, epoch: int, kind: Kind, why: str, cap: int = 0) -> int:
        """That epoch is over; the first who says so is heard. Returns the present epoch."""
        return int(self._call("group_end", [epoch, kind, why[:_MOST_WHY], cap]))

    def announce(self, epoch: int, address: str) -> bool:
        """Where the ranks of this epoch meet; False where it is over."""
        return bool(self._call("group_address", [epoch, address]))

    def address(self, epoch: int) -> str | None:
        """Where they meet, '' as long as that is not known; None where the epoch is over."""
        now, address = self._client.hmget(self._key, ["epoch", "address"])
        return _text(address) if now is not None and int(now) == epoch else None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else (value or "")
