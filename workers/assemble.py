"""From a job's payloads to the table that a stage computes, and from what it made to the job's next payload.

No I/O: the bytes behind refs come from `fetch`, and what is to be written is returned. `compute` does the work between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.fusing import Group
from torchrelay.config.graph import Graph, Node, is_runs
from torchrelay.config.ragged import take_rows
from torchrelay.errors import BytesLost, DecodeError, InputError
from torchrelay.queues import codec
from torchrelay.queues.job import (
    AT,
    COUNTS,
    FROM_INPUT,
    REJECTED,
    Origins,
    Packed,
    Payload,
    Ref,
    decode_payload,
    is_hidden,
    join_payloads,
)
from torchrelay.queues.levels import Levels, RowFailure, failures_of
from torchrelay.workers.edge import Edge
from torchrelay.workers.gathering import PARTS, gathered
from torchrelay.workers.rows import is_column, spread_rows, truth
from torchrelay.workers.work import Closed, Incoming, J, Opened, Output, Rejection, Work

_NO_LEVELS = Levels({})


@dataclass(slots=True)
class _Parsed(Generic[J]):
    """One job before its blobs are read: `wanted` by the stage's own names, with where each was made."""

    incoming: Incoming[J]
    all: Payload
    wanted: dict[str, tuple[Packed, tuple[int, ...]]]
    hidden: dict[str, Packed]
    # Why `wanted` is empty: no harm if no row of the job enters.
    missing: DecodeError | None = None

    def refs(self) -> list[Ref]:
        packed = [p for p, _ in self.wanted.values()]
        return [p for p in (*packed, *self.hidden.values()) if type(p) is Ref]


_MAX_WHY = 1000
_WHEN, _BEFORE = "?", "<"  # beside the stage's own names, among what is read of a job
_Bytes = bytes | memoryview | DeviceRows
_Fetch = Callable[[Sequence[tuple[J, Ref]]], Sequence[_Bytes | None]]


class Assembler(Generic[J]):
    """Opens and closes the jobs of one node, or of several that are fused, `group`, of which `node` is the first.
    `fetch` reads the bytes behind refs, None for those that are gone."""

    def __init__(
        self,
        graph: Graph,
        node: Node,
        fetch: _Fetch[J] | None = None,
        rows_per_job: int = 2**31 - 1,
        group: Group | None = None,
    ) -> None:
        self._graph = graph
        self._node = node
        self._group = group
        # What it leaves of a job is as the last one would leave it.
        self._last = last = node if group is None else group.last
        self._fetch = fetch
        self._rows_per_job = rows_per_job
        self._ranks = {n.name: n.rank for n in graph.nodes} | {"input": graph.input_rank}
        # One chain on which rows stay as many as they are needs no origins; most jobs of it take a short way.
        self._plain = graph.plain
        self._short = graph.plain and node.when is None
        self._inputs = (node.inputs or {}) if group is None else group.inputs
        self._columns = [(name, source.rpartition(".")[2]) for name, source in self._inputs.items()]
        self._ends = not last.succs and graph.result is None
        self._edge = Edge.of(graph, last)
        self._before = {n.rank: {a.rank for a in graph.ancestors(n)} for n in graph.nodes}

    def open_all(self, batch: Iterable[Incoming[J]]) -> Opened[J]:
        """Decodes what the stage reads of each job; blobs of the whole batch are read together."""
        opened: Opened[J] = Opened([], [], [])
        parsed: list[_Parsed[J]] = []
        for incoming in batch:
            try:
                short = self._short and not incoming.keep
                ready = self._open_shortly(incoming) if short and not parsed else None
                if ready is not None:
                    opened.ready.append(ready)
                    continue
                parsed.append(self._brief(incoming) if short else self._parse(incoming))
            except Exception as error:  # nothing here waits for anything: whatever it is, it is this job's
                opened.bad.append((incoming.job, error))
        if parsed:
            self._open_parsed(parsed, opened)
        return opened

    def _open_parsed(self, parsed: Sequence[_Parsed[J]], opened: Opened[J]) -> None:
        wanted = [(job.incoming.job, ref) for job in parsed for ref in job.refs()]
        fetched = dict(zip([r for _, r in wanted], self._fetch(wanted), strict=True)) if wanted and self._fetch else {}
        for job in parsed:
            gone = [ref for ref in job.refs() if fetched.get(ref) is None]
            if any(ref.of_input for ref in gone):
                error = BytesLost("the bytes of a column of the input are gone; submit the job again")
                opened.bad.append((job.incoming.job, error))
                continue
            if gone:
                opened.lost.append((job.incoming.job, self._makers(gone)))
                continue
            try:
                work = self._decode_shortly(job, fetched) if self._short and not job.incoming.keep else None
                opened.ready.append(work or self._decode(job, fetched))
            except Exception as error:
                opened.bad.append((job.incoming.job, error))

    def _makers(self, gone: Iterable[Ref]) -> int:
        makers = {ref.maker or 0 for ref in gone}
        known = all(1 <= maker <= len(self._graph.nodes) for maker in makers)
        return sum(1 << (maker - 1) for maker in makers) if known else 0

    def _open_shortly(self, incoming: Incoming[J]) -> Work[J] | None:
        """A job of a plain chain whose columns are all inline; None for any other."""
        payload = decode_payload(incoming.payloads[0])
        columns, rows = payload.columns, incoming.rows
        table: dict[str, Column] = {}
        for local, column in self._read_of(columns):
            packed = columns.get(column)
            if type(packed) is not bytes:
                return None
            value: Any = codec.decode(packed)
            if not is_column(value) or len(value) != rows:
                return None  # the long way says what is wrong
            table[local] = value
        return Work(incoming, table, rows, rows, payload, _fields(payload.meta), _NO_LEVELS)

    def _read_of(self, columns: Iterable[str]) -> Sequence[tuple[str, str]]:
        """What the stage reads of a plain chain's job: by its own name, and the job's."""
        return self._columns if self._node.inputs is not None else [*((c, c) for c in columns), *self._columns]

    def _brief(self, incoming: Incoming[J]) -> _Parsed[J]:
        """A job of a plain chain, of which nothing is to be worked out unless something is missing."""
        payload = decode_payload(incoming.payloads[0])
        columns = payload.columns
        wanted: dict[str, tuple[Packed, tuple[int, ...]]] = {}
        for local, column in self._read_of(columns):
            packed = columns.get(column)
            if packed is None:
                return self._parse(incoming)  # says what is wrong
            wanted[local] = (packed, ())
        return _Parsed(incoming, payload, wanted, {})

    def _decode_shortly(self, job: _Parsed[J], fetched: Mapping[Ref, _Bytes | None]) -> Work[J] | None:
        """Of a plain chain, where all columns hold the job's rows."""
        rows = job.incoming.rows
        table: dict[str, Column] = {}
        for local, (packed, _) in job.wanted.items():
            value: Any = _value(packed, fetched)
            if not is_column(value) or len(value) != rows:
                return None  # the long way says what is wrong
            table[local] = value
        return Work(job.incoming, table, rows, rows, job.all, _fields(job.all.meta), _NO_LEVELS)

    def _parse(self, incoming: Incoming[J]) -> _Parsed[J]:
        parts = [decode_payload(p) for p in incoming.payloads]
        merged = join_payloads(parts)
        node, missing = self._node, None
        wanted: dict[str, tuple[Packed, tuple[int, ...]]] = {}
        try:
            wanted = self._wanted(parts, merged)
        except DecodeError as error:
            # A stage that declares no outputs and got no rows could not say which columns there would be.
            if incoming.rows and not any(c[0] == REJECTED for c in merged.columns):
                raise
            missing = error
            wanted = self._of_the_run(parts, merged)
        hidden: dict[str, Packed] = {}
        if not self._plain or incoming.keep:
            levels = {*node.before, *(n for _, stack in wanted.values() for n in stack)}
            hidden = {
                c: packed
                for c, packed in merged.columns.items()
                if c[0] == REJECTED or (c[0] == COUNTS and int(c[1:]) in levels)
            }
        return _Parsed(incoming, merged, wanted, hidden, missing)

    def _wanted(self, parts: Sequence[Payload], merged: Payload) -> dict[str, tuple[Packed, tuple[int, ...]]]:
        node = self._node
        wanted: dict[str, tuple[Packed, tuple[int, ...]]] = {}
        if node.inputs is None:
            wanted = {c: self._unique(parts, merged, c) for c in merged.columns if self._is_read(c, merged)}
        wanted |= self._of_the_run(parts, merged)
        for local, source in self._inputs.items():
            wanted[local] = self._source(parts, merged, source)
        if node.when is not None:
            wanted[_WHEN] = self._source(parts, merged, node.when)
        if node.keeps_older:
            older = node.older or {}
            for column in node.outputs.keys() & merged.columns.keys():
                wanted[_BEFORE + column] = self._source(parts, merged, older.get(column, column))
        return wanted

    def _of_the_run(self, parts: Sequence[Payload], merged: Payload) -> dict[str, tuple[Packed, tuple[int, ...]]]:
        """The run's own columns, for who ends it: what it is to write, and of which rows."""
        if self._node.gathers is None:
            return {}
        return {c: self._unique(parts, merged, c) for c in merged.columns if is_runs(c)}

    def _is_read(self, column: str, merged: Payload) -> bool:
        """Whether a stage that reads all columns reads this one; who ends a run, those that it is to write."""
        if is_hidden(column) or is_runs(column) or self._node.gathers is None:
            return not is_hidden(column) and is_runs(column) == (self._node.gathers is not None)
        rank = merged.origins.get(column, FROM_INPUT)[0]
        return any(n.rank == rank and n.index in self._node.gathers for n in self._graph.nodes)

    def _source(self, parts: Sequence[Payload], merged: Payload, source: str) -> tuple[Packed, tuple[int, ...]]:
        """What `column` or `stage.column` stands for."""
        stage, _, column = source.rpartition(".")
        if not stage or self._plain:
            return self._unique(parts, merged, column)
        for part in parts:
            origin = part.origins.get(column, FROM_INPUT)
            if column in part.columns and origin[0] == self._ranks[stage]:
                return part.columns[column], origin[1:]
        raise _missing(source, merged)

    def _unique(self, parts: Sequence[Payload], merged: Payload, column: str) -> tuple[Packed, tuple[int, ...]]:
        if column not in merged.columns:
            raise _missing(column, merged)
        origin = merged.origins.get(column, FROM_INPUT)
        if len(parts) > 1:
            ranks = {p.origins.get(column, FROM_INPUT)[0] for p in parts if column in p.columns}
            rivals = ranks - {0, origin[0]} - self._before.get(origin[0], set())
            if rivals:
                names = sorted(n.name for n in self._graph.nodes if n.rank in {*rivals, origin[0]})
                raise InputError(
                    f"stage {self._node.name!r} gets column {column!r} from {' and '.join(names)}, which run side by "
                    f"side; choose one: inputs: {{{column}: {names[0]}.{column}}}"
                )
        return merged.columns[column], origin[1:]

    def _decode(self, job: _Parsed[J], fetched: Mapping[Ref, _Bytes | None]) -> Work[J]:
        incoming, node = job.incoming, self._node
        hidden = {name: _value(packed, fetched) for name, packed in job.hidden.items()}
        levels = Levels.of(hidden)
        if node.gathers is not None:
            return self._gathered(job, levels, failures_of(hidden), fetched)
        total = len(levels.counts(node.before[-1])) if node.rows == "collapse" else incoming.rows
        table: dict[str, Column] = {}
        for local, (packed, stack) in job.wanted.items():
            value = _value(packed, fetched)
            if not is_column(value):
                raise DecodeError(f"column {local!r} is no column")
            table[local] = levels.align(value, stack, node.at)
            if len(table[local]) != total:
                raise DecodeError(f"column {local!r} does not hold the job's {total} rows")
        entry = self._graph.entry
        work = Work(incoming, table, total, total, job.all, _fields(job.all.meta), levels, at=node.at, entry=entry)
        if node.when is not None or len(hidden):
            self._select(work, failures_of(hidden))
        if job.missing is not None and work.rows:
            raise job.missing
        return work

    def _gathered(
        self, job: _Parsed[J], levels: Levels, failures: Sequence[RowFailure], fetched: Mapping[Ref, _Bytes | None]
    ) -> Work[J]:
        """A chunk for the node that ends a run: all its rows as one, each column as a whole."""
        columns = {name: (_value(packed, fetched), stack) for name, (packed, stack) in job.wanted.items()}
        table = gathered(levels, columns, failures, self._graph.entry, self._node.before)
        if job.missing is not None and len(table[PARTS][0]):
            raise job.missing
        return Work(job.incoming, table, 1, 1, job.all, _fields(job.all.meta), levels)

    def _select(self, work: Work[J], failures: Sequence[RowFailure]) -> None:
        """Leaves the rows that enter: not those of rejected rows, nor those for which `when` is false."""
        alive = np.ones(work.total, bool)
        if failures:
            alive = ~np.isin(work.levels.entry_rows(work.at, work.total, work.entry), [f.row for f in failures])
        enters = alive
        if self._node.when is not None:
            # It is missing only where no row is alive.
            enters = alive & truth(work.table.pop(_WHEN)) if _WHEN in work.table else alive
            work.skips = bool((alive & ~enters).any())
            work.before = {name[1:]: work.table.pop(name) for name in list(work.table) if name[0] == _BEFORE}
        if not enters.all():
            work.active = np.flatnonzero(enters)
            work.rows = len(work.active)
            work.table = {name: take_rows(column, work.active) for name, column in work.table.items()}

    def close(self, work: Work[J], output: Output) -> Closed:
        """What is committed for one job, the made columns over those that ride along.

        Raises InputError for a value that cannot travel, or for more rows than the pipeline allows a job.
        """
        node = self._node
        if self._short and output.counts is None and not output.rejected and not work.incoming.keep:
            return self._close_shortly(work, output)
        columns, total = dict(output.columns), work.total
        made: dict[str, codec.Message] = {}
        if output.counts is not None:
            counts = np.zeros(work.total, np.uint32)
            counts[slice(None) if work.active is None else work.active] = output.counts
            total = int(counts.sum(dtype=np.int64))
            made[f"{COUNTS}{node.index}"] = codec.encode(counts)
            made.update((name, _encoded(name, column)) for name, column in output.beside.items())
        elif work.active is not None or output.rejected:
            columns = self._spread(work, output)
        if total > self._rows_per_job:
            raise too_many_rows(node.name, total, self._rows_per_job)
        if output.rejected:
            made[f"{REJECTED}{self._last.index}"] = codec.encode(self._failures(work, output.rejected))
        self._encode(columns, made)
        riding = self._riding(work.riding, made)
        if self._plain:
            return Closed(made, riding, None, total)
        origins = self._origins(work.riding.origins, made, riding)
        origins.update((name, (node.rank, *node.at)) for name in output.beside)
        return Closed(made, riding, origins, total)

    def _close_shortly(self, work: Work[J], output: Output) -> Closed:
        """Of a plain chain, without rejected rows."""
        keeps = self._last.keeps
        made: dict[str, codec.Message] = {}
        self._encode(output.columns, made)
        riding: dict[str, Packed] = {}
        if not self._ends:
            for name, packed in work.riding.columns.items():
                if name not in made and (keeps is None or name in keeps):
                    riding[name] = packed
        return Closed(made, riding, None, work.total)

    def _encode(self, columns: Mapping[str, Column], made: dict[str, codec.Message]) -> None:
        """Adds the columns that stay in the job, as they travel."""
        keeps, edge = self._last.keeps, self._edge
        for name, column in columns.items():
            if keeps is None or name in keeps or is_runs(name):
                mine = edge is not None and self._maker(name) is self._last
                made[name] = _encoded(name, edge.narrowed(name, column) if edge is not None and mine else column)

    def _maker(self, column: str) -> Node:
        return self._last if self._group is None else self._group.maker_of(column)

    def _spread(self, work: Work[J], output: Output) -> dict[str, Column]:
        """Columns of the rows that were made, as columns of all: others keep what they had, or are null."""
        numbers = np.arange(work.total) if work.active is None else work.active
        kept = numbers[[i for i in range(len(numbers)) if i not in output.rejected]]
        return {
            name: spread_rows(column, kept, work.total, (work.before or {}).get(name), nulls=work.skips)
            for name, column in output.columns.items()
        }

    def _failures(self, work: Work[J], rejected: Mapping[int, Rejection]) -> list[list[Any]]:
        entry = work.entry_rows()
        by_row = {int(entry[i]): why for i, why in sorted(rejected.items(), reverse=True)}
        return [
            list(RowFailure(row, why.stage or self._node.name, *_carried(why))) for row, why in sorted(by_row.items())
        ]

    def _riding(self, payload: Payload, made: Mapping[str, object]) -> dict[str, Packed]:
        node = self._last
        kept: dict[str, Packed] = {}
        stacks = set(node.stack)
        # Without an `output` list the result is what the last stages return; one that only regroups returns that.
        for name, packed in payload.columns.items() if node.identity or not self._ends else ():
            stack = payload.origins.get(name, FROM_INPUT)[1:]
            mine = not self._ends or stack[: len(node.before)] == node.before
            keeps = node.keeps is None or name in node.keeps or is_runs(name)
            if mine and keeps and name not in made and not is_hidden(name) and node.gathers is None:
                kept[name] = packed
                stacks.update(stack)
        for name, packed in payload.columns.items() if node.gathers is None else ():
            if name[0] == REJECTED or (name[0] == COUNTS and int(name[1:]) in stacks):
                kept[name] = packed
        return kept

    def _origins(self, old: Origins, made: Mapping[str, object], riding: Mapping[str, Packed]) -> Origins:
        node = self._last
        origins = {name: origin for name, origin in old.items() if name in riding and not is_hidden(name)}
        origins.update((name, (self._maker(name).rank, *node.stack)) for name in made if not is_hidden(name))
        if not node.succs:
            origins[AT] = (0, *node.stack)
        return origins


def too_many_rows(stage: str, rows: int, limit: int) -> InputError:
    """A job grew beyond what its pipeline allows."""
    return InputError(
        f"stage {stage!r} made {rows} rows of this job, above limits.rows_per_job "
        f"({limit}); raise the limit, or submit fewer rows at once"
    )


def in_order(columns: dict[str, Packed], output: Iterable[str] | None) -> dict[str, Packed]:
    """A result's columns as the pipeline's `output` lists them."""
    return {name: columns[name] for name in output or () if name in columns} | columns


def _value(packed: Packed, fetched: Mapping[Ref, _Bytes | None]) -> Any:
    found = packed if isinstance(packed, bytes) else fetched[packed]
    return found if isinstance(found, DeviceRows) else codec.decode(found or b"")


def _carried(why: Rejection) -> tuple[str, str, int]:
    """Short enough for a table of many, and Unicode: a stage's words may be anything."""
    kind, message = (text[:_MAX_WHY].encode("utf-8", "replace").decode() for text in (why.error_type, why.message))
    return kind, message, why.attempts


def _encoded(name: str, column: object) -> codec.Message:
    try:
        return codec.message(column)
    except InputError as error:
        raise InputError(f"column {name!r}: {error}") from error


def _missing(column: str, payload: Payload) -> DecodeError:
    there = sorted(c for c in payload.columns if not is_hidden(c))
    return DecodeError(f"column {column!r} is missing; the job holds {', '.join(there) or 'no columns'}")


def _fields(meta: bytes) -> dict[str, Any]:
    fields = codec.decode(meta) if meta else {}
    if not isinstance(fields, dict):
        raise DecodeError("the job's meta is no mapping", length=len(meta))
    return fields
