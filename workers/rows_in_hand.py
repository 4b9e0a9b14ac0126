"""How many rows one worker holds, from the claim until they were computed and given on or back."""

from __future__ import annotations

import sys
import threading

__all__ = ["RowsInHand"]


class RowsInHand:
    """Counts rows; `most` bounds them, None does not. One thread calls `took` and `wait`, `left` may be another's."""

    def __init__(self, most: int | None = None) -> None:
        self.bounded = most is not None
        self._most = sys.maxsize if most is None else most
        self._rows = 0
        self._changed = threading.Condition()

    @property
    def room(self) -> int:
        """How many more may be taken; less than none after a job that is larger than the bound."""
        return self._most - self._rows

    def took(self, rows: int) -> None:
        """So many came."""
        with self._changed:
            self._rows += rows

    def left(self, rows: int) -> None:
        """So many are done with."""
        with self._changed:
            self._rows -= rows
            self._changed.notify_all()

    def wait(self, rows: int, timeout_s: float) -> None:
        """Blocks until so many may be taken, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.room >= rows, timeout_s)
