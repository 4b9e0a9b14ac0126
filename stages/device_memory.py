"""A GPU's memory as processes of one host share it: allocated, exported, opened and copied through the CUDA driver.

torch shares a tensor with one reader and counts its references in a file; here one allocation is opened once by each
reader, and who allocated it says what it holds. A process opens memory of another GPU in the context of its own, so it
takes nothing on the other one, and copies go over NVLink where there is one.

The functions are those of the CUDA Driver API, section "Memory Management": IPC handles, which need no fabric and which
any two processes of a host and an IPC namespace can use.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from torchrelay.errors import DeviceError

__all__ = ["CudaMemory", "DriverError", "Exported", "Opened"]

_LAZY_PEER_ACCESS = 1
_Address = ctypes.c_uint64


class DriverError(DeviceError, RuntimeError):
    """What the CUDA driver refuses; a RuntimeError as torch's own are, by which `faults` knows those that last."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * 64),)


class Exported(NamedTuple):
    """Memory of this process's device, and the handle by which others open it."""

    address: int
    handle: bytes


class Opened(NamedTuple):
    """Memory of another process, as this one's device reaches it."""

    address: int
    nbytes: int


class CudaMemory:
    """The memory of one device. Every call may come from any thread.

    Args:
        device: its torch name, `cuda:0`.

    Every method raises DriverError for what the driver refuses, with its reason.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    @property
    def gpu(self) -> int:
        """The device's identity on this host: a digest of its UUID, other than 0."""
        return _digest(self._device.index or 0)

    def reachable(self) -> tuple[int, ...]:
        """The identities of the devices of this host, this one included, whose memory it can copy from."""
        mine = self._device.index or 0
        numbers = range(torch.cuda.device_count())
        return tuple(_digest(n) for n in numbers if n == mine or torch.cuda.can_device_access_peer(mine, n))

    def allocate(self, nbytes: int) -> Exported:
        """New memory for others to open; whoever frees it while one of them copies breaks that copy."""
        torch.cuda.set_device(self._device)
        address, handle = _Address(), _Handle()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        try:
            _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        except DriverError:
            self.free(address.value)
            raise
        return Exported(address.value, bytes(handle))

    def free(self, address: int) -> None:
        """Gives memory back that `allocate` gave."""
        torch.cuda.set_device(self._device)
        _call("cuMemFree_v2", _Address(address))

    def open(self, handle: bytes) -> Opened:
        """Memory that another process exported."""
        torch.cuda.set_device(self._device)
        address, start, size = _Address(), _Address(), ctypes.c_size_t()
        given = _Handle.from_buffer_copy(handle)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
        try:
            _call("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(size), address)
        except DriverError:
            self.close(address.value)
            raise
        return Opened(address.value, size.value - (address.value - start.value))

    def close(self, address: int) -> None:
        """Gives back what `open` gave; nothing may be copying from it."""
        torch.cuda.set_device(self._device)
        _call("cuIpcCloseMemHandle", _Address(address))

    def copy(self, into: int, source: int, nbytes: int, stream: int) -> None:
        """Starts a copy between two addresses that this device reaches, on a CUDA stream of it."""
        _call(
            "cuMemcpyDtoDAsync_v2", _Address(into), _Address(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        )

    def read(self, source: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A copy on the host, uint8 `[nbytes]`."""
        torch.cuda.set_device(self._device)
        array = np.empty(nbytes, np.uint8)
        if nbytes:
            _call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), _Address(source), ctypes.c_size_t(nbytes))
        return array


def _digest(number: int) -> int:
    uuid = str(torch.cuda.get_device_properties(number).uuid)
    return int.from_bytes(hashlib.blake2b(uuid.encode(), digest_size=8).digest(), "little") | 1


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"the CUDA driver cannot be loaded: {error}") from error


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        reason = text.value.decode("ascii", "replace") if text.value else "no reason given"
        raise DriverError(f"{name.removesuffix('_v2')}: CUDA error {status}: {reason}")
