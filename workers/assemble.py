"""From granted jobs to tables for the stage, and from its outputs to what is committed: columns, refs, riding along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import redis

from torchrelay.config.columns import Column
from torchrelay.errors import DecodeError
from torchrelay.queues import codec
from torchrelay.queues.blobs import fetch_blobs
from torchrelay.queues.job import Packed, Ref, decode_payload, encode_payload, split_inline
from torchrelay.queues.transitions import Output
from torchrelay.workers.claimer import Held
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import patiently


@dataclass(slots=True)
class Work:
    """One job made ready for the stage: its inputs decoded, and what rides along untouched."""

    held: Held
    table: dict[str, Column]
    riding: dict[str, Packed]
    meta: bytes
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Parsed:
    """One job before its blobs are read: the columns that the stage reads, and what rides along."""

    held: Held
    wanted: dict[str, Packed]
    riding: dict[str, Packed]
    meta: bytes
    refs: list[Ref]


class Assembler:
    """Decodes inputs and encodes outputs of one node."""

    def __init__(self, context: NodeContext, client: redis.Redis) -> None:
        self._context = context
        self._client = client
        inputs = context.node.inputs
        self._sources = None if inputs is None else {local: _split(source) for local, source in inputs.items()}
        self._stage_of = {n.index: n.name for n in context.pipeline.graph.nodes} | {0: "input"}

    def open_all(self, batch: Sequence[Held]) -> tuple[list[Work], list[tuple[Held, DecodeError]], list[Held]]:
        """(ready, undecodable with why, lost) of a batch: one bad job harms no other. Blobs are read in one go."""
        ready: list[Work] = []
        bad: list[tuple[Held, DecodeError]] = []
        lost: list[Held] = []
        parsed: list[_Parsed] = []
        for held in batch:
            try:
                parsed.append(self._parse(held))
            except DecodeError as error:
                bad.append((held, error))
        fetched = self._fetch(parsed)
        for job in parsed:
            if job.refs and None in [fetched[ref] for ref in job.refs]:
                lost.append(job.held)
                continue
            try:
                ready.append(self._decode(job, fetched))
            except DecodeError as error:
                bad.append((job.held, error))
        return ready, bad, lost

    def _parse(self, held: Held) -> _Parsed:
        payloads = held.entry.payloads
        by_stage: dict[str, dict[str, Packed]] = {}
        columns: dict[str, Packed] = {}
        meta = b""
        for pred, payload in zip(self._context.node.preds, payloads, strict=True):
            part, meta, _ = decode_payload(payload)
            by_stage[self._stage_of[pred]] = part
            columns = {**columns, **part} if columns else part
        wanted = self._inputs(columns, by_stage)
        refs = [c for c in wanted.values() if type(c) is Ref]
        return _Parsed(held, wanted, self._riding(columns), meta, refs)

    def _fetch(self, jobs: Sequence[_Parsed]) -> dict[Ref, bytes | None]:
        """The bytes behind every ref that the jobs read, None where they are gone; a round trip per lane."""
        fetched: dict[Ref, bytes | None] = {}
        for number, lane in enumerate(self._context.lanes):
            refs = [ref for job in jobs if job.held.lane == number for ref in job.refs]
            if refs:
                fetch = partial(fetch_blobs, self._client, lane, refs)
                fetched.update(zip(refs, patiently(fetch), strict=True))
        return fetched

    def _decode(self, job: _Parsed, fetched: Mapping[Ref, bytes | None]) -> Work:
        table: dict[str, Column] = {}
        rows = job.held.entry.rows
        for local, packed in job.wanted.items():
            data = packed if isinstance(packed, bytes) else fetched[packed]
            value = codec.decode(data or b"")
            if not hasattr(value, "__len__") or len(value) != rows:
                raise DecodeError(f"column {local!r} does not hold the job's {rows} rows")
            table[local] = value  # type: ignore[assignment]  # the codec gives arrays and lists
        return Work(job.held, table, job.riding, job.meta, _fields(job.meta))

    def _riding(self, columns: dict[str, Packed]) -> dict[str, Packed]:
        node = self._context.node
        if not node.succs and self._context.pipeline.output is None:
            return {}  # the result is what the terminal stages return
        return columns if node.keeps is None else {c: v for c, v in columns.items() if c in node.keeps}

    def _inputs(self, columns: dict[str, Packed], by_stage: dict[str, dict[str, Packed]]) -> dict[str, Packed]:
        if self._sources is None:
            return columns
        out: dict[str, Packed] = {}
        for local, (stage, column) in self._sources.items():
            source = by_stage.get(stage, columns) if stage else columns
            if column not in source:
                raise DecodeError(f"column {column!r} is missing; the job holds {sorted(columns) or 'no columns'}")
            out[local] = source[column]
        return out

    def close(self, work: Work, outputs: Mapping[str, Column]) -> tuple[Output, dict[str, bytes]]:
        """What is committed for one job, the returned columns over those that ride along; and the blobs to write first.

        Raises InputError for a value that cannot travel.
        """
        context, held = self._context, work.held
        keeps = context.node.keeps
        encoded = {name: codec.encode(value) for name, value in outputs.items() if keeps is None or name in keeps}
        columns: dict[str, Packed] = {c: v for c, v in work.riding.items() if c not in outputs}
        inline, large = split_inline(encoded)
        columns.update(inline)
        refs = ""
        blobs: dict[str, bytes] = {}
        for name, data in large.items():
            ref = Ref.of(f"{held.entry.job_id}.{context.node.index}.{held.fence}.{name}", len(data))
            blobs[ref.name] = data
            columns[name] = ref
            refs += ref.text(context.pipeline.graph.consumers(name, context.node.index))
        return Output(held.entry.packed, encode_payload(columns, work.meta), None, refs), blobs


def _fields(meta: bytes) -> dict[str, Any]:
    fields = codec.decode(meta) if meta else {}
    if not isinstance(fields, dict):
        raise DecodeError("the job's meta is no mapping", length=len(meta))
    return fields


def _split(source: str) -> tuple[str, str]:
    stage, dot, column = source.rpartition(".")
    return (stage, column) if dot else ("", source)
