"""Rows in the memory of a GPU of this host, whoever has it: known by dtype and shape, copied only where they are used.

Where code knows nothing of devices it makes an array of them (`on_host`), which copies their bytes to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np

__all__ = ["DeviceBytes", "DeviceRows", "on_host"]

Array = np.ndarray[Any, np.dtype[Any]]


class DeviceBytes(Protocol):
    """A run of a GPU's memory. It stays as it is while this object lives."""

    def copy_to(self, start: int, nbytes: int, address: int, stream: int) -> None:
        """Starts a copy of some of its bytes to an address on the reader's device, on that CUDA stream."""
        ...

    def read(self, start: int, nbytes: int) -> Array:
        """A copy of some of its bytes on the host, uint8 `[nbytes]`; waits for it."""
        ...


class DeviceRows(Sequence[Array]):
    """N values `row_shape` of one dtype in C order, from byte `start` of `memory` on.

    Args:
        memory: where they lie.
        start: the byte at which the first row begins.
        dtype, shape: as an array of them would have, `[N, *row_shape]`.
    """

    __slots__ = ("dtype", "memory", "shape", "start")

    def __init__(self, memory: DeviceBytes, start: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.memory = memory
        self.start = start
        self.dtype = dtype
        self.shape = shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> DeviceRows: ...
    def __getitem__(self, index: int | slice) -> Array | DeviceRows:
        """Rows `a:b` where they lie, any others copied to the host."""
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            if step == 1:
                shape = (max(end - first, 0), *self.shape[1:])
                return DeviceRows(self.memory, self.start + first * self.row_nbytes, self.dtype, shape)
            raise IndexError("rows on a device are sliced without a step; make an array of them first")
        row: Array = on_host(self[range(len(self))[index] :][:1])[0]
        return row

    def __iter__(self) -> Iterator[Array]:
        return iter(on_host(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("rows on a device become an array by a copy only")
        array = self.memory.read(self.start, self.nbytes).view(self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype)

    def copy_to(self, address: int, stream: int) -> None:
        """Starts a copy of all rows to an address on the reader's device, on that CUDA stream."""
        self.memory.copy_to(self.start, self.nbytes, address, stream)


def on_host(column: Any) -> Any:
    """The column with an array in place of rows on a device."""
    return np.asarray(column) if isinstance(column, DeviceRows) else column
