"""`@read`: makes the rows of a chunk, as the pipeline's stages know them, of its descriptor."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.ragged import take_rows
from torchrelay.config.run_graph import CHUNK, READ, ROWS, RunGraph
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import MEMORY
from torchrelay.errors import InputError
from torchrelay.queues import codec
from torchrelay.stages import Batch, Stage, StageContext
from torchrelay.stages.outputs import ReadRows
from torchrelay.stages.reading import BadRow, ReadResult, read_chunk
from torchrelay.stages.reading.kept import pack_table
from torchrelay.stages.reading.pushed import from_columns
from torchrelay.stages.reading.raw import ids
from torchrelay.stages.writing.plain import key_value
from torchrelay.workers.run_columns import AT, KEPT, REFUSED, ROW, SOURCE, warm_up

__all__ = ["Read"]

_NOTHING = ReadResult({}, ids(()), ids(()))


class Read(Stage):
    """One chunk a call. What cannot be read at all fails for good; a row that cannot be read is only told of."""

    def __init__(self, twin: Pipeline) -> None:
        self._types = cast(RunGraph, twin.graph).base.input

    def load(self, context: StageContext) -> None:
        """What most formats need is there before the first chunk waits for it."""
        warm_up()

    def forward(self, batch: Batch) -> ReadRows:
        task = RunTask.decode(batch[CHUNK][0])
        try:
            found, refused = _selected(self._read(task, batch[ROWS][0]), task)
        except InputError as error:
            # Its file is gone or damaged: that is as bad the next time.
            batch.reject(0, f"{type(error).__name__}: {error}")
            found, refused = _NOTHING, []
        own: dict[str, Column] = {SOURCE: found.sources, ROW: found.rows}
        beside: dict[str, Column] = {}
        if found.kept is not None:
            own[AT], beside[KEPT] = np.arange(len(found)), [pack_table(found.kept)]
        # As the values of a RowError, which knows the stage and how often it was tried.
        refused += [[bad.source, bad.row, READ, bad.error, bad.text, 1, None] for bad in found.bad]
        return ReadRows(found.table, [len(found)], own, {REFUSED: [refused], **beside})

    def _read(self, task: RunTask, rows: bytes | None) -> ReadResult:
        if task.chunk.format != MEMORY:
            return read_chunk(task.chunk, task.read, self._types)
        return from_columns(codec.decode(rows or b""))


def _selected(found: ReadResult, task: RunTask) -> tuple[ReadResult, list[list[Any]]]:
    """The rows that the task is about; and those that it charges, each as the values of a RowError."""
    if task.only is None and task.span is None and not task.charges:
        return found, []
    pairs = list(zip(found.sources.tolist(), found.rows.tolist(), strict=True))
    order = sorted({*pairs, *((bad.source, bad.row) for bad in found.bad)})
    if task.only is not None:
        asked = set(task.only)
        order = [pair for pair in order if pair in asked]
    wanted = set(order if task.span is None else order[slice(*task.span)])
    at_of, refused = {pair: at for at, pair in enumerate(pairs)}, []
    for start, end, *why in task.charges:
        for pair in order[start:end]:
            # One that could not be read has a reason of its own.
            if (at := at_of.get(pair)) is not None and pair in wanted:
                key = None if found.kept is None or task.read.key is None else key_value(found.kept, task.read.key, at)
                refused.append([*pair, *why, key])
                wanted.discard(pair)
    return _taken(found, [at for at, pair in enumerate(pairs) if pair in wanted], wanted), refused


def _taken(found: ReadResult, at: list[int], wanted: set[tuple[int, int]]) -> ReadResult:
    chosen = np.asarray(at, np.int64)
    bad: tuple[BadRow, ...] = tuple(row for row in found.bad if (row.source, row.row) in wanted)
    return ReadResult(
        {name: take_rows(column, chosen) for name, column in found.table.items()},
        found.sources[chosen],
        found.rows[chosen],
        None if found.kept is None else found.kept.take(chosen),
        bad,
        found.nbytes,
    )
