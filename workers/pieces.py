"""Jobs cut into parts for several batches, and put together again: rows of many jobs share a batch by their length.

`cut` decides which rows are computed together, `Gathering` collects what was made of one job's parts. No I/O.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.ragged import take_rows
from torchrelay.errors import InputError
from torchrelay.stages import Made
from torchrelay.stages.batch import join_rows
from torchrelay.workers.batching import Planner
from torchrelay.workers.work import Index, J, Work


class Gathering(Generic[J]):
    """One job that is computed in several batches. It is `broken` once one of them failed or was given up: then the job
    is computed as a whole, or given back, and what comes of its other parts counts for nothing."""

    def __init__(self, work: Work[J]) -> None:
        self.work = work
        self.broken = False
        self._lock = threading.Lock()
        self._missing = work.rows
        self._made: list[tuple[Index, Made]] = []

    def breaks(self) -> bool:
        """Breaks it; True for the first who says so."""
        with self._lock:
            first, self.broken = not self.broken, True
            return first

    def add(self, index: Index, made: Made) -> bool:
        """Takes what was made of some rows; True when all are there."""
        self._made.append((index, made))
        self._missing -= len(index)
        return self._missing == 0 and not self.broken

    def whole(self) -> Made:
        """What was made of the job. Raises InputError where parts came with different columns."""
        rejected: dict[int, str] = {}
        kept: list[Index] = []
        full: list[dict[str, Column]] = []
        for index, made in self._made:
            rejected.update((int(index[i]), why) for i, why in made.rejected.items())
            left = np.delete(index, list(made.rejected))
            if len(left):
                kept.append(left)
                full.append(made.columns)
        if not full:
            return Made(self._made[0][1].columns, None, rejected)
        odd = next((columns for columns in full if columns.keys() != full[0].keys()), None)
        if odd is not None:
            raise InputError(
                f"of one job's rows the stage returned {', '.join(full[0])} for some, and {', '.join(odd)} for others; "
                "return the same columns each time"
            )
        order = np.argsort(np.concatenate(kept))
        columns = {name: take_rows(join_rows([part[name] for part in full]), order) for name in full[0]}
        return Made(columns, None, rejected)


class Part(NamedTuple, Generic[J]):
    """Some rows of a job, by their rising numbers; without a gathering, all of them."""

    work: Work[J]
    chosen: Index | None = None
    gathering: Gathering[J] | None = None

    @property
    def rows(self) -> int:
        return self.work.rows if self.chosen is None else len(self.chosen)

    @property
    def table(self) -> Mapping[str, Column]:
        chosen = self.chosen
        if chosen is None:
            return self.work.table
        first, end = int(chosen[0]), int(chosen[-1]) + 1
        if end - first == len(chosen):
            return {name: column[first:end] for name, column in self.work.table.items()}
        return {name: take_rows(column, chosen) for name, column in self.work.table.items()}


def cut(works: Sequence[Work[J]], planner: Planner[J]) -> list[list[Part[J]]]:
    """The jobs in batches.

    Of a stage that puts rows of like length together, rows of all jobs are mixed; else a job with more rows than a
    batch holds is cut in order. Of a table that keeps what it can, too: where a part fails, `compute` takes the whole
    job and finds out which rows it is.
    """
    mixing = [w for w in works if planner.mixes(w)]
    if len(mixing) > 1 or (mixing and planner.too_large(mixing[0])):
        rest = [w for w in works if not planner.mixes(w)]
        return [*_mixed(mixing, planner), *([Part(w) for w in batch] for batch in planner.batches(rest))]
    return [parts for batch in planner.batches(works) for parts in _in_order(batch, planner)]


def _in_order(batch: Sequence[Work[J]], planner: Planner[J]) -> list[list[Part[J]]]:
    """A batch as it is; one that is a single job of too many rows, in pieces."""
    work = batch[0]
    if len(batch) > 1 or not planner.too_large(work):
        return [[Part(w) for w in batch]]
    gathering = Gathering(work)
    return [[Part(work, np.arange(a, b), gathering)] for a, b in planner.pieces(work, 0, work.rows)]


def _mixed(works: Sequence[Work[J]], planner: Planner[J]) -> list[list[Part[J]]]:
    keys = np.concatenate([planner.row_costs(w) for w in works])
    owners = np.repeat(np.arange(len(works)), [w.rows for w in works])
    numbers = np.concatenate([np.arange(w.rows) for w in works])
    order = np.argsort(keys, kind="stable")
    gatherings = [Gathering(w) for w in works]
    batches: list[list[Part[J]]] = []
    for start, end in planner.runs(keys[order]):
        rows = np.sort(order[start:end])  # by job, and in the order of its rows
        bounds = np.flatnonzero(np.diff(owners[rows])) + 1
        batch: list[Part[J]] = []
        for part in np.split(rows, bounds):
            owner = int(owners[part[0]])
            whole = len(part) == works[owner].rows
            batch.append(Part(works[owner]) if whole else Part(works[owner], numbers[part], gatherings[owner]))
        batches.append(batch)
    # The job that is first in rank is in the first of its batches first.
    first = {id(w): i for i, w in enumerate(works)}
    return sorted(batches, key=lambda batch: min(first[id(p.work)] for p in batch))
