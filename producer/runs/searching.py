"""The chunks of a run that end their workers, and the jobs by which the rows at fault are found. See `halving`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torchrelay.errors import JobError, TorchrelayError
from torchrelay.producer.runs.halving import Halving, Span, is_struck
from torchrelay.producer.runs.limiting import count_rows
from torchrelay.producer.runs.works import Work

__all__ = ["Searches", "Step"]

log = logging.getLogger("torchrelay.runs")


class Step(NamedTuple):
    """What follows: jobs to submit next; or `failed`, the chunk fails as a whole for this reason."""

    works: tuple[Work, ...] = ()
    failed: JobError | None = None


class Searches:
    """Each chunk is searched once. After one in which nothing passed the stage is taken to be at fault, and no further
    chunk is searched."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], Halving] = {}
        self._hopeless = False

    def begin(self, work: Work, error: JobError, *, patient: bool) -> Step:
        """A chunk's job failed for good. `patient`: others have passed."""
        if self._hopeless or work.place in self._of or not is_struck(error):
            return Step(failed=error)
        chunk, only = work.task.chunk, work.task.only
        try:
            rows = count_rows(chunk) if only is None else len(only)
        except (TorchrelayError, OSError) as unread:
            log.info("the rows of chunk %d are not counted: %s", chunk.number, unread)
            rows = 0
        if rows < 1:
            return Step(failed=error)
        log.warning("chunk %d of %s: %s; its %d rows are searched", chunk.number, chunk.path, error, rows)
        self._of[work.place] = search = Halving(rows, error, patient)
        return self._next(work, search, search.begin())

    def ended(self, piece: Work, error: JobError | None) -> Step:
        """The job of a piece ended. One that failed otherwise than by death is left to the job that does the chunk."""
        search, span = self._of[piece.place], piece.task.span
        assert span is not None  # it is a piece
        if search.hopeless:
            return Step()  # the chunk has failed meanwhile
        if error is None or not is_struck(error):
            search.passed(span)
            return self._next(piece, search, [])
        return self._next(piece, search, search.died(span, error))

    def _next(self, work: Work, search: Halving, pieces: Sequence[Span]) -> Step:
        """These pieces; when nothing is left to be learnt, the chunk without the rows that were found."""
        task = replace(work.task, span=None)
        if search.hopeless:
            log.warning("chunk %d: no piece of it passes; no further chunk is searched", task.chunk.number)
            self._hopeless = True
            return Step(failed=search.why)
        if search.over:
            return Step((Work(replace(task, charges=tuple(sorted(search.charges))), work.rows),))
        return Step(tuple(Work(replace(task, span=span), work.rows) for span in pieces))
