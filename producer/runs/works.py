"""What a run has to do, one job after the other: chunks that have no part yet, rows that failed at their last try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torchrelay.config.columns import Types
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import Chunk
from torchrelay.producer.runs.folder import Retry, RunFolder
from torchrelay.producer.runs.memory import push_chunks
from torchrelay.producer.runs.planning import plan_chunks
from torchrelay.queues import codec
from torchrelay.stages.reading.pushed import as_columns

__all__ = ["Work", "planned", "pushed", "works_of"]


class Work(NamedTuple):
    """One job of a run. `rows` are the encoded rows of a chunk that lies in the driver's memory; `attempts` counts how
    often it was submitted and failed through no fault of its rows."""

    task: RunTask
    rows: bytes | None = None
    attempts: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """(chunk, round), by which its part is known."""
        return self.task.chunk.number, self.task.round


Chunks = Callable[[], Iterator[tuple[Chunk, bytes | None]]]
"""Gives what is to do of the run's plan, from its beginning."""


def planned(folder: RunFolder, root: str | None) -> Iterator[tuple[Chunk, bytes | None]]:
    """Every chunk of a run that reads files. `root` is the folder below which images are named."""
    plan, number = folder.manifest.plan, 0
    mark = plan.read.delimiter
    # With a limit all files are one plan: what was added behind them counts against what is left of it.
    batches = folder.batches if plan.limit is None else [list(plan.sources)]
    for batch in batches:
        for chunk in plan_chunks(batch, folder.size, limit=plan.limit, root=root, first_number=number, delimiter=mark):
            yield chunk, None
            number = chunk.number + 1


def pushed(folder: RunFolder, data: Any, types: Types) -> Iterator[tuple[Chunk, bytes | None]]:
    """Every chunk of an input that lies in this process's memory, with its rows; but for those that are done."""
    plan = folder.manifest.plan
    done = folder.done() - {retry.chunk for retry in folder.retries()}
    for chunk, found in push_chunks(data, plan.read, types, folder.size, limit=plan.limit, done=done):
        yield chunk, codec.encode(as_columns(found))


def works_of(folder: RunFolder, chunks: Chunks, *, retry_errors: bool) -> Iterator[Work]:
    """Of each chunk without a part its job; with `retry_errors`, of one with failed rows a job for those alone."""
    read, write = folder.manifest.plan.read, folder.output.options
    done = folder.done()
    again: dict[int, Retry] = {r.chunk: r for r in folder.retries()} if retry_errors else {}
    for chunk, rows in chunks():
        task = RunTask(folder.run, chunk, read, write)
        if chunk.number not in done:
            yield Work(task, rows)
        elif (retry := again.get(chunk.number)) is not None:
            yield Work(RunTask(folder.run, chunk, read, write, retry.round, retry.rows), rows)
