"""Counts rows of a run whose key another row has too. Each key's 64 bits are compared, in bounded memory.

Integers and times are their own 64 bits; of others a hash is taken, so that of a billion keys two different ones count
as one with a chance of about 3 %. Where there are more keys than fit, those of one share of all numbers are
looked at at a time, and the column is read as often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from torchrelay.errors import ConfigError
from torchrelay.producer.runs.folder import RunFolder
from torchrelay.stages.writing.arrow import need_arrow
from torchrelay.stages.writing.found import file_names, load, read_part
from torchrelay.stages.writing.layout import json_text

__all__ = ["Duplicates", "duplicates"]

MOST_KEYS = 8 << 20
"""Held at once, of 8 bytes each."""
_SHOWN = 3
Numbers = np.ndarray[Any, np.dtype[np.uint64]]


class Duplicates(NamedTuple):
    """`rows` is how many rows have a key that a row before them has; `examples` are a few such keys, as text."""

    rows: int
    examples: tuple[str, ...]


def duplicates(run: RunFolder) -> Duplicates | None:
    """Of the rows that were read and written, as of the run's last look; None where the run has no key, or its parts
    cannot be read back. Rows that a stage made of one row have its key, and count once."""
    key = run.output.options.key
    if key is None:
        return None
    total = sum(found.record.rows for found in run.parts.values())
    shares = max(-(-total // MOST_KEYS), 1)
    count, twice = 0, np.empty(0, np.uint64)
    try:
        for share in range(shares):
            mine = [_mixed(numbers, shares, share) for _, numbers in _keys(run, key)]
            keys, counts = np.unique(np.concatenate(mine), return_counts=True) if mine else (twice, twice)
            count += int((counts - 1).sum()) if len(counts) else 0
            twice = np.concatenate([twice, keys[counts > 1][: _SHOWN - len(twice)]])
        return Duplicates(count, _examples(run, key, twice))
    except ConfigError:
        return None  # a class of the user's that cannot read


def _mixed(numbers: Numbers, shares: int, share: int) -> Numbers:
    if shares == 1:
        return numbers
    # Numbers that follow each other must fall into all shares.
    spread = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    mine: Numbers = numbers[spread % np.uint64(shares) == share]
    return mine


def _keys(run: RunFolder, key: str) -> Iterator[tuple[Any, Numbers]]:
    """Keys, and 64 bits of each, of the first row that was made of each row."""
    for found in run.parts.values():
        if not found.record.rows:
            continue
        full = load(run.output, found)
        places = full.record.places()
        assert places is not None  # of a run with a key, the record holds the ids
        first = np.flatnonzero(places[2] == 0)
        if run.output.options.format == "parquet":
            from pyarrow import parquet

            with run.output.store.open(file_names(full)[0]) as file:
                column = parquet.ParquetFile(file).read([key]).column(key)
            yield (taken := column.take(first)), _numbers_of_arrow(taken)
        else:
            values = [value for batch in read_part(run.output, full) for value in batch[key]]
            yield (some := [values[i] for i in first.tolist()]), _hashes(some)


def _numbers_of_arrow(column: Any) -> Numbers:
    pa = need_arrow()
    kind = column.type
    if pa.types.is_integer(kind) and not column.null_count:
        return np.asarray(column.to_numpy()).astype(np.int64, casting="unsafe").view(np.uint64)
    if (pa.types.is_timestamp(kind) or pa.types.is_date64(kind) or pa.types.is_time64(kind)) and not column.null_count:
        return np.asarray(column.cast(pa.int64()).to_numpy()).view(np.uint64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return _hashes(column.to_pylist())
    return _hashes([repr(v) for v in column.to_pylist()])


def _hashes(values: list[Any]) -> Numbers:
    plain = [v if isinstance(v, str | bytes) else json_text(v) for v in values]
    return np.fromiter(map(hash, plain), np.int64, len(plain)).view(np.uint64)


def _examples(run: RunFolder, key: str, twice: Numbers) -> tuple[str, ...]:
    found: dict[int, str] = {}
    for values, numbers in _keys(run, key) if len(twice) else ():
        for i in np.flatnonzero(np.isin(numbers, twice)).tolist():
            value = values[i]
            found.setdefault(int(numbers[i]), f"{value.as_py() if hasattr(value, 'as_py') else value}"[:60])
        if len(found) == len(twice):
            break
    return tuple(found.values())
