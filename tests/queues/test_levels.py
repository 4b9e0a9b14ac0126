"""Columns of one job, made at different numbers of rows, lined up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.ragged import RaggedRows
from torchrelay.errors import DecodeError
from torchrelay.queues.job import (
    AT,
    FROM_INPUT,
    Payload,
    decode_payload,
    decode_payloads,
    encode_payload,
    join_payloads,
)
from torchrelay.queues.levels import Levels, RowFailure, result_row, result_table

Tree = list[list[list[int]]]


def counts(values: list[int]) -> np.ndarray[Any, Any]:
    return np.array(values, np.uint32)


def hidden(tree: Tree) -> dict[str, Any]:
    """A tree's rows -> items -> leaves as the counts of nodes 1 and 2."""
    return {"#1": counts([len(row) for row in tree]), "#2": counts([len(item) for row in tree for item in row])}


trees = st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3), max_size=4)


@given(trees, st.booleans())
def test_nested_expansions_line_up_in_both_directions(tree: Tree, arrays: bool) -> None:
    """Older columns repeat down to the leaves, leaves group up to lists of lists: as a plain walk of the tree says."""
    levels = Levels.of(hidden(tree))
    leaves = [leaf for row in tree for item in row for leaf in item]
    column: Any = np.array(leaves, np.int64) if arrays else leaves
    rows = list(range(len(tree)))
    down = levels.align(np.array(rows) if arrays else rows, (), (1, 2))
    assert list(down) == [i for i, row in enumerate(tree) for item in row for _ in item]
    up = levels.align(column, (1, 2), ())
    assert [[list(item) for item in row] for row in up] == tree
    assert [list(item) for item in levels.align(column, (1, 2), (1,))] == [item for row in tree for item in row]
    assert levels.entry_rows((1, 2), len(tree)).tolist() == list(down)


@given(trees)
def test_ragged_rows_line_up_as_lists_do(tree: Tree) -> None:
    """Repeated down, grouped up, and left out with their row: what comes of one array is what comes of a list."""
    levels = Levels.of(hidden(tree))
    leaves = [np.arange(leaf) for row in tree for item in row for leaf in item]
    rows = [np.arange(i) for i in range(len(tree))]
    for column, made_at, read_at in (
        (leaves, (1, 2), (1,)),
        (leaves, (1, 2), ()),
        (rows, (), (1, 2)),
        (rows, (), (1,)),
    ):
        ragged = RaggedRows.of(column, fewest=1)
        if ragged is not None:
            as_list, as_one = levels.align(column, made_at, read_at), levels.align(ragged, made_at, read_at)
            assert plain(as_one) == plain(as_list)
            failures = {"!1": [[0, "s", "E", "why", 1]]}
            tables = [result_table(hidden(tree) | failures | {"c": c}, {}) for c in (as_list, as_one)]
            assert type(tables[1].columns["c"]) is list
            assert plain(tables[1].columns["c"]) == plain(tables[0].columns["c"])


def plain(value: Any) -> Any:
    """Arrays as lists, marked, and ragged rows as lists of them."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | RaggedRows) else value


@given(trees)
def test_a_column_read_beside_its_expansion_is_grouped_then_repeated(tree: Tree) -> None:
    """What was made within node 1 comes to rows of node 3 as a whole group per row."""
    values = {"#1": counts([len(row) for row in tree]), "#3": counts([2] * len(tree))}
    items = [len(item) for row in tree for item in row]
    read = Levels.of(values).align(items, (1,), (3,))
    assert read == [[len(item) for item in row] for row in tree for _ in range(2)]


def test_one_row_repeats_without_a_copy() -> None:
    """An array of one source row is shared by all rows made of it."""
    image = np.ones((1, 64, 64), np.uint8)
    read = Levels.of({"#1": counts([5])}).align(image, (), (1,))
    assert isinstance(read, np.ndarray)
    assert read.shape == (5, 64, 64)
    assert np.shares_memory(read, image)


def test_groups_of_an_array_are_views() -> None:
    """Regrouping copies nothing."""
    crops = np.arange(12).reshape(6, 2)
    read = Levels.of({"#1": counts([4, 0, 2])}).align(crops, (1,), ())
    assert [len(group) for group in read] == [4, 0, 2]
    assert all(np.shares_memory(group, crops) for group in read if len(group))


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ({}, [1, 2]),
        ({"#1": counts([1, 2])}, [1, 2]),
        ({"#1": np.array([1.0])}, [1]),
        ({"#1": [1]}, [1]),
    ],
)
def test_counts_that_do_not_fit_are_a_decode_error(values: dict[str, Any], column: list[int]) -> None:
    """Missing, wrong or foreign counts are named, whatever direction is read."""
    with pytest.raises(DecodeError):
        Levels.of(values).align(column, (1,), ())


def test_a_row_result_holds_lists_where_nobody_regrouped() -> None:
    """One submitted row gives one row back."""
    values = {"#1": counts([2]), "lang": ["en"], "score": np.array([1.5, 2.5]), "n": np.array([7])}
    row = result_row(values, {"score": (1, 1)})
    assert (row["lang"], row["n"], row["score"].tolist()) == ("en", 7, [1.5, 2.5])


def test_numbers_of_a_row_are_python_s_own() -> None:
    """A nullable number travels as an array without dims and comes back as a number."""
    for origins in ({}, {"x": (1,)}):
        row = result_row({"x": [np.array(2.5, np.float32)], "y": np.array([3]), "z": [None]}, origins)
        assert row == {"x": 2.5, "y": 3, "z": None}
        assert [type(v) for v in row.values()] == [float, int, type(None)]


def test_a_table_result_leaves_rejected_rows_out_at_every_level() -> None:
    """Rows made of a rejected one go with it; what is left says where it came from."""
    values = {
        "#1": counts([2, 1, 3]),
        "lang": ["a", "b", "c"],
        "x": np.arange(6),
        "!2": [[1, "crop", "ValueError", "no", 3]],
        "!3": [[1, "late", "ValueError", "no", 3], [0, "late", "Rejected", "small", 1]],
    }
    table = result_table(values, {"x": (1, 1), AT: (0, 1)})
    assert table.columns["lang"] == ["c"] * 3
    assert np.asarray(table.columns["x"]).tolist() == [3, 4, 5]
    assert table.source_rows.tolist() == [2, 2, 2]
    assert table.failures == [
        RowFailure(0, "late", "Rejected", "small", 1),
        RowFailure(1, "crop", "ValueError", "no", 3),
    ]
    regrouped = result_table(values, {"x": (1, 1), AT: FROM_INPUT})
    assert [group.tolist() for group in regrouped.columns["x"]] == [[3, 4, 5]]


def test_of_branches_the_column_made_last_wins() -> None:
    """A branch that only carries the older value of a column does not hide what the other made of it."""
    carries = Payload({"x": b"old", "a": b"a"}, b"m", {"a": (2,)})
    makes = Payload({"x": b"new", "b": b"b"}, b"m", {"x": (3,), "b": (3,)})
    for parts in ([carries, makes], [makes, carries]):
        joined = join_payloads(parts)
        assert joined.columns == {"x": b"new", "a": b"a", "b": b"b"}
        assert joined.origins["x"] == (3,)


def test_results_of_two_ends_stand_where_both_stand() -> None:
    """The rows of a result are those that all its last stages share."""
    parts = [Payload({}, b"", {AT: (0, 1, 2)}), Payload({}, b"", {AT: (0, 1, 4)}), Payload({}, b"", {AT: (0, 1)})]
    assert join_payloads(parts).origins[AT] == (0, 1)
    data = b"".join(encode_payload(p.columns, p.meta, p.origins) for p in parts)
    assert decode_payloads(data).origins[AT] == (0, 1)


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.lists(st.integers(0, 255), min_size=1, max_size=4).map(tuple))
)
def test_origins_travel(origins: dict[str, tuple[int, ...]]) -> None:
    """A payload with origins comes back as it went."""
    assert decode_payload(encode_payload({}, b"m", origins)) == ({}, b"m", origins)


@pytest.mark.parametrize("origins", [3, {"a": 3}, {"a": []}, {"a": [-1]}, {"a": [256]}, {"a": ["x"]}, {1: [1]}, [1]])
def test_malformed_origins_are_refused(origins: Any) -> None:
    """Nothing but lists of small whole numbers by column is an origin."""
    import msgpack

    with pytest.raises(DecodeError, match="payload"):
        decode_payload(msgpack.packb(({}, b"", origins)))
