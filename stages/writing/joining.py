"""One layout for a column whose parts were written each by itself: what it would be, had they been one part. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from torchrelay.config.types import NUMERIC
from torchrelay.stages.writing.layout import Layout, carried

__all__ = ["holds", "in_file", "joined", "layouts_for"]

_NAMES = {dtype: name for name, dtype in NUMERIC.items()}
_TEXT = Layout("json")
_NUMBERS = ("number", "fixed", "ragged")


def in_file(layout: Layout) -> tuple[Any, ...]:
    """What of a layout a file's schema shows: equal for columns that readers take for one type."""
    if layout.kind == "arrow":
        return ("arrow",)
    if layout.kind not in _NUMBERS:
        return ("binary",) if layout.kind == "bytes" else ("string",)
    shape = layout.shape if layout.kind == "fixed" else len(layout.shape)
    return (layout.kind, str(carried(layout)), layout.is_complex, shape)


def layouts_for(layouts: Iterable[Layout]) -> Iterator[Layout]:
    """What may hold the values of all these layouts, the best first; the last, JSON as text, holds any.

    Whether wider numbers hold those of a part as they are, only its values tell (`holds`).
    """
    found = Layout("null")
    for layout in layouts:
        found = joined(found, layout)
    yield found
    if found.dtype == "int64":
        yield Layout(found.kind, "uint64", found.shape)
    if found.kind in _NUMBERS:
        yield _TEXT


def joined(a: Layout, b: Layout) -> Layout:
    """The layout for values of both."""
    if a == b or b.kind == "null" or a.kind == "arrow":
        return a
    if a.kind == "null" or b.kind == "arrow":
        return b
    if a.kind not in _NUMBERS or b.kind not in _NUMBERS or len(a.shape) != len(b.shape):
        return _TEXT
    dtype = _promoted(NUMERIC[a.dtype], NUMERIC[b.dtype])
    if dtype is None:
        return _TEXT
    if a.shape == b.shape and a.kind == b.kind:
        return Layout(a.kind, dtype, a.shape)
    return Layout("ragged", dtype, (None,) * len(a.shape))


def _promoted(a: np.dtype[Any], b: np.dtype[Any]) -> str | None:
    """A dtype for numbers of both. int64 stands for a mix of signed and unsigned ones too, whose values must fit."""
    if (a.kind == "b") != (b.kind == "b"):
        return None
    try:
        both = np.promote_types(a, b)
    except TypeError:
        both = np.dtype(np.float32)  # two of the small floats
    if both.kind == "f" and a.kind in "iu" and b.kind in "iu":
        return "int64"
    return _NAMES.get(both)


def holds(layout: Layout, values: Any) -> bool:
    """Whether numbers, an array or a list of arrays and None, are the same ones in the dtype of a layout."""
    if layout.kind not in _NUMBERS:
        return True
    return all(_same(v, layout.np_dtype) for v in ([values] if isinstance(values, np.ndarray) else values))


def _same(value: Any, want: np.dtype[Any]) -> bool:
    if value is None:
        return True
    array = np.asarray(value)
    if array.dtype == want or array.dtype.kind not in "iu" or not array.size:
        return True  # of floats, the promoted dtype holds all
    if want.kind in "iu":
        limits = np.iinfo(want)
        return bool(limits.min <= int(array.min()) and int(array.max()) <= limits.max)
    wide = array.astype(want)
    real = wide.real if want.kind == "c" else wide
    # Python compares an int with a float exactly, numpy after rounding.
    return bool(np.asarray(real, np.float64).ravel().tolist() == array.ravel().tolist())
