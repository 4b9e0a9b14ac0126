"""The Lua transitions as values, and calls of them as values: what to send and how to read the answer. No I/O.

Both the synchronous and the asynchronous clients send these; neither knows what is inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

from torchrelay.errors import BrokerError, BrokerMisconfigured, PipelineNotFound, QueueFull, TorchrelayError

T = TypeVar("T")
Arg = bytes | str | int | float

CONTROL_SCRIPTS = frozenset({"register", "heartbeat", "wish", "group", "group_end", "group_address"})
FLEET_SCRIPTS = frozenset({"host", "lead", "decree"})


@dataclass(frozen=True)
class Script:
    """One transition: its source with the shared library before it, and the digest that EVALSHA takes."""

    name: str
    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The transition of this name, read from the package's `lua/` folder."""
    folder = files("torchrelay.queues") / "lua"
    body = (folder / f"{name}.lua").read_text(encoding="utf-8")
    if name not in CONTROL_SCRIPTS:
        shared = "fleet_lib.lua" if name in FLEET_SCRIPTS else "lib.lua"
        body = (folder / shared).read_text(encoding="utf-8") + body
    return Script(name, body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One transition with its keys and arguments, and how to read what it returns."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Arg]
    read: Callable[[Any], T]

    def command(self, *, with_source: bool = False) -> list[Arg]:
        """The command to send; with its source after a NOSCRIPT, which also loads it."""
        head: list[Arg] = ["EVAL", self.script.source] if with_source else ["EVALSHA", self.script.sha]
        return [*head, len(self.keys), *self.keys, *self.args]


class WorkerRetired(BrokerError):
    """This worker was declared dead; it must end and a new one take its place."""


class StaleOperation(BrokerError):
    """An operation's number is older than its slot in the session's ring: more than 16 were outstanding."""


class NamespaceMissing(BrokerMisconfigured):
    """The server does not know this namespace (any more): it is new, or it lost its data."""


def explain(name: str, text: str) -> TorchrelayError:
    """The error that a refused transition means; `text` is the server's."""
    word, _, rest = text.partition(" ")
    if word == "TRFULL":
        what, where, now, limit = [*rest.split(" "), "", "", ""][:4]
        if what == "results":
            return QueueFull(f"{now} bytes of results are unread, over the limit of {limit}; read or cancel futures")
        return QueueFull(
            f"queue of {where} is full: {now} {what} wait, the mark is {limit}; "
            "retry later, pass wait_s, add workers, or raise the stage's queue marks"
        )
    # redis-py takes the word OOM off the text.
    if word == "OOM" or "command not allowed when used memory" in text:
        return QueueFull("the server is at its maxmemory; wait for workers to drain it, or raise maxmemory")
    if word == "TRNOPIPE":
        return PipelineNotFound(f"pipeline number {rest} is not registered here; register its file again")
    if word == "TRSCHEMA" and rest == "none":
        return NamespaceMissing("the server does not hold this namespace; it is new or lost its data; register again")
    if word == "TRSCHEMA":
        return BrokerMisconfigured(
            f"the namespace has data of schema {rest}, this torchrelay speaks 1; "
            "use the version that wrote it, or another namespace"
        )
    if word == "TRRETIRED":
        return WorkerRetired(f"worker {rest} was retired")
    if word == "TRSTALEOP":
        return StaleOperation(rest)
    if word == "WRONGTYPE" or "WRONGTYPE" in text:
        return BrokerMisconfigured(
            f"{name}: a key of the namespace holds another type; does something else write to it? ({text})"
        )
    return BrokerError(f"{name}: the server refused: {text}")
