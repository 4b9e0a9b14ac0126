"""What crosses a cut as columns of a batch, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.shards import SIZES, STATE
from torchrelay.errors import DecodeError, InputError
from torchrelay.stages.splitting.crossing import Crossing, groups_of, pack, state_bytes, unpack

DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float16, torch.float32,
          torch.float64, torch.complex64)  # fmt: skip
SHAPES: Sequence[tuple[int, ...]] = ((), (3,), (1,), (2, 5), (4, 0), (2, 1, 3))


def numbers(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=random).to(dtype)


@given(
    rows=st.integers(1, 5),
    forms=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 1 << 40), max_size=3),
    lie=st.sampled_from(["dense", "turned", "sparse"]),
)
def test_what_crosses_comes_back(
    rows: int, forms: list[tuple[torch.dtype, tuple[int, ...]]], sizes: list[int], lie: str
) -> None:
    """Of every dtype and shape, also where a tensor's memory has another order; no more bytes than told."""
    tensors = [numbers(dtype, (rows, *shape), i) for i, (dtype, shape) in enumerate(forms)]
    if lie == "turned":
        tensors = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    elif lie == "sparse":
        tensors = [t.repeat_interleave(3, -1)[..., ::3] for t in tensors]
    columns = pack(Crossing(tensors, sizes), rows)
    state, told = columns[STATE], columns[SIZES]
    assert state.dtype == torch.uint8
    assert state.shape == (rows, state_bytes([t[:1].numel() * t.element_size() for t in tensors]))
    assert told.shape[0] == rows
    back = unpack(state, told[0].tolist())
    assert list(back.numbers) == sizes
    for ours, theirs in zip(back.tensors, tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_rows_may_lie_in_a_wider_column() -> None:
    """As rows of several lengths do, once they are padded to the longest one."""
    tensors = [numbers(torch.float32, (3, 5), 1), numbers(torch.int64, (3, 2), 2)]
    columns = pack(Crossing(tensors, []), 3)
    wide = torch.nn.functional.pad(columns[STATE], (0, 24), value=255)
    back = unpack(wide, columns[SIZES][0].tolist())
    assert all(torch.equal(a, b) for a, b in zip(back.tensors, tensors, strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda state, sizes: (state[:, :-8], sizes),
        lambda state, sizes: (state, sizes[:-2]),
        lambda state, sizes: (state, []),
        lambda state, sizes: (state, [5, *sizes[1:]]),
        lambda state, sizes: (state, [sizes[0], 99, *sizes[2:]]),
        lambda state, sizes: (state, [sizes[0], -1, *sizes[2:]]),
        lambda state, sizes: (state, [sizes[0], sizes[1], 1, -4, *sizes[4:]]),
        lambda state, sizes: (state, [-1, *sizes[1:]]),
        lambda state, sizes: (state, [*sizes, 7]),
        lambda state, sizes: (state, [sizes[0], sizes[1], 1, 1 << 62, *sizes[4:]]),
    ],
    ids=["state", "cut", "empty", "more tensors", "dtype", "negative dtype", "negative", "count", "rest", "huge"],
)  # fmt: skip
def test_what_is_damaged_is_told(damage: object) -> None:
    """And never read as something else."""
    columns = pack(Crossing([numbers(torch.float32, (2, 6), 1), numbers(torch.int64, (2, 3), 2)], [9]), 2)
    state, sizes = damage(columns[STATE], columns[SIZES][0].tolist())  # type: ignore[operator]
    with pytest.raises(DecodeError, match="came from the part before is damaged"):
        unpack(state, sizes)


def test_only_what_has_the_batchs_rows_can_cross() -> None:
    with pytest.raises(InputError, match="called with 3 rows, and the batch has 2"):
        pack(Crossing([torch.zeros(3, 4)], []), 2)
    with pytest.raises(InputError, match="float8_e5m2 cannot go from a part to the next"):
        pack(Crossing([torch.zeros(2, 4).to(torch.float8_e5m2)], []), 2)


def test_rows_of_equal_sizes_are_a_group() -> None:
    """In the order of their first rows; by all columns that are given."""
    sizes = np.array([[1, 8], [1, 9], [1, 8], [1, 9], [1, 8]])
    padded = np.array([[3], [3], [3], [4], [3]])
    assert [g.tolist() for g in groups_of(sizes)] == [[0, 2, 4], [1, 3]]
    assert [g.tolist() for g in groups_of(sizes, padded)] == [[0, 2, 4], [1], [3]]
    assert [g.tolist() for g in groups_of(np.ones((3, 2), np.int64))] == [[0, 1, 2]]
