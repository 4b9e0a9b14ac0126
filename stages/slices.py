"""Tensors, and slices of them, out of weights files straight to where they shall be.

Promise: of a .safetensors file, or of a model that lies in several with an index, no more is in this process's memory
than the slices that were asked for and one buffer. Files are read, not mapped: pages of a mapped file would count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from torchrelay.errors import StageLoadError
from torchrelay.stages.cuts import Cut
from torchrelay.stages.pickled import read_pickled
from torchrelay.stages.safetensors_files import Place, is_index, read_head, read_index

__all__ = ["Weights", "open_weights"]

_BUFFER = 16 << 20
# Shorter pieces of a row are cheaper to copy out of whole rows than to ask the system for one by one.
_PIECE = 4096


class Weights(Protocol):
    """Named tensors that are read when they are wanted. Close it; `with` does."""

    path: Path

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...

    def read(
        self,
        name: str,
        cut: Cut | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The tensor, or a part of it, in `dtype` (None: the file's), with memory of its own on `device`."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Weights: ...
    def __exit__(self, *_: object) -> None: ...


def open_weights(path: Path) -> Weights:
    """Weights to read from.

    Args:
        path: a .safetensors file, or the `.safetensors.index.json` of a model in several. Of a .pt or .pth file, which
            does not say where its tensors are, all is read at once: into the memory of each process that opens it.

    Raises:
        StageLoadError: the file is missing, damaged, of another kind, or holds anything but named tensors.
    """
    if is_index(path):
        return _Lazy(path, read_index(path))
    if path.suffix == ".safetensors":
        return _Lazy(path, read_head(path))
    return _Whole(path, read_pickled(path, torch.device("cpu")))


class _Whole:
    """Weights that are in memory already."""

    def __init__(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._state = state

    def names(self) -> Sequence[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(
        self,
        name: str,
        cut: Cut | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        whole = self._state[name]
        part = whole.clone() if cut is None else cut.of(whole)
        return part.to(device=device, dtype=dtype or whole.dtype)

    def close(self) -> None:
        self._state = {}

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lazy:
    """Weights in files of the safetensors format."""

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self.path = path
        self._places = places
        self._files: dict[Path, int] = {}
        self._staging: torch.Tensor | None = None

    def names(self) -> Sequence[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(
        self,
        name: str,
        cut: Cut | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        place, device = self._places[name], torch.device(device)
        rows, row, segments = _segments(place.shape, cut)
        # Inference tensors could not be changed later, and a user may load inside inference mode.
        with torch.inference_mode(False):
            made = torch.zeros if cut is not None and cut.size is not None else torch.empty
            found = made((rows, row), dtype=dtype or place.dtype, device=device)
            for segment in segments:
                self._fill(found, place, segment)
            return found.view(place.shape if cut is None else cut.shape(place.shape))

    def _fill(self, found: torch.Tensor, place: Place, segment: _Segment) -> None:
        """Reads one segment into the columns of `found` that are its."""
        target = found.narrow(1, segment.at, segment.width)
        in_place = found.device.type == "cpu" and found.dtype == place.dtype
        width, item = segment.width, place.dtype.itemsize
        if in_place and (segment.rows == 1 or (width == segment.pitch and target.is_contiguous())):
            self._read(place, place.start + segment.start * item, _bytes(target))
        elif in_place and width * item >= _PIECE:
            for i in range(segment.rows):
                self._read(place, place.start + (segment.start + i * segment.pitch) * item, _bytes(target[i]))
        else:
            self._through_buffer(target, place, segment)

    def _through_buffer(self, target: torch.Tensor, place: Place, segment: _Segment) -> None:
        """In blocks of rows, each read whole, or alone what is wanted of it where that is much."""
        item, pitch, width = place.dtype.itemsize, segment.pitch, segment.width
        alone = width == pitch or width * item >= _PIECE
        stride = width if alone else pitch
        staging = self._buffer(target.device, min(_BUFFER, segment.rows * stride * item))
        if stride * item > len(staging):
            self._long_rows(target, place, segment, staging)
            return
        step = len(staging) // (stride * item)
        for first in range(0, segment.rows, step):
            rows = min(step, segment.rows - first)
            start = place.start + (segment.start + first * pitch) * item
            # The last row may end with what is wanted of it: behind that the file may end too.
            length = ((rows - 1) * stride + width) * item
            block = staging[: rows * stride * item]
            if alone and width != pitch:
                for i in range(rows):
                    self._read(
                        place, start + i * pitch * item, _bytes(block[i * width * item : (i + 1) * width * item])
                    )
            else:
                self._read(place, start, _bytes(block[:length]))
            target[first : first + rows].copy_(block.view(place.dtype).view(rows, stride)[:, :width])

    def _long_rows(self, target: torch.Tensor, place: Place, segment: _Segment, staging: torch.Tensor) -> None:
        """Rows of which not even one fits the buffer."""
        item = place.dtype.itemsize
        step = len(staging) // item
        for i in range(segment.rows):
            for first in range(0, segment.width, step):
                count = min(step, segment.width - first)
                block = staging[: count * item]
                self._read(place, place.start + (segment.start + i * segment.pitch + first) * item, _bytes(block))
                target[i, first : first + count].copy_(block.view(place.dtype))

    def _buffer(self, device: torch.device, wanted: int) -> torch.Tensor:
        if self._staging is None or len(self._staging) < wanted:
            # From pinned memory a copy to the device is one transfer, and it is over when it returns.
            pinned = device.type == "cuda"
            self._staging = torch.empty(_BUFFER if pinned else wanted, dtype=torch.uint8, pin_memory=pinned)
        return self._staging

    def _read(self, place: Place, start: int, into: memoryview) -> None:
        file = self._files.get(place.path)
        try:
            if file is None:
                file = self._files[place.path] = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < len(into):
                got = os.preadv(file, [into[done:]], start + done)
                if got == 0:
                    raise StageLoadError(f"weights {str(place.path)!r} ended while they were read; were they replaced?")
                done += got
        except OSError as error:
            raise StageLoadError(f"weights {str(place.path)!r} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        self._staging = None

    def __enter__(self) -> _Lazy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Segment:
    """Of each of `rows` rows, `pitch` elements apart, `width` elements from element `start` on; in the part that they
    are read into they stand from column `at` on."""

    start: int
    rows: int
    pitch: int
    width: int
    at: int


def _segments(shape: Sequence[int], cut: Cut | None) -> tuple[int, int, Iterator[_Segment]]:
    """How many rows the part has, how long each is, and what it consists of."""
    if cut is None:
        total = math.prod(shape)
        return 1, total, iter([_Segment(0, 1, total, total, 0)] if total else [])
    outer, inner = math.prod(shape[: cut.dim]), math.prod(shape[cut.dim + 1 :])
    pitch = shape[cut.dim] * inner

    def found() -> Iterator[_Segment]:
        at = 0
        for start, stop in cut.ranges:
            width = (stop - start) * inner
            if width and outer:
                yield _Segment(start * inner, outer, pitch, width, at)
            at += width

    return outer, (cut.taken if cut.size is None else cut.size) * inner, found()


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
