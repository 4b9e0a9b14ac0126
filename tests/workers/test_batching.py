"""How the jobs of a window are put into batches: by length, within rows and cost, nobody ahead held up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.ragged import RaggedRows
from torchrelay.config.spec import BatchSpec, CostSpec
from torchrelay.config.types import parse_type
from torchrelay.queues.job import Payload
from torchrelay.queues.levels import Levels
from torchrelay.workers.batching import Planner
from torchrelay.workers.work import Incoming, Work

TOKENS = {"tokens": parse_type("int64[*]")}
IMAGES = {"image": parse_type("uint8[*, *, 3]")}


def job(number: int, column: str, values: Any) -> Work[int]:
    return Work(
        Incoming(number, [], len(values)), {column: values}, len(values), len(values), Payload({}), {}, Levels({})
    )


def texts(*job_lengths: list[int]) -> list[Work[int]]:
    """Jobs of rows with so many tokens."""
    return [job(i, "tokens", [np.zeros(n, np.int64) for n in lengths]) for i, lengths in enumerate(job_lengths)]


def numbers(batches: list[list[Work[int]]]) -> list[list[int]]:
    return [[w.job for w in batch] for batch in batches]


def costs(total: int, column: str = "tokens", **more: Any) -> BatchSpec:
    return BatchSpec(max_cost=CostSpec(column=column, total=total), **more)


def test_rows_alone_are_counted_in_the_order_they_came() -> None:
    """Without buckets or costs nothing is sorted, and a batch holds max_rows."""
    works = texts([5], [900], [7], [1, 1], [3])
    assert numbers(Planner[int](BatchSpec(max_rows=3)).batches(works)) == [[0, 1, 2], [3, 4]]


def test_rows_of_like_length_come_together_and_the_head_comes_first() -> None:
    """The long ones wait for each other; the batch of the first job is the first, and keeps its order."""
    works = texts([100], [2], [90], [1], [80], [3])
    planner = Planner[int](costs(300, pad={"tokens": 0}), TOKENS)
    assert numbers(planner.batches(works)) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("spec", "values", "expected"),
    [
        (costs(10), [[4], [4], [2]], [[0, 1, 2]]),
        (costs(10, pad={"tokens": 0}), [[4], [4], [2]], [[0, 2], [1]]),
        (costs(16, pad={"tokens": 0}, buckets={"tokens": [8, 16]}), [[4], [4], [9], [3]], [[0, 1], [2], [3]]),
        (costs(10), [[40], [40], [2]], [[0], [1], [2]]),
        (costs(10, max_rows=2), [[1], [1], [1]], [[0, 1], [2]]),
    ],
)
def test_a_batch_costs_at_most_its_total(spec: BatchSpec, values: list[list[int]], expected: list[list[int]]) -> None:
    """Lengths add up; padded ones count as rows times the longest, in its bucket. One row over the total goes alone."""
    assert numbers(Planner[int](spec, TOKENS).batches(texts(*values))) == expected


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("str", [["abcd"], ["ab"], ["xyz"]]),
        ("bytes", [[b"abcd"], [b"ab"], [b"xyz"]]),
        ("json", [[[1, 2, 3, 4]], [{"a": 1, "b": 2}], [[1, 2, None]]]),
        ("int64", [np.array([4]), np.array([2]), np.array([3])]),
        ("float32", [np.array([3.5], np.float32), np.array([2.0], np.float32), np.array([2.1], np.float32)]),
        ("int64?", [[4], [2], [3]]),
        ("int64[2, *]", [[np.zeros((2, 4))], [np.zeros((2, 2))], [np.zeros((2, 3))]]),
        ("int64[*]", [np.zeros((1, 4)), np.zeros((1, 2)), np.zeros((1, 3))]),
    ],
)
def test_what_a_row_costs(kind: str, values: list[Any]) -> None:
    """The length of texts, bytes, lists and of the first ragged dimension; of a number, the number itself."""
    works = [job(i, "x", v) for i, v in enumerate(values)]
    for total, expected in ((9, [[0, 1, 2]]), (8, [[0], [1, 2]]), (4, [[0], [1], [2]])):
        assert numbers(Planner[int](costs(total, "x"), {"x": parse_type(kind)}).batches(works)) == expected


@pytest.mark.parametrize("value", [None, True, float("nan"), float("inf"), -5.0, 1e300])
def test_numbers_that_are_no_cost_harm_nothing(value: Any) -> None:
    """Null and numbers without a size count as little or as much as can be, and raise nothing."""
    works = [job(0, "x", [value]), job(1, "x", [1])]
    assert sorted(w for b in numbers(Planner[int](costs(10, "x")).batches(works)) for w in b) == [0, 1]


def test_a_row_over_the_largest_bucket_harms_no_other() -> None:
    """It fails in a batch of its own."""
    works = texts([5], [50], [6])
    planner = Planner[int](BatchSpec(pad={"tokens": 0}, buckets={"tokens": [8]}), TOKENS)
    assert numbers(planner.batches(works)) == [[0, 2], [1]]


def test_each_ragged_axis_counts_by_itself() -> None:
    """Tall and wide images are of different shapes."""
    sizes = [(600, 900), (900, 600), (640, 700), (800, 500)]
    works = [job(i, "image", [np.zeros((*size, 3), np.uint8)]) for i, size in enumerate(sizes)]
    spec = BatchSpec(max_rows=2, pad={"image": 0}, buckets={"image": [640, 960]})
    assert numbers(Planner[int](spec, IMAGES).batches(works)) == [[0, 2], [1, 3]]


def test_a_job_over_the_cost_is_cut_into_pieces() -> None:
    """As few as fit, in order; one row over the total is a piece alone."""
    (work,) = texts([4, 4, 1, 30, 2, 2, 2])
    planner = Planner[int](costs(10, max_rows=2), TOKENS)
    assert planner.too_large(work)
    assert list(planner.pieces(work, 0, 7)) == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    assert list(planner.pieces(work, 4, 7, 1)) == [(4, 5), (5, 6), (6, 7)]
    assert not planner.too_large(texts([30])[0])


lengths = st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=25)


@given(lengths, st.integers(1, 8), st.integers(1, 100), st.booleans())
def test_every_job_is_in_one_batch_that_fits(jobs: list[list[int]], rows: int, total: int, padded: bool) -> None:
    """For any window: nobody is left out or doubled, batches fit, and the heads of batches stand in rank order."""
    more: Mapping[str, Any] = {"pad": {"tokens": 0}, "buckets": {"tokens": [8, 16]}} if padded else {}
    works = texts(*jobs)
    batches = numbers(Planner[int](costs(total, max_rows=rows, **more), TOKENS).batches(works))
    assert sorted(w for batch in batches for w in batch) == list(range(len(jobs)))
    assert all(batch == sorted(batch) for batch in batches)
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)
    for batch in batches:
        if len(batch) > 1:
            values = [n for w in batch for n in jobs[w]]
            size = [8 if n <= 8 else 16 for n in values]
            assert len(values) <= rows
            assert (len(size) * max(size, default=0) if padded else sum(values)) <= total


@given(lengths, st.integers(1, 8), st.integers(1, 100), st.booleans())
def test_ragged_rows_are_planned_as_lists_are(jobs: list[list[int]], rows: int, total: int, padded: bool) -> None:
    """However a column is held, its jobs come in the same batches, and in the same pieces."""
    more: Mapping[str, Any] = {"pad": {"image": 0}, "buckets": {"image": [8, 16]}} if padded else {}
    planner = Planner[int](costs(total, "image", max_rows=rows, **more), IMAGES)
    lists = [[np.zeros((n, 5, 3), np.uint8) for n in job] for job in jobs]
    ways = [[job(i, "image", column) for i, column in enumerate(columns)] for columns in (lists, map(held, lists))]
    assert numbers(planner.batches(ways[0])) == numbers(planner.batches(ways[1]))
    for one, other in zip(*ways, strict=True):
        assert planner.too_large(one) == planner.too_large(other)
        assert list(planner.pieces(one, 0, one.rows)) == list(planner.pieces(other, 0, other.rows))


def held(rows: list[np.ndarray]) -> Any:
    return RaggedRows.of(rows, fewest=1) or rows


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 8), st.integers(1, 100), st.booleans())
def test_pieces_are_as_long_as_fits(values: list[int], rows: int, total: int, padded: bool) -> None:
    """Row by row: a piece ends where one more row would cost too much, or be one too many."""
    more: Mapping[str, Any] = {"pad": {"tokens": 0}, "buckets": {"tokens": [8, 16]}} if padded else {}
    planner = Planner[int](costs(total, max_rows=rows, **more), TOKENS)
    expected: list[list[int]] = []
    for value in values:
        each = next((size for size in (8, 16) if size >= value), value) if padded else value
        both = [*expected[-1], each] if expected else []
        cost = len(both) * max(both, default=0) if padded else sum(both)
        if both and len(both) <= rows and cost <= total:
            expected[-1] = both
        else:
            expected.append([each])
    (work,) = texts(values)
    assert [end - start for start, end in planner.pieces(work, 0, len(values))] == [len(piece) for piece in expected]
