"""Between numpy and torch, bit for bit: batches to tensors on a device, outputs back to arrays.

numpy knows bfloat16 and float8 through ml_dtypes and torch has its own; they are viewed as unsigned integers on the
way, so nothing is converted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from torchrelay.config.ragged import FEWEST_ROWS, MOST_ROW_BYTES, RaggedRows
from torchrelay.errors import InputError
from torchrelay.stages.padding import Padded

if TYPE_CHECKING:
    from torchrelay.stages.batch import Batch

__all__ = [
    "carried",
    "host_array",
    "host_value",
    "numpy_outputs",
    "row_tensors",
    "to_host",
    "torch_batch",
    "torch_dtype",
    "walked",
]

_CARRIER: dict[int, tuple[np.dtype[Any], torch.dtype]] = {
    1: (np.dtype(np.uint8), torch.uint8),
    2: (np.dtype(np.uint16), torch.uint16),
}
_SHARED_NAMES = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_TO_TORCH: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(getattr(ml_dtypes, name)): getattr(torch, name) for name in _SHARED_NAMES if hasattr(torch, name)
}
_TO_NUMPY = {theirs: ours for ours, theirs in _TO_TORCH.items()}
_SHARED_DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
_SHARED = frozenset(getattr(torch, name) for name in _SHARED_DTYPES.split())


with warnings.catch_warnings():
    # Torch says once a process that a read-only array became a tensor. Those are only read, or their stage said so.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"x", np.uint8))


def torch_batch(batch: Batch, device: str, *, share: bool = False) -> Batch:
    """The batch with private writable tensors on `device`; columns of str, bytes or json stay as they are.

    With `share`, tensors on the CPU are the jobs' own memory where that needs no copy: they must not be written to.
    """
    where = torch.device(device)
    columns = {name: _to_torch(column, where, name in batch.fresh, share) for name, column in batch.columns.items()}
    padded = {
        name: Padded(_to_torch(padded.lengths, where, True, share), padded.axes)
        for name, padded in (batch.padded or {}).items()
    }
    return replace(
        batch, columns=columns, padded=padded, fresh=frozenset(columns), arange=partial(torch.arange, device=where)
    )


def _to_torch(column: Any, device: torch.device, fresh: bool, share: bool) -> Any:
    if isinstance(column, np.ndarray):
        return _tensor(column, device, fresh, share)
    if isinstance(column, RaggedRows):
        return row_tensors(column, _tensor(column.dense(), device, fresh, share))
    if isinstance(column, list) and any(isinstance(value, np.ndarray) for value in column):
        # The rows are views of what the jobs hold, also where the list itself is new.
        return [_tensor(value, device, False, share) if isinstance(value, np.ndarray) else value for value in column]
    return column


def row_tensors(rows: RaggedRows, flat: Any) -> list[Any]:
    """The rows as views of a tensor that holds them one behind the other; as arrays where it is no tensor."""
    return list(torch.split(flat, rows.lengths.tolist())) if isinstance(flat, torch.Tensor) else list(rows)


def carried(array: np.ndarray) -> tuple[np.ndarray | None, torch.dtype]:
    """The same bytes in a dtype that numpy and torch share, and torch's dtype for them; None where torch has none."""
    dtype = _TO_TORCH.get(array.dtype)
    if dtype is not None:
        return array.view(_CARRIER[array.dtype.itemsize][0]), dtype
    if array.dtype.kind not in "biufc":
        return None, torch.uint8
    return array, torch_dtype(array.dtype)


def _tensor(array: np.ndarray, device: torch.device, fresh: bool, share: bool) -> Any:
    carrier, dtype = carried(array)
    if carrier is None:
        return array  # a dtype that torch does not have
    if device.type == "cuda":
        # From pinned memory the copy runs beside the host; its allocator keeps the block until the copy is done.
        pinned = torch.empty(carrier.shape, dtype=torch_dtype(carrier.dtype), pin_memory=True)
        np.copyto(pinned.numpy(), carrier)
        return pinned.to(device, non_blocking=True).view(dtype)
    own = carrier if share else _writable(carrier) if fresh else None
    tensor = torch.from_numpy(carrier.copy() if own is None else own)
    return (tensor if device.type == "cpu" else tensor.to(device)).view(dtype)


def _writable(array: np.ndarray) -> np.ndarray | None:
    """The array behind a read-only view of it, if there is one that owns its memory."""
    base: Any = array
    while isinstance(base, np.ndarray) and not base.flags.writeable:
        base = base.base
    if not isinstance(base, np.ndarray) or base.nbytes != array.nbytes or not base.flags.c_contiguous:
        return None
    return base.view(array.dtype).reshape(array.shape)


@cache
def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Torch's name of a dtype that numpy shares with it."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def numpy_outputs(stage_name: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's outputs with arrays in place of tensors; waits once for all that come from a GPU.

    Raises:
        InputError: a tensor is sparse, quantised, nested or of a dtype that numpy lacks.
    """
    plain: dict[str, Any] = {}
    devices: set[torch.device] = set()

    def moved(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.is_cuda:
            devices.add(value.device)
        return to_host(stage_name, name, value)

    for name, value in outputs.items():
        plain[name] = walked(value, partial(moved, name))
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return {name: host_value(value) for name, value in plain.items()}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows one behind the other in one tensor; `lengths` int64 `[N]`."""

    flat: torch.Tensor
    lengths: np.ndarray


def walked(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """An output column with its tensors moved; `host_value` makes arrays of them. Many small ones are moved as one."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, list | tuple) and any(isinstance(row, torch.Tensor) for row in value):
        rows = _one_behind_the_other(value)
        if rows is not None:
            return replace(rows, flat=move(rows.flat))
        return [move(row) if isinstance(row, torch.Tensor) else row for row in value]
    return value


def _one_behind_the_other(rows: Sequence[Any]) -> _Rows | None:
    """None where they are no tensors of one kind that differ in their first axis only, or few, or large."""
    if len(rows) < FEWEST_ROWS or set(map(type, rows)) != {torch.Tensor}:
        return None
    if any(row.is_nested or row.is_quantized or row.is_meta or row.layout is not torch.strided for row in rows):
        return None
    first = rows[0]
    if not first.ndim or len({(row.dtype, row.device, row.ndim, row.shape[1:]) for row in rows}) > 1:
        return None
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if int(lengths.sum()) * math.prod(first.shape[1:]) * first.itemsize > MOST_ROW_BYTES * len(rows):
        return None
    return _Rows(torch.cat(list(rows)), lengths)


def host_value(value: Any) -> Any:
    """A column with arrays in place of the tensors that `walked` brought to the host."""
    if isinstance(value, torch.Tensor):
        return host_array(value)
    if isinstance(value, _Rows):
        return RaggedRows.adjacent(host_array(value.flat), value.lengths)
    if isinstance(value, list) and any(isinstance(row, torch.Tensor) for row in value):
        return [host_array(row) if isinstance(row, torch.Tensor) else row for row in value]
    return value


def to_host(stage_name: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, of a dtype that is carried; one from a GPU is there once its stream was waited for.

    Raises InputError for one that is sparse, quantised, nested, or of a dtype that numpy lacks.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise InputError(f"stage {stage_name!r}: column {name!r} is a {kind} tensor; return a dense one")
    if tensor.dtype not in _TO_NUMPY and tensor.dtype not in _SHARED:
        raise InputError(
            f"stage {stage_name!r}: column {name!r} has dtype {tensor.dtype}, which is not carried; convert it"
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def host_array(tensor: torch.Tensor) -> np.ndarray:
    """The array over a tensor that `to_host` gave."""
    ours = _TO_NUMPY.get(tensor.dtype)
    if ours is not None:
        return tensor.contiguous().view(_CARRIER[ours.itemsize][1]).numpy().view(ours)
    array: np.ndarray = tensor.numpy()
    return array
