"""The unfinished files of one part: under temporary names, locked while their writer lives, gone when it is done.

The kernel gives a lock back when its holder ends, whatever ends it, and keeps it while the holder is only stopped. So
whoever cleans up takes files of the dead alone (`remove_dead`).
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import Self

from torchrelay.stages.writing.stores import TMP, LocalStore, Store, disk_trouble

__all__ = ["NO_LOCKS", "Staging", "remove_dead"]

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_TRIES = 100


class Staging:
    """A context in which files are made. They lie beside the output where that is local: a link does not leave a file
    system."""

    def __init__(self, store: Store, stem: str, fence: str) -> None:
        self._store = store
        self._begin = f".{stem}.{fence}"
        self._made: dict[Path, int | None] = {}
        self._elsewhere: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        if not isinstance(self._store, LocalStore):
            self._elsewhere = tempfile.TemporaryDirectory(prefix="torchrelay-part-")
        return self

    def __exit__(self, *_: object) -> None:
        for path, descriptor in self._made.items():
            path.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)
        self._made.clear()
        if self._elsewhere is not None:
            self._elsewhere.cleanup()

    def make(self, suffix: str) -> Path:
        """A new empty file whose name ends so. Who removes the files of the dead takes it from here on for living."""
        if self._elsewhere is not None:
            folder = Path(self._elsewhere.name)
        else:
            assert isinstance(self._store, LocalStore)
            folder = self._store.tmp_folder()
        for _ in range(_TRIES):
            path = folder / f"{self._begin}.{secrets.token_hex(6)}{suffix}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            locked = _lock(descriptor)
            if locked is None:
                os.close(descriptor)
                self._made[path] = None
                return path
            # A cleaner may have met it before it was locked, and taken it for one of a dead writer.
            if locked and os.fstat(descriptor).st_nlink == 1:
                self._made[path] = descriptor
                return path
            os.close(descriptor)
        raise FileExistsError(f"{folder}: new files are taken away again at once")

    def sync(self) -> None:
        """Puts all files on the disk."""
        for path in self._made:
            # Not the locked descriptor: a writer may have put another file under this name.
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def remove_dead(store: LocalStore, keep: Set[str] = frozenset()) -> int:
    """Removes the temporary files whose writers are gone, but for those with these names; how many it were."""
    removed = 0
    with disk_trouble(store.where):
        try:
            found = list(os.scandir(store.path(TMP)))
        except FileNotFoundError:
            return 0
        for entry in found:
            if entry.name in keep or not entry.is_file(follow_symlinks=False):
                continue
            try:
                descriptor = os.open(entry.path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                if _lock(descriptor):
                    os.unlink(entry.path)
                    removed += 1
            except FileNotFoundError:
                pass  # its writer was faster
            finally:
                os.close(descriptor)
    return removed


def _lock(descriptor: int) -> bool | None:
    """Whether the file is locked now; None where there are no locks, and nobody can tell who is dead."""
    # Here, since Windows has no such module: there a driver writes what it makes at the end of a run.
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True
