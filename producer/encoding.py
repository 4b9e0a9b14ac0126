"""Turns rows into jobs: checks them against the declared columns and encodes them. No I/O, so that the synchronous and
the asynchronous client share it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from torchrelay.config.columns import table_of_row
from torchrelay.errors import InputError
from torchrelay.queues import codec
from torchrelay.queues.job import FLAG_HIGH, FLAG_KEYED, FLAG_UNTIL_ACK, Packed, Ref, encode_payload, split_inline
from torchrelay.queues.priority import Priority, parse_priority
from torchrelay.queues.registry import Registered
from torchrelay.queues.transitions import NewJob

DEFAULT_KEEP_S = 3600
_LONGEST_S = 10 * 366 * 86400.0


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How jobs are to be treated; seconds. `keep_s` None keeps a result until it is delivered, at most an hour."""

    priority: int = Priority.MEDIUM
    deadline_s: float | None = None
    delay_s: float = 0.0
    keep_s: int | None = None
    meta: bytes = b""

    @classmethod
    def parse(
        cls,
        priority: object = Priority.MEDIUM,
        deadline_s: object = None,
        delay_s: object = 0,
        keep_s: object = None,
        meta: Mapping[str, Any] | None = None,
    ) -> SubmitOptions:
        """Checks what the caller gave; raises InputError that names the option, the value and the range."""
        packed = b""
        if meta is not None:
            if not isinstance(meta, Mapping):
                raise InputError(f"meta must be a mapping, not {type(meta).__name__}")
            packed = codec.encode(dict(meta))
            if len(packed) > 2048:
                raise InputError(f"meta takes {len(packed)} bytes, over the limit of 2048; put large values in columns")
        return cls(
            parse_priority(priority),
            None if deadline_s is None else _seconds("deadline_s", deadline_s, least=0.001),
            _seconds("delay_s", delay_s, least=0.0),
            None if keep_s is None else math.ceil(_seconds("keep_s", keep_s, least=0.0)),
            packed,
        )


def _seconds(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _LONGEST_S:
        raise InputError(f"{name} {value!r:.60} must be a number of seconds from {least:g} to {_LONGEST_S:g}")
    return float(value)


def parse_wait(value: object) -> float:
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


class JobEncoder:
    """Encodes jobs of one pipeline version."""

    def __init__(self, registered: Registered, boost_ms_per_point: float) -> None:
        self.registered = registered
        self._types = registered.pipeline.input
        self._graph = registered.pipeline.graph
        self._boost = boost_ms_per_point

    def columns(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """One row as a table of one: checked against the declared columns, and each column encoded."""
        if not isinstance(row, Mapping):
            raise InputError(f"a row is a mapping of column to value, not {type(row).__name__}")
        encoded: dict[str, bytes] = {}
        for name, column in table_of_row(self._types, row).items():
            try:
                encoded[name] = codec.encode(column)
            except InputError as error:
                raise InputError(f"column {name!r}: {error}") from error
        return encoded

    def encode(
        self, job_id: str, encoded: Mapping[str, bytes], rows: int, options: SubmitOptions, digest: bytes = b""
    ) -> tuple[NewJob, dict[str, bytes]]:
        """The job, and the blobs to write before it: name -> bytes."""
        inline, large = split_inline(encoded)
        columns: dict[str, Packed] = dict(inline)
        blobs: dict[str, bytes] = {}
        refs = ""
        for column, data in large.items():
            name = f"{job_id}.0.in.{column}"
            blobs[name] = data
            ref = Ref.of(name, len(data))
            columns[column] = ref
            refs += ref.text(self._graph.consumers(column, 0))
        payload = encode_payload(columns, options.meta)
        flags = FLAG_HIGH if options.priority >= Priority.HIGH else 0
        keep_s = DEFAULT_KEEP_S if options.keep_s is None else options.keep_s
        if digest:
            flags |= FLAG_KEYED
            content = hashlib.blake2b(digest_size=16)
            for column in sorted(encoded):
                content.update(column.encode() + b"\0" + encoded[column])
            digest += content.digest()
        elif options.keep_s is None:
            flags |= FLAG_UNTIL_ACK
        nbytes = len(payload) + sum(map(len, large.values()))
        deadline_ms = 0.0 if options.deadline_s is None else options.deadline_s * 1000.0
        boost_ms = options.priority * self._boost
        job = NewJob(
            job_id, payload, rows, nbytes, boost_ms, options.delay_s * 1000.0, deadline_ms, keep_s, flags, refs, digest
        )
        return job, blobs
