"""Groups of rows that are computed apart: each gets what is its own, and what does not fit together is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.stages.splitting.parts import Parts, assert_as_whole, cut
from torchrelay.config.shards import PADDED, SIZES, STATE
from torchrelay.errors import DecodeError, InputError
from torchrelay.stages.outputs import Expand
from torchrelay.stages.splitting.joining import joined

TOKENS = {"tokens": "int64[*]"}
PAD = {"max_rows": 8, "pad": {"tokens": 0}}
GROUPS = [np.array([0, 2]), np.array([1])]


def tokens(*rows: list[int]) -> dict[str, Any]:
    return {"tokens": [np.array(row) for row in rows]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    outputs = {"total": "float32[4]", "each": "float32[*, 4]"}
    return Parts(cut(tmp_path_factory.mktemp("cut"), "Tokens", TOKENS, outputs, batch=PAD, parts=3))


def test_rows_that_were_padded_apart_are_one_batch(parts: Parts) -> None:
    """Each is computed at the length that it had in the first part, and stands where it stood."""
    assert_as_whole(parts, tokens([1, 2, 3], [4]), tokens([5], [6, 7], [13, 9]), tokens([8, 1, 2]), tokens([9]))


def test_rows_that_are_refused_are_not_missed_by_their_neighbours(parts: Parts) -> None:
    """A group of which no row is left may return nothing; also where there is no other."""
    assert_as_whole(parts, tokens([1, 2, 3], [13, 1, 4]), tokens([13]), tokens([13, 2]), tokens([4, 5]))
    assert_as_whole(parts, tokens([13]), tokens([13, 2]))


def test_rows_of_groups_become_several_in_order(tmp_path: Path) -> None:
    pipeline = cut(tmp_path, "Opens", TOKENS, {"y": "float32[4]", "of": "int64"}, batch=PAD, rows="expand")
    assert_as_whole(Parts(pipeline), tokens([1, 2, 3], [4]), tokens([5], [6, 7]), tokens([8, 1, 2]))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.data())
def test_expanded_rows_are_as_without_groups(of: list[int], data: st.DataObject) -> None:
    """Whatever groups rows are in, and however many each becomes; those of a refused group are left out."""
    groups = [np.flatnonzero(np.array(of) == g) for g in dict.fromkeys(of)]
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(of), max_size=len(of)))
    refused = groups[-1].tolist() if len(groups) > 1 and data.draw(st.booleans()) else []
    made = [
        Expand(
            {"row": np.repeat(g, [counts[i] for i in g]), "text": [str(i) for i in g for _ in range(counts[i])]},
            torch.tensor([counts[i] for i in g]),
        )
        for g in groups
    ]
    if refused:
        made[-1] = None  # type: ignore[call-overload]
    together = joined(made, groups, len(of), "s", refused)
    wanted = [i for i in range(len(of)) if i not in refused for _ in range(counts[i])]
    assert list(together.columns["row"]) == wanted
    assert together.columns["text"] == [str(i) for i in wanted]


@pytest.mark.parametrize(
    ("two", "one", "says"),
    [
        ({"y": torch.zeros(1, 4)}, {"y": torch.zeros(2, 4)}, r"stage 's': column 'y' needs 2 rows; Tensor"),
        ({"y": torch.zeros(2)}, {"y": torch.tensor(1.0)}, "column 'y' needs 1 rows"),
        ({"y": ["a", "b"]}, {"y": "c"}, "column 'y' needs 1 rows; str of length 1 came"),
        ({"y": ["a", "b"]}, {"z": ["c"]}, "other columns for other rows"),
        ({"y": ["a", "b"]}, Expand({"y": ["c"]}, [1]), "other columns for other rows"),
        (Expand({"y": ["a"]}, [1, 0]), Expand({"z": ["a"]}, [1]), "other columns for other rows"),
        (Expand({"y": ["a"] * 4}, [2]), Expand({"y": ["a"]}, [1]), "whole number from 0 for each of the 2 rows"),
        (Expand({"y": ["a"] * 2}, [1.5, 1]), Expand({"y": ["a"]}, [1]), "whole number from 0"),
        (Expand({"y": ["a"] * 2}, [1, 0]), Expand({"y": []}, [1]), "column 'y' needs 1 rows; list of length 2 came"),
    ],
)
def test_a_group_that_returns_what_is_not_its_rows_is_told(two: Any, one: Any, says: str) -> None:
    """Also where all groups together have the right number: rows would get what is another's."""
    with pytest.raises(InputError, match=says):
        joined([two, one], GROUPS, 3, "s")


def test_nothing_is_cast_where_groups_meet() -> None:
    """Columns of other dtypes or shapes stay rows; those of one form are one array."""
    ints, floats = torch.tensor([[1], [3]]), torch.tensor([[2.0]])
    found = joined([{"y": ints, "z": ints}, {"y": floats, "z": ints[:1]}], GROUPS, 3, "s")
    assert [row.dtype for row in found["y"]] == [torch.int64, torch.float32, torch.int64]
    assert found["z"].tolist() == [[1], [1], [3]]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        (SIZES, [0, 0], "damaged: 0 tensors with 0 sizes"),
        (SIZES, [1, 99], "damaged"),
        (STATE, [1, 2, 3], "damaged: a row has 3 bytes"),
        (PADDED, [-3], "does not say how column 'tokens' was padded"),
    ],
)
def test_a_damaged_row_says_so_and_costs_its_own_batch_alone(
    parts: Parts, column: str, value: list[int], says: str
) -> None:
    """The part computes the next batch as ever."""
    table = parts.first(tokens([1, 2, 3]))[0]
    came = np.array(value, table[column][0].dtype)
    runner = parts.runners[-1]
    if column != PADDED:
        with pytest.raises(DecodeError, match=says):
            parts.runners[1].run([{STATE: table[STATE], SIZES: table[SIZES], column: [came]}], [1])
    table = {**parts.first(tokens([1, 2, 3]))[0]}
    middle = parts.runners[1].run([{name: table[name] for name in (STATE, SIZES)}], [1])[0].columns
    table |= middle
    with pytest.raises(DecodeError, match=says):
        runner.run([{**table, column: [came]}], [1])
    assert len(runner.run([table], [1])[0].columns["total"]) == 1
