"""Which blocks a reader is using now: a list that it publishes, and the owner of the blocks looks at.

A block that its readers released needs no such list. One that is taken back by force, because its job ended or its
bytes are kept in Redis as well, is used again only when no living reader lists it. A list counts while its reader holds
the file's lock, so a killed reader keeps nothing.
"""

from __future__ import annotations

import mmap
import os
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np

from torchrelay.queues.arena.locks import keep, let_go, try_lock
from torchrelay.queues.arena.segment import is_own_file, remove
from torchrelay.queues.keys import new_token

MAX_HOLDS = 4096
_WORDS = 2
_SUFFIX = ".held"

BlockKey = tuple[int, int]
"""An arena's id and, in one number, segment and slot: what one entry of a list says."""


def block_key(arena: str, segment: int, slot: int) -> BlockKey:
    """How lists name a block."""
    return _arena_word(arena), (segment << 32 | slot) + 1


@lru_cache(maxsize=1024)
def _arena_word(arena: str) -> int:
    return int.from_bytes(arena.encode("ascii"), "little")


class Holds:
    """One reader's own list. Entries are counted: the same block may be in use twice. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        name = new_token(8)
        made = folder / f"{name}.new"
        self._path = folder / f"{name}{_SUFFIX}"
        self._descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try_lock(self._descriptor)
            os.posix_fallocate(self._descriptor, 0, MAX_HOLDS * _WORDS * 8)
        except OSError:
            made.unlink()
            os.close(self._descriptor)
            raise
        # Under its name it is locked from the first moment: an owner that looks takes no new reader for a dead one.
        made.rename(self._path)
        keep(self._descriptor)
        self._map = mmap.mmap(self._descriptor, 0)
        self._words = memoryview(self._map).cast("Q")
        self._free = list(range(MAX_HOLDS - 1, -1, -1))
        self._places: dict[BlockKey, list[int]] = {}
        self._lock = threading.Lock()

    def add(self, key: BlockKey) -> bool:
        """Lists a block; False when the list is full."""
        with self._lock:
            known = self._places.get(key)
            if known is not None:
                known[1] += 1
                return True
            if not self._free:
                return False
            place = self._free.pop()
            self._places[key] = [place, 1]
            self._words[place * _WORDS] = key[0]
            self._words[place * _WORDS + 1] = key[1]
            return True

    def drop(self, key: BlockKey) -> None:
        """Takes one use of a block off the list."""
        with self._lock:
            known = self._places.get(key)
            if known is None:
                return
            known[1] -= 1
            if known[1] == 0:
                del self._places[key]
                self._words[known[0] * _WORDS + 1] = 0
                self._free.append(known[0])

    def close(self) -> None:
        """Removes the list."""
        self._words.release()
        self._map.close()
        self._path.unlink(missing_ok=True)
        let_go(self._descriptor)


def blocks_in_use(folder: Path) -> set[BlockKey]:
    """What the living readers of this folder list; lists of dead readers are removed on the way."""
    found: set[BlockKey] = set()
    for path in folder.glob(f"*{_SUFFIX}"):
        if not is_own_file(path):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # its reader closed it meanwhile
        if try_lock(descriptor, shared=True):
            remove(path)
        else:
            listed = os.pread(descriptor, MAX_HOLDS * _WORDS * 8, 0)
            pairs = np.frombuffer(listed[: len(listed) // (_WORDS * 8) * _WORDS * 8], np.uint64).reshape(-1, _WORDS)
            found.update((int(a), int(b)) for a, b in pairs[pairs[:, 1] != 0])
        os.close(descriptor)
    return found
