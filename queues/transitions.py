"""Calls of the transitions on one lane: typed arguments in, `Call` values out. No I/O.

Each method's contract stands at the head of the Lua file of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import msgpack

from torchrelay.config.graph import Graph
from torchrelay.queues.job import SUBMIT_HEAD, Entry, Failure, decode_records, split_entries
from torchrelay.queues.keys import LaneKeys, new_token
from torchrelay.queues.scripts import Arg, Call, script

MAX_JOBS_PER_CALL = 256
MAX_BYTES_PER_CALL = 1 << 20
MAX_STRIKES = 3
_MOST = 0xFFFFFFFF


class Session:
    """Numbers a client's operations, so that a replay is known; at most 16 may be outstanding (rule 11)."""

    WINDOW = 16

    def __init__(self, client: str | None = None) -> None:
        self.client = client or new_token(8)
        self._next = count(1)

    def next(self) -> int:
        return next(self._next)


class NewJob(NamedTuple):
    """One job to submit: milliseconds, rows, and its encoded payload. `refs` lists blobs already written."""

    id: str
    payload: bytes
    rows: int
    nbytes: int
    boost_ms: float = 0.0
    delay_ms: float = 0.0
    deadline_ms: float = 0.0
    keep_s: int = 3600
    flags: int = 0
    refs: str = ""
    key_digests: bytes = b""

    def head(self) -> bytes:
        refs = self.refs.encode()
        packed = SUBMIT_HEAD.pack(
            self.boost_ms,
            self.delay_ms,
            self.deadline_ms,
            self.rows,
            min(self.nbytes, _MOST),
            self.keep_s,
            self.flags,
            len(refs),
        )
        return packed + refs + self.key_digests


@dataclass(frozen=True, slots=True)
class Submitted:
    """`statuses` is one letter a job, as submit.lua lists them; `named`: ids of the jobs that keys led to, in order."""

    statuses: str
    named: list[str]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a claim gave: entries under one fence until `expires_ms` (the server's clock).

    `next_due_ms` is -1 when nothing is delayed. `gated`: no more is given now, as a successor is full or the node is
    `paused`. `entrance` is which of the places that the claim named this is about. `elsewhere` jobs were passed over,
    since their bytes lie in another host's memory.
    """

    fence: str
    expires_ms: int
    entries: list[Entry]
    next_due_ms: int
    left: int
    gated: bool
    paused: bool = False
    entrance: int = 0
    elsewhere: int = 0


class Entrance(NamedTuple):
    """A place at which a worker claims: a node of a pipeline, by its number and key, and the last node that the worker
    runs from there. With how much it takes: jobs and rows. Without a `key` the graph is asked for it."""

    number: int
    node: int
    last: int
    key: str
    jobs: int
    rows: int


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """How much one claim may take: jobs, rows, inline bytes; and for how long."""

    jobs: int
    rows: int
    nbytes: int
    lease_ms: int


class Reader(NamedTuple):
    """Which host's shared memory a worker reads ('' for none), and how long jobs in that of others are left to them."""

    host: str
    patience_ms: int


NO_READER = Reader("", 10)


class Asked(NamedTuple):
    """A job that is waited for elsewhere: `member` names it and who reads it, `refs` lists what to copy, in the form of
    job records; `payloads` tell where that lies."""

    member: str
    refs: str
    payloads: list[bytes]


class Copied(NamedTuple):
    """A copy of what one ref of an asked job means: a blob of so many chunks, to be renamed; '' where there is none."""

    member: str
    name: str
    blob: str
    chunks: int


class Output(NamedTuple):
    """One job's committed output. `rows` None leaves the count; `refs` lists blobs already written."""

    token: bytes
    payload: bytes
    rows: int | None = None
    refs: str = ""


def pack_graph(ref: str, graph: Graph, marks: Sequence[tuple[int, int]]) -> bytes:
    """The graph as lib.lua reads it; `marks` holds each node's high-water in ready rows and bytes."""
    nodes = [
        (
            f"{ref}/{n.name}",
            sum(1 << (p - 1) for p in n.preds if p > 0),
            list(n.succs),
            list(n.preds),
            *mark,
            int(n.kept_for > 0),
        )
        for n, mark in zip(graph.nodes, marks, strict=True)
    ]
    packed: bytes = msgpack.packb((ref, int(graph.linear), (1 << len(nodes)) - 1, nodes))
    return packed


def _first_and_last(nodes: int | tuple[int, int]) -> tuple[int, int]:
    return nodes if isinstance(nodes, tuple) else (nodes, nodes)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _submitted(value: Any) -> Submitted:
    statuses, _, named = _text(value).partition("|")
    return Submitted(statuses, named.split(",") if named else [])


def _grant(value: Any) -> Grant:
    fence, expires, packed, records, next_due, left, gated, entrance, elsewhere = value
    entries = list(decode_records(split_entries(packed), records))
    return Grant(_text(fence), int(expires), entries, next_due, left, gated > 0, gated == 2, entrance, elsewhere)


def _asked(value: Any) -> tuple[int, list[Asked]]:
    wait, *jobs = value
    return int(wait), [Asked(_text(member), _text(refs), payloads) for member, refs, *payloads in jobs]


def _census(value: Any) -> tuple[int, list[tuple[str, int, int, int]]]:
    delayed, *flat = value
    return delayed, [(_text(flat[i]), *flat[i + 1 : i + 4]) for i in range(0, len(flat), 4)]


class Transitions:
    """Builds the calls of one lane."""

    def __init__(self, keys: LaneKeys) -> None:
        self.keys = keys

    def _call(self, name: str, args: Sequence[Arg], read: Any = _text) -> Call[Any]:
        return Call(script(name), self.keys.fixed, args, read)

    def _operation(self, name: str, session: Session, args: Iterable[Arg], read: Any = _text) -> Call[Any]:
        keys = (*self.keys.fixed, self.keys.session(session.client))
        return Call(script(name), keys, [session.next(), *args], read)

    def init(self, lanes: int) -> Call[tuple[str, int, bool]]:
        return self._call("init", [lanes], lambda v: (_text(v[0]), int(v[1]), v[2] == 1))

    def define(self, number: int, packed_graph: bytes) -> Call[int]:
        keys = (*self.keys.fixed, self.keys.paused)
        return Call(script("define"), keys, [number, packed_graph], int)

    def submit(
        self, session: Session, number: int, jobs: Sequence[NewJob], results_max_bytes: int, share: str = ""
    ) -> Call[Submitted]:
        """`share` is `priority:tenant` of all these jobs, or '' for jobs without a tenant."""
        args: list[Arg] = [number, results_max_bytes, share]
        for job in jobs:
            args += (job.id, job.head(), job.payload)
        return self._operation("submit", session, args, _submitted)

    def claim(
        self,
        session: Session,
        fence: str,
        incarnation: str,
        number: int,
        nodes: int | tuple[int, int],
        limits: ClaimLimits,
        reader: Reader = NO_READER,
    ) -> Call[Grant]:
        """`nodes` is the node to claim at, or with the last one that the worker runs."""
        entrance = Entrance(number, *_first_and_last(nodes), "", limits.jobs, limits.rows)
        return self.claim_any(session, fence, incarnation, [entrance], limits.lease_ms, limits.nbytes, reader=reader)

    def claim_any(
        self,
        session: Session,
        fence: str,
        incarnation: str,
        entrances: Sequence[Entrance],
        lease_ms: int,
        nbytes: int = MAX_BYTES_PER_CALL,
        better_than: float | None = None,
        reader: Reader = NO_READER,
    ) -> Call[Grant]:
        """At the entrance whose first job is best in rank; with `better_than`, only jobs of a lower rank."""
        rank = "" if better_than is None else repr(better_than)
        args: list[Arg] = [fence, incarnation, nbytes, lease_ms, rank, *reader]
        for entrance in entrances:
            args += entrance
        return self._operation("claim", session, args, _grant)

    def commit(
        self, session: Session, fence: str, number: int, nodes: int | tuple[int, int], outputs: Sequence[Output]
    ) -> Call[str]:
        """`nodes` is the node that was claimed, or with the last one that its worker ran."""
        entries = b"".join([o.token for o in outputs])
        rows: bytes = b""
        if any(o.rows is not None for o in outputs):
            rows = b"".join([(_MOST if o.rows is None else o.rows).to_bytes(4, "little") for o in outputs])
        refs = "".join([o.refs + ";" for o in outputs]) if any(o.refs for o in outputs) else ""
        args: list[Arg] = [fence, number, *_first_and_last(nodes), entries, rows, refs]
        args += [o.payload for o in outputs]
        return self._operation("commit", session, args)

    def fail(
        self,
        session: Session,
        fence: str,
        number: int,
        node: int,
        failures: Sequence[tuple[bytes, float, Failure]],
        max_attempts: int,
    ) -> Call[str]:
        """`failures` holds (token, delay_ms before the next attempt, why)."""
        args: list[Arg] = [fence, number, node, b"".join([f[0] for f in failures]), max_attempts]
        for _, delay_ms, why in failures:
            args += (delay_ms, why.encode())
        return self._operation("fail", session, args)

    def release(self, session: Session, fence: str, tokens: Sequence[bytes]) -> Call[str]:
        return self._operation("release", session, [fence, b"".join(tokens)])

    def lost(
        self, session: Session, fence: str, tokens: Sequence[bytes], why: Failure, makers: Sequence[int] = ()
    ) -> Call[str]:
        """`makers` holds, per job, the mask of the nodes that made the lost bytes; 0 (or none at all): unknown."""
        masks = b"".join([m.to_bytes(4, "little") for m in makers])
        return self._operation("lost", session, [fence, b"".join(tokens), why.encode(), masks])

    def renew(self, lease_ms: int, fences: Sequence[str]) -> Call[list[tuple[bool, list[bytes]]]]:
        return self._call("renew", [lease_ms, *fences], lambda v: [(h == 1, split_entries(e)) for h, e in v])

    def reap(self, most: int = 16, unless_kept_ms: int = 0) -> Call[list[int]]:
        return self._call("reap", [most, unless_kept_ms], list)

    def retire(self, incarnation: str, started: bytes, why: Failure) -> Call[list[int]]:
        return self._call("retire", [incarnation, started, MAX_STRIKES, why.encode()], list)

    def promote(self, most: int = 256) -> Call[list[int]]:
        return self._call("promote", [most], list)

    def expire(self, most: int = 256) -> Call[int]:
        return self._call("expire", [most], int)

    def sweep(self, most: int = 256) -> Call[int]:
        return self._call("sweep", [most], int)

    def cancel(self, ids: Sequence[str]) -> Call[str]:
        return self._call("cancel", list(ids))

    def pause(self, name: str, version: str, stage: str, on: bool) -> Call[list[str]]:
        """`version` and `stage` are '' for all; the nodes that match come back."""
        keys = (*self.keys.fixed, self.keys.paused)
        args = [name, version, stage, "1" if on else "0"]
        return Call(script("pause"), keys, args, lambda v: [_text(k) for k in v])

    def purge(self, masks: Mapping[int, int], ids: Sequence[str]) -> Call[int]:
        """`masks` holds the bits of the nodes to purge by pipeline number; at most 256 ids at a time."""
        return self._call("purge", ["".join(f"{n}:{mask}," for n, mask in masks.items()), *ids], int)

    def census(self, first: int, most: int) -> Call[tuple[int, list[tuple[str, int, int, int]]]]:
        """Delayed entries in all; per node those that are ready, held, and delayed from the `first` on."""
        return self._call("census", [first, most], _census)

    def ack(self, ids: Sequence[str]) -> Call[int]:
        return self._call("ack", list(ids), int)

    def holders(self, names: Sequence[str]) -> Call[list[bool]]:
        """Whether a live job still wants each of these blobs, by name; at most 256 at a time."""
        return self._call("holders", list(names), lambda v: [flag == "1" for flag in _text(v)])

    def spilling(self, host: str, most: int, ttl_ms: int) -> Call[tuple[int, list[Asked]]]:
        """Milliseconds until the next job is due (-1: there is none), and those that are. `ttl_ms` 0: it leaves."""
        return self._call("spilling", [host, most, ttl_ms], _asked)

    def spill(self, host: str, copies: Sequence[Copied]) -> Call[str]:
        return self._call("spill", [host, *(value for copy in copies for value in copy)])

    def aged(self, host: str, names: Sequence[str]) -> Call[int]:
        """At most 256 names of blobs at a time."""
        return self._call("aged", [host, *names], int)

    def redrive(self, ids: Sequence[str]) -> Call[list[str]]:
        return self._call("redrive", ["redrive", *ids], lambda v: [_text(i) for i in v])

    def drop_dead(self, ids: Sequence[str]) -> Call[list[str]]:
        return self._call("redrive", ["drop", *ids], lambda v: [_text(i) for i in v])

    def recount(self, mend: bool = False) -> Call[list[tuple[str, int, int]]]:
        return self._call(
            "recount",
            ["1" if mend else "0"],
            lambda v: [(_text(v[i]), int(v[i + 1]), int(v[i + 2])) for i in range(0, len(v), 3)],
        )

    def put_chunk(self, blob: str, number: int, chunk: bytes, ttl_ms: int) -> Call[int]:
        return Call(script("putchunk"), (*self.keys.fixed, self.keys.blob(blob)), [number, chunk, ttl_ms], int)
