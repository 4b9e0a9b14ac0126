"""Which rows of a chunk end their worker: found by halves, so that they cost no others. Pure.

A crash takes the whole process, so that a job of many rows tells nothing of the row at fault. The driver has pieces of
the chunk computed, each a job that writes nothing; of one that died too, its halves; and then the chunk without the
rows that were found, which are charged. What is written is one part, by that last job: a driver that dies meanwhile
leaves a chunk without a part, as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from torchrelay.config.graph import is_runs
from torchrelay.config.run_task import Charge
from torchrelay.errors import JobError, JobFailed
from torchrelay.queues.transitions import MAX_STRIKES

__all__ = ["Halving", "Span", "is_struck"]

Span = tuple[int, int]
"""Rows of a chunk, from this place to before that one."""
_DIED: Final = "WorkerDied"
# So many pieces that die before one passes: the stage is at fault, not a row.
_HOPELESS: Final = 8
# So many rows of a chunk can be found, each of which takes the depth of the tree.
_ROWS: Final = 8


def is_struck(error: JobError) -> bool:
    """Whether a job ended its workers at a stage of the pipeline: by a crash, out of memory or out of time. Reading
    takes a chunk's file as a whole, whichever rows are wanted."""
    return isinstance(error, JobFailed) and error.error_type == _DIED and not is_runs(error.stage)


@dataclass
class Halving:
    """The search in one chunk of so many rows. `left` are pieces whose outcome is not known yet.

    `patient` where the stage is known to work, as other chunks have passed it: then only rows that die alone, with none
    that passes, or many pieces, tell against it.
    """

    rows: int
    why: JobError
    patient: bool = False
    left: set[Span] = field(default_factory=set)
    charges: list[Charge] = field(default_factory=list)
    _died: int = 0
    _passed: int = 0

    @property
    def _most(self) -> int:
        """How many pieces may die."""
        return _ROWS * max(self.rows - 1, 1).bit_length() + _ROWS

    @property
    def hopeless(self) -> bool:
        """Whether it was given up, since all pieces die."""
        if self._passed:
            return False
        most = self._most if self.patient else _HOPELESS
        return self._died >= most or len(self.charges) >= _HOPELESS

    @property
    def over(self) -> bool:
        """Whether there is nothing more to learn."""
        return self.hopeless or not self.left

    def begin(self) -> list[Span]:
        """The first pieces to compute; none where the chunk is one row, which is charged."""
        return self._narrow((0, self.rows), self.why)

    def passed(self, span: Span) -> None:
        """None of these rows ends a worker by itself."""
        self.left.discard(span)
        self._passed += 1

    def died(self, span: Span, error: JobError) -> list[Span]:
        """These ended their worker; gives the pieces to compute next."""
        self.left.discard(span)
        self._died += 1
        return [] if self.hopeless else self._narrow(span, error)

    def _narrow(self, span: Span, error: JobError) -> list[Span]:
        start, end = span
        if end - start > 1 and self._died < self._most:
            middle = (start + end) // 2
            pieces = [(start, middle), (middle, end)]
            self.left.update(pieces)
            return pieces
        text = error.message
        if end - start > 1:
            text = f"one of these {end - start} rows, or several: {text}; the search was given up"
        self.charges.append(Charge(start, end, error.stage, error.error_type, text, MAX_STRIKES))
        return []
