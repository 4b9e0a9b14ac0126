"""What `@read` and `@write` share: the columns that rows carry from one to the other beside the pipeline's own.

All their names begin with `@`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

__all__ = ["AT", "HELD", "KEPT", "REFUSED", "ROW", "SOURCE", "warm_up"]

SOURCE: Final = "@source"
"""Number of the file that a row comes from, int64."""
ROW: Final = "@row"
"""Its number in that file, int64."""
AT: Final = "@at"
"""Its number in KEPT, int64, where there is any."""
KEPT: Final = "@kept"
"""Of the chunk: the key and the kept columns of its rows, an Arrow stream. So no type of theirs is lost on the way, and
of a row that became many only a number is repeated."""
REFUSED: Final = "@refused"
"""Of the chunk: what could not be read of it, each as the values of a `RowError`."""
HELD: Final = "@held"
"""Not a column: under this name the meta of a job holds the worker's own handle of it."""


def warm_up() -> None:
    """Imports pyarrow where it is installed, which takes a while; formats that need it say so where it is not."""
    with suppress(ImportError):
        import pyarrow.parquet  # noqa: F401
