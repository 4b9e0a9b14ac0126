"""Rows of several jobs as one batch, as `forward` sees it; `outputs` gives what it returns back to the jobs.

Promise: order within a job and among jobs is kept; the values of a single job are not copied; nothing is cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.device_rows import DeviceRows, on_host
from torchrelay.config.ragged import RaggedRows, shown
from torchrelay.config.types import ColumnType
from torchrelay.errors import InputError
from torchrelay.stages.padding import Allocate, Padded, mask_of, pad_rows, padded_already

__all__ = ["Batch", "Pieces", "Refusal", "as_pieces", "assemble", "join_rows", "read_only"]


class Refusal(str):
    """Why a row was rejected; `stage` says by whom, where several stages run as one."""

    stage: str

    def __new__(cls, why: str, stage: str) -> Refusal:
        made = super().__new__(cls, why)
        made.stage = stage
        return made


class Pieces(NamedTuple):
    """Rows of several jobs that one array could hold, `[n, ...]` each, not joined: a device takes them one by one."""

    arrays: Sequence[np.ndarray | DeviceRows]

    @property
    def rows(self) -> int:
        return sum(map(len, self.arrays))

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.arrays[0].shape[1:]

    def joined(self) -> np.ndarray:
        """All rows in one array."""
        whole = [on_host(array) for array in self.arrays]
        return whole[0] if len(whole) == 1 else np.concatenate(whole)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Batch:
    """N rows that one `forward` takes together. Looks like a mapping of columns, but `len()` counts rows.

    `batch["x"]` is an array `[N, ...]` for a column of fixed shape and for a padded one (in a TorchStage: a tensor
    on its device), and a list of N values for any other column. `job_rows` holds the number of rows of each job.
    """

    columns: dict[str, Any]
    job_rows: tuple[int, ...]
    job_meta: tuple[Mapping[str, Any], ...] = ()
    padded: Mapping[str, Padded] | None = None
    # Columns whose memory was made for this batch: nobody else sees it.
    fresh: frozenset[str] = frozenset()
    arange: Callable[[int], Any] = np.arange
    # Row -> why it was rejected.
    rejected: dict[int, str] = field(default_factory=dict)
    # Per job, whether it has ended meanwhile; None where nobody can tell.
    ended: Callable[[], Sequence[bool]] | None = None

    def __getitem__(self, name: str) -> Any:
        try:
            column = self.columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r} in this batch; it holds {', '.join(self.columns) or 'none'}") from None
        if type(column) is RaggedRows:
            # Only now, as many a column is only passed on; kept, as the list is the stage's own.
            column = self.columns[name] = shown(column)
        return column

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return sum(self.job_rows)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Batch of {len(self)} rows, {len(self.job_rows)} jobs: {', '.join(self.columns)}>"

    def keys(self) -> KeysView[str]:
        """The names of the columns."""
        return self.columns.keys()

    @property
    def meta(self) -> list[Mapping[str, Any]]:
        """Per row, the `meta` that its job was submitted with (empty if none); rows of a job share one mapping."""
        return self._per_row(self.job_meta or ({},) * len(self.job_rows))

    @property
    def cancelled(self) -> list[bool]:
        """Per row, whether its job was cancelled or ended otherwise since the batch began; asks at most twice a second.

        What a stage returns for such a row is dropped: a long `forward` may skip its work.
        """
        return self._per_row((False,) * len(self.job_rows) if self.ended is None else self.ended())

    def reject(self, row: int, why: str) -> None:
        """Refuses one row for good: it is not tried again, and its neighbours go on.

        Return something for it all the same (None in a list, anything in an array): it is not looked at. The job of a
        rejected row fails with `why`; a table submitted with `on_error="keep"` goes on without the submitted row that
        this one came from.

        Raises:
            InputError: the batch has no such row.
        """
        # Not int(): a fraction or a truth value would reject another row.
        number = _number(row)
        if not 0 <= number < len(self):
            raise InputError(f"batch.reject({row!r:.40}): the batch has rows 0 to {len(self) - 1}")
        self.rejected[number] = str(why)

    def _per_row(self, per_job: Sequence[Any]) -> list[Any]:
        return [value for value, rows in zip(per_job, self.job_rows, strict=True) for _ in range(rows)]

    @property
    def lengths(self) -> Mapping[str, Any]:
        """Per padded column, the true sizes, int64: `[N]`, or `[N, k]` where k dimensions are ragged."""
        return {name: padded.lengths for name, padded in (self.padded or {}).items()}

    def mask(self, name: str) -> Any:
        """True where a padded column holds data: bool `[N, longest]`, with one more axis per further ragged one.

        Raises:
            KeyError: the column is not padded (`batch: {pad: {name: value}}` in the YAML).
        """
        padded = (self.padded or {}).get(name)
        if padded is None:
            raise KeyError(f"column {name!r} is not padded; set batch: {{pad: {{{name}: 0}}}} for its stage")
        return mask_of(self.columns[name].shape, padded, self.arange)

    def to_torch(self, device: str, *, share: bool = False) -> Batch:
        """The same batch with tensors on `device` in place of arrays, private and writable but for `share`; nothing is
        cast."""
        from torchrelay.stages.torch_tensors import torch_batch

        return torch_batch(self, device, share=share)


def assemble(
    columns: Sequence[Mapping[str, Column]],
    rows: Sequence[int],
    types: Mapping[str, ColumnType] | None = None,
    pad: Mapping[str, float] | None = None,
    meta: Sequence[Mapping[str, Any]] = (),
    buckets: Mapping[str, Sequence[int]] | None = None,
    *,
    joined_by: Callable[[Sequence[Column]], Any] | None = None,
    empty: Allocate = np.empty,
) -> Batch:
    """Join the tables of several jobs along their rows.

    Args:
        columns: per job, column -> ndarray `[n, ...]` or list of n.
        rows: per job, its n.
        types: the declared types of the columns, as far as they are declared.
        pad: columns to pad to the longest row of the batch, and the value to fill with.
        meta: per job, what its submitter attached; may be empty.
        buckets: padded columns -> the sizes, rising, of which the smallest that holds the longest row is taken.
        joined_by: how the pieces of a column that needs no padding are put together; default `join_rows`.
        empty: makes the array of a padded column.

    Raises:
        InputError: the jobs hold different columns, or a column cannot be padded.
    """
    # A job of which no row enters need not hold every column.
    full = [table for table, count in zip(columns, rows, strict=True) if count] or columns[:1]
    names = full[0].keys()
    for other in full:
        if other.keys() != names:
            raise InputError(
                f"jobs of one batch hold different columns: {', '.join(names)} and {', '.join(other)}; "
                "declare the stage's inputs"
            )
    pad, types, buckets, join = pad or {}, types or {}, buckets or {}, joined_by or join_rows
    joined: dict[str, Any] = {}
    padded: dict[str, Padded] = {}
    fresh: set[str] = set()
    for name in names:
        pieces = [table[name] for table in full]
        sizes = buckets.get(name, ())
        even = padded_already(name, pieces, types.get(name), pad[name], sizes) if name in pad else None
        if name in pad and even is None:
            joined[name], padded[name] = pad_rows(name, pieces, types.get(name), pad[name], sizes, empty)
            fresh.add(name)
        else:
            if even is not None:
                padded[name] = even
            joined[name] = join(pieces)
            if len(pieces) > 1:
                fresh.add(name)
        if isinstance(joined[name], np.ndarray):
            joined[name] = read_only(joined[name])
        elif len(pieces) == 1 and not isinstance(joined[name], Pieces | RaggedRows):
            # The stage may change its list, and the job's own is needed again when this forward fails.
            joined[name] = list(joined[name])
    return Batch(joined, tuple(rows), tuple(meta), padded, frozenset(fresh))


def join_rows(pieces: Sequence[Column]) -> Column:
    """Rows behind rows: one array where all are arrays of one dtype and shape, or ragged rows, else a list of rows.
    Those on a device are brought to the host."""
    pieces = [on_host(piece) for piece in pieces]
    if len(pieces) == 1:
        return pieces[0]
    arrays = as_pieces(pieces)
    if isinstance(arrays, Pieces):
        return arrays.joined()
    return arrays


def as_pieces(pieces: Sequence[Column]) -> Pieces | RaggedRows | list[Any]:
    """Pieces where all are arrays of one dtype and row shape, or such rows on a device; ragged rows; else a list."""
    arrays = [piece for piece in pieces if isinstance(piece, np.ndarray | DeviceRows)]
    # dtypes are compared, because concatenate would promote int64 and float32 to float64 without a word
    kinds = {(array.dtype, array.shape[1:]) for array in arrays}
    if len(arrays) == len(pieces) and len(kinds) == 1:
        return Pieces(tuple(arrays))
    pieces = [on_host(piece) for piece in pieces]
    ragged = RaggedRows.joined(pieces)
    if ragged is not None:
        return ragged
    values: list[Any] = []
    for piece in pieces:
        values.extend(piece)
    return values


def _number(row: Any) -> int:
    """A whole number, -1 for what is none."""
    try:
        return -1 if isinstance(row, bool) else index(row)
    except TypeError:
        return -1


def read_only(array: np.ndarray) -> np.ndarray:
    """The array, or a view of it that cannot be written to."""
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array
