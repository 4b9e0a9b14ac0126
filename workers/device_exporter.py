"""The device memory in which a worker leaves what it made, for workers of other GPUs of its host to copy from.

Segments are allocated as they are needed, up to a bound, and exported once each. A run of one is taken for a batch's
column and is free again when nothing refers to it any more: neither the blocks of shared memory that hold its tickets,
nor the batch on its way there. The file `<exporter>.gpu`, locked as long as this process lives, says that the memory
is there.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torchrelay.config.device_rows import DeviceRows
from torchrelay.queues.arena.home import EXPORTER_SUFFIX
from torchrelay.queues.arena.life import LifeSign
from torchrelay.queues.arena.space import PAGE_BYTES, Space, pages_of
from torchrelay.queues.keys import new_token
from torchrelay.queues.tickets import Ticket

__all__ = ["DeviceExporter", "Exports", "Run"]

log = logging.getLogger("torchrelay.arena")
SEGMENT_BYTES = 256 << 20


class Exports(Protocol):
    """A device's memory, as its owner uses it; see `stages.device_memory.CudaMemory`."""

    @property
    def gpu(self) -> int: ...
    def allocate(self, nbytes: int) -> tuple[int, bytes]: ...
    def free(self, address: int) -> None: ...
    def copy(self, into: int, source: int, nbytes: int, stream: int) -> None: ...
    def read(self, source: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]: ...


class _Segment:
    def __init__(self, number: int, address: int, handle: bytes, nbytes: int) -> None:
        self.number = number
        self.address = address
        self.handle = handle
        self.space = Space(nbytes // PAGE_BYTES)
        # What was let go of, by whatever thread the last reference died in.
        self.left: deque[tuple[int, int]] = deque()

    def take(self, pages: int) -> int | None:
        while self.left:
            self.space.give(*self.left.popleft())
        return self.space.take(pages)


class Run:
    """Bytes of a segment, from `offset` on, which are this object's until it dies."""

    __slots__ = ("_exporter", "_pages", "offset", "segment")

    def __init__(self, exporter: DeviceExporter, segment: _Segment, first_page: int, pages: int) -> None:
        self._exporter = exporter
        self.segment = segment
        self.offset = first_page * PAGE_BYTES
        self._pages = (first_page, pages)

    def __del__(self) -> None:
        self.segment.left.append(self._pages)

    def write(self, source: int, nbytes: int, stream: int) -> None:
        """Starts a copy into it."""
        self._exporter.memory.copy(self.segment.address + self.offset, source, nbytes, stream)

    def copy_to(self, start: int, nbytes: int, address: int, stream: int) -> None:
        self._exporter.memory.copy(address, self.segment.address + self.offset + start, nbytes, stream)

    def read(self, start: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._exporter.memory.read(self.segment.address + self.offset + start, nbytes)


class DeviceExporter:
    """One worker's device memory for others. `take` may be called from one thread, `tend` and `close` from one, the
    rest from any.

    Args:
        memory: the device's.
        folder: where readers of this host look for the lock.
        max_bytes: how much it takes at most.
    """

    def __init__(self, memory: Exports, folder: Path, max_bytes: int) -> None:
        self.memory = memory
        self.gpu = memory.gpu
        self._max_bytes = max_bytes
        self._segments: list[_Segment] = []
        self._taken_bytes = 0
        self.name = new_token(8)
        self._path = folder / (self.name + EXPORTER_SUFFIX)
        # The last one has the name; whoever opened an earlier one still looks at that.
        self._signs = [LifeSign(self._path)]

    def take(self, nbytes: int) -> Run | None:
        """Room for so many bytes; None where there is none now."""
        pages = pages_of(nbytes)
        for segment in self._segments:
            first = segment.take(pages)
            if first is not None:
                return Run(self, segment, first, pages)
        grown = self._grow(pages * PAGE_BYTES)
        first = None if grown is None else grown.take(pages)
        return None if grown is None or first is None else Run(self, grown, first, pages)

    def _grow(self, nbytes: int) -> _Segment | None:
        size = max(min(SEGMENT_BYTES, self._max_bytes - self._taken_bytes), nbytes)
        if self._taken_bytes + size > self._max_bytes:
            return None
        try:
            address, handle = self.memory.allocate(size)
        except RuntimeError as error:
            log.warning("no device memory to hand over %d MiB: %s; columns go through the host", size >> 20, error)
            self._max_bytes = self._taken_bytes
            return None
        self._taken_bytes += size
        segment = _Segment(len(self._segments), address, handle, size)
        self._segments.append(segment)
        return segment

    def ticket(self, rows: DeviceRows) -> bytes | None:
        """What tells others of these rows; None where they do not lie here."""
        run = rows.memory
        if not isinstance(run, Run):
            return None
        segment = run.segment
        return Ticket(
            self.name, segment.number, segment.handle, run.offset + rows.start, rows.dtype, rows.shape
        ).encode()

    def tend(self) -> None:
        """Makes the file anew where somebody removed it: readers to come would take the memory for gone."""
        if self._signs[-1].is_there():
            return
        try:
            self._signs.append(LifeSign(self._path))
        except OSError as error:
            log.info("nobody can see that this worker's device memory is there: %s", error)

    def close(self) -> None:
        """Says that the memory is gone; it goes with the process."""
        for sign in self._signs:
            sign.close()
