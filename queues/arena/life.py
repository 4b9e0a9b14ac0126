"""Files that say that a process lives, by a lock that the kernel takes off when it ends, whatever ends it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torchrelay.queues.arena.locks import keep, let_go, try_lock
from torchrelay.queues.arena.segment import is_own_file, remove

__all__ = ["LifeSign", "Watched", "remove_dead"]


class LifeSign:
    """This process's own file at `path`, locked until it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        made = path.with_name(path.name + ".new")
        self._descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try_lock(self._descriptor)
        # Under its name it is locked from the first moment: nobody takes this process for a dead one.
        made.rename(path)
        keep(self._descriptor)

    def is_there(self) -> bool:
        """Whether the file still has its name: who looks for it else takes this process for dead."""
        return os.fstat(self._descriptor).st_nlink > 0

    def close(self) -> None:
        """Takes the file away."""
        remove(self._path)
        let_go(self._descriptor)


class Watched:
    """Another process's file. Thread-safe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._open = True

    @classmethod
    def find(cls, path: Path) -> Watched | None:
        """None where there is no such file of this user."""
        if not is_own_file(path):
            return None
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError:
            return None  # it was closed meanwhile

    def lives(self) -> bool:
        """Whether its process still holds the lock."""
        with self._lock:
            if self._open and try_lock(self._descriptor, shared=True):
                self._close()
            return self._open

    def close(self) -> None:
        """Looks no more: it counts as dead from here on."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._descriptor)


def remove_dead(folder: Path, suffix: str) -> None:
    """Removes the files with this suffix whose processes are gone."""
    for path in folder.glob(f"*{suffix}"):
        watched = Watched.find(path)
        if watched is not None:
            if not watched.lives():
                remove(path)
            watched.close()
