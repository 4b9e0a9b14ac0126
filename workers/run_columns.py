"""What `@read` and `@write` share: the columns that rows carry from one to the other beside the pipeline's own.

All their names begin with `@`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

__all__ = ["HELD", "KEY", "REFUSED", "ROW", "SOURCE", "keep_column", "warm_up"]

SOURCE: Final = "@source"
"""Number of the file that a row comes from, int64."""
ROW: Final = "@row"
"""Its number in that file, int64."""
KEY: Final = "@key"
"""Its value of the key column, where the run has one."""
REFUSED: Final = "@refused"
"""Of the chunk: what could not be read of it, each as the values of a `RowError`."""
HELD: Final = "@held"
"""Not a column: under this name the meta of a job holds the worker's own handle of it."""


def keep_column(number: int) -> str:
    """The column that carries the kept column of this number: its own name may be anything."""
    return f"@keep{number}"


def warm_up() -> None:
    """Imports pyarrow where it is installed, which takes a while; formats that need it say so where it is not."""
    with suppress(ImportError):
        import pyarrow.parquet  # noqa: F401
