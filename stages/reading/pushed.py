"""Rows that were read in the driver, as they travel to the worker that would have read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrelay.errors import DecodeError
from torchrelay.stages.reading.choosing import ReadResult
from torchrelay.stages.reading.kept import pack_table, unpack_table
from torchrelay.stages.reading.raw import BadRow

__all__ = ["as_columns", "from_columns"]


def as_columns(found: ReadResult) -> dict[str, Any]:
    """Everything of it, as values that the codec carries."""
    return {
        "table": found.table,
        "sources": found.sources,
        "rows": found.rows,
        "kept": None if found.kept is None else pack_table(found.kept),
        "bad": [[bad.source, bad.row, bad.error, bad.text] for bad in found.bad],
    }


def from_columns(values: Any) -> ReadResult:
    """What `as_columns` was given; raises DecodeError."""
    if not isinstance(values, Mapping):
        raise DecodeError("a chunk of rows in memory came without its rows")
    try:
        bad = tuple(BadRow(*fields) for fields in values["bad"])
        kept = values["kept"]
        table = None if kept is None else unpack_table(kept)
        return ReadResult(values["table"], values["sources"], values["rows"], table, bad)
    except (KeyError, TypeError) as error:
        raise DecodeError(f"the rows of a chunk are not readable: {error!r:.100}") from error
