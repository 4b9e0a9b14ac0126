"""Rows, tables and stage outputs against declared columns: exact or refused, never silently changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrelay.config.columns import check_column, check_outputs, check_table, check_value, row_of_table, table_of_row
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import ColumnType, parse_type
from torchrelay.errors import InputError


def types(**texts: str) -> dict[str, ColumnType]:
    return {name: parse_type(text) for name, text in texts.items()}


def one(text: str, value: Any) -> Any:
    return table_of_row(types(a=text), {"a": value})["a"]


@settings(deadline=None)
@given(st.sampled_from(["int8", "int32", "int64", "uint8", "uint64"]), st.integers(-(2**70), 2**70))
def test_ints_exact(dtype: str, value: int) -> None:
    """An int comes out as it went in, or is refused: it never wraps."""
    limits = np.iinfo(dtype)
    if limits.min <= value <= limits.max:
        assert int(one(dtype, value)[0]) == value
    else:
        with pytest.raises(InputError, match="'a'"):
            one(dtype, value)


@settings(deadline=None)
@given(st.sampled_from(["float16", "float32", "float64", "bfloat16", "complex64"]), st.integers(-(2**64), 2**63))
def test_ints_in_float_columns(dtype: str, value: int) -> None:
    """A float column takes an int that it can hold exactly, and no other."""
    try:
        column = one(dtype, value)
    except InputError:
        with np.errstate(all="ignore"):
            back = np.asarray(float(value)).astype(parse_type(dtype).np_dtype).astype(np.complex128).real
        assert not (np.isfinite(back) and int(back) == value) or abs(value) >= 2**63
    else:
        assert int(column.astype(np.complex128)[0].real) == value


@settings(deadline=None)
@given(st.lists(st.floats(width=32), max_size=5))
def test_floats_carried(values: list[float]) -> None:
    """Floats of the column's width, NaN and Inf included, are carried as they are."""
    assert np.array_equal(one("float32[*]", values)[0], np.array(values, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("text", "value", "says"),
    [
        ("int64", True, "bool"),
        ("bool", 1, "bool is expected"),
        ("int64", 1.0, "int64 is expected, float"),
        ("int64", "1", "int64 is expected, str"),
        ("float32", 1e300, "does not fit"),
        ("float16", 2049, "exactly"),
        ("float64", np.array(2**53 + 1), "exactly"),
        ("float32", np.float64(1), r"astype\('float32'\)"),
        ("bfloat16[2]", np.ones(2, np.float32), "astype"),
        ("float32[2]", [1.0, 2.0, 3.0], r"float32\[3\] came"),
        ("float32[2]", [[1.0, 2.0]], "2 dims, not 1"),
        ("float32[*, *]", [[1.0], [1.0, 2.0]], "column 'a'"),
        ("float32", None, r"\?"),
        ("float32", np.array([object()]), "float32 is expected"),
        ("str", b"x", "str is expected, bytes"),
        ("str", 5, "str is expected, int 5"),
        ("bytes", "x", "bytes is expected, str"),
    ],
)
def test_refused(text: str, value: object, says: str) -> None:
    """What does not fit is an InputError that names the column, what came and what to do."""
    with pytest.raises(InputError, match=says) as caught:
        one(text, value)
    assert "'a'" in str(caught.value)


def test_converted() -> None:
    """Same-kind values that lose nothing are converted; big-endian arrays become native."""
    assert one("float32[2]", np.ones(2, ">f4"))[0].dtype == np.dtype("=f4")
    assert one("int64", np.int8(3)).dtype == np.int64
    assert one("float64[2]", (1, 2)).tolist() == [[1.0, 2.0]]
    assert one("bytes", memoryview(b"ab")) == [b"ab"]
    assert one("float32[*]", [])[0].dtype == np.float32


def test_no_copy() -> None:
    """An array of the declared dtype is taken as it is, not copied."""
    array = np.ones((4, 3), np.float32)
    assert np.shares_memory(one("float32[4, 3]", array), array)


def test_defaults_and_null() -> None:
    """Missing columns take their default or null, and a default is not shared between rows."""
    declared = types(a="str = en", b="int64?", c="json = [1]")
    first = table_of_row(declared, {})
    assert first == {"a": ["en"], "b": [None], "c": [[1]]}
    first["c"][0].append(2)
    assert table_of_row(declared, {})["c"] == [[1]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "'text' is missing; str is expected"),
        ({"texxt": "a"}, "did you mean 'text'"),
        ({"text": "a", "x": 1}, "no column 'x'"),
        ({"text": "a", 5: 1}, "no column 5"),
        (["text"], "a row is a mapping"),
        (None, "a row is a mapping"),
    ],
)
def test_row_shape(row: Any, says: str) -> None:
    """Missing and unknown columns are named, with the nearest known one."""
    with pytest.raises(InputError, match=says):
        table_of_row(types(text="str"), row)


@pytest.mark.parametrize(
    "row", [{}, {"": 1}, {"a b": 1}, {"é": 1}, {"a\n": 1}, {"{}": 1}, {"x" * 65: 1}, {1: 1}, "a", None]
)
def test_undeclared_names(row: Any) -> None:
    """Without declared columns, names still have to be plain."""
    with pytest.raises(InputError):
        table_of_row(None, row)


def test_undeclared_values() -> None:
    """Without declared columns, values are wrapped as they are."""
    table = table_of_row({}, {"x": np.ones((2, 3)), "t": "hi"})
    assert np.shape(table["x"]) == (1, 2, 3)
    assert table["t"] == ["hi"]


def test_named_dims() -> None:
    """A named dim is one size within a row, and may differ between rows."""
    declared = types(image="uint8[H, W]", mask="bool[H, W]")
    two, three = np.zeros((2, 5), np.uint8), np.zeros((3, 5), np.uint8)
    check_table(declared, {"image": [two, three], "mask": [two.astype(bool), three.astype(bool)]})
    with pytest.raises(InputError, match="row 1: column 'mask': H is 2 here and 3 in 'image'"):
        check_table(declared, {"image": [two, three], "mask": [two.astype(bool), two.astype(bool)]})
    with pytest.raises(InputError, match="H is 3"):
        table_of_row(declared, {"image": two, "mask": three.astype(bool)})


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.text(max_size=5), st.lists(st.integers(0, 255)))))
def test_table_is_its_rows(rows: list[tuple[int, str, list[int]]]) -> None:
    """A table checks to the same values as its rows one by one."""
    declared = types(n="int32", t="str", r="uint8[*]")
    table, count = check_table(
        declared, {"n": [r[0] for r in rows], "t": [r[1] for r in rows], "r": [r[2] for r in rows]}
    )
    assert count == len(rows)
    assert np.shape(table["n"]) == (len(rows),)
    for i, (n, t, r) in enumerate(rows):
        single = row_of_table(table_of_row(declared, {"n": n, "t": t, "r": r}))
        both = row_of_table(table, i)
        assert (single["n"], single["t"], list(single["r"])) == (both["n"], both["t"], list(both["r"]))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"a": 5}, "one value per row"),
        ({"a": "abc"}, "one value per row"),
        ({"a": {1, 2}}, "one value per row"),
        ({"a": np.array(5)}, "one value per row"),
        ({"a": [1, 2], "b": ["x"]}, "'b' has 1 rows, 'a' has 2"),
        ({"a": [1, "x"], "b": ["x", "y"]}, "row 1: column 'a'"),
        ({"a": [1, 2**40], "b": ["x", "y"]}, "row 1: column 'a'"),
        ({"a": np.ones((2, 2), np.int32), "b": ["x", "y"]}, "'a'"),
        ({"a": np.ones(2), "b": ["x", "y"]}, "astype"),
        ({"a": [1]}, "'b' is missing"),
        ([1], "a table is a mapping"),
    ],
)
def test_table_refused(table: Any, says: str) -> None:
    """A table that is none names its column, and its row where one value is wrong."""
    with pytest.raises(InputError, match=says):
        check_table(types(a="int32", b="str"), table)


@pytest.mark.parametrize("table", [{"a": 5}, {"a": "abc"}, {"a": np.array(1)}, {"a b": [1]}, None])
def test_undeclared_table_refused(table: Any) -> None:
    """Without declared columns, a table's columns still hold one value per row."""
    with pytest.raises(InputError):
        check_table(None, table)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"x": np.ones((3, 2), np.float32)}, "2 rows"),
        ({"x": np.array(1.0)}, "one value per row"),
        ({"x": np.ones((2, 3), np.float32)}, r"float32\[2\] is expected in each of 2 rows, float32\[3\] came"),
        ({"x": np.ones((2, 2), np.float64)}, "astype"),
        ({"x": np.ones((2, 2), np.float32), "y": [1, 2]}, "'y' is not declared"),
        ({}, "did not return column 'x'"),
        ({5: [1, 2]}, "named 5"),
        ([1], "returned list"),
        (None, "returned NoneType"),
    ],
)
def test_outputs_refused(outputs: object, says: str) -> None:
    """A stage that returns something else than declared is named, with the column and the rows expected."""
    with pytest.raises(InputError, match=says) as caught:
        check_outputs("encode", types(x="float32[2]"), outputs, 2)
    assert "'encode'" in str(caught.value)


def test_outputs_named_dims() -> None:
    """Named dims hold for what a stage returns."""
    with pytest.raises(InputError, match="stage 's': row 0: column 'b': H is 3"):
        check_outputs("s", types(a="uint8[H]", b="uint8[H]"), {"a": [[1, 2]], "b": [[1, 2, 3]]}, 1)


def test_outputs_undeclared() -> None:
    """Without declared outputs any column of the right length passes."""
    out = check_outputs("s", {}, {"x": np.ones((2, 5)), "t": ("a", "b")}, 2)
    assert np.shape(out["x"]) == (2, 5)
    assert out["t"] == ["a", "b"]


def test_row_of_table() -> None:
    """A row has Python scalars for numbers without dims, bfloat16 too, and arrays without the batch axis."""
    table: Mapping[str, Any] = {
        "n": np.array([1, 2]),
        "h": np.ones(2, ml_dtypes.bfloat16),
        "v": np.ones((2, 3)),
        "t": ["a", "b"],
    }
    row = row_of_table(table, 1)
    assert (type(row["n"]), type(row["h"]), row["v"].shape, row["t"]) == (int, float, (3,), "b")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("int32[*]", [np.zeros(n, np.int32) for n in range(5)]),
        ("int64[*]?", [np.arange(n, dtype=np.int32) for n in range(5)]),
        ("float32[*, 3]", [np.zeros((n, 3), np.float32) for n in range(5)]),
        ("uint8[H, W, 3]", [np.zeros((n, 2, 3), np.uint8) for n in range(5)]),
        ("float64[2, *]", [np.zeros((2, 3))] * 5),
    ],
)
def test_arrays_that_differ_in_one_axis_are_held_as_one(text: str, rows: list[Any]) -> None:
    """Of a table and of a stage's outputs; values, shapes and the declared dtype are those of the rows one by one."""
    expected = [check_value("a", parse_type(text), row) for row in rows]
    for column in (rows, RaggedRows.of(rows)):
        for checked in (
            check_table(types(a=text), {"a": column})[0],
            check_outputs("s", types(a=text), {"a": column}, 5),
        ):
            assert isinstance(checked["a"], RaggedRows)
            assert [(r.dtype, r.tolist()) for r in checked["a"]] == [(r.dtype, r.tolist()) for r in expected]
            assert row_of_table(checked, 3)["a"].tolist() == expected[3].tolist()


@pytest.mark.parametrize(
    ("text", "rows", "why"),
    [
        ("int32[*]", [np.zeros(2, np.int64)] * 5, "row 0: .*astype"),
        ("int32[*]", [np.zeros(2, np.int32)] * 4 + [None], "row 4"),
        ("int32[*]", [np.zeros(2, np.int32)] * 4 + [np.zeros((2, 2), np.int32)], "row 4: .*2 dims"),
        ("int32[*, *]", [np.zeros(2, np.int32)] * 5, "row 0: .*1 dims"),
        ("float32[*, 3]", [np.zeros((2, 4), np.float32)] * 5, "row 0"),
        ("float32[2, *]", [np.zeros((2, 4), np.float32)] * 3 + [np.zeros((3, 4), np.float32)] * 2, "row 3"),
        ("str", [np.zeros(2)] * 5, "row 0"),
        ("float32[2]", [np.zeros(2, np.float32)] * 4 + [np.zeros(3, np.float32)], "row 4"),
    ],
)
def test_the_row_that_does_not_fit_is_named(text: str, rows: list[Any], why: str) -> None:
    """However many fit, and however the column is held."""
    for column in (rows, RaggedRows.of(rows) or rows):
        with pytest.raises(InputError, match=why):
            check_table(types(a=text), {"a": column})


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=6), st.booleans())
def test_a_name_is_one_size_in_a_row_of_ragged_columns(sizes: list[tuple[int, int]], holds: bool) -> None:
    """Two columns that name one dim must agree row by row; the first row where they do not is named."""
    kinds = types(a="int32[T]", b="float32[T, 2]", c="bool[U]")
    table = {
        "a": [np.zeros(a, np.int32) for a, _ in sizes],
        "b": [np.zeros((a if holds else b, 2), np.float32) for a, b in sizes],
        "c": [np.zeros(b, np.bool_) for _, b in sizes],
    }
    odd = [] if holds else [i for i, (a, b) in enumerate(sizes) if a != b]
    if odd:
        with pytest.raises(InputError, match=f"row {odd[0]}: column 'b': T is"):
            check_table(kinds, table)
    else:
        assert check_table(kinds, table)[1] == len(sizes)


@pytest.mark.parametrize("text", ["", "é", "😀", "a\0b"])
def test_texts_pass_as_they_are(text: str):
    assert check_value("t", parse_type("str"), text) == text


@pytest.mark.parametrize("text", ["\ud800", "good \udfff", "é\udc80"])
def test_half_of_a_surrogate_pair_is_refused_by_its_row(text: str):
    """Found where the row is known: when a job is encoded, it would cost all of them."""
    with pytest.raises(InputError, match=r"row 1: column 't': str is expected.*surrogate"):
        check_column("t", parse_type("str"), ["good", text], 2)
