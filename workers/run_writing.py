"""`@write`: writes one part file of each chunk, when all that the pipeline made of it is there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import CHUNK, RESULT, RunGraph, is_runs
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import WriteOptions
from torchrelay.errors import ConfigError, RetryLater, UsageError
from torchrelay.stages import Batch, Stage, StageContext
from torchrelay.stages.reading.kept import unpack_table
from torchrelay.stages.writing import PartId, PartRows, RowError, open_output, write_part
from torchrelay.stages.writing.plain import key_value
from torchrelay.workers.gathering import FAILED, PARTS, FailedRow
from torchrelay.workers.run_columns import AT, HELD, KEPT, REFUSED, ROW, SOURCE, warm_up

if TYPE_CHECKING:
    from torchrelay.stages.writing.found import Output
    from torchrelay.workers.run_stages import StillHeld

__all__ = ["Write"]


class Write(Stage):
    """One chunk a call: its columns come whole (`workers.gathering`), and a part's name and counts are returned. A task
    of a span writes nothing: that it came so far is all that was asked."""

    def __init__(self, twin: Pipeline, still_held: StillHeld, writer: str) -> None:
        """`writer` is the one class that may be imported, as `file.py:Writer`."""
        self._writer = writer
        self._types = cast(RunGraph, twin.graph).written_types
        self._base_dir = twin.base_dir
        self._still_held = still_held
        self._output = lru_cache(8)(self._open)

    def _open(self, options: WriteOptions) -> Output:
        if ":" in options.format and options.format != self._writer:
            raise ConfigError(
                f"format {options.format!r:.120} is a class, and workers import none that a job names: start those of "
                f"@write with TORCHRELAY_RUN_WRITER={options.format:.120}"
            )
        return open_output(options, self._base_dir)

    def load(self, context: StageContext) -> None:
        """What most formats need is there before the first chunk waits for it."""
        warm_up()

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        task = RunTask.decode(batch[CHUNK][0])
        if task.span is not None:
            failed = len(batch[FAILED][0]) + len(batch[REFUSED][0])
            return {RESULT: [{"name": "", "rows": len(batch[SOURCE][0]), "failed": failed}]}
        held = batch.meta[0][HELD]
        part = PartId(task.run, task.chunk.number, task.round)
        try:
            output = self._output(task.write)
            written = write_part(output, part, held.fence, self._rows(task, batch), lambda: self._still_held(held))
        except UsageError as error:
            # Names that clash, another run's file: that is as bad the next time.
            batch.reject(0, f"{type(error).__name__}: {error}")
            return {RESULT: [None]}
        if written is None:
            raise RetryLater(0, f"chunk {task.chunk.number} was taken over by another worker before it was written")
        return {RESULT: [written._asdict()]}

    def _rows(self, task: RunTask, batch: Batch) -> PartRows:
        kept = unpack_table(batch[KEPT][0]) if AT in batch else None
        failed = [_row_error(row, kept, task.write.key) for row in batch[FAILED][0]]
        refused = [RowError(*values) for values in batch[REFUSED][0]]
        return PartRows(
            columns={name: batch[name][0] for name in batch if not is_runs(name)},
            sources=batch[SOURCE][0],
            rows=batch[ROW][0],
            parts=batch[PARTS][0],
            kept=None if kept is None else kept.take(batch[AT][0]),
            errors=sorted([*failed, *refused], key=lambda e: (e.source, e.row)),
            types=self._types,
        )


def _row_error(failed: FailedRow, kept: Any, key: str | None) -> RowError:
    why, of = failed
    value = None if kept is None or key is None else key_value(kept, key, of[AT])
    return RowError(of[SOURCE], of[ROW], why.stage, why.error_type, why.message, why.attempts, value)
