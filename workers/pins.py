"""The CUDA side of a worker's shared memory: pins the segments that it maps, so that a batch goes to the device from
where its producers wrote it, and opens device memory to other processes. Imports torch only when asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from torchrelay.queues.arena.reader import Pins
from torchrelay.queues.arena.segment import Segment

if TYPE_CHECKING:
    from torchrelay.stages.device_memory import CudaMemory

PINNED_MAX_BYTES = 16 << 30


class _Pins(Protocol):
    def pin(self, address: int, nbytes: int) -> bool: ...
    def unpin(self, address: int) -> None: ...


class SegmentPins:
    """Hands addresses of segments to a pinner."""

    def __init__(self, pinner: _Pins) -> None:
        self._pinner = pinner

    def mapped(self, segment: Segment) -> None:
        self._pinner.pin(_address(segment), segment.nbytes)

    def unmapped(self, segment: Segment) -> None:
        self._pinner.unpin(_address(segment))


def pins_for(device: str) -> Pins:
    """Pins for a CUDA device; needs torch."""
    from torchrelay.stages.pinning import Pinner

    return SegmentPins(Pinner(device, PINNED_MAX_BYTES))


def cuda_memory(device: str) -> CudaMemory:
    """A CUDA device's memory, as it is shared between processes; needs torch."""
    from torchrelay.stages.device_memory import CudaMemory

    return CudaMemory(device)


def _address(segment: Segment) -> int:
    return int(np.frombuffer(segment.data, np.uint8).ctypes.data)
