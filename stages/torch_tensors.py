"""Between numpy and torch, bit for bit: batches to tensors on a device, outputs back to arrays.

numpy knows bfloat16 and float8 through ml_dtypes and torch has its own; they are viewed as unsigned integers on the
way, so nothing is converted.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
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
    "dense",
    "host_array",
    "host_value",
    "join_tensors",
    "numpy_dtype",
    "numpy_outputs",
    "private",
    "real",
    "row_tensors",
    "stand_ins",
    "tensor_rows",
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
    if isinstance(column, torch.Tensor):
        return column.to(device)
    if isinstance(column, RaggedRows):
        return row_tensors(column, _tensor(column.dense(), device, fresh, share))
    if isinstance(column, list) and any(isinstance(value, np.ndarray | torch.Tensor) for value in column):
        # The rows are views of what the jobs hold, also where the list itself is new.
        return [_to_torch(v, device, False, share) if isinstance(v, np.ndarray | torch.Tensor) else v for v in column]
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
    tensor = dense(stage_name, name, tensor)
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def dense(stage_name: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, where it is, as its plain values; raises InputError for one that is not carried: see `to_host`."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise InputError(f"stage {stage_name!r}: column {name!r} is a {kind} tensor; return a dense one")
    if tensor.dtype not in _TO_NUMPY and tensor.dtype not in _SHARED:
        raise InputError(
            f"stage {stage_name!r}: column {name!r} has dtype {tensor.dtype}, which is not carried; convert it"
        )
    return _plain(tensor)


def host_array(tensor: torch.Tensor) -> np.ndarray:
    """The array over a tensor that `to_host` gave."""
    ours = _TO_NUMPY.get(tensor.dtype)
    if ours is not None:
        return tensor.contiguous().view(_CARRIER[ours.itemsize][1]).numpy().view(ours)
    array: np.ndarray = tensor.numpy()
    return array


def stand_ins(stage_name: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the same dtypes and shapes in place of tensors, also in lists: enough to check types by, and no copy.

    Raises InputError as `to_host` does.
    """

    def standing(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return np.broadcast_to(_zero(dense(stage_name, name, value).dtype), tuple(value.shape))

    return {
        name: [standing(name, row) for row in value] if isinstance(value, list | tuple) else standing(name, value)
        for name, value in outputs.items()
    }


@cache
def _zero(dtype: torch.dtype) -> np.ndarray:
    return np.zeros((), numpy_dtype(dtype))


@cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype of an array over a tensor that `dense` let pass."""
    ours = _TO_NUMPY.get(dtype)
    return torch.empty(0, dtype=dtype).numpy().dtype if ours is None else ours


def real(value: Any, standing: Any, checked: Any) -> Any:
    """The column itself, as the check of what stands for it said it is; None where the check converted a tensor.

    Args:
        value: a tensor, an array, or a list of values that may be tensors.
        standing: its stand-in.
        checked: what the check of the stand-in returned.
    """
    if isinstance(value, torch.Tensor):
        if isinstance(checked, np.ndarray):
            return _plain(value) if checked.dtype == standing.dtype else None
        same = all(isinstance(row, np.ndarray) and row.dtype == standing.dtype for row in checked)
        return list(_plain(value).unbind(0)) if same else None
    if not (isinstance(value, list | tuple) and any(isinstance(row, torch.Tensor) for row in value)):
        return checked
    if isinstance(checked, np.ndarray) or not all(map(_unchanged, value, standing, checked)):
        return None
    return [_plain(row) if isinstance(row, torch.Tensor) else seen for row, seen in zip(value, checked, strict=True)]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg()


def _unchanged(value: Any, standing: Any, checked: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (isinstance(checked, np.ndarray) and checked.dtype == standing.dtype)


# What follows is made in inference mode, as all tensors of batches are: compiled code is for such, or for others.


@torch.inference_mode()
def private(batch: Batch, others: Sequence[Any]) -> Batch:
    """The batch with copies of those tensors whose memory another column of it, or of `others`, has a part in."""
    used = Counter(key for column in (*batch.columns.values(), *others) for key in _memory(column))

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(row) for row in value]
        shared = isinstance(value, torch.Tensor) and any(used[key] > 1 for key in _memory(value))
        return value.clone() if shared else value

    return replace(batch, columns={name: own(column) for name, column in batch.columns.items()})


def _memory(column: Any) -> set[tuple[str, int]]:
    """The blocks of memory that a column's tensors lie in."""
    values = column if isinstance(column, list) else [column]
    return {(str(v.device), v.untyped_storage().data_ptr()) for v in values if isinstance(v, torch.Tensor)}


@torch.inference_mode()
def tensor_rows(tensor: torch.Tensor, rows: Any) -> torch.Tensor:
    """These rows, copied."""
    return tensor.index_select(0, torch.as_tensor(np.asarray(rows, np.int64), device=tensor.device))


@torch.inference_mode()
def join_tensors(parts: Sequence[Any]) -> Any:
    """Rows behind rows: one tensor where all are tensors of one dtype and row shape, else a list of rows."""
    first = parts[0]
    if all(
        isinstance(p, torch.Tensor) and (p.dtype, p.device, p.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        for p in parts
    ):
        return torch.cat(list(parts))
    return [row for part in parts for row in part]
