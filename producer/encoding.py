"""Turns rows and tables into jobs: checks them against the declared columns and encodes them. No I/O: both clients
share it."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict
from zlib import crc32

import numpy as np

from torchrelay.config.columns import check_table, table_of_row
from torchrelay.errors import InputError, TorchrelayError
from torchrelay.producer.futures import JobFuture
from torchrelay.queues import codec
from torchrelay.queues.codec import HostMessage
from torchrelay.queues.job import (
    FLAG_HIGH,
    FLAG_KEEP,
    FLAG_KEYED,
    FLAG_TABLE,
    FLAG_UNTIL_ACK,
    Packed,
    Place,
    Ref,
    encode_payload,
    split_inline,
)
from torchrelay.queues.placement import readers_of
from torchrelay.queues.priority import Priority, parse_priority
from torchrelay.queues.registry import Registered
from torchrelay.queues.tenants import parse_tenant, share_of
from torchrelay.queues.transitions import NewJob

DEFAULT_KEEP_S = 3600
_LONGEST_S = 10 * 366 * 86400.0

Outcome = JobFuture[Any] | TorchrelayError


class Options(TypedDict, total=False):
    """What every way to submit takes by keyword; `Relay.submit` says what each means."""

    priority: str | int
    deadline_s: float | None
    delay_s: float
    keep_s: int | None
    wait_s: float
    meta: Mapping[str, Any] | None
    durable: bool
    tenant: str | None


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How jobs are to be treated; seconds. `keep_s` None keeps a result until it is delivered, at most an hour.

    Without `durable`, large columns may lie in this host's shared memory alone.
    """

    priority: int = Priority.MEDIUM
    deadline_s: float | None = None
    delay_s: float = 0.0
    keep_s: int | None = None
    meta: bytes = b""
    wait_s: float = 0.0
    durable: bool = True
    tenant: str = ""

    @property
    def share(self) -> str:
        """Whose turn the jobs take, as a submit names it."""
        return share_of(self.tenant, self.priority)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> SubmitOptions:
        """Checks what the caller gave; raises InputError that names the option, the value and the range."""
        for name in options.keys() - Options.__annotations__.keys():
            near = difflib.get_close_matches(name, list(Options.__annotations__), 1)
            near = ["deadline_s"] if name.startswith("timeout") else near
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(Options.__annotations__)}"
            raise InputError(f"unknown option {name!r:.60}; {hint}")
        deadline_s, keep_s, durable = options.get("deadline_s"), options.get("keep_s"), options.get("durable", True)
        if not isinstance(durable, bool):
            raise InputError(f"durable {durable!r:.60} must be True or False")
        return cls(
            parse_priority(options.get("priority", Priority.MEDIUM)),
            None if deadline_s is None else _seconds("deadline_s", deadline_s, least=0.001),
            _seconds("delay_s", options.get("delay_s", 0), least=0.0),
            None if keep_s is None else math.ceil(_seconds("keep_s", keep_s, least=0.0)),
            _packed_meta(options.get("meta")),
            _wait(options.get("wait_s", 0.0)),
            durable,
            parse_tenant(options.get("tenant")),
        )


def _packed_meta(meta: object) -> bytes:
    if meta is None:
        return b""
    if not isinstance(meta, Mapping):
        raise InputError(f"meta must be a mapping, not {type(meta).__name__}")
    packed = codec.encode(dict(meta))
    if len(packed) > 2048:
        raise InputError(f"meta takes {len(packed)} bytes, over the limit of 2048; put large values in columns")
    return packed


def _seconds(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _LONGEST_S:
        raise InputError(f"{name} {value!r:.60} must be a number of seconds from {least:g} to {_LONGEST_S:g}")
    return float(value)


def _wait(value: object) -> float:
    """How long to wait for room, in seconds; infinity is one's own choice."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InputError(f"wait_s {value!r:.60} must be a number of seconds from 0")
    return float(value)


def key_digest(pipeline: str, key: object) -> bytes:
    """16 bytes that stand for the caller's key within a pipeline. Any text of 1 to 1024 characters is a key."""
    if not isinstance(key, str) or not 1 <= len(key) <= 1024:
        raise InputError(f"key {key!r:.60} must be a text of 1 to 1024 characters")
    text = f"{pipeline}\0{key}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def lane_of_key(digest: bytes, lanes: int) -> int:
    """The lane in which every job of this key lives."""
    return crc32(digest) % lanes


class Owner(Protocol):
    """Who wants to know what became of a draft that was sent together with others' drafts."""

    @property
    def gone(self) -> bool: ...
    def take(self, number: int, outcome: Outcome) -> None: ...


@dataclass(slots=True)
class Draft:
    """A checked row or table on its way: what is needed to encode it, again if its id turns out to be taken.

    Large arrays in `columns` are the caller's own until the draft is sent. `owner`, where there is one, is told what
    became of its draft `number`.
    """

    columns: dict[str, HostMessage]
    rows: int = 1
    flags: int = 0
    digest: bytes = b""
    key: str = ""
    owner: Owner | None = None
    number: int = 0


class Encoded(NamedTuple):
    """A job ready to send: `blobs` are to be written to Redis before it."""

    job: NewJob
    blobs: dict[str, HostMessage]


Store = Callable[[str, HostMessage, Sequence[str], SubmitOptions], Place | None]
"""Finds a place in shared memory for the bytes of this name that these nodes will read; None where there is none."""


class JobEncoder:
    """Encodes jobs of one pipeline version."""

    def __init__(self, registered: Registered, boost_ms_per_point: float) -> None:
        self.registered = registered
        self._types = registered.pipeline.input
        self._graph = registered.pipeline.graph
        self._boost = boost_ms_per_point
        self._readers_of: dict[str, list[str]] = {}

    @property
    def ref(self) -> str:
        """`name@version`."""
        return self.registered.pipeline.ref

    def row(self, row: Mapping[str, Any], key: str | None = None) -> Draft:
        """One row as a table of one: checked against the declared columns, and each column encoded."""
        if not isinstance(row, Mapping):
            raise InputError(f"a row is a mapping of column to value, not {type(row).__name__}; submit_many takes many")
        return self._keyed(Draft(_encoded(table_of_row(self._types, row))), key)

    def rows(self, rows: Iterable[Mapping[str, Any]], keys: Sequence[str] | None, first: int = 0) -> list[Draft]:
        """Many rows, each a job of its own; an error names the row, counted from `first`."""
        drafts: list[Draft] = []
        for number, row in enumerate(rows, first):
            try:
                drafts.append(self.row(row))
            except InputError as error:
                raise InputError(f"row {number}: {error}") from error
        if keys is not None:
            if isinstance(keys, str) or len(keys) != len(drafts):
                raise InputError(f"{len(drafts)} rows need {len(drafts)} keys, a sequence; {len(keys)} came")
            for draft, key in zip(drafts, keys, strict=True):
                self._keyed(draft, key)
        return drafts

    def table(self, table: Mapping[str, Any], on_error: str, key: str | None = None) -> Draft:
        """N rows as one job."""
        if on_error not in ("raise", "keep"):
            raise InputError(f'on_error {on_error!r:.60} must be "raise" or "keep"')
        columns, rows = check_table(self._types, table)
        limit = self.registered.pipeline.spec.limits.rows_per_job
        if rows > limit:
            raise InputError(
                f"the table has {rows} rows, over the pipeline's limits.rows_per_job of {limit}; "
                "submit it in parts, or raise the limit"
            )
        flags = FLAG_TABLE | (FLAG_KEEP if on_error == "keep" else 0)
        return self._keyed(Draft(_encoded(columns), rows, flags), key)

    def _keyed(self, draft: Draft, key: str | None) -> Draft:
        if key is not None:
            draft.digest, draft.key = key_digest(self.registered.pipeline.name, key), key
        return draft

    def encode(self, job_id: str, draft: Draft, options: SubmitOptions, store: Store) -> Encoded:
        """The job, with its large columns where `store` finds a place for them."""
        inline, large = split_inline(draft.columns)
        columns: dict[str, Packed] = dict(inline)
        blobs: dict[str, HostMessage] = {}
        refs = ""
        for column, message in large.items():
            name = f"{job_id}.0.in.{column}"
            place = store(name, message, self._readers(column), options)
            if place is None or options.durable:
                blobs[name] = message
            ref = Ref.of(name, len(message), place, in_redis=name in blobs)
            columns[column] = ref
            refs += ref.text(self._graph.consumers(column, 0))
        payload = encode_payload(columns, options.meta)
        flags = draft.flags | (FLAG_HIGH if options.priority >= Priority.HIGH else 0)
        keep_s = DEFAULT_KEEP_S if options.keep_s is None else options.keep_s
        digest = draft.digest
        if digest:
            flags |= FLAG_KEYED
            digest += _content(draft)
        elif options.keep_s is None:
            flags |= FLAG_UNTIL_ACK
        nbytes = len(payload) + sum(map(len, large.values()))
        deadline_ms = 0.0 if options.deadline_s is None else options.deadline_s * 1000.0
        boost_ms = options.priority * self._boost
        delay_ms = options.delay_s * 1000.0
        job = NewJob(job_id, payload, draft.rows, nbytes, boost_ms, delay_ms, deadline_ms, keep_s, flags, refs, digest)
        return Encoded(job, blobs)

    def _readers(self, column: str) -> list[str]:
        if column not in self._readers_of:
            self._readers_of[column] = readers_of(self._graph, self.ref, column, 0)
        return self._readers_of[column]


def kept_rows(rows: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Rows that stay as they are until they are sent. Those of a list are the caller's, who waits for the call; whoever
    makes rows one by one may fill the same array again for the next."""
    return rows if isinstance(rows, list | tuple) else map(kept_row, rows)


def kept_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with copies of its arrays."""
    if not isinstance(row, Mapping):
        return row  # whoever encodes it says so
    return {name: _copied(value) if hasattr(value, "__array__") else value for name, value in row.items()}


def _copied(value: Any) -> Any:
    try:
        return np.array(value)
    except Exception:  # a stranger's __array__ may raise anything; whoever checks the row says so
        return value


def _encoded(columns: Mapping[str, Any]) -> dict[str, HostMessage]:
    encoded: dict[str, HostMessage] = {}
    for name, column in columns.items():
        try:
            encoded[name] = codec.on_host(codec.message(column))
        except InputError as error:
            raise InputError(f"column {name!r}: {error}") from error
    return encoded


def _content(draft: Draft) -> bytes:
    """16 bytes that stand for what is submitted: a table is never the same job as a row, nor with other errors."""
    content = hashlib.blake2b(bytes([draft.flags]) if draft.flags else b"", digest_size=16)
    for column in sorted(draft.columns):
        content.update(column.encode() + b"\0")
        content.update(codec.join(draft.columns[column]))
    return content.digest()
