"""Rows that a user's dataset or iterable gives, as columns: mappings, tuples or single values; tensors become arrays.

Imports no torch: a tensor is known by its methods.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from torchrelay.config.columns import Column, Types, describe
from torchrelay.config.runs import ReadOptions
from torchrelay.config.types import NUMERIC
from torchrelay.errors import InputError
from torchrelay.stages.reading.images import stacked
from torchrelay.stages.reading.raw import MISSING, BadRow, Raw, ids, plain_numbers

__all__ = ["RowReader", "row_bytes"]

VALUE_COLUMN = "value"


class RowReader:
    """Makes a row of what came. Dataset columns of a tuple are `0`, `1` ..., or the pipeline's columns where no
    `columns` say otherwise; of a single value the pipeline's only column, else `value`."""

    def __init__(self, options: ReadOptions, types: Types | None) -> None:
        names = list(types or options.columns)
        self._single = options.columns.get(names[0], names[0]) if len(names) == 1 else VALUE_COLUMN
        self._places = [] if options.columns else names

    def row(self, value: Any, copy: bool = False) -> dict[str, Any]:
        """{dataset column: value}; arrays are copied where they may be filled again."""
        if isinstance(value, Mapping):
            named: dict[str, Any] = {str(k): v for k, v in value.items()}
        elif hasattr(value, "_asdict"):
            named = dict(value._asdict())
        elif isinstance(value, tuple):
            names = self._places[: len(value)] + [str(i) for i in range(len(self._places), len(value))]
            named = dict(zip(names, value, strict=True))
        elif value is None:
            raise InputError("a row is a mapping, a tuple or a value, not None")
        else:
            named = {self._single: value}
        return {name: _plain(v, copy) for name, v in named.items()}

    def table(self, read: Sequence[dict[str, Any] | BadRow]) -> Raw:
        """What was read as columns, numbered from 0 in this order."""
        rows = {i: row for i, row in enumerate(read) if not isinstance(row, BadRow)}
        bad = [replace(row, row=i) for i, row in enumerate(read) if isinstance(row, BadRow)]
        names = dict.fromkeys(name for row in rows.values() for name in row)
        columns: dict[str, Column] = {}
        for name in names:
            column = plain_numbers([row.get(name, MISSING) for row in rows.values()])
            columns[name] = stacked(column) if isinstance(column, list) else column
        return Raw(ids([0] * len(rows)), ids(list(rows)), columns, bad)


def _plain(value: Any, copy: bool) -> Any:
    if hasattr(value, "detach"):
        value = _array_of_tensor(value.detach().cpu())
    elif type(value).__module__.startswith("PIL.") and hasattr(value, "convert"):
        return np.asarray(value.convert("RGB"))
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise InputError(f"{describe(value)} holds Python objects; numbers are expected")
        return value.copy() if copy else value
    return value


def _array_of_tensor(tensor: Any) -> Any:
    """A tensor as an array; bfloat16 and the like by their bits, since numpy itself does not know them."""
    try:
        return tensor.numpy()
    except TypeError as error:
        name, torch = str(tensor.dtype).removeprefix("torch."), sys.modules.get("torch")
        dtype = NUMERIC.get(name) if name.startswith(("bfloat16", "float8")) else None
        if dtype is None or torch is None:
            raise InputError(
                f"a tensor of {tensor.dtype} has no NumPy form ({error}); convert it in the dataset"
            ) from error
        bits = torch.int16 if dtype.itemsize == 2 else torch.uint8
        return tensor.contiguous().view(bits).numpy().view(dtype)


def row_bytes(row: Mapping[str, Any]) -> int:
    """About how large a row is."""
    total = 0
    for value in row.values():
        nbytes = getattr(value, "nbytes", None)
        total += nbytes if isinstance(nbytes, int) else len(value) if isinstance(value, str | bytes | list) else 8
    return total
