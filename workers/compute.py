"""Runs jobs through their stage in batches, and finds out whose fault it is when that fails.

A batch that raises is halved until the jobs that raise stand alone. A job with more rows than a batch takes several
forwards, and leaves as one. Of a table that keeps what it can (`on_error="keep"`), the rows that raise are found by
halving too, and become rejected rows. A batch that does not fit the device's memory is computed in smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.errors import DecodeError, InputError, RetryLater
from torchrelay.stages import Made
from torchrelay.stages.batch import Refusal, join_rows
from torchrelay.stages.faults import DeviceLost, blamed
from torchrelay.stages.outputs import own
from torchrelay.workers.batching import Planner
from torchrelay.workers.forwards import Forwards, Meter, NoRoom, Runs, told
from torchrelay.workers.row_cap import fewer
from torchrelay.workers.work import J, Output, Rejection, Work

__all__ = ["Failed", "GivenUp", "Meter", "Outcome", "Runs", "compute", "judged", "told"]

_FAULTS = (Exception, SystemExit)
# So many rows that raise alone, and none that passes: the stage is at fault, not the rows.
_HOPELESS_ROWS = 8


class Failed(NamedTuple):
    """Why a job has no output. `final`: trying it again is of no use; `after_s`: try it no sooner; `stage`: who is at
    fault, '' where only one could be."""

    error: BaseException | None
    final: bool = False
    after_s: float | None = None
    error_type: str = ""
    message: str = ""
    stage: str = ""


class GivenUp(NamedTuple):
    """Why a job has neither: it ended meanwhile, or this worker is to end. It is given back unharmed."""


Outcome = Output | Failed | GivenUp


def compute(
    works: Sequence[Work[J]], runner: Runs, planner: Planner[J], meter: Meter[J], fault: BaseException | None = None
) -> Iterator[list[tuple[Work[J], Outcome]]]:
    """Yields the jobs in groups as they finish. Use, or copy, a group's columns before asking for the next.

    `fault` is what these jobs raised together a moment ago, so that they need not be tried together again.

    Raises DeviceLost when no further forward can pass in this process.
    """
    forwards = Forwards(runner, planner, meter)
    for i, batch in enumerate(planner.batches(works)):
        # Meanwhile the device may have run out of memory.
        fits = sum(w.rows for w in batch) <= planner.max_rows
        for j, part in enumerate([batch] if fits else planner.batches(batch)):
            if (i or j) and not meter.goes_on(part):
                yield [(w, GivenUp()) for w in part]
                continue
            try:
                known = fault if len(part) == len(works) else None
                yield from _batch(part, forwards, planner.max_rows, known=known)
            finally:
                planner.cap.settle()


def _batch(
    works: Sequence[Work[J]],
    forwards: Forwards[J],
    max_rows: int,
    *,
    again: bool = True,
    known: BaseException | None = None,
) -> Iterator[list[tuple[Work[J], Outcome]]]:
    if len(works) == 1 and works[0].rows and (works[0].incoming.keep or forwards.planner.too_large(works[0], max_rows)):
        yield [(works[0], _Rows(works[0], forwards, max_rows).outcome())]
        return
    rows = [w.rows for w in works]
    try:
        if known is not None:
            raise known
        made = forwards.run(works, [w.table for w in works], rows, again=again)
    except RetryLater as later:
        yield [(w, Failed(later, after_s=later.after_s, stage=blamed(later))) for w in works]
        return
    except DeviceLost:
        raise
    except _FAULTS as error:
        fault = error
    else:
        yield [(w, judged(w, m)) for w, m in zip(works, made, strict=True)]
        return
    # Out of the except block: while an exception is being handled, it holds the memory of the calls it came through.
    if isinstance(fault, NoRoom) and sum(rows) > 1:
        max_rows = fewer(sum(rows))
        parts = forwards.planner.batches(works, max_rows)
    elif len(works) == 1:
        yield [(works[0], _failed(fault))]
        return
    else:
        parts = [list(works[: len(works) // 2]), list(works[len(works) // 2 :])]
    for part in parts:
        if forwards.meter.goes_on(part):
            yield from _batch(part, forwards, max_rows, again=False)
        else:
            yield [(w, GivenUp()) for w in part]


def _failed(fault: BaseException) -> Failed:
    if isinstance(fault, NoRoom):
        error = fault.error
        return Failed(error, error_type=type(error).__name__, message=str(fault), stage=blamed(error))
    return Failed(fault, stage=blamed(fault))


def judged(work: Work[J], made: Made) -> Outcome:
    """What becomes of a job of which this was made."""
    if not made.rejected:
        return Output(made.columns, made.counts, {}, made.beside)
    rejected = {i: _rejection(why) for i, why in made.rejected.items()}
    return _unless_refused(work, Output(made.columns, made.counts, rejected, made.beside))


def _rejection(why: str) -> Rejection:
    return Rejection("Rejected", why, 1, why.stage if isinstance(why, Refusal) else "")


def _unless_refused(work: Work[J], output: Output) -> Outcome:
    """A job that is not to go on without some of its rows fails with the first of them."""
    if output.rejected and not work.incoming.keep:
        number, first = min(output.rejected.items())
        try:
            # By the number that the submitter knows; of a row that was submitted alone, which of those made of it.
            row = int(work.entry_rows()[number]) if work.submitted > 1 else number
        except DecodeError as error:
            return Failed(error)
        where = f"row {row}: " if work.submitted > 1 or work.rows > 1 else ""
        message = where + first.message
        return Failed(None, final=True, error_type=first.error_type, message=message, stage=first.stage)
    return output


class _Hopeless(Exception):
    """Nothing passes."""


class _Stop(Exception):
    """Nobody waits for the rest."""


@dataclass(slots=True)
class _Piece:
    start: int
    rows: int
    made: Made


class _Rows(Generic[J]):
    """One job, in pieces of its rows."""

    def __init__(self, work: Work[J], forwards: Forwards[J], max_rows: int) -> None:
        self._work = work
        self._forwards = forwards
        self._max_rows = max_rows
        self._pieces: list[_Piece] = []
        self._raised: dict[int, Rejection] = {}
        self._first: BaseException | None = None

    def outcome(self) -> Outcome:
        work = self._work
        try:
            for start, end in self._cut():
                self._run(start, end, 1)
                # The rows that are left are as large, most likely.
                self._forwards.planner.cap.settle()
            if self._pieces or work.incoming.last:
                return _unless_refused(work, self._joined())
        except _Stop:
            return GivenUp()
        except RetryLater as later:
            return Failed(later, after_s=later.after_s, stage=blamed(later))
        except DeviceLost:
            raise
        except _Hopeless:
            pass
        except _FAULTS as error:
            return _failed(error)
        assert self._first is not None  # no piece passed, or it was hopeless
        return _failed(self._first)

    def _cut(self) -> Iterator[tuple[int, int]]:
        planner = self._forwards.planner
        for start, end in planner.pieces(self._work, 0, self._work.rows, self._max_rows):
            if end - start <= planner.max_rows:
                yield start, end
            else:
                yield from planner.pieces(self._work, start, end)

    def _run(self, start: int, end: int, tries: int) -> None:
        work = self._work
        if (start or tries > 1) and not self._forwards.meter.goes_on([work]):
            raise _Stop
        table: Mapping[str, Column] = work.table
        if end - start < work.rows:
            table = {name: column[start:end] for name, column in work.table.items()}
        try:
            (made,) = self._forwards.run([work], [table], [end - start], again=tries == 1)
        except (RetryLater, DeviceLost):
            raise
        except _FAULTS as error:
            fault = error
        else:
            # The stage may use its buffers again for the next piece.
            self._pieces.append(_Piece(start, end - start, made if end - start == work.rows else own(made)))
            return
        self._first = self._first or fault
        self._narrow(start, end, tries, fault)

    def _narrow(self, start: int, end: int, tries: int, fault: BaseException) -> None:
        work = self._work
        if isinstance(fault, NoRoom) and end - start > 1:
            parts = list(self._forwards.planner.pieces(work, start, end, fewer(end - start)))
        elif not work.incoming.keep:
            raise fault
        elif end - start > 1:
            parts = [(start, (start + end) // 2), ((start + end) // 2, end)]
        else:
            self._reject(start, fault)
            return
        for first, last in parts:
            self._run(first, last, tries + 1)

    def _reject(self, row: int, fault: BaseException) -> None:
        error = fault.error if isinstance(fault, NoRoom) else fault
        # The forwards with others, by which it was found, are no attempts at this row.
        attempts = self._work.incoming.attempts + 1
        self._raised[row] = Rejection(type(error).__name__, told(fault), attempts, blamed(error))
        if not self._pieces and not self._work.incoming.last and len(self._raised) >= _HOPELESS_ROWS:
            raise _Hopeless

    def _joined(self) -> Output:
        if not self._pieces:
            # Every row raised; a run without rows tells what columns there would be.
            (nothing,) = self._forwards.runner.run([{n: c[:0] for n, c in self._work.table.items()}], [0], [{}])
            self._pieces.append(_Piece(0, 0, nothing))
        rejected = dict(self._raised)
        for piece in self._pieces:
            rejected.update((piece.start + i, _rejection(why)) for i, why in piece.made.rejected.items())
        if len(self._pieces) == 1:
            columns: dict[str, Column] = self._pieces[0].made.columns
        else:
            # A piece of which nothing is left may not even know its columns.
            full = [p.made.columns for p in self._pieces if p.rows > len(p.made.rejected)]
            full = full or [self._pieces[0].made.columns]
            odd = next((part for part in full if part.keys() != full[0].keys()), None)
            if odd is not None:
                raise InputError(
                    f"of one job's rows the stage returned {', '.join(full[0])} for some, and {', '.join(odd)} for "
                    "others; return the same columns each time"
                )
            columns = {name: join_rows([part[name] for part in full]) for name in full[0]}
        return Output(columns, self._counts(), rejected)

    def _counts(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        counts = np.zeros(self._work.rows, np.int64)
        for piece in self._pieces:
            if piece.made.counts is None:
                return None
            counts[piece.start : piece.start + piece.rows] = piece.made.counts
        return counts
