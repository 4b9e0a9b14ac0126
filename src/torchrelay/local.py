"""Runs a pipeline in this process, without a server: the checks of a client, the engine of a worker, one process.

Rows go in chunks. A chunk is one table job that passes every node, so that a row costs little beside its stages; its
results are taken apart again by submitted row, and are what `relay.submit(...).result()` returns for that row. Of a
chunk that fails, the halves are tried, down to the rows whose fault it is; those fail as their own jobs would.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from torchrelay.config.imports import import_use
from torchrelay.config.shards import PartConfig, shard_of
from torchrelay.errors import ConfigError, InputError, JobFailed
from torchrelay.local_rows import Chunk, Intake
from torchrelay.producer.encoding import SubmitOptions
from torchrelay.producer.mapping import yields_errors
from torchrelay.queues import codec
from torchrelay.queues.job import (
    COUNTS,
    Failure,
    Origins,
    Packed,
    Ref,
    decode_payload,
    encode_payload,
    join_payloads,
    split_inline,
)
from torchrelay.queues.levels import failures_of, result_rows
from torchrelay.stages import Runner, StageContext, make_group_runner
from torchrelay.workers.assemble import Assembler, in_order, too_many_rows
from torchrelay.workers.batching import Planner
from torchrelay.workers.compute import Failed, GivenUp, compute, told
from torchrelay.workers.device import pick_device
from torchrelay.workers.edge import check_codecs
from torchrelay.workers.splitting import LocalPlans, is_split, split_stage
from torchrelay.workers.work import Closed, Incoming, Work

if TYPE_CHECKING:
    from torchrelay.config.fusing import Group
    from torchrelay.config.graph import Graph, Node
    from torchrelay.config.pipeline import Pipeline
    from torchrelay.config.spec import StageConfig

__all__ = ["run_local"]

Row = dict[str, Any]
_DEVICE = re.compile(r"auto|auto-cpu|cpu|cuda(:\d+)?")


@overload
def run_local(
    pipeline: Pipeline,
    rows: Iterable[Mapping[str, Any]],
    *,
    device: str = "auto-cpu",
    on_error: Literal["raise"] = "raise",
    meta: Mapping[str, Any] | None = None,
) -> list[Row]: ...


@overload
def run_local(
    pipeline: Pipeline,
    rows: Iterable[Mapping[str, Any]],
    *,
    device: str = "auto-cpu",
    on_error: Literal["return"],
    meta: Mapping[str, Any] | None = None,
) -> list[Row | JobFailed]: ...


def run_local(
    pipeline: Pipeline,
    rows: Iterable[Mapping[str, Any]],
    *,
    device: str = "auto-cpu",
    on_error: Literal["raise", "return"] = "raise",
    meta: Mapping[str, Any] | None = None,
) -> list[Any]:
    """The results of all rows, in their order, computed in this process: no server, no workers.

    Args:
        pipeline: one that was loaded from its file, or made in Python.
        rows: any iterable of rows. Those of a list or tuple are all checked before the first stage runs, others as
            they come.
        device: auto, auto-cpu (a stage that wants a GPU falls back), cpu, cuda or cuda:N.
        on_error: with "raise" the first row that fails raises its JobFailed; with "return" the JobFailed stands in the
            place of the row's result. A stage that raises is tried `retry: {attempts: N}` times, without waiting.
        meta: a small mapping that every row carries to `batch.meta`.

    Raises InputError for a row that does not fit, StageLoadError, DeviceError, ConfigError, JobFailed.
    """
    keep_errors = yields_errors(on_error)
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise ConfigError(f"device {device!r:.40} is none of auto, auto-cpu, cpu, cuda, cuda:N")
    options = SubmitOptions.parse({"meta": meta})
    stages = pipeline.spec.stages
    # Inside an expansion rows are more than those that come.
    outer = [stages[n.index - 1].batch.max_rows for n in pipeline.graph.nodes if not n.before]
    intake = Intake(pipeline.input, max(outer))
    chunks: Iterator[Chunk] = intake.chunks(rows)
    if isinstance(rows, Sequence):
        chunks = _drain(list(chunks))
    # The first rows are checked before any model is loaded.
    first = next(chunks, None)
    if first is None:
        return []
    results: list[Any] = []
    with LocalRun(pipeline, device, options.meta, keep_errors=keep_errors) as run:
        for chunk in chain([first], chunks):
            results += run.results(chunk)
    return results


def _drain(chunks: list[Chunk]) -> Iterator[Chunk]:
    """Each in turn, and no longer held here."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


class _Step(NamedTuple):
    """One node, or several that are fused, ready to work."""

    group: Group
    runner: Runner
    assembler: Assembler[Blobs]
    planner: Planner[Blobs]


@dataclass(slots=True)
class Blobs:
    """The columns of one chunk that are too large to travel inline. Also its Meter: nothing of it ends early."""

    found: dict[str, bytes] = field(default_factory=dict)

    def put(self, node: int, columns: Mapping[str, codec.Message]) -> dict[str, Packed]:
        """The columns as a payload holds them."""
        inline, large = split_inline(columns)
        packed: dict[str, Packed] = dict(inline)
        for name, data in large.items():
            ref = packed[name] = Ref.of(f"{node}.{name}", len(data))
            self.found[ref.name] = codec.join(data)
        return packed

    def get(self, packed: Packed) -> bytes:
        return self.found[packed.name] if isinstance(packed, Ref) else packed

    def started(self, works: Sequence[Work[Blobs]]) -> None: ...
    def stopped(self, rows: int) -> None: ...
    def ended(self, works: Sequence[Work[Blobs]]) -> Sequence[bool]:
        return [False] * len(works)

    def goes_on(self, works: Sequence[Work[Blobs]]) -> bool:
        return True


class _Fault(Exception):
    """A chunk has no result."""

    def __init__(self, step: _Step, failed: Failed, attempts: int) -> None:
        super().__init__()
        self.step = step
        self.failed = failed
        self.attempts = attempts

    def of_row(self, row: int) -> JobFailed:
        """The error of a chunk of one row, as a client sees it."""
        error = self.failed.error
        trace = "".join(traceback.format_exception(error)) if error else ""
        kind = self.failed.error_type or type(error).__name__
        stage = self.failed.stage or self.step.group.first.name
        failure = Failure(stage, kind, self.failed.message or (told(error) if error else ""), trace)
        why = Failure.decode(failure.encode())
        made = JobFailed(
            why.message,
            stage=why.stage,
            attempts=self.attempts,
            error_type=why.error_type,
            traceback=why.traceback,
            row=row,
        )
        made.__cause__ = error
        return made


class LocalRun:
    """A pipeline whose stages are loaded in this process while the `with` block lasts."""

    def __init__(self, pipeline: Pipeline, device: str, meta: bytes, *, keep_errors: bool) -> None:
        self._pipeline = pipeline
        self._graph: Graph = pipeline.graph
        self._device = device
        self._meta = meta
        self._keep_errors = keep_errors
        self._limit = pipeline.spec.limits.rows_per_job
        self._steps: list[_Step] = []
        self._closing = ExitStack()
        self._plans = LocalPlans()

    def __enter__(self) -> LocalRun:
        try:
            order = {node.name: node.rank for node in self._graph.nodes}
            groups = sorted(self._pipeline.groups, key=lambda group: order[group.first.name])
            self._steps = [self._load(group) for group in groups]
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.close()

    def _load(self, group: Group) -> _Step:
        pipeline = self._pipeline
        check_codecs(self._graph, group.last)
        device = pick_device(group.stages[0], self._device)
        shard, shards = shard_of(group.stages[0])
        where = StageContext(
            device=device, shard=shard, shards=shards, version=pipeline.version, base_dir=pipeline.base_dir
        )
        runner = make_group_runner(lambda stage: self._found(stage, where), group)
        self._closing.callback(runner.close)
        runner.load(where)
        assembler: Assembler[Blobs] = Assembler(self._graph, group.first, _fetch, group=group)
        return _Step(group, runner, assembler, Planner(group.batch, group.types))

    def _found(self, stage: StageConfig, where: StageContext) -> object:
        """What the entry of a stage names, or its part of a model."""
        if isinstance(stage, PartConfig) and is_split(stage):
            return split_stage(stage, self._pipeline, where, self._plans.agree)
        return stage.use and import_use(stage.use, self._pipeline.base_dir)

    def results(self, chunk: Chunk) -> list[Any]:
        """Per row its result, or with `keep_errors` its JobFailed. Else the first row that fails raises it."""
        try:
            values, origins = self._walk(chunk, keep=self._keep_errors and chunk.rows > 1)
        except _Fault as fault:
            if chunk.rows > 1:
                # Which row it was, and whether an earlier one fails at a later stage, the halves tell.
                middle = chunk.rows // 2
                return self.results(chunk.part(0, middle)) + self.results(chunk.part(middle, chunk.rows))
            failed = fault.of_row(chunk.first)
            if self._keep_errors:
                return [failed]
            raise failed from failed.__cause__
        rows: list[Any] = result_rows(values, origins, chunk.rows)
        for failure in failures_of(values):
            rows[failure.row : failure.row + 1] = self.results(chunk.part(failure.row, failure.row + 1))
        return rows

    def _walk(self, chunk: Chunk, *, keep: bool) -> tuple[dict[str, Any], Origins]:
        """Every column of the chunk's result, hidden ones included; raises _Fault."""
        blobs = Blobs()
        payloads = {0: encode_payload(blobs.put(0, chunk.columns), self._meta)}
        rows = {0: chunk.rows}
        for step in self._steps:
            node, preds = step.group.last, step.group.first.preds
            came = [payloads[p] for p in preds]
            closed = self._serve(step, Incoming(blobs, came, rows[preds[0]], keep, last=True), chunk.rows)
            packed = {**closed.riding, **blobs.put(node.index, closed.made)}
            packed = packed if node.succs else in_order(packed, self._pipeline.output)
            payloads[node.index] = encode_payload(packed, self._meta, closed.origins)
            rows[node.index] = closed.rows
        end = join_payloads([decode_payload(payloads[node.index]) for node in self._graph.terminals])
        columns = in_order(end.columns, self._pipeline.output)
        return {name: codec.decode(blobs.get(packed)) for name, packed in columns.items()}, end.origins

    def _serve(self, step: _Step, incoming: Incoming[Blobs], entry_rows: int) -> Closed:
        """One node's work; a chunk of one row is tried as often as its job would be."""
        most = step.group.stages[0].retry.attempts if entry_rows == 1 else 1
        attempts, failed = 0, Failed(None)
        while attempts < most and not failed.final:
            attempts += 1
            opened = step.assembler.open_all([incoming])
            if opened.bad:
                failed = Failed(opened.bad[0][1])
                continue
            ((work, outcome),) = next(compute(opened.ready, step.runner, step.planner, incoming.job))
            assert not isinstance(outcome, GivenUp)  # `goes_on` never tells to
            if isinstance(outcome, Failed):
                failed = outcome
                continue
            try:
                closed = step.assembler.close(work, outcome)
                self._check_growth(step.group.first, work, closed)
            except InputError as error:
                failed = Failed(error)
            else:
                return closed
        raise _Fault(step, failed, attempts)

    def _check_growth(self, node: Node, work: Work[Blobs], closed: Closed) -> None:
        """What a job may grow to holds for each submitted row: outside, each is a job of its own."""
        if closed.rows > self._limit and node.rows == "expand":
            counts: Any = codec.decode(codec.join(closed.made[f"{COUNTS}{node.index}"]))
            most = int(np.bincount(work.levels.entry_rows(node.at, work.total), weights=counts).max())
            if most > self._limit:
                raise too_many_rows(node.name, most, self._limit)


def _fetch(wanted: Sequence[tuple[Blobs, Ref]]) -> list[bytes | None]:
    return [blobs.found.get(ref.name) for blobs, ref in wanted]
