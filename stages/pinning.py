"""Pins memory of other makers, so that a GPU copies from where it lies: `cudaHostRegister`, within a bound.

About 0.1 s a GB. Memory must be given back before it is unmapped. Where the driver refuses (a container's limit of
locked memory, say) the batches take the way through pinned copies.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

__all__ = ["Pinner"]

log = logging.getLogger("torchrelay.stages")


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # so in its stubs


class Pinner:
    """Pins up to `max_bytes` for one device."""

    def __init__(self, device: str, max_bytes: int) -> None:
        self._device = torch.device(device)
        self._max_bytes = max_bytes
        self._pinned: dict[int, int] = {}
        self._refused = False

    def pin(self, address: int, nbytes: int) -> bool:
        """Whether the device can now read these bytes by itself; they must be mapped for writing."""
        if self._refused or sum(self._pinned.values()) + nbytes > self._max_bytes:
            return False
        torch.cuda.set_device(self._device)
        status = int(_runtime().cudaHostRegister(address, nbytes, 0))
        if status:
            self._refused = True
            log.warning("the driver pins no shared memory (CUDA error %d); batches are copied once more", status)
            self._clear_error()
            return False
        self._pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        """Gives back what `pin` pinned; anything else is left alone."""
        if self._pinned.pop(address, None) is not None:
            _runtime().cudaHostUnregister(address)

    def _clear_error(self) -> None:
        """The refusal stays the runtime's last error, and the next launch would report it as its own."""
        try:
            torch.zeros(1, device=self._device)
        except RuntimeError:
            pass  # that was it
