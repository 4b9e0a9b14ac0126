"""Opens the device memory of other workers of this host, and tells whether they still live: see `device_exporter`.

What was opened stays so until its owner is gone and no rows of it are in hand.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from torchrelay.config.device_rows import DeviceRows
from torchrelay.queues.arena.home import EXPORTER_SUFFIX
from torchrelay.queues.arena.life import Watched
from torchrelay.queues.tickets import Ticket

__all__ = ["DeviceImporter", "Imports"]

log = logging.getLogger("torchrelay.arena")


class Imports(Protocol):
    """A device, as it copies from the memory of others; see `stages.device_memory.CudaMemory`."""

    def reachable(self) -> tuple[int, ...]: ...
    def open(self, handle: bytes) -> tuple[int, int]: ...
    def close(self, address: int) -> None: ...
    def copy(self, into: int, source: int, nbytes: int, stream: int) -> None: ...
    def read(self, source: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]: ...


class _Mapping:
    """A segment of another process, open as long as this lives."""

    def __init__(self, memory: Imports, address: int, nbytes: int, unused: deque[int]) -> None:
        self._memory = memory
        self._address = address
        self.nbytes = nbytes
        self._unused = unused

    def __del__(self) -> None:
        # Not here: this may be any thread, in the middle of anything.
        self._unused.append(self._address)

    def copy_to(self, start: int, nbytes: int, address: int, stream: int) -> None:
        self._memory.copy(address, self._address + start, nbytes, stream)

    def read(self, start: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._memory.read(self._address + start, nbytes)


class _Exporter(NamedTuple):
    """Another worker: its sign of life, and what was opened of its memory."""

    life: Watched
    opened: dict[int, _Mapping]


class DeviceImporter:
    """Rows of other workers, as this one's device reaches them. One thread calls `rows` and `tend`, any `is_there`.

    Args:
        memory: this worker's device.
        folder: where exporters hold their locks.
    """

    def __init__(self, memory: Imports, folder: Path) -> None:
        self._memory = memory
        self._folder = folder
        self._exporters: dict[str, _Exporter] = {}
        self._unused: deque[int] = deque()
        self.gpus = memory.reachable()
        """Identities of the devices that it can copy from; none after the driver refused one."""

    def rows(self, ticket: Ticket) -> DeviceRows | None:
        """The rows that a ticket tells of; None where they are gone, or cannot be reached from here."""
        exporter = self._exporter(ticket.exporter)
        if exporter is None or not exporter.life.lives():
            return None
        mapping = exporter.opened.get(ticket.segment)
        if mapping is None:
            try:
                mapping = _Mapping(self._memory, *self._memory.open(ticket.handle), self._unused)
            except RuntimeError as error:
                if exporter.life.lives():
                    log.warning("the device memory of another worker cannot be opened: %s; it goes by the host", error)
                    self.gpus = ()
                return None
            exporter.opened[ticket.segment] = mapping
        if ticket.offset + ticket.nbytes > mapping.nbytes:
            return None
        return DeviceRows(mapping, ticket.offset, ticket.dtype, ticket.shape)

    def _exporter(self, name: str) -> _Exporter | None:
        found = self._exporters.get(name)
        if found is None:
            life = Watched.find(self._folder / (name + EXPORTER_SUFFIX))
            if life is not None:
                found = self._exporters[name] = _Exporter(life, {})
        return found

    def is_there(self, exporter: str) -> bool:
        """Whether this worker's memory still is what its tickets said, as far as that hangs on its life."""
        found = self._exporters.get(exporter)
        return found is not None and found.life.lives()

    def tend(self) -> None:
        """Closes the memory of dead workers: on their devices it is in use until then."""
        for name, exporter in list(self._exporters.items()):
            if not exporter.life.lives():
                del self._exporters[name]
        while self._unused:
            try:
                self._memory.close(self._unused.popleft())
            except RuntimeError as error:
                log.info("device memory of a dead worker was not closed: %s", error)

    def close(self) -> None:
        """Forgets everything; what is open goes with the process."""
        for exporter in self._exporters.values():
            exporter.life.close()
        self._exporters.clear()
