"""Whether a worker is to end, for those that look now and then and for those that wait."""

from __future__ import annotations

import os
from typing import Any


class Stop:
    """False until `set()`, which a signal handler or any thread may call; `fileno()` is readable from then on."""

    def __init__(self) -> None:
        self._flag = False
        self._reader, self._writer = os.pipe()

    def __call__(self) -> bool:
        return self._flag

    def fileno(self) -> int:
        return self._reader

    def set(self, *_: Any) -> None:
        if not self._flag:
            self._flag = True
            os.write(self._writer, b".")
