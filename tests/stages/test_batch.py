"""Joining tables of jobs into a batch, padding, and splitting outputs back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import parse_type
from torchrelay.errors import InputError
from torchrelay.stages.batch import Pieces, as_pieces, assemble
from torchrelay.stages.outputs import empty_outputs, own, split


def test_fixed_columns_are_joined_in_order() -> None:
    """Arrays of fixed shape become one read-only array and strings one list, jobs in order."""
    tables: list[dict[str, Any]] = [
        {"x": np.array([[1.0, 2.0]], np.float32), "s": ["a"]},
        {"x": np.array([[3.0, 4.0], [5.0, 6.0]], np.float32), "s": ["b", "c"]},
    ]
    batch = assemble(tables, [1, 2], meta=[{"user": 1}, {}])
    assert len(batch) == 3
    assert list(batch.keys()) == ["x", "s"]
    assert "x" in batch
    assert "y" not in batch
    assert batch["s"] == ["a", "b", "c"]
    np.testing.assert_array_equal(batch["x"], [[1, 2], [3, 4], [5, 6]])
    assert batch["x"].dtype == np.float32
    assert batch.meta == [{"user": 1}, {}, {}]
    assert batch.job_rows == (1, 2)
    assert dict(batch).keys() == batch.keys()
    with pytest.raises(ValueError, match="read-only"):
        batch["x"][0] = 0
    with pytest.raises(KeyError, match="it holds x, s"):
        batch["y"]


def test_one_job_is_not_copied() -> None:
    """Values of a single job are used as they are, but neither arrays nor lists can be written through the batch."""
    x, names = np.zeros((2, 3)), ["a", "b"]
    batch = assemble([{"x": x, "s": names}], [2])
    assert np.shares_memory(batch["x"], x)
    assert batch["s"] == names
    assert batch["s"] is not names
    assert batch["s"][0] is names[0]
    assert not batch["x"].flags.writeable
    assert x.flags.writeable


def test_unequal_arrays_stay_rows() -> None:
    """Undeclared arrays of other shapes or dtypes become a list of rows; nothing is promoted or cast."""
    batch = assemble([{"x": np.zeros((1, 2))}, {"x": np.zeros((1, 3))}], [1, 1])
    assert [row.shape for row in batch["x"]] == [(2,), (3,)]
    batch = assemble([{"x": np.zeros((1, 2), np.int64)}, {"x": np.zeros((1, 2), np.float32)}], [1, 1])
    assert [row.dtype for row in batch["x"]] == [np.int64, np.float32]


def test_different_columns_are_refused() -> None:
    """Jobs that hold different columns cannot form a batch."""
    with pytest.raises(InputError, match="different columns"):
        assemble([{"a": [1]}, {"b": [1]}], [1, 1])


def test_jobs_without_rows_ride_along() -> None:
    """A job of 0 rows in a batch adds nothing and gets 0 rows of output."""
    batch = assemble([{"x": []}, {"x": np.ones((2, 3))}, {"x": []}], [0, 2, 0])
    assert batch["x"].shape == (2, 3)
    parts = split({"y": np.arange(2)}, batch.job_rows, "s")
    assert [len(part.columns["y"]) for part in parts] == [0, 2, 0]


def test_padding_one_ragged_dimension() -> None:
    """Rows are filled up to the longest; lengths and mask say what is real."""
    types = {"ids": parse_type("int64[*]")}
    tables: list[dict[str, Any]] = [
        {"ids": [np.array([1, 2, 3])]},
        {"ids": [np.array([4]), np.array([], np.int64)]},
    ]
    batch = assemble(tables, [1, 2], types, {"ids": -1})
    np.testing.assert_array_equal(batch["ids"], [[1, 2, 3], [4, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(batch.lengths["ids"], [3, 1, 0])
    assert batch.lengths["ids"].dtype == np.int64
    np.testing.assert_array_equal(batch.mask("ids"), [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert batch.mask("ids").dtype == np.bool_
    with pytest.raises(KeyError, match="not padded"):
        batch.mask("other")


def test_padding_two_ragged_dimensions() -> None:
    """Images get lengths [N, 2] and a mask over height and width; the fixed axis is left alone."""
    types = {"image": parse_type("uint8[H, W, 3]")}
    images = [np.full((2, 4, 3), 7, np.uint8), np.full((3, 1, 3), 9, np.uint8)]
    batch = assemble([{"image": images[:1]}, {"image": images[1:]}], [1, 1], types, {"image": 0})
    assert batch["image"].shape == (2, 3, 4, 3)
    np.testing.assert_array_equal(batch.lengths["image"], [[2, 4], [3, 1]])
    np.testing.assert_array_equal(batch.mask("image"), (batch["image"] != 0).any(axis=-1))
    one = assemble([{"image": images[1:]}], [1], types, {"image": 0})
    np.testing.assert_array_equal(one["image"][0], images[1])


def test_ragged_axes_are_padded_up_to_a_bucket_each() -> None:
    """Each axis is as long as the smallest bucket that all rows fit; lengths and mask still tell what is real."""
    types = {"image": parse_type("uint8[H, W, 3]")}
    images = [np.full((2, 4, 3), 7, np.uint8), np.full((3, 5, 3), 9, np.uint8)]
    batch = assemble([{"image": images}], [2], types, {"image": 0}, buckets={"image": [4, 8]})
    assert batch["image"].shape == (2, 4, 8, 3)
    np.testing.assert_array_equal(batch.lengths["image"], [[2, 4], [3, 5]])
    np.testing.assert_array_equal(batch.mask("image"), (batch["image"] != 0).any(axis=-1))
    with pytest.raises(InputError, match=r"'image': a row is 9 long, over the largest bucket \(8\)"):
        assemble([{"image": [np.zeros((9, 1, 3), np.uint8)]}], [1], types, {"image": 0}, buckets={"image": [4, 8]})


class NoBytes:
    """A device's memory that nobody may look into."""

    def copy_to(self, start: int, nbytes: int, address: int, stream: int) -> None:
        raise AssertionError("copied")

    def read(self, start: int, nbytes: int) -> np.ndarray[Any, np.dtype[Any]]:
        raise AssertionError("read")


def test_rows_of_one_length_are_padded_already() -> None:
    """They are put together as a column of fixed shape is, without a copy of a single job's; lengths and mask say the
    same as after padding."""
    kind = {"x": parse_type("int64[*]")}
    one, two = np.arange(6).reshape(2, 3), np.arange(3).reshape(1, 3)
    batch = assemble([{"x": one}], [2], kind, {"x": 0})
    assert np.shares_memory(batch["x"], one)
    both = assemble([{"x": one}, {"x": two}], [2, 1], kind, {"x": 0}, joined_by=as_pieces)
    assert isinstance(both["x"], Pieces)
    assert [piece is array for piece, array in zip(both["x"].arrays, (one, two), strict=True)] == [True, True]
    np.testing.assert_array_equal(both.lengths["x"], [3, 3, 3])
    assert both.lengths["x"].dtype == np.int64
    np.testing.assert_array_equal(batch.mask("x"), np.ones((2, 3), bool))
    # Rows on a device stay there.
    there = DeviceRows(NoBytes(), 0, np.dtype(np.int64), (4, 3))
    apart = assemble([{"x": one}, {"x": there}], [2, 4], kind, {"x": 0}, joined_by=as_pieces)
    assert apart["x"].arrays[1] is there
    np.testing.assert_array_equal(apart.lengths["x"], [3] * 6)
    # A bucket that is longer, or another length beside it: then they are padded.
    assert assemble([{"x": one}], [2], kind, {"x": 0}, buckets={"x": [3, 8]})["x"].shape == (2, 3)
    assert assemble([{"x": one}], [2], kind, {"x": 0}, buckets={"x": [8]})["x"].shape == (2, 8)
    assert assemble([{"x": one}, {"x": one[:, :2]}], [2, 2], kind, {"x": 0})["x"].shape == (4, 3)
    with pytest.raises(InputError, match=r"cannot be padded with 0\.5"):
        assemble([{"x": one}], [2], kind, {"x": 0.5})
    square = assemble([{"x": np.zeros((2, 3, 4))}], [2], {"x": parse_type("float64[*, *]")}, {"x": 0})
    np.testing.assert_array_equal(square.lengths["x"], [[3, 4], [3, 4]])


@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=3), min_size=1, max_size=4))
def test_padding_loses_nothing(jobs: list[list[list[int]]]) -> None:
    """Masked values, row by row, are the values that came."""
    tables: list[dict[str, Any]] = [{"x": [np.array(row, np.int32) for row in job]} for job in jobs]
    batch = assemble(tables, [len(job) for job in jobs], {"x": parse_type("int32[*]")}, {"x": 0})
    rows = [row for job in jobs for row in job]
    assert rows == [list(row[keep]) for row, keep in zip(batch["x"], batch.mask("x"), strict=True)]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([("int32[*]", ()), ("float32[*, 3]", (3,)), ("uint8[*, *, 3]", (2, 3)), ("int16[*, 600]", (600,))]),
    st.sampled_from([(), (4, 10)]),
)
def test_padding_ragged_rows_is_padding_lists(jobs: list[list[int]], kind: tuple[str, Any], sizes: Any) -> None:
    """Values, shape, lengths and mask are the same, however the rows of each job are held, in one job and several."""
    declared = parse_type(kind[0])
    random = np.random.default_rng(5)
    lists = [[random.integers(1, 99, (n, *kind[1])).astype(declared.np_dtype) for n in job] for job in jobs]
    ragged = [RaggedRows.of(rows, fewest=1) for rows in lists]
    mixed = [held if i % 2 else lists[i] for i, held in enumerate(ragged)]
    counts = [len(job) for job in jobs]
    rows = [row for job in lists for row in job]
    expected = np.zeros((sum(counts), *one_shape(lists, sizes, declared.shape)), declared.np_dtype)
    for place, row in zip(expected, rows, strict=True):
        place[tuple(map(slice, row.shape))] = row
    for columns in (lists, ragged, mixed):
        tables: list[Any] = [{"x": column} for column in columns]
        batch = assemble(tables, counts, {"x": declared}, {"x": 0}, buckets={"x": sizes} if sizes else {})
        assert (batch["x"].dtype, batch["x"].shape) == (expected.dtype, expected.shape)
        assert batch["x"].tobytes() == expected.tobytes()
        sides = 2 if kind[0].count("*") == 2 else 1
        lengths = [list(row.shape[:sides]) for row in rows]
        assert batch.lengths["x"].reshape(-1, sides).tolist() == lengths
        assert (expected[~batch.mask("x")] == 0).all()
        assert batch.mask("x").sum() == sum(np.prod(n, dtype=int) for n in lengths)


def one_shape(jobs: list[list[np.ndarray]], sizes: Any, declared: Any) -> list[int]:
    longest = np.max([row.shape for rows in jobs for row in rows], axis=0).tolist()
    return [
        n if isinstance(d, int) else min([s for s in sizes if s >= n], default=n)
        for n, d in zip(longest, declared, strict=True)
    ]


def test_a_stage_sees_ragged_rows_as_its_own_list_of_arrays() -> None:
    """Of one job and of several, the same list at each look, and no other batch's; the arrays are read-only."""
    rows = [np.arange(n) for n in range(5)]
    ragged = RaggedRows.of(rows)
    assert ragged is not None
    for tables in ([{"x": ragged}], [{"x": ragged[:2]}, {"x": ragged[2:]}], [{"x": ragged[:2]}, {"x": rows[2:]}]):
        counts: list[int] = [len(table["x"]) for table in tables]
        batch = assemble(tables, counts)
        seen = batch["x"]
        assert type(seen) is list
        assert [row.tolist() for row in seen] == [row.tolist() for row in rows]
        assert dict(batch)["x"] is seen
        seen.clear()
        assert len(assemble(tables, counts)["x"]) == 5
    assert not any(row.flags.writeable for row in assemble([{"x": ragged}], [5])["x"])


def test_ragged_outputs_are_given_back_as_one_array_each() -> None:
    """A list of arrays, once it is checked, is shared out, and no more the stage's memory; rejected rows are gone."""
    buffer = np.arange(20)
    outputs = {"y": [buffer[i : 2 * i] for i in range(6)]}
    for types in ({"y": parse_type("int64[*]")}, {}):
        parts = split(outputs, [2, 4], "s", types, rejected={1: "no"})
        assert [part.rejected for part in parts] == [{1: "no"}, {}]
        kept = [own(part).columns["y"] for part in parts]
        before = [[row.tolist() for row in column] for column in kept]
        buffer += 100
        assert [[row.tolist() for row in column] for column in kept] == before
        buffer -= 100
        assert before == [[[]], [[2, 3], [3, 4, 5], [4, 5, 6, 7], [5, 6, 7, 8, 9]]]
        if types:
            assert all(isinstance(column, RaggedRows) for column in kept)


@pytest.mark.parametrize(
    ("rows", "kind", "value"),
    [
        ([np.zeros(2), np.zeros(2, np.float32)], "float64[*]", 0),
        ([np.zeros((2, 3)), np.zeros((2, 4))], "float64[*, 3]", 0),
        ([np.zeros((2, 3)), np.zeros((4, 3))], "float64[3, *]", 0),
        ([np.zeros(2), None], "float64[*]?", 0),
        (["a", "b"], "str", 0),
        ([np.zeros(2, np.uint8), np.zeros(3, np.uint8)], "uint8[*]", -1),
        ([np.zeros(2, np.int64), np.zeros(3, np.int64)], "int64[*]", 0.5),
        ([np.zeros(2, np.uint8), np.zeros(3, np.uint8)], "uint8[*]", float("nan")),
    ],
)
def test_what_cannot_be_padded(rows: list[Any], kind: str, value: float) -> None:
    """Mixed dtypes, fixed axes that differ, nulls, text and values that do not fit are refused by name."""
    with pytest.raises(InputError, match="'x'"):
        assemble([{"x": rows}], [2], {"x": parse_type(kind)}, {"x": value})


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_split_gives_each_job_its_rows(job_rows: list[int]) -> None:
    """The parts, put together again, are the whole."""
    total = sum(job_rows)
    outputs = {"a": np.arange(total), "s": [str(i) for i in range(total)]}
    parts = split(outputs, job_rows, "s")
    assert [len(part.columns["a"]) for part in parts] == job_rows
    assert [v for part in parts for v in part.columns["s"]] == outputs["s"]
    np.testing.assert_array_equal(np.concatenate([part.columns["a"] for part in parts]), outputs["a"])


@pytest.mark.parametrize(
    "outputs",
    [
        np.zeros(3),
        None,
        {"y": np.zeros((2, 2))},
        {"y": np.zeros((3, 3))},
        {"y": np.zeros((3, 2)), "z": [1, 2, 3]},
        {"y": np.float32(1)},
        {"y": np.array(1.0)},
        {},
    ],
)
def test_wrong_outputs_name_the_stage(outputs: Any) -> None:
    """Outputs of another kind, column, shape or row count are refused with the stage's name."""
    with pytest.raises(InputError, match="encode"):
        split(outputs, [1, 2], "encode", {"y": parse_type("float64[2]")})


def test_empty_outputs_keep_dtype_and_shape() -> None:
    """A job of 0 rows gets every declared column, with its dtype and shape."""
    out = empty_outputs({"v": parse_type("float32[4, 2]"), "s": parse_type("str"), "r": parse_type("int64[*]")})
    assert isinstance(out["v"], np.ndarray)
    assert (out["v"].shape, out["v"].dtype) == ((0, 4, 2), np.float32)
    assert (out["s"], out["r"]) == ([], [])
