"""Several stages as one: each computes what the one before made, where it lies, and only the last one's outputs and
what is wanted behind them leave.

Promise: a stage sees what it would see alone, but for its batch size: columns of the declared types, in slices of its
own `max_rows`, without rows that an earlier stage rejected. A tensor is handed over as it is; it is copied only where
somebody else still needs it and the stage may write to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from torchrelay.config.fusing import Group, Source
from torchrelay.config.spec import StageConfig
from torchrelay.config.types import ColumnType
from torchrelay.stages.batch import Batch, Refusal, read_only
from torchrelay.stages.faults import blame
from torchrelay.stages.handing import handed_over, join_columns, own_column, rows_of, without_tensors
from torchrelay.stages.outputs import Expand
from torchrelay.stages.padding import Padded, pad_rows
from torchrelay.stages.stage import Stage

__all__ = ["Fused", "Member"]

Rows = np.ndarray[Any, np.dtype[np.int64]]


class Member(NamedTuple):
    """One of the stages: the object, its entry in the file, and the declared types of what it reads and returns."""

    stage: Any
    spec: StageConfig
    types: Mapping[str, ColumnType]
    outputs: Mapping[str, ColumnType]


@dataclass(slots=True)
class _Flow:
    """A batch on its way through the stages: the rows that are left, by number, the job of each, and the columns:
    those from outside by their names, others by the number of the stage that made them."""

    batch: Batch
    rows: Rows
    jobs: Rows
    columns: dict[Source, Any]
    padded: dict[Source, Padded] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> _Flow:
        jobs = np.repeat(np.arange(len(batch.job_rows)), batch.job_rows)
        padded = {Source(None, name): p for name, p in (batch.padded or {}).items()}
        columns = {Source(None, name): column for name, column in batch.columns.items()}
        return cls(batch, np.arange(len(jobs)), jobs, columns, padded)

    def keep(self, kept: Rows) -> None:
        """Leaves these of its rows alone."""
        self.rows, self.jobs = self.rows[kept], self.jobs[kept]
        self.columns = {source: rows_of(column, kept) for source, column in self.columns.items()}
        self.padded = {source: Padded(rows_of(p.lengths, kept), p.axes) for source, p in self.padded.items()}


class Fused(Stage):
    """The stages of a group as one stage, whose batch holds what any of them reads from outside.

    Args:
        members: the stages, which are loaded before the first batch comes.
        group: where each finds its columns.

    `device` is where they were loaded.
    """

    def __init__(self, members: Sequence[Member], group: Group) -> None:
        self._members = members
        self._group = group
        self.device = "cpu"
        # The last member that needs a column; those that leave are needed to the end.
        self._until = {s: i for i, reads in enumerate(group.reads) for s in (reads or {}).values()}
        self._until.update((Source(maker, column), len(members)) for column, maker in group.leaving.items())
        # Whether its batch is brought to the device as tensors.
        self._takes_tensors = any(m.stage._takes_tensors for m in members)

    def tensors(self, batch: Batch, device: str) -> Batch:
        """The batch as tensors on `device`, private unless no stage of the group writes to them."""
        import torch

        share = all(m.stage.share for m in self._members if m.stage._takes_tensors)
        with torch.inference_mode():
            return batch.to_torch(device, share=share)

    def infer(self, batch: Batch) -> Mapping[str, Any] | Expand:
        """As `forward`."""
        return self.forward(batch)

    def forward(self, batch: Batch) -> Mapping[str, Any] | Expand:
        """What leaves the group of this batch, as one stage would return it; rows that were rejected are noted in the
        batch. What a stage raises carries its name: `faults.blamed`."""
        flow, last = _Flow.of(batch), len(self._members) - 1
        for number, member in enumerate(self._members):
            with _blaming(member.spec.name):
                self._pass(flow, number, member)
            if not len(flow.rows):
                return {}
        out = {column: flow.columns[Source(maker, column)] for column, maker in self._group.leaving.items()}
        out.update((source.column, column) for source, column in flow.columns.items() if source.maker == last)
        if len(flow.rows) == len(batch):
            return out
        # A single stage would have returned something for a rejected row too, which is not looked at.
        place = np.zeros(len(batch), np.int64)
        place[flow.rows] = np.arange(len(flow.rows))
        return {name: rows_of(column, place) for name, column in out.items()}

    def _pass(self, flow: _Flow, number: int, member: Member) -> None:
        """Runs one stage on the rows that are left."""
        whole, total, most = self._view(flow, number, member), len(flow.rows), member.spec.batch.max_rows
        made: list[dict[str, Any]] = []
        kept: list[Rows] = []
        for start in range(0, total, most):
            outputs, left = _call(flow, member, _cut(whole, flow.jobs, start, min(start + most, total)), start)
            # The stage may use its buffers again for the next slice.
            if len(left):
                made.append({n: c if total <= most else own_column(c) for n, c in outputs.items()})
            kept.append(left)
        rows = np.concatenate(kept)
        if len(rows) < total:
            flow.keep(rows)
        names = made[0] if made else ()
        flow.columns = {source: column for source, column in flow.columns.items() if self._needed(source, number)}
        flow.columns.update((Source(number, name), join_columns([part[name] for part in made])) for name in names)

    def _view(self, flow: _Flow, number: int, member: Member) -> Batch:
        """All rows that are left, with the columns that this stage reads, as it takes them."""
        reads = self._group.reads[number]
        if reads is None:
            # What is named like no column is read by others.
            reads = {s.column: s for s in flow.columns if s.maker is None and "." not in s.column}
        columns = {local: flow.columns[source] for local, source in reads.items()}
        padded = {local: flow.padded[source] for local, source in reads.items() if source in flow.padded}
        if not member.stage._takes_tensors:
            columns = _on_host(member, columns)
            padded = {name: Padded(_on_host(member, {name: p.lengths})[name], p.axes) for name, p in padded.items()}
        rules = member.spec.batch
        for local in [name for name in rules.pad if name in columns and name not in padded]:
            rows = _on_host(member, {local: columns[local]})[local]
            sizes = rules.buckets.get(local, ())
            columns[local], padded[local] = pad_rows(local, [rows], member.types.get(local), rules.pad[local], sizes)
        batch = Batch(columns, flow.batch.job_rows, flow.batch.job_meta, padded, ended=flow.batch.ended)
        if not member.stage._takes_tensors:
            return batch
        from torchrelay.stages.torch_tensors import private

        batch = cast(Batch, member.stage.tensors(batch, self.device))
        if member.stage.share:
            return batch
        return private(batch, [column for source, column in flow.columns.items() if self._needed(source, number)])

    def _needed(self, source: Source, number: int) -> bool:
        """Whether a stage behind this one reads the column, or it leaves the group."""
        return self._until.get(source, -1) > number


def _call(flow: _Flow, member: Member, batch: Batch, start: int) -> tuple[Mapping[str, Any], Rows]:
    """One forward, of the rows from `start` on: what it made of those that it did not reject, and which these are."""
    stage, name = member.stage, member.spec.name
    outputs = stage.infer(batch) if stage._takes_tensors else stage.forward(batch)
    refused = dict(batch.rejected)
    for row, why in refused.items():
        flow.batch.rejected[int(flow.rows[start + row])] = Refusal(why, name)
    left = np.delete(np.arange(len(batch)), list(refused)) if refused else np.arange(len(batch))
    return handed_over(outputs, name, member.outputs, len(batch), left), start + left


def _cut(whole: Batch, jobs: Rows, start: int, end: int) -> Batch:
    """Some rows of a batch; lists are copies, as the stage may change its own."""
    columns = {name: column[start:end] for name, column in whole.columns.items()}
    padded = {name: Padded(p.lengths[start:end], p.axes) for name, p in (whole.padded or {}).items()}
    rows = np.bincount(jobs[start:end], minlength=len(whole.job_rows)).tolist()
    return Batch(columns, tuple(rows), whole.job_meta, padded, whole.fresh, whole.arange, ended=whole.ended)


def _on_host(member: Member, columns: Mapping[str, Any]) -> dict[str, Any]:
    """As a plain stage takes them: read-only arrays in place of tensors."""
    plain = dict(columns)
    if any(not isinstance(column, np.ndarray) for column in columns.values()):
        plain = without_tensors(member.spec.name, columns)
    return {name: read_only(c) if isinstance(c, np.ndarray) else c for name, c in plain.items()}


@contextmanager
def _blaming(stage: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        blame(error, stage)
        raise
