"""Runs jobs through their stage in batches, and finds out whose fault it is when that fails.

A batch that raises is halved until the jobs that raise stand alone. A job with more rows than a batch takes several
forwards, and leaves as one. Of a table that keeps what it can (`on_error="keep"`), the rows that raise are found by
halving too, and become rejected rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.errors import DecodeError, InputError, RetryLater
from torchrelay.stages import Made
from torchrelay.stages.batch import join_rows
from torchrelay.workers.batching import Planner
from torchrelay.workers.work import J, Output, Rejection, Work

_FAULTS = (Exception, SystemExit)
# So many rows that raise alone, and none that passes: the stage is at fault, not the rows.
_HOPELESS_ROWS = 8


class Runs(Protocol):
    """What computes a batch; see `stages.Runner.run`."""

    def run(
        self,
        tables: Sequence[Mapping[str, Column]],
        rows: Sequence[int],
        meta: Sequence[Mapping[str, Any]],
        ended: Any = None,
    ) -> list[Made]: ...


class Meter(Protocol[J]):
    """Is told of every forward, and knows which jobs have ended, and when this worker is to end."""

    def started(self, works: Sequence[Work[J]]) -> None: ...
    def stopped(self, rows: int) -> None: ...
    def ended(self, works: Sequence[Work[J]]) -> Sequence[bool]: ...
    def goes_on(self, works: Sequence[Work[J]]) -> bool:
        """Whether a further forward for these jobs is of use. Asked between two of one claim."""
        ...


class Failed(NamedTuple):
    """Why a job has no output. `final`: trying it again is of no use; `after_s`: try it no sooner."""

    error: BaseException | None
    final: bool = False
    after_s: float | None = None
    error_type: str = ""
    message: str = ""


class GivenUp(NamedTuple):
    """Why a job has neither: it ended meanwhile, or this worker is to end. It is given back unharmed."""


Outcome = Output | Failed | GivenUp


def told(error: BaseException) -> str:
    """An error's text, whatever a stranger's `__str__` does."""
    try:
        return str(error)
    except Exception as fault:
        return f"(its text cannot be made: {type(fault).__name__})"


def compute(
    works: Sequence[Work[J]], runner: Runs, planner: Planner[J], meter: Meter[J]
) -> Iterator[list[tuple[Work[J], Outcome]]]:
    """Yields the jobs in groups as they finish. Use, or copy, a group's columns before asking for the next."""
    for i, batch in enumerate(planner.batches(works)):
        if i and not meter.goes_on(batch):
            yield [(w, GivenUp()) for w in batch]
        else:
            yield from _batch(batch, runner, planner, meter)


def _batch(
    works: Sequence[Work[J]], runner: Runs, planner: Planner[J], meter: Meter[J]
) -> Iterator[list[tuple[Work[J], Outcome]]]:
    if len(works) == 1 and works[0].rows and (works[0].incoming.keep or planner.too_large(works[0])):
        yield [(works[0], _Rows(works[0], runner, planner, meter).outcome())]
        return
    try:
        made = _forward(works, [w.table for w in works], [w.rows for w in works], runner, meter)
    except RetryLater as later:
        yield [(w, Failed(later, after_s=later.after_s)) for w in works]
    except _FAULTS as error:
        if len(works) == 1:
            yield [(works[0], Failed(error))]
            return
        middle = len(works) // 2
        for half in (works[:middle], works[middle:]):
            if meter.goes_on(half):
                yield from _batch(half, runner, planner, meter)
            else:
                yield [(w, GivenUp()) for w in half]
    else:
        yield [(w, _judged(w, m)) for w, m in zip(works, made, strict=True)]


def _forward(
    works: Sequence[Work[J]],
    tables: Sequence[Mapping[str, Column]],
    rows: Sequence[int],
    runner: Runs,
    meter: Meter[J],
) -> list[Made]:
    meter.started(works)
    try:
        return runner.run(tables, rows, [w.fields for w in works], lambda: meter.ended(works))
    finally:
        meter.stopped(sum(rows))


def _judged(work: Work[J], made: Made) -> Outcome:
    if not made.rejected:
        return Output(made.columns, made.counts, {})
    rejected = {i: Rejection("Rejected", why, 1) for i, why in made.rejected.items()}
    return _unless_refused(work, Output(made.columns, made.counts, rejected))


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
        return Failed(None, final=True, error_type=first.error_type, message=where + first.message)
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

    def __init__(self, work: Work[J], runner: Runs, planner: Planner[J], meter: Meter[J]) -> None:
        self._work = work
        self._runner = runner
        self._planner = planner
        self._meter = meter
        self._pieces: list[_Piece] = []
        self._raised: dict[int, Rejection] = {}
        self._first: BaseException | None = None

    def outcome(self) -> Outcome:
        work = self._work
        try:
            for start, end in self._planner.pieces(work, 0, work.rows):
                self._run(start, end, 1)
            if self._pieces or work.incoming.last:
                return _unless_refused(work, self._joined())
        except _Stop:
            return GivenUp()
        except RetryLater as later:
            return Failed(later, after_s=later.after_s)
        except _Hopeless:
            return Failed(self._first)
        except _FAULTS as error:
            return Failed(error)
        return Failed(self._first)

    def _run(self, start: int, end: int, tries: int) -> None:
        work = self._work
        if (start or tries > 1) and not self._meter.goes_on([work]):
            raise _Stop
        table: Mapping[str, Column] = work.table
        if end - start < work.rows:
            table = {name: column[start:end] for name, column in work.table.items()}
        try:
            (made,) = _forward([work], [table], [end - start], self._runner, self._meter)
        except RetryLater:
            raise
        except _FAULTS as error:
            self._first = self._first or error
            if not work.incoming.keep:
                raise
            self._narrow(start, end, tries, error)
        else:
            # The stage may use its buffers again for the next piece.
            self._pieces.append(_Piece(start, end - start, made if end - start == work.rows else own(made)))

    def _narrow(self, start: int, end: int, tries: int, error: BaseException) -> None:
        if end - start > 1:
            middle = (start + end) // 2
            self._run(start, middle, tries + 1)
            self._run(middle, end, tries + 1)
            return
        self._raised[start] = Rejection(type(error).__name__, told(error), tries)
        if not self._pieces and not self._work.incoming.last and len(self._raised) >= _HOPELESS_ROWS:
            raise _Hopeless

    def _joined(self) -> Output:
        if not self._pieces:
            # Every row raised; a run without rows tells what columns there would be.
            (nothing,) = self._runner.run([{n: c[:0] for n, c in self._work.table.items()}], [0], [{}])
            self._pieces.append(_Piece(0, 0, nothing))
        rejected = dict(self._raised)
        for piece in self._pieces:
            rejected.update((piece.start + i, Rejection("Rejected", why, 1)) for i, why in piece.made.rejected.items())
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


def own(made: Made) -> Made:
    """A copy: the stage may use its buffers again at the next call."""
    columns: dict[str, Column] = {}
    for name, column in made.columns.items():
        if isinstance(column, np.ndarray):
            columns[name] = column.copy()
        else:
            columns[name] = [v.copy() if isinstance(v, np.ndarray) else v for v in column]
    return made._replace(columns=columns)
