"""How many rows a forward may have after the device ran out of memory: fewer at once, more again after a while."""

from __future__ import annotations

import logging

__all__ = ["RowCap", "fewer"]

log = logging.getLogger("torchrelay.worker")
# So many batches at the cap pass before twice as many rows are tried again; each time, it takes twice as many.
_PATIENCE, _MAX_PATIENCE = 16, 4096


def fewer(rows: int) -> int:
    """The power of two below: halves, of sizes that a compiled model knows."""
    return 1 << max(rows - 1, 1).bit_length() - 1


class RowCap:
    """`rows` is what a forward may have now, at most what the stage allows.

    From the first batch that does not fit until `settle()`, only notes are taken: a single row that fits nowhere must
    not make the batches of others small.
    """

    def __init__(self, max_rows: int) -> None:
        self.rows = max_rows
        self._max_rows = max_rows
        self._passed = 0
        self._too_many: list[int] = []
        self._good = 0
        self._patience = _PATIENCE

    def begin(self, rows: int) -> None:
        """More did not fit in a process before this one."""
        self.rows = min(self._max_rows, max(rows, 1))

    def fitted(self, rows: int) -> None:
        """A forward of so many rows passed."""
        self._passed = max(self._passed, rows)
        if self._too_many or rows < self.rows:
            return
        self._good += 1
        if self._good < self._patience:
            return
        self._good = 0
        if self.rows < self._max_rows:
            self.rows = min(2 * self.rows, self._max_rows)
            log.info("forwards of %d rows are tried again", self.rows)
        else:
            self._patience = _PATIENCE

    def too_many(self, rows: int) -> None:
        """A forward of so many rows did not fit, twice."""
        if not self._too_many:
            self._passed = 0
        self._too_many.append(rows)

    def settle(self) -> None:
        """All jobs of the batch that did not fit are done: what is to be learned from it?"""
        sizes = [rows for rows in self._too_many if rows > self._passed]
        # Where nothing passed, the rows were too large for any batch.
        if self._passed and sizes:
            self.rows = min(self.rows, fewer(min(sizes)))
            self._good = 0
            log.warning("out of memory with %d rows: forwards have %d at most for now", min(sizes), self.rows)
            self._patience = min(2 * self._patience, _MAX_PATIENCE)
        self._too_many.clear()
