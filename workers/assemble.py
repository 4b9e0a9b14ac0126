"""From granted jobs to tables for the stage, and from its outputs to what is committed: columns, refs, riding along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from torchrelay.config.columns import Column
from torchrelay.errors import BytesLost, DecodeError
from torchrelay.queues import codec
from torchrelay.queues.blobs import read_blobs
from torchrelay.queues.job import Packed, Ref, decode_payload, encode_payload, split_inline
from torchrelay.queues.transitions import Output
from torchrelay.workers.claimer import Held
from torchrelay.workers.committer import Committer
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


class Assembler:
    """Decodes inputs and encodes outputs of one node."""

    def __init__(self, context: NodeContext, client: redis.Redis) -> None:
        self._context = context
        self._client = client
        inputs = context.node.inputs
        self._sources = None if inputs is None else {local: _split(source) for local, source in inputs.items()}
        self._stage_of = {n.index: n.name for n in context.pipeline.graph.nodes} | {0: "input"}

    def open(self, held: Held) -> Work:
        """Decodes the columns that the stage reads; raises DecodeError or BytesLost for this job alone."""
        payloads = held.entry.payloads
        by_stage: dict[str, dict[str, Packed]] = {}
        columns: dict[str, Packed] = {}
        meta = b""
        for pred, payload in zip(self._context.node.preds, payloads, strict=True):
            part, meta = decode_payload(payload)
            by_stage[self._stage_of[pred]] = part
            columns = {**columns, **part} if columns else part
        wanted = self._inputs(columns, by_stage)
        refs = [c for c in wanted.values() if isinstance(c, Ref)]
        fetched = iter(self._fetch(held.lane, refs)) if refs else iter(())
        table: dict[str, Column] = {}
        for local, packed in wanted.items():
            value = codec.decode(next(fetched) if isinstance(packed, Ref) else packed)
            if not hasattr(value, "__len__") or len(value) != held.entry.rows:
                raise DecodeError(f"column {local!r} does not hold the job's {held.entry.rows} rows")
            table[local] = value  # type: ignore[assignment]  # the codec gives arrays and lists
        riding = self._riding(columns)
        return Work(held, table, riding, meta, _fields(meta))

    def _fetch(self, lane: int, refs: list[Ref]) -> list[bytes]:
        return patiently(lambda: read_blobs(self._client, self._context.lanes[lane], refs))

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

    def close(self, work: Work, outputs: Mapping[str, Column], committer: Committer) -> Output:
        """What is committed for one job: the returned columns over those that ride along."""
        context, held = self._context, work.held
        keeps = context.node.keeps
        encoded = {name: codec.encode(value) for name, value in outputs.items() if keeps is None or name in keeps}
        columns: dict[str, Packed] = {c: v for c, v in work.riding.items() if c not in outputs}
        inline, large = split_inline(encoded)
        columns.update(inline)
        refs = ""
        if large:
            prefix = f"{held.entry.job_id}.{context.node.index}.{held.fence}."
            written = committer.write_blobs(held.lane, {prefix + name: data for name, data in large.items()})
            for name in large:
                ref = written[prefix + name]
                columns[name] = ref
                refs += ref.text(context.pipeline.graph.consumers(name, context.node.index))
        return Output(held.entry.packed, encode_payload(columns, work.meta), None, refs)


def _fields(meta: bytes) -> dict[str, Any]:
    fields = codec.decode(meta) if meta else {}
    if not isinstance(fields, dict):
        raise DecodeError("the job's meta is no mapping", length=len(meta))
    return fields


def _split(source: str) -> tuple[str, str]:
    stage, dot, column = source.rpartition(".")
    return (stage, column) if dot else ("", source)


def open_all(
    assembler: Assembler, batch: Sequence[Held]
) -> tuple[list[Work], list[tuple[Held, DecodeError]], list[Held]]:
    """(ready, undecodable with why, lost) of a batch: one bad job harms no other."""
    ready: list[Work] = []
    bad: list[tuple[Held, DecodeError]] = []
    lost: list[Held] = []
    for held in batch:
        try:
            ready.append(assembler.open(held))
        except BytesLost:
            lost.append(held)
        except DecodeError as error:
            bad.append((held, error))
    return ready, bad, lost
