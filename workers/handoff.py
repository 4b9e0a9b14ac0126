"""A bounded queue between two threads of a worker that ends with both of them: who waits on either side is woken."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Handoff(Generic[T]):
    """Holds at most `most` items. After `close`, nothing more is taken in, and what is there can still be taken out."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def put(self, item: T) -> bool:
        """Waits for room; False when nobody takes it any more."""
        with self._changed:
            while len(self._items) >= self._most and not self.closed:
                self._changed.wait()
            if self.closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def put_first(self, item: T) -> None:
        """Back to the front, also when it is full or closed: what was taken out already, and is not done with."""
        with self._changed:
            self._items.appendleft(item)
            self._changed.notify_all()

    def get(self, timeout_s: float | None = None) -> T | None:
        """The next item; None after `timeout_s` without one, or when there will be none."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._items and not self.closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    @property
    def empty(self) -> bool:
        """Whether nothing is there just now."""
        with self._changed:
            return not self._items

    @property
    def over(self) -> bool:
        """Whether it is closed and empty."""
        with self._changed:
            return self.closed and not self._items
