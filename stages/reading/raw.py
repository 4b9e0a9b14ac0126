"""What a reader of one format hands on: rows with their ids, columns under the dataset's names, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from torchrelay.config.columns import Column

__all__ = ["MISSING", "BadRow", "Ids", "Raw", "Unreadable", "ids", "plain_numbers"]

Ids = np.ndarray[Any, np.dtype[np.int64]]


class _Missing:
    """In a list of values: the row has none, which is not the same as null."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In a list of values: the row has one that could not be read; it costs the row where the value is wanted."""

    error: str
    """Name of the error's class."""
    text: str

    @classmethod
    def of(cls, error: BaseException, where: str = "") -> Unreadable:
        return cls(type(error).__name__, f"{where}{error}"[:2000])


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was not read, and why."""

    source: int
    row: int
    error: str
    """Name of the error's class."""
    text: str


@dataclass(slots=True)
class Raw:
    """Rows of a chunk. A list column may hold MISSING and Unreadable."""

    sources: Ids
    rows: Ids
    columns: Mapping[str, Column]
    bad: list[BadRow] = field(default_factory=list)
    nbytes: int = 0
    """Bytes that were read for it, by estimate where the file is packed."""
    images: frozenset[str] = frozenset()
    """Columns whose values are the bytes of image files."""
    as_text: bool = False
    """Whether numbers stand as text, as in CSV."""
    arrow: Any = None
    """The same rows as a pyarrow.Table, where they come from one."""


def ids(values: Sequence[int] | range) -> Ids:
    return np.asarray(values, np.int64).reshape(len(values))


def plain_numbers(values: list[Any]) -> Column:
    """Python's numbers of one kind as an array (int64, float64 or bool); any other list as it is."""
    kinds = set(map(type, values))
    if kinds and kinds in ({int}, {bool}, {float}, {int, float}):
        try:
            return np.asarray(values, np.float64 if float in kinds else np.bool_ if bool in kinds else np.int64)
        except OverflowError:
            pass  # integers over 64 bits stay what they are
    return values
