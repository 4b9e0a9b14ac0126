"""From threads into an event loop, many calls with one wake."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Bridge:
    """Calls functions in a loop, in the order in which any thread posted them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._woken = False

    def post(self, fn: Callable[..., object], *args: Any) -> None:
        """Has `fn(*args)` called in the loop; nothing where the loop is closed. From any thread."""
        self._calls.append((fn, args))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                # The loop is closed: nobody waits there any more.
                self._calls.clear()
                self._woken = False

    def _drain(self) -> None:
        # Lowered first: what is posted from here on either is seen below or wakes the loop again.
        self._woken = False
        while self._calls:
            fn, args = self._calls.popleft()
            try:
                fn(*args)
            except Exception as error:
                self._loop.call_exception_handler({"message": f"{fn!r} raised", "exception": error})
