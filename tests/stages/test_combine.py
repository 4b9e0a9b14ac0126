"""What combines the shards of a stage: exact where it can be, and told where it cannot."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from torchrelay.errors import ConfigError
from torchrelay.stages.batch import Batch
from torchrelay.stages.combine import Combine


def combine(parts: list[Any], dim: int | None = None) -> tuple[Any, dict[int, str]]:
    """One column of so many shards, and why rows were rejected."""
    batch = Batch({f"y:{i}": part for i, part in enumerate(parts)}, (len(parts[0]),))
    made = Combine("s", len(parts), {"y": dim}).forward(batch)
    return made["y"], batch.rejected


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_arrays_are_concatenated_along_a_rows_own_dimension(dim: int) -> None:
    """As rows would be one by one."""
    parts = [np.random.default_rng(i).standard_normal((5, 2, 3)).astype(np.float32) for i in range(3)]
    made, _ = combine(parts, dim)
    np.testing.assert_array_equal(made, [np.concatenate([p[i] for p in parts], axis=dim) for i in range(5)])
    listed, _ = combine([list(p) for p in parts], dim)
    np.testing.assert_array_equal(listed, made)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_short_floats_are_summed_in_float32_and_rounded_once(dtype: str) -> None:
    """Adding one after the other in the short type would lose what is small."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    eps = float(ml_dtypes.finfo(kind).eps)
    parts = [np.full((2, 1), 1.0, kind), *(np.full((2, 1), eps / 4, kind) for _ in range(8))]
    made, _ = combine(parts)
    assert made.dtype == kind
    np.testing.assert_array_equal(made, np.full((2, 1), 1.0 + 2 * eps, kind))
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = (one_by_one + part).astype(kind)
    assert (one_by_one == 1).all()


def test_the_sum_of_float32_is_that_of_the_shards_in_their_order() -> None:
    """So that the same parts give the same bytes each time."""
    parts = [np.random.default_rng(i).standard_normal((4, 7)).astype(np.float32) for i in range(4)]
    made, _ = combine(parts)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, ((parts[0] + parts[1]) + parts[2]) + parts[3])


def test_the_parts_are_not_written_to() -> None:
    """They lie in memory that other processes read."""
    parts = [np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)]
    for part in parts:
        part.flags.writeable = False
    np.testing.assert_array_equal(combine(parts)[0], np.full((2, 3), 2))


def test_a_sum_that_its_type_does_not_hold_rejects_that_row() -> None:
    """Numbers that wrapped around would be wrong without a word."""
    parts = [np.array([[100], [1]], np.int8), np.array([[100], [2]], np.int8)]
    for given in (parts, [list(p) for p in parts]):
        made, rejected = combine(given)
        assert list(rejected) == [0]
        assert (
            "stage 's': column 'y': the sum of all shards is more than int8 holds; return a wider type" in rejected[0]
        )
        assert int(made[1][0]) == 3


def test_scalars_are_summed() -> None:
    made, _ = combine([[1.5, None], [2.5, None]])
    assert made == [4.0, None]
    assert combine([np.array([1, 2]), np.array([3, 4])])[0].tolist() == [4, 6]


def test_null_in_some_shards_only_rejects_the_row() -> None:
    made, rejected = combine([[np.ones(2), None, np.ones(2)], [np.ones(2), None, None]], 0)
    assert [None if m is None else m.tolist() for m in made] == [[1, 1, 1, 1], None, None]
    assert list(rejected) == [2]
    assert "is null in shard 1 and not in all" in rejected[2]


@pytest.mark.parametrize(
    ("parts", "dim", "says"),
    [
        (
            [np.ones((2, 3)), np.ones((2, 4))],
            None,
            "float64[2, 3] from shard 0, float64[2, 4] from shard 1, cannot be s",
        ),
        ([np.ones((2, 3)), np.ones((3, 3))], -1, "cannot be concatenated along dimension -1; in all others they must"),
        ([np.ones((2, 3)), np.ones((2, 3), np.int64)], -1, "float64[2, 3] from shard 0, int64[2, 3] from shard 1"),
        ([np.ones(3), np.ones(3)], 1, "float64[3] from shard 0, float64[3] from shard 1, cannot be concatenated along"),
        ([np.ones((2, 3)), np.ones(3)], 0, "float64[2, 3] from shard 0, float64[3] from shard 1"),
    ],
)
def test_parts_that_do_not_fit_are_rejected_with_their_shapes(parts: list[Any], dim: int | None, says: str) -> None:
    """Row by row, whether they came as arrays or lists; the rows beside them are combined."""
    good = [parts[0], parts[0]]
    made, rejected = combine([[good[0], parts[0]], [good[1], parts[1]]], dim)
    if dim != 1:
        assert made[0] is not None
        assert list(rejected) == [1]
    assert says in rejected[1]
    assert "stage 's': column 'y'" in rejected[1]
    assert combine([part[None] for part in parts], dim)[1].keys() == {0}


def test_nothing_to_combine_is_an_error() -> None:
    with pytest.raises(ConfigError, match="stage 's': two shards or more"):
        Combine("s", 1, {"y": None})
