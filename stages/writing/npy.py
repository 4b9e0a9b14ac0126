"""Parts as .npy files, one a column: what numpy can hold without pickle, ready for `np.load(..., mmap_mode="r")`.

numbers, arrays of one shape      <part>.<column>.npy         [N, ...]
arrays of several shapes          <part>.<column>.npy         all elements one behind the other
                                  <part>.<column>.shapes.npy  int64 [N, ndim]
everything else, and nulls        <part>.<column>.jsonl       one JSON value a line
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.stages.writing.formats import BATCH_ROWS, Make, from_json, json_values, write_line
from torchrelay.stages.writing.layout import Array, Layout, as_flat, as_stack, json_text, restore
from torchrelay.stages.writing.record import PartRecord
from torchrelay.stages.writing.stores import Store
from torchrelay.stages.writing.table import PartTable

__all__ = ["Npy"]


class Npy:
    """As many files a part as it has columns, or a few more."""

    inside = False
    suffix = ".npy"

    def write(self, make: Make, table: PartTable, record: PartRecord) -> list[tuple[str, Path]]:
        files: list[tuple[str, Path]] = []

        def save(suffix: str, array: Array) -> None:
            files.append((suffix, make(suffix)))
            _save(files[-1][1], np.ascontiguousarray(array))

        for name, column in table.columns.items():
            layout, begin = table.layouts[name], _file_name(name)
            if not _is_npy(column, layout):
                files.append((f"{begin}.jsonl", make(f"{begin}.jsonl")))
                with files[-1][1].open("wb") as file:
                    for value in json_values(column, layout):
                        write_line(file, json_text(value))
            elif layout.kind == "ragged":
                flat, shapes, _ = as_flat(column, layout)
                save(f"{begin}.npy", _native(flat, layout))
                save(f"{begin}.shapes.npy", shapes)
            else:
                save(f"{begin}.npy", _native(as_stack(column, layout)[0], layout))
        return files

    def read(self, store: Store, record: PartRecord, names: Sequence[str]) -> Iterator[dict[str, Column]]:
        columns: dict[str, Column] = {}
        # The part's own name has no dot.
        found = {n[n.index(".", n.rfind("/") + 1) :]: n for n in names}
        for name, layout in record.layouts.items():
            begin = _file_name(name)
            if f"{begin}.jsonl" in found:
                with store.open(found[f"{begin}.jsonl"]) as file:
                    columns[name] = from_json([json.loads(line) for line in file], layout)
                continue
            array = _load(store, found[f"{begin}.npy"])
            if layout.kind == "ragged":
                columns[name] = _rows(array, _load(store, found[f"{begin}.shapes.npy"]), layout)
            else:
                columns[name] = restore_native(array, layout)
        for start in range(0, record.rows, BATCH_ROWS):
            yield {n: c[start : start + BATCH_ROWS] for n, c in columns.items()}


def _file_name(column: str) -> str:
    """How the ends of a column's file names begin; dots are taken by what follows."""
    return "." + quote(column, safe="").replace(".", "%2E")


def _is_npy(column: Column, layout: Layout) -> bool:
    if layout.kind not in ("number", "fixed", "ragged"):
        return False
    return not isinstance(column, list) or not any(v is None for v in column)


def _native(array: Array, layout: Layout) -> Array:
    """numpy's files have complex numbers, unlike others."""
    return restore(array, layout) if layout.is_complex else array


def restore_native(array: Array, layout: Layout) -> Array:
    return array if layout.is_complex else restore(array, layout)


def _rows(flat: Array, shapes: Array, layout: Layout) -> list[Any]:
    ends = np.cumsum(shapes.prod(axis=1))
    starts = np.concatenate([[0], ends[:-1]]).tolist()
    values = restore_native(flat, layout)
    return [values[a:b].reshape(s) for a, b, s in zip(starts, ends.tolist(), shapes.tolist(), strict=True)]


def _save(path: Path, array: Array) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # Not np.save: on a full disk its error does not say so.
        file.write(array.reshape(-1).view(np.uint8).data)


def _load(store: Store, name: str) -> Array:
    with store.open(name) as file:
        array: Array = np.load(file, allow_pickle=False)
    return array
