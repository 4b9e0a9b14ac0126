"""Jobs cut into parts for several batches, and put together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MakePipeline, Workers
from torchrelay import Relay
from torchrelay.config.spec import BatchSpec, CostSpec
from torchrelay.config.types import parse_type
from torchrelay.errors import InputError, JobFailed
from torchrelay.queues.job import Payload
from torchrelay.queues.levels import Levels
from torchrelay.stages import Made
from torchrelay.workers.batching import Planner
from torchrelay.workers.pieces import Gathering, cut
from torchrelay.workers.work import Incoming, Work

TYPES = {"t": parse_type("int32[*]")}
SORTED = BatchSpec(max_rows=16, pad={"t": 0}, buckets={"t": [4, 8, 16]}, max_cost=CostSpec(column="t", total=64))


def job(name: str, lengths: list[int], *, keep: bool = False) -> Work[str]:
    rows = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]
    incoming = Incoming(name, (), len(rows), keep)
    return Work(incoming, {"t": rows}, len(rows), len(rows), Payload({}), {}, Levels({}))


def bucket(length: int) -> int:
    return next(b for b in (4, 8, 16) if b >= length)


@given(st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=40), min_size=1, max_size=6))
def test_rows_of_many_jobs_share_batches_by_length(jobs: list[list[int]]) -> None:
    """Each row is in one batch, each batch fits, padded, and every job is put together in its own order."""
    works = [job(str(i), lengths) for i, lengths in enumerate(jobs)]
    planner: Planner[str] = Planner(SORTED, TYPES)
    made: dict[str, Any] = {}
    for batch in cut(works, planner):
        lengths = [len(row) for part in batch for row in part.table["t"]]
        assert len(lengths) == sum(part.rows for part in batch) <= 16
        assert len(lengths) * max(map(bucket, lengths)) <= 64 or len(lengths) == 1
        for part in batch:
            out = Made({"n": np.array([row[0] for row in part.table["t"]])})
            if part.gathering is None or part.chosen is None:
                made[part.work.job] = out
            elif part.gathering.add(part.chosen, out):
                made[part.work.job] = part.gathering.whole()
    assert {name: m.columns["n"].tolist() for name, m in made.items()} == {w.job: list(range(w.rows)) for w in works}


def test_batches_are_of_one_bucket_where_they_fill() -> None:
    """Rows of a longer bucket do not make a batch of short ones long, unless little of it is filled."""
    works = [job("a", [2, 7] * 16), job("b", [3, 8] * 16)]
    shapes = [
        (sum(p.rows for p in batch), max(bucket(len(r)) for p in batch for r in p.table["t"]))
        for batch in cut(works, Planner(SORTED, TYPES))
    ]
    assert sorted(shapes) == [(8, 8)] * 4 + [(16, 4)] * 2


def test_a_large_job_is_cut_in_order() -> None:
    """Without costs, pieces are neighbours, and views of the job's own rows; so it is with a keep table."""
    table = {"x": np.arange(10)}
    planner: Planner[str] = Planner(BatchSpec(max_rows=4))
    for keep in (False, True):
        work = Work(Incoming("big", (), 10, keep), table, 10, 10, Payload({}), {}, Levels({}))
        parts = [part for batch in cut([work], planner) for part in batch]
        assert [part.table["x"].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert all(np.shares_memory(part.table["x"], table["x"]) for part in parts)
    kept = job("kept", [3] * 40, keep=True)
    assert sum(part.rows for batch in cut([kept], Planner(SORTED, TYPES)) for part in batch) == 40
    assert len(cut([kept], Planner(SORTED, TYPES))) > 1


def test_rejected_rows_keep_their_numbers() -> None:
    """What one part rejects is told by the job's own row number; the others stay in order."""
    gathering = Gathering(job("a", [1] * 5))
    assert not gathering.add(np.array([1, 3]), Made({"y": np.array([10])}, None, {1: "no"}))
    assert gathering.add(np.array([0, 2, 4]), Made({"y": np.array([0, 20, 40])}))
    whole = gathering.whole()
    assert whole.columns["y"].tolist() == [0, 10, 20, 40]
    assert whole.rejected == {3: "no"}


def test_parts_with_other_columns_are_an_error() -> None:
    """A stage that returns this for some rows of a job and that for others is told so."""
    gathering = Gathering(job("a", [1] * 2))
    gathering.add(np.array([0]), Made({"y": np.array([1])}))
    gathering.add(np.array([1]), Made({"z": np.array([1])}))
    with pytest.raises(InputError, match="return the same columns each time"):
        gathering.whole()


def test_a_broken_job_is_taken_back_once() -> None:
    """The first part that fails takes the job; what comes of the others counts for nothing."""
    gathering = Gathering(job("a", [1] * 2))
    assert gathering.breaks()
    assert not gathering.breaks()
    gathering.add(np.array([0]), Made({}))
    assert not gathering.add(np.array([1]), Made({}))


YAML = """
pipeline: mixed
input: {t: "int32[*]"}
stages:
  - name: add
    use: stages.py:Add
    inputs: [t]
    outputs: {total: int64, rows: int64}
    retry: {attempts: 2, backoff_s: [0, 0]}
    batch:
      {max_rows: 16, ahead: 2, pad: {t: 0}, buckets: {t: [4, 8, 16]}, max_cost: {column: t, total: 64}}
"""
CODE = """
import os
import numpy as np
from torchrelay import Stage


class Add(Stage):
    def forward(self, batch):
        t, n = batch["t"], len(batch)
        assert t.shape[1] in (4, 8, 16) and t.shape[0] * t.shape[1] <= 64
        if (t == 13).any():
            raise ValueError("thirteen")
        if (t == 99).any():
            os._exit(9)
        for i in np.flatnonzero((t == 77).any(axis=1)):
            batch.reject(int(i), "seventy-seven")
        return {"total": t.sum(axis=1), "rows": np.full(n, n)}
"""


def tables(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"t": [rng.integers(200, 300, rng.integers(1, 17)).astype(np.int32) for _ in range(20)]} for _ in range(count)
    ]


def totals(table: dict[str, Any]) -> list[int]:
    return [int(row.sum()) for row in table["t"]]


def test_real_workers_mix_rows_of_jobs_and_blame_the_right_one(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers
) -> None:
    """Jobs share batches; one whose row raises fails alone, one with a rejected row too, a keep table loses its row."""
    path = make_pipeline(YAML, CODE)
    relay.register(path)
    given_tables = tables(30)
    given_tables[7]["t"][3] = np.array([13], np.int32)
    given_tables[11]["t"][4] = np.array([77], np.int32)
    given_tables[12]["t"][5] = np.array([77, 1], np.int32)
    futures = [
        relay.submit_table("mixed", t, on_error="keep" if i == 12 else "raise") for i, t in enumerate(given_tables)
    ]
    workers.start(path)
    shared = 0
    for i, (future, table) in enumerate(zip(futures, given_tables, strict=True)):
        if i in (7, 11):
            with pytest.raises(JobFailed, match="thirteen" if i == 7 else "row 4: seventy-seven"):
                future.result(timeout=30)
            continue
        result = future.result(timeout=30)
        expected = totals(table)
        if i == 12:
            assert list(future.errors) == [5]
            del expected[5]
        assert result["total"].tolist() == expected
        shared += int(max(result["rows"]) > 8)
    assert shared > 20


def test_a_job_in_parts_that_kills_its_worker_is_the_one_that_ends(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers
) -> None:
    """Its parts lie in batches beside others' rows: it reruns alone, and ends after three strikes; others finish."""
    path = make_pipeline(YAML, CODE)
    relay.register(path)
    given_tables = tables(8)
    given_tables[2]["t"][0] = np.array([99], np.int32)
    futures = [relay.submit_table("mixed", t) for t in given_tables]
    workers.start(path)
    with pytest.raises(JobFailed, match="WorkerDied"):
        futures[2].result(timeout=60)
    for i, (future, table) in enumerate(zip(futures, given_tables, strict=True)):
        if i != 2:
            assert future.result(timeout=30)["total"].tolist() == totals(table)
