"""Brings batches to a GPU and their results back while it computes: copies on streams of their own, waits by events.

A column of fixed row shape goes into one of three static tensors, piece by piece: each job's rows by one DMA from where
they lie, if that memory is pinned or another device's, else from a pinned copy. The stream that computes waits for the
copy's event, and the copy that comes to the same tensor again waits for the event of the forward that read it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.ragged import RaggedRows
from torchrelay.stages.batch import Batch, Pieces
from torchrelay.stages.outputs import Expand
from torchrelay.stages.padding import Padded
from torchrelay.stages.torch_tensors import (
    carried,
    dense,
    host_value,
    numpy_dtype,
    row_tensors,
    to_host,
    torch_dtype,
    walked,
)

__all__ = ["Departure", "Exports", "Fed", "Feeder", "begin"]

_TURNS = 3
_MOST_SHAPES = 16
_WAIT_S = 600.0


@dataclass(slots=True)
class _Turn:
    """One static tensor. `free` is set once the forward that reads it is launched; `read` is the event of its end."""

    tensor: torch.Tensor
    free: threading.Event = field(default_factory=threading.Event)
    read: torch.cuda.Event | None = None


@dataclass(slots=True)
class _Ring:
    turns: list[_Turn]
    next: int = 0


@dataclass(slots=True)
class Fed:
    """A batch on its way to the device: `copied` is the event after which its tensors hold it."""

    batch: Batch
    copied: torch.cuda.Event
    turns: list[_Turn]

    def give_back(self, read: torch.cuda.Event | None) -> None:
        """The forward was launched and `read` stands behind it, or there will be none."""
        _give_back(self.turns, read)


def _give_back(turns: list[_Turn], read: torch.cuda.Event | None) -> None:
    for turn in turns:
        turn.read = read
        turn.free.set()


class Feeder:
    """Copies batches to one device. One thread calls `feed`."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # so in its stubs
        self._compute: Any = torch.cuda.default_stream(self._device)
        self._rings: OrderedDict[tuple[str, torch.dtype, tuple[int, ...]], _Ring] = OrderedDict()

    def feed(self, batch: Batch, on_host: Collection[str] = ()) -> Fed:
        """Starts the copies; the tensors are valid for the stream that computes once it waited for `copied`. Columns
        named in `on_host` stay arrays."""
        turns: list[_Turn] = []
        torch.cuda.set_device(self._device)
        try:
            # Compiled code is for tensors that were made in inference mode, or for others; they are all of one kind.
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                columns = {
                    name: _kept(column) if name in on_host else self._column(name, column, turns)
                    for name, column in batch.columns.items()
                }
                padded = {n: Padded(self._private(p.lengths), p.axes) for n, p in (batch.padded or {}).items()}
                copied = _event()
                copied.record(self._stream)
        except BaseException:
            _give_back(turns, None)
            raise
        arange = partial(torch.arange, device=self._device)
        moved = replace(batch, columns=columns, padded=padded, fresh=frozenset(columns), arange=arange)
        return Fed(moved, copied, turns)

    @staticmethod
    def host_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A new array in memory that the device copies from by itself."""
        nbytes = math.prod(shape) * dtype.itemsize
        # The array keeps the tensor, and torch's allocator the block until the copies that were started from it are
        # done.
        array: np.ndarray = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().view(dtype)
        return array.reshape(shape)

    def _column(self, name: str, column: Any, turns: list[_Turn]) -> Any:
        if isinstance(column, np.ndarray):
            column = Pieces((column,))
        if isinstance(column, Pieces):
            carrier, dtype = carried(np.empty(0, column.arrays[0].dtype))
            return column.joined() if carrier is None else self._pieces(name, column, dtype, turns)
        if isinstance(column, RaggedRows):
            return row_tensors(column, self._private(column.dense()))
        if isinstance(column, list) and any(isinstance(value, np.ndarray) for value in column):
            return [self._private(value) if isinstance(value, np.ndarray) else value for value in column]
        return column

    def _pieces(self, name: str, pieces: Pieces, dtype: torch.dtype, turns: list[_Turn]) -> torch.Tensor:
        turn = self._take_turn((name, dtype, pieces.row_shape), pieces.rows)
        turns.append(turn)
        at = 0
        for piece in pieces.arrays:
            room = turn.tensor[at : at + len(piece)]
            if isinstance(piece, DeviceRows):
                piece.copy_to(room.data_ptr(), self._stream.cuda_stream)
            else:
                source = _pinned(piece)
                room.view(source.dtype).copy_(source, non_blocking=True)
            at += len(piece)
        return turn.tensor[:at]

    def _take_turn(self, key: tuple[str, torch.dtype, tuple[int, ...]], rows: int) -> _Turn:
        ring = self._rings.get(key)
        if ring is None:
            ring = self._rings[key] = _Ring([])
            while len(self._rings) > _MOST_SHAPES:
                # Columns of ever new shapes are not worth keeping; what is in use lives on with its batch.
                self._rings.popitem(last=False)
        self._rings.move_to_end(key)
        if len(ring.turns) < _TURNS:
            turn = _Turn(self._empty(key, rows))
            ring.turns.append(turn)
            return turn
        turn = ring.turns[ring.next]
        ring.next = (ring.next + 1) % _TURNS
        if not turn.free.wait(_WAIT_S):
            raise TimeoutError(f"a batch was not computed within {_WAIT_S:g} s")
        turn.free.clear()
        if turn.read is not None:
            self._stream.wait_event(turn.read)
        if len(turn.tensor) < rows:
            turn.tensor = self._empty(key, rows)
        return turn

    def _empty(self, key: tuple[str, torch.dtype, tuple[int, ...]], rows: int) -> torch.Tensor:
        tensor = torch.empty((rows, *key[2]), dtype=key[1], device=self._device)
        tensor.record_stream(self._compute)
        return tensor

    def _private(self, array: np.ndarray) -> Any:
        carrier, dtype = carried(array)
        if carrier is None:
            return array  # a dtype that torch does not have
        tensor = _pinned(array).to(self._device, non_blocking=True)
        tensor.record_stream(self._compute)
        return tensor.view(dtype)


def _kept(column: Any) -> Any:
    return column.joined() if isinstance(column, Pieces) else column


def _pinned(array: np.ndarray) -> torch.Tensor:
    """The array's bytes in memory that the device can copy from by itself, as a tensor of a dtype that numpy shares."""
    carrier, _ = carried(array)
    assert carrier is not None  # asked by the caller
    if carrier.flags.c_contiguous:
        tensor = torch.from_numpy(carrier)
        if tensor.is_pinned():
            return tensor
    # torch's allocator of pinned memory keeps the block until the copies that were started from it are done.
    pinned = torch.empty(carrier.shape, dtype=torch_dtype(carrier.dtype), pin_memory=True)
    np.copyto(pinned.numpy(), carrier)
    return pinned


def _event(*, timing: bool = False) -> torch.cuda.Event:
    """One that lets the processor do something else while it is waited for."""
    return torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]  # so in its stubs


def begin(fed: Fed, device: str) -> torch.cuda.Event:
    """Makes the stream that computes wait for a batch; returns the event from which its forward counts."""
    stream: Any = torch.cuda.current_stream(torch.device(device))
    stream.wait_event(fed.copied)
    begun = _event(timing=True)
    begun.record(stream)
    return begun


class Exports(Protocol):
    """Takes columns of a batch that stay in device memory, for stages on other devices."""

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceRows | None:
        """Room for a column of this name, shape `[N, ...]` and dtype; None where it is to go to the host."""
        ...

    def copy_in(self, rows: DeviceRows, address: int, stream: int) -> None:
        """Starts the copy from an address of this device into rows that it gave room for."""
        ...


class Departure:
    """What a forward made, on its way to the host, or to where it stays on the device. `arrived()` waits for it.

    Args:
        stage: the stage's name, for errors.
        outputs: what `forward` returned: columns, or an Expand of such.
        device: of the stage.
        begun: the event before the forward, as `begin` recorded it.
        exports: what may stay on the device; None for nothing.
    """

    def __init__(
        self, stage: str, outputs: object, device: str, begun: torch.cuda.Event, exports: Exports | None = None
    ) -> None:
        self.begun = begun
        self.ended = _event(timing=True)
        self._outputs = outputs
        columns = outputs.columns if isinstance(outputs, Expand) else outputs
        # What is no mapping is reported where all outputs are checked.
        self._moved = None
        if isinstance(columns, Mapping):
            self._moved = {n: _depart(stage, n, c, exports) for n, c in columns.items()}
        self.ended.record(torch.cuda.current_stream(torch.device(device)))

    def idle_s(self, before: Departure | None) -> float:
        """How long the device stood still between the forward before and this one; both have arrived."""
        return 0.0 if before is None else max(0.0, before.ended.elapsed_time(self.begun) / 1000.0)

    def arrived(self) -> object:
        """The outputs with arrays in place of tensors; blocks until the device is done, without the interpreter lock.

        Raises what CUDA reports of the forward or the copies.
        """
        self.ended.synchronize()
        # Its events are asked about later; what it made must not live that long.
        outputs, moved, self._outputs, self._moved = self._outputs, self._moved, None, None
        if moved is None:
            return outputs
        columns = {name: host_value(value) for name, value in moved.items()}
        return replace(outputs, columns=columns) if isinstance(outputs, Expand) else columns


def _export(stage: str, name: str, value: Any, exports: Exports | None) -> DeviceRows | None:
    """The column where it stays, once the copy to there is started; None where it goes to the host."""
    if exports is None or not isinstance(value, torch.Tensor) or not value.is_cuda or not value.ndim:
        return None
    tensor = dense(stage, name, value).contiguous()
    rows = exports(name, tuple(tensor.shape), numpy_dtype(tensor.dtype))
    if rows is not None:
        exports.copy_in(rows, tensor.data_ptr(), torch.cuda.current_stream(tensor.device).cuda_stream)
    return rows


def _depart(stage: str, name: str, value: Any, exports: Exports | None) -> Any:
    rows = _export(stage, name, value, exports)
    if rows is not None:
        return rows
    if isinstance(value, np.ndarray):
        return value.copy()  # the stage may use its own buffer again at its next call
    if isinstance(value, list | tuple):
        value = [row.copy() if isinstance(row, np.ndarray) else row for row in value]
    return walked(value, partial(to_host, stage, name))
