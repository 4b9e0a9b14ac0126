"""What goes from a part of a model to the next, as columns of a batch and back.

Of each row, `%state` has the bytes of all tensors that cross, one behind the other from multiples of 16 on, and
`%sizes` says what they are: their number, then of each its dtype (a number of `_DTYPES`), its number of dimensions and
these, without the rows; then the number of whole numbers that cross beside them, and these. Rows with equal `%sizes`
are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchrelay.config.shards import SIZES, STATE
from torchrelay.errors import DecodeError, InputError

__all__ = ["Crossing", "groups_of", "pack", "state_bytes", "unpack"]

_ALIGNED = 16
_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Crossing:
    """Tensors `[n, ...]` of n rows, and whole numbers that hold for all of them."""

    tensors: Sequence[torch.Tensor]
    numbers: Sequence[int]

    def check(self, tensors: int, numbers: int) -> None:
        """Raises DecodeError for other than so many."""
        if (len(self.tensors), len(self.numbers)) != (tensors, numbers):
            raise DecodeError(
                f"what came from the part before is damaged: {len(self.tensors)} tensors with {len(self.numbers)} "
                f"sizes, and {tensors} with {numbers} cross here"
            )


def state_bytes(nbytes: Sequence[int]) -> int:
    """The bytes of a row's state whose tensors have so many each."""
    at = 0
    for size in nbytes:
        at = _aligned(at) + size
    return at


def pack(crossing: Crossing, rows: int) -> dict[str, Any]:
    """As columns of `rows` rows: a uint8 tensor `[rows, bytes]` and an int64 array `[rows, k]`, which is on the host.

    Raises InputError for a tensor that does not have these rows.
    """
    sizes = [len(crossing.tensors)]
    flat = []
    for tensor in crossing.tensors:
        if len(tensor) != rows:
            raise InputError(f"the model was called with {len(tensor)} rows, and the batch has {rows}; keep its rows")
        if tensor.dtype not in _DTYPES:
            raise InputError(f"a tensor of {tensor.dtype} cannot go from a part to the next; cut the model elsewhere")
        sizes += [_DTYPES.index(tensor.dtype), tensor.ndim - 1, *tensor.shape[1:]]
        dense = _dense(tensor).view(torch.uint8)
        flat.append(dense.view(rows, dense.numel() // rows))
    sizes += [len(crossing.numbers), *crossing.numbers]
    return {STATE: _joined(flat, rows), SIZES: np.broadcast_to(np.array(sizes, np.int64), (rows, len(sizes)))}


def _joined(flat: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    if len(flat) == 1:
        return flat[0]
    state = torch.empty((rows, state_bytes([t.shape[1] for t in flat])), dtype=torch.uint8, device=flat[0].device)
    at = 0
    for tensor in flat:
        start = _aligned(at)
        state[:, at:start] = 0
        at = start + tensor.shape[1]
        state[:, start:at] = tensor
    return state


def unpack(state: torch.Tensor, sizes: Sequence[int]) -> Crossing:
    """What crossed: of rows with these sizes, their state `[n, at least so many bytes]`.

    Raises DecodeError for what `pack` did not make.
    """
    try:
        read = iter(sizes)
        shapes = []
        for _ in range(next(read)):
            dtype, ndim = _DTYPES[next(read)], next(read)
            shapes.append((dtype, tuple(next(read) for _ in range(ndim))))
        numbers = [next(read) for _ in range(next(read))]
        if any(read):  # zeros pad rows of fewer sizes
            raise IndexError("more is told than crosses")
        return Crossing(list(_tensors(state, shapes)), numbers)
    except (StopIteration, IndexError, RuntimeError) as error:
        raise DecodeError(f"what came from the part before is damaged: {error}", length=state.shape[1]) from error


def _tensors(state: torch.Tensor, shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[torch.Tensor]:
    at, rows = 0, len(state)
    for dtype, shape in shapes:
        start = _aligned(at)
        at = start + math.prod(shape) * dtype.itemsize
        if at > state.shape[1]:
            raise IndexError(f"a row has {state.shape[1]} bytes, and {at} are told")
        flat = _dense(state[:, start:at])
        yield (flat.clone() if flat.storage_offset() % dtype.itemsize else flat).view(dtype).view(rows, *shape)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers one behind the other. Strides of dimensions of size 1 are whatever they are, also in what torch calls
    contiguous."""
    flat = tensor.reshape(-1)
    return flat if flat.is_contiguous() and flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


def groups_of(*columns: np.ndarray) -> list[np.ndarray]:
    """The numbers of the rows that are equal in all these `[N, k]`, group by group, by their first row."""
    wide = np.concatenate(columns, axis=1)
    if (wide == wide[0]).all():
        return [np.arange(len(wide))]
    _, first, group = np.unique(wide, axis=0, return_index=True, return_inverse=True)
    return [np.flatnonzero(group.reshape(-1) == g) for g in np.argsort(first)]


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED) * _ALIGNED
