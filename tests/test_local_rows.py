"""Random pipelines in run_local: as a model in plain Python says, and exactly as real workers do it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import row_models
from tests.conftest import Workers
from torchrelay import Pipeline, Relay
from torchrelay.errors import JobFailed
from torchrelay.local import run_local

OPS = st.lists(st.sampled_from(row_models.OPS), min_size=1, max_size=9).map(row_models.legal).filter(bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(ops: list[str], value: int) -> Any:
    try:
        return row_models.expected(ops, value)
    except row_models.Failed as failed:
        return failed.args


@settings(deadline=None, max_examples=150)
@given(ops=OPS, values=st.lists(st.integers(-20, 60), max_size=12), max_rows=st.integers(1, 5))
def test_rows_are_what_the_model_says(folder: Path, ops: list[str], values: list[int], max_rows: int) -> None:
    """Expansions in expansions, regroupings with and without code, skipped, rejected and failing rows, joins."""
    pipeline = Pipeline.load(row_models.write(folder, ops, max_rows))
    rows = [{"v0": v} for v in values]
    model = [model_of(ops, v) for v in values]
    results = run_local(pipeline, rows, on_error="return")
    assert [row_models.plain(r) for r in results] == model
    failed = next((i for i, r in enumerate(results) if isinstance(r, JobFailed)), None)
    if failed is None:
        assert row_models.exact(run_local(pipeline, rows)) == row_models.exact(results)
        return
    with pytest.raises(JobFailed) as raised:
        run_local(pipeline, rows)
    assert (raised.value.row, *row_models.plain(raised.value)) == (failed, *model[failed])


@pytest.mark.parametrize(
    "ops",
    [
        ["open", "bump", "open", "mix", "pick", "close", "risky", "total"],
        ["fork", "risky", "open", "total", "pick"],
        *[row_models.legal(random.Random(seed).choices(row_models.OPS, k=6)) for seed in (3, 8)],
    ],
    ids="-".join,
)
def test_results_are_those_of_workers(tmp_path: Path, relay: Relay, workers: Workers, ops: list[str]) -> None:
    """Values, types, dtypes and shapes, the order of columns, of failing rows stage, error, message, attempts."""
    path = row_models.write(tmp_path, ops, 4)
    workers.start(path)
    rows = [{"v0": v} for v in range(-5, 40)]
    served = list(relay.map("model", rows, on_error="return"))
    local = run_local(Pipeline.load(path), rows, on_error="return")
    assert [row_models.exact(r) for r in local] == [row_models.exact(r) for r in served]
    assert [row_models.plain(r) for r in local] == [model_of(ops, row["v0"]) for row in rows]
