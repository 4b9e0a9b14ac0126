"""Makes the parts of a run one dataset: each result column has one type in all of them.

A column that the pipeline does not declare has in each part the type of what was in that chunk: integers here and
floats there, or no value at all. At the end of a run, parts that differ are written again, each whole or not at all, in
the type that the column would have had, had the run been one chunk: wider numbers where these hold every value as it
is, else JSON as text. Where types are declared, nothing is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchrelay.producer.runs.folder import RunFolder
from torchrelay.stages.writing.arrow import from_arrow
from torchrelay.stages.writing.found import Found, Output, file_names, load
from torchrelay.stages.writing.joining import holds, in_file, layouts_for
from torchrelay.stages.writing.layout import Layout
from torchrelay.stages.writing.staging import Staging
from torchrelay.stages.writing.stores import disk_trouble
from torchrelay.stages.writing.table import PartTable

__all__ = ["agree"]

_log = logging.getLogger("torchrelay.runs")


def agree(run: RunFolder) -> dict[str, str]:
    """Writes again what must be, of the parts as of the last look; columns whose parts differed, and their type now.

    Only Parquet's parts have types of their own.
    """
    if run.output.options.format != "parquet":
        return {}
    parts = [found for found in run.parts.values() if found.record.rows]
    wanted = _wanted(run.output, parts)
    again = [found for found in parts if _differs(found, wanted)]
    for found in again:
        _write_again(run.output, found, wanted)
    differed = {n: _shown(to) for n, to in wanted.items() if any(_column_differs(found, n, to) for found in again)}
    if again:
        _log.info("%d parts were written again, so that all have the same types: %s", len(again), differed)
        run.look()
    return differed


def _wanted(output: Output, parts: Sequence[Found]) -> dict[str, Layout]:
    """The layout of each column in all parts, in the order of the first part that has it."""
    groups = {id(found.record.layouts): found.record.layouts for found in parts}
    names = dict.fromkeys(name for layouts in groups.values() for name in layouts)
    return {name: _decided(output, parts, name, [g[name] for g in groups.values() if name in g]) for name in names}


def _decided(output: Output, parts: Sequence[Found], name: str, layouts: Sequence[Layout]) -> Layout:
    options = list(layouts_for(layouts))
    if all(in_file(layout) == in_file(options[0]) and layout.dtype == options[0].dtype for layout in layouts):
        return options[0]
    for option in options[:-1]:
        if all(holds(option, values) for values in _numbers(output, parts, name, option)):
            return option
    return options[-1]


def _numbers(output: Output, parts: Sequence[Found], name: str, option: Layout) -> Iterator[Any]:
    """The column of those parts in which it has another dtype."""
    for found in parts:
        layout = found.record.layouts.get(name)
        if layout is not None and layout.dtype and layout.dtype != option.dtype:
            full = load(output, found).record.layouts[name]
            yield from_arrow(_read(output, found, [name]).column(name), full)


def _read(output: Output, found: Found, names: Sequence[str] | None = None) -> Any:
    from pyarrow import parquet

    with output.store.open(file_names(found)[0]) as file:
        return parquet.ParquetFile(file).read(names)


def _differs(found: Found, wanted: Mapping[str, Layout]) -> bool:
    return any(_column_differs(found, name, to) for name, to in wanted.items())


def _column_differs(found: Found, name: str, to: Layout) -> bool:
    own = found.record.layouts.get(name)
    if own is None:
        return True
    if to.kind == "arrow":
        return False  # the plan decided it
    # Text stands in JSON with its quotes; of no value at all, text and JSON look the same.
    return in_file(own) != in_file(to) or (own.kind == "text" and to.kind == "json")


def _write_again(output: Output, found: Found, wanted: Mapping[str, Layout]) -> None:
    record = load(output, found).record
    table = _read(output, found)
    columns: dict[str, Any] = {}
    layouts: dict[str, Layout] = {}
    for name, to in wanted.items():
        own = record.layouts.get(name)
        if own is None:
            # Of a kept column each part has the type; what a stage did not return in a chunk is null there.
            columns[name], layouts[name] = [None] * record.rows, to
        elif _column_differs(found, name, to):
            columns[name], layouts[name] = from_arrow(table.column(name), own), to
        else:
            columns[name], layouts[name] = table.column(name), own
    store = output.store
    with disk_trouble(store.where), Staging(store, record.part.stem, "again") as staging:
        made = PartTable(columns, layouts, record.rows, record.packed_places)
        ((_, path),) = output.format.write(staging.make, made, replace(record, layouts=layouts))
        staging.sync()
        store.replace(path, found.name)


def _shown(layout: Layout) -> str:
    axes = f"[{', '.join('*' if n is None else str(n) for n in layout.shape)}]" if layout.shape else ""
    return f"{layout.dtype or layout.kind}{axes}"
