"""A device that is none: its memory is files in a folder, which any process opens by a handle, as a GPU's is opened."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.queues.keys import new_token


class FakeGpu:
    """The memory of device number `gpu`. `reaches` are the devices that it copies from; `refuses` makes the driver
    refuse what it names: "allocate", "open". `open_now` counts what is opened and not closed."""

    def __init__(self, folder: Path, gpu: int = 7, reaches: tuple[int, ...] = (7,), refuses: str = "") -> None:
        self._folder = folder
        self.gpu = gpu
        self._reaches = reaches
        self.refuses = refuses
        self.open_now = 0
        self._maps: dict[int, mmap.mmap] = {}

    def reachable(self) -> tuple[int, ...]:
        return self._reaches

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        if self.refuses == "allocate":
            raise RuntimeError("CUDA error 2: out of memory")
        path = self._folder / f"{new_token(8)}.memory"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.posix_fallocate(descriptor, 0, nbytes)
        os.close(descriptor)
        return self._map(path), path.name.encode().ljust(64, b"\0")

    def free(self, address: int) -> None:
        del self._maps[address]

    def open(self, handle: bytes) -> tuple[int, int]:
        path = self._folder / handle.rstrip(b"\0").decode()
        if self.refuses == "open" or not path.exists():
            raise RuntimeError("CUDA error 201: invalid device context")
        address = self._map(path)
        self.open_now += 1
        return address, len(self._maps[address])

    def close(self, address: int) -> None:
        del self._maps[address]
        self.open_now -= 1

    def copy(self, into: int, source: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(into, source, nbytes)

    def read(self, source: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        array = np.empty(nbytes, np.uint8)
        ctypes.memmove(array.ctypes.data, source, nbytes)
        return array

    def _map(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDWR)
        mapped = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._maps[address] = mapped
        return address
