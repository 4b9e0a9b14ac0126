"""Small parts to write, and what is found of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.runs import WriteOptions
from torchrelay.stages.writing import Output, PartId, PartRows, RowError, Written, open_output, write_part
from torchrelay.stages.writing.found import load, read_part, scan

RUN = "run-1"
FORMATS = ("parquet", "jsonl", "npy")


def part(chunk: int = 0, round_: int = 0) -> PartId:
    return PartId(RUN, chunk, round_)


def output_at(folder: object, kind: str = "parquet", **options: Any) -> Output:
    return open_output(WriteOptions(str(folder), kind, **options))


def rows_of(columns: Mapping[str, Column], errors: Sequence[RowError] = (), **more: Any) -> PartRows:
    """Rows of source 0, numbered from 0."""
    count = len(next(iter(columns.values())))
    zeros = np.zeros(count, np.int64)
    return PartRows(columns, zeros, np.arange(count), zeros, errors=errors, **more)


def write(output: Output, columns: Mapping[str, Column], chunk: int = 0, fence: str = "w-1", **more: Any) -> Written:
    written = write_part(output, part(chunk), fence, rows_of(columns, **more), lambda: True)
    assert written is not None
    return written


def read_back(output: Output, chunk: int = 0, round_: int = 0) -> dict[str, list[Any]]:
    """All rows of the only part of a chunk."""
    (found,) = scan(output, RUN).parts[chunk, round_]
    columns: dict[str, list[Any]] = {}
    for batch in read_part(output, load(output, found)):
        for name, column in batch.items():
            columns.setdefault(name, []).extend(column)
    return columns


def same(a: Any, b: Any) -> bool:
    """Equal values; of arrays dtype and shape too, and NaN is NaN. An array without elements may lose its width."""
    if isinstance(b, np.ndarray) and b.ndim:
        if not isinstance(a, np.ndarray) or a.dtype != b.dtype or a.ndim != b.ndim or a.size != b.size:
            return False
        return not b.size or (a.shape == b.shape and a.tobytes() == b.tobytes()) or _equal(a, b)
    if isinstance(a, float | complex | np.inexact) or isinstance(b, float | complex | np.inexact):
        return _equal(np.asarray(a), np.asarray(b))
    if isinstance(b, np.generic | np.ndarray):
        return _equal(np.asarray(a), np.asarray(b))
    return type(a) is type(b) and a == b


def _equal(a: Any, b: Any) -> bool:
    if a.shape != b.shape or a.dtype.kind in "OUS":
        return False
    wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else None
    wide = wide or (np.float64 if b.dtype.kind not in "biu" else None)
    return np.array_equal(a, b) if wide is None else np.array_equal(a.astype(wide), b.astype(wide), equal_nan=True)


def visible(folder: Path) -> list[str]:
    """What readers of the folder meet."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(("_", "."))) if folder.is_dir() else []


def unfinished(folder: Path) -> list[str]:
    tmp = folder / "_run/tmp"
    return sorted(p.name for p in tmp.iterdir()) if tmp.is_dir() else []
