"""One segment: a data file and a file of control slots, mapped by its owner and by everyone who reads from it.

Control file, native 64-bit words: a header page (magic, number of slots, bytes of data), then 128 bytes a slot:

    word 0      generation: odd while a block lives there, even while not; it only grows
    word 1      state (0 writing, 1 ready) | kind << 8 | edges << 16
    word 2, 3   offset and size of the block's bytes
    word 4      length of the block's name, which lies right behind its bytes
    word 5      lane << 48 | when it was written, ms of CLOCK_MONOTONIC, which all processes of a host share
    word 8..15  released[edge] = generation, set by that edge's reader after its commit

A block is whole once `ready` stands under its generation. A reader checks the generation, uses the bytes, checks it
again, commits, and only then sets `released`. The owner raises the generation before the space is used again, so a
stale reader always notices. Words are written one by one through a memoryview: `struct.pack_into` would fill with zeros
first.

Data files are never truncated while mapped. They are made with fallocate: a hole on a full file system would kill
whoever touches it.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.queues.arena.locks import keep, let_go, try_lock
from torchrelay.queues.arena.space import PAGE_BYTES

MAGIC = 0x54524152454E4131
HEADER_BYTES = 4096
SLOT_BYTES = 128
SLOT_WORDS = SLOT_BYTES // 8
FIRST_RELEASE = 8
MAX_EDGES = 8
MAX_NAME_BYTES = 4096
MAX_SEGMENT_BYTES = 1 << 40
WRITING, READY = 0, 1
KIND_ONLY, KIND_CACHE = 0, 1
"""What else there is of a block's bytes: nothing, or the durable form in Redis."""

_POPULATE_WRITE = 23
_NAME = re.compile(r"([0-9A-Za-z]{8})\.(\d{1,6})\.data")

Words = np.ndarray[Any, np.dtype[np.uint64]]


def data_path(folder: Path, arena: str, number: int) -> Path:
    """The data file of one segment."""
    return folder / f"{arena}.{number}.data"


def control_path(folder: Path, arena: str, number: int) -> Path:
    """Its control slots."""
    return folder / f"{arena}.{number}.ctl"


def lock_path(folder: Path, arena: str) -> Path:
    """What the owner of an arena holds a lock on, as long as it lives."""
    return folder / f"{arena}.lock"


def segments_in(folder: Path) -> dict[str, list[int]]:
    """Arena -> numbers of its segments, as far as files are there."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.data"):
        match = _NAME.fullmatch(path.name)
        # A link, a folder or a pipe of such a name is nobody's segment.
        if match and is_own_file(path):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def is_own_file(path: Path) -> bool:
    """Whether this very path is a regular file of this user."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()


def remove(path: Path) -> None:
    """Removes a file that may be gone already, or be none."""
    try:
        path.unlink()
    except OSError:
        pass  # gone already, or a folder that somebody else put there


@dataclass(slots=True, eq=False)
class Segment:
    """A mapped segment: `room` is its data, writable for its owner alone. `words` are the control slots' words as
    integers, `table` the same words as an array."""

    arena: str
    number: int
    data: mmap.mmap
    room: memoryview
    control: mmap.mmap
    words: memoryview
    table: Words
    slots: int

    @property
    def nbytes(self) -> int:
        return len(self.data)

    @classmethod
    def create(cls, folder: Path, arena: str, number: int, nbytes: int) -> Segment:
        """Makes both files, with all their pages in place. Raises OSError without room for them, and leaves nothing."""
        nbytes -= nbytes % PAGE_BYTES
        slots = max(64, nbytes // (4 * PAGE_BYTES))
        # In this order, and removed in the other: there is never a control file alone, which nobody would look for.
        paths = (data_path(folder, arena, number), control_path(folder, arena, number))
        descriptors: list[int] = []
        try:
            for path, size in zip(paths, (nbytes, HEADER_BYTES + slots * SLOT_BYTES), strict=True):
                descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                os.posix_fallocate(descriptors[-1], 0, size)
            data, control = (mmap.mmap(descriptor, 0) for descriptor in descriptors)
        except OSError:
            for path in paths[: len(descriptors)]:
                path.unlink(missing_ok=True)
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            data.madvise(_POPULATE_WRITE)
        except OSError:
            pass  # before Linux 5.14 the pages are mapped at their first touch
        header = memoryview(control)[:HEADER_BYTES].cast("Q")
        header[1], header[2] = slots, nbytes
        header[0] = MAGIC
        header.release()
        return cls._of(arena, number, data, memoryview(data), control, slots)

    @classmethod
    def attach(cls, folder: Path, arena: str, number: int, *, writable: bool = False) -> Segment | None:
        """Maps a segment that another process made, its data read-only unless `writable`.

        None when it is not there, or is not what an owner of this user makes: whoever asks takes that for lost bytes.
        """
        paths = (control_path(folder, arena, number), data_path(folder, arena, number))
        descriptors: list[int] = []
        try:
            for path in paths:
                descriptors.append(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK))
                found = os.fstat(descriptors[-1])
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                    return None
                # With holes it would kill whoever touches them when the file system is full.
                if found.st_size > MAX_SEGMENT_BYTES or found.st_blocks * 512 < found.st_size:
                    return None
            control = mmap.mmap(descriptors[0], 0)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            data = mmap.mmap(descriptors[1], 0, prot=protection)
        except (OSError, ValueError):
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if len(control) < HEADER_BYTES:
            return None
        with memoryview(control)[:HEADER_BYTES].cast("Q") as header:
            magic, slots, nbytes = header[0], header[1], header[2]
        if magic != MAGIC or slots == 0 or nbytes != len(data) or HEADER_BYTES + slots * SLOT_BYTES != len(control):
            return None
        return cls._of(arena, number, data, memoryview(data).toreadonly(), control, slots)

    @classmethod
    def _of(cls, arena: str, number: int, data: mmap.mmap, room: memoryview, control: mmap.mmap, slots: int) -> Segment:
        words = memoryview(control)[HEADER_BYTES:].cast("Q")
        table: Words = np.frombuffer(control, np.uint64, offset=HEADER_BYTES).reshape(slots, SLOT_WORDS)
        return cls(arena, number, data, room, control, words, table, slots)

    def name_of(self, slot: int) -> str:
        """The name of the block in this slot."""
        at = slot * SLOT_WORDS
        start = self.words[at + 2] + self.words[at + 3]
        return bytes(self.data[start : start + self.words[at + 4]]).decode("utf-8", "replace")

    def is_there(self, folder: Path) -> bool:
        """Whether who has not mapped it yet can."""
        return data_path(folder, self.arena, self.number).exists()

    def unlink(self, folder: Path) -> None:
        """Removes its files; mappings of others live on."""
        control_path(folder, self.arena, self.number).unlink(missing_ok=True)
        data_path(folder, self.arena, self.number).unlink(missing_ok=True)


class OwnerLock:
    """The lock that says that an arena's owner lives."""

    def __init__(self, folder: Path, arena: str) -> None:
        self._path = lock_path(folder, arena)
        self._descriptor = -1

    def take(self, *, make: bool = True) -> bool:
        """Whether this process owns the arena now."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if make else 0)
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP):
                return False  # no lock of ours: nobody can own that arena
            raise
        # Its last owner may have removed it between the opening and the lock.
        if not try_lock(descriptor) or os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        keep(descriptor)
        return True

    def is_there(self) -> bool:
        """Whether the lock that is held still has its name: another could take one of that name else."""
        return os.fstat(self._descriptor).st_nlink > 0

    def give(self, *, remove: bool) -> None:
        """Lets go; with `remove`, nothing of the arena is left to own."""
        if self._descriptor >= 0:
            if remove:
                self._path.unlink(missing_ok=True)
            let_go(self._descriptor)
            self._descriptor = -1
