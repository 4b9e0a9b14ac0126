"""The columns that a run's rows carry from `@read` to `@write` beside the pipeline's own. All begin with `@`."""

from __future__ import annotations

from typing import Final

__all__ = ["HELD", "KEY", "REFUSED", "ROW", "SOURCE", "keep_column"]

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
