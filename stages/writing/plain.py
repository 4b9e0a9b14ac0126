"""Kept columns for formats that are not Arrow's, and for the list of errors: as values that these have."""

from __future__ import annotations

import json
from typing import Any

from torchrelay.config.columns import Column, plain_value
from torchrelay.stages.reading.arrow import column_of_arrow
from torchrelay.stages.writing.arrow import layout_in
from torchrelay.stages.writing.layout import Layout, layout_of

__all__ = ["key_value", "plain_column"]


def plain_column(array: Any, layout: Layout) -> tuple[Column, Layout]:
    """A kept column for formats that are not Arrow's: (its values, how they lie)."""
    if layout.kind == "json":
        return [None if text is None else json.loads(text) for text in array.to_pylist()], layout
    column = column_of_arrow(array)
    return column, layout_of(column)


def key_value(table: Any, key: str, row: int) -> Any:
    """One row's key, as the list of errors holds it: text, or a value that JSON has."""
    column, _ = plain_column(table.column(key).slice(row, 1), layout_in(table.schema.field(key)))
    return plain_value(column[0])
