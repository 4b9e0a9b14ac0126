"""Readers that go forward only, kept between chunks.

Some files have no way into their middle: what is compressed, CSV with line breaks in quotes, a tar, a row group. The
reader of one chunk then stands where the next begins. Kept here, it goes on from there, so that a worker unpacks a file
once, however many chunks it was cut into. A chunk that lies before every kept reader gets a new one, from the start.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

__all__ = ["CURSORS", "Cursor", "Cursors"]

# Each holds an open file, and of a Parquet file also a row group.
_MOST = 8


class Cursor(Protocol):
    """`position` is the first place that was not read yet, in the unit of the chunks."""

    position: int

    def close(self) -> None: ...


C = TypeVar("C", bound=Cursor)


class Cursors:
    """At most `most` idle readers, least recently used first. Any thread may borrow one; it is then its alone."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._idle: list[tuple[Any, Any]] = []
        self._pid = os.getpid()

    @contextmanager
    def borrow(self, key: object, start: int, make: Callable[[], C]) -> Iterator[C]:
        """The kept reader of this key that is nearest before `start`, else a new one. Kept unless the block raises."""
        cursor = self._take(key, start) or make()
        try:
            yield cursor
        except BaseException:
            cursor.close()
            raise
        self._give(key, cursor)

    def close(self) -> None:
        """Closes all idle readers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, cursor in idle:
            cursor.close()

    def _take(self, key: object, start: int) -> Any:
        with self._lock:
            if self._pid != os.getpid():
                # A forked child shares the files' offsets with its parent.
                self._idle, self._pid = [], os.getpid()
            fit = [i for i, (k, c) in enumerate(self._idle) if k == key and c.position <= start]
            if not fit:
                return None
            return self._idle.pop(max(fit, key=lambda i: self._idle[i][1].position))[1]

    def _give(self, key: object, cursor: Any) -> None:
        with self._lock:
            self._idle.append((key, cursor))
            old = self._idle[: -self._most]
            del self._idle[: -self._most]
        for _, each in old:
            each.close()


CURSORS = Cursors()
# Once modules are torn down, a reader cannot close itself any more.
atexit.register(CURSORS.close)
