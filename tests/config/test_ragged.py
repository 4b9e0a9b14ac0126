"""RaggedRows is a list of arrays that lies in one: every way to ask for rows gives what a list gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.ragged import RaggedRows, shown, take_rows
from torchrelay.config.types import NUMERIC
from torchrelay.stages.batch import assemble

Rows = list[np.ndarray]


def same(rows: Any, expected: Sequence[np.ndarray]) -> bool:
    """Equal in number, dtype, shape and bytes."""
    return [(r.dtype, r.shape, r.tobytes()) for r in rows] == [(r.dtype, r.shape, r.tobytes()) for r in expected]


@st.composite
def alike(draw: st.DrawFn) -> Rows:
    """Rows of one dtype that differ in their first axis only."""
    dtype = NUMERIC[draw(st.sampled_from(["int32", "float16", "bool", "bfloat16", "complex64"]))]
    row_shape = draw(st.sampled_from([(), (3,), (0,), (2, 1)]))
    lengths = draw(st.lists(st.integers(0, 5), min_size=4, max_size=9))
    return [np.resize(np.arange(1, 90), (n, *row_shape)).astype(dtype) for n in lengths]


def ragged_of(rows: Rows) -> RaggedRows:
    ragged = RaggedRows.of(rows)
    assert ragged is not None
    return ragged


@given(alike(), st.data())
def test_every_way_to_ask_for_rows(rows: Rows, data: st.DataObject) -> None:
    """Numbers from both ends, slices of slices, any order of rows, iteration and dense elements agree with a list."""
    ragged = ragged_of(rows)
    count = len(rows)
    assert same(ragged, rows)
    assert same([ragged[i] for i in range(-count, count)], rows + rows)
    start, end, step = (
        data.draw(st.integers(-3, 9)),
        data.draw(st.integers(-3, 12)),
        data.draw(st.sampled_from([1, 2, -1])),
    )
    assert same(ragged[start:end:step], rows[start:end:step])
    assert same(ragged[start:end][1:3], rows[start:end][1:3])
    index = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=12)), np.int64)
    taken, expected = ragged.take(index), [rows[i] for i in index]
    assert same(taken, expected)
    assert same(take_rows(rows, index), expected)
    assert same([taken.dense()], [np.concatenate([rows[0][:0], *expected])])
    assert same(shown(taken), expected)
    both = RaggedRows.joined([ragged[1:3], taken, ragged[:0]])
    assert both is not None
    assert same(both, [*rows[1:3], *expected])
    assert [ragged.sizes(axis).tolist() for axis in range(ragged.row_ndim)] == np.array(
        [r.shape for r in rows]
    ).T.tolist()


def test_rows_are_read_only_views() -> None:
    """Slices, taken and dense rows share the memory of the whole, and none can be written."""
    ragged = ragged_of([np.arange(n) for n in range(1, 6)])
    for part in (ragged[1:4], ragged.take(np.array([3, 0, 3])), ragged):
        assert all(np.shares_memory(row, ragged.flat) and not row.flags.writeable for row in part)
    assert np.shares_memory(ragged[1:4].dense(), ragged.flat)
    with pytest.raises(ValueError, match="read-only"):
        ragged[0][0] = 1


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [np.zeros(2)] * 3,
        [np.zeros(2)] * 4 + [None],
        [np.zeros(2)] * 4 + [np.ma.masked_array([1.0], [True])],
        [np.zeros(2)] * 4 + [np.zeros(2, np.float32)],
        [np.zeros(2)] * 4 + [np.zeros((2, 1))],
        [np.zeros((2, 3))] * 4 + [np.zeros((0, 2))],
        [np.zeros(2)] * 4 + [np.zeros(())],
        [np.zeros(())] * 4,
        [np.zeros(2, ">f4")] * 4,
        [np.zeros(2, "M8[s]")] * 4,
        [np.array(["a"])] * 4,
        [np.array([None])] * 4,
        [np.zeros(10_000)] * 4,
        [np.zeros((2**32, 0))] * 4,
        ["abcd"] * 4,
    ],
)
def test_what_stays_a_list(rows: list[Any]) -> None:
    """Few, large, mixed, masked and foreign rows are not put together; nothing is cast."""
    assert RaggedRows.of(rows) is None


def test_large_rows_of_several_jobs_are_not_copied() -> None:
    """Rows of one job may be as large as they like, and be repeated; together with others they stay views."""
    images = RaggedRows.adjacent(np.zeros((40, 1000)), np.full(4, 10))
    repeated = images.take(np.zeros(1000, np.int64))
    assert RaggedRows.joined([repeated]) is repeated
    for pieces in ([repeated, repeated], [images, images]):
        assert RaggedRows.joined(pieces) is None
        batch = assemble([{"x": piece} for piece in pieces], [len(piece) for piece in pieces])
        assert all(np.shares_memory(row, images.flat) for row in batch["x"])


def test_pieces_of_other_kinds_are_not_joined() -> None:
    """Rows of another dtype or row shape, and plain lists, stay what they are."""
    ragged = ragged_of([np.zeros((n, 2), ml_dtypes.bfloat16) for n in range(4)])
    for other in (
        ragged_of([np.zeros((1, 2), np.float16)] * 4),
        ragged_of([np.zeros((1, 3), ml_dtypes.bfloat16)] * 4),
        [np.zeros((1, 2), ml_dtypes.bfloat16)],
        np.zeros((1, 2)),
    ):
        assert RaggedRows.joined([ragged, other]) is None
        assert RaggedRows.joined([other, ragged]) is None
