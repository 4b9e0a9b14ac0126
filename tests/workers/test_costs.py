"""Batches by cost and in buckets, with real workers: what a stage sees, and what becomes of rows that fit nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Workers
from tests.workers.support import WorkerProcess
from torchrelay import Relay
from torchrelay.errors import JobFailed
from torchrelay.queues.registry import Registry

CODE = """
    import json
    from torchrelay import Stage

    class Sum(Stage):
        def __init__(self, log):
            self.log = log

        def forward(self, batch):
            with open(self.log, "a") as file:
                print(json.dumps([batch["tokens"].shape, batch.lengths["tokens"].tolist()]), file=file)
            return {"sum": batch["tokens"].sum(axis=1)}
"""
YAML = """
    pipeline: sums
    input: {{tokens: "int64[*]"}}
    output: [sum]
    stages:
      - name: sum
        use: stages.py:Sum
        args: {{log: "{log}"}}
        outputs: {{sum: int64}}
        retry: {{attempts: 1}}
        batch:
          {{max_rows: 8, pad: {{tokens: 0}}, buckets: {{tokens: [8, 32]}}, max_cost: {{column: tokens, total: 64}}}}
"""


def test_batches_hold_rows_of_like_length_within_their_cost(
    relay: Relay, registry: Registry, workers: Workers, make_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """Long and short rows that alternate are computed apart; a row over the largest bucket fails alone."""
    log = tmp_path / "shapes.jsonl"
    path = make_pipeline(YAML.format(log=log), CODE)
    relay.register(path)
    sizes = [3, 30, 5, 33, 20, 8, 1, 9] * 3
    futures = relay.submit_many("sums", [{"tokens": np.ones(n, np.int64)} for n in sizes])
    table = relay.submit_table("sums", {"tokens": [np.ones(n, np.int64) for n in sizes]}, on_error="keep")
    workers.start(path)
    for size, future in zip(sizes, futures, strict=True):
        if size > 32:
            with pytest.raises(JobFailed, match=r"a row is 33 long, over the largest bucket \(32\)"):
                future.result(30)
        else:
            assert future.result(30) == {"sum": size}
    assert table.result(30)["sum"].tolist() == [n for n in sizes if n <= 32]
    assert sorted(table.errors) == [i for i, n in enumerate(sizes) if n > 32]
    forwards = [json.loads(line) for line in log.read_text().splitlines()]
    assert {width for (_, width), _ in forwards} == {8, 32}
    assert all(rows * width <= 64 for (rows, width), _ in forwards)
    # Of the jobs of one row, one batch at most mixes lengths of both buckets.
    mixed = [lengths for (_, width), lengths in forwards[:6] if width == 32 and min(lengths) <= 8]
    assert len(mixed) <= 1


COMPILED = """
    from functools import partial

    import torch
    from torch import nn
    from torchrelay import TorchStage

    # No C++ compiler is needed, and shapes count as always.
    torch.compile = partial(torch.compile, backend="eager")

    class Mean(TorchStage):
        def __init__(self, log):
            self.log = log

        def build(self, context):
            return nn.EmbeddingBag.from_pretrained(torch.arange(20.0)[:, None], mode="mean")

        def forward(self, batch):
            with open(self.log, "a") as file:
                print(*batch["tokens"].shape, file=file)
            return {"mean": self.model(batch["tokens"])[:, 0]}
"""
COMPILED_YAML = """
    pipeline: means
    input: {{tokens: "int64[*]"}}
    stages:
      - name: mean
        use: stages.py:Mean
        args: {{log: "{log}"}}
        outputs: {{mean: float32}}
        torch: {{compile: true}}
        batch: {{max_rows: 4, pad: {{tokens: 0}}, buckets: {{tokens: [4, 8]}}}}
"""


def test_a_compiled_stage_is_warm_before_its_first_job(
    relay: Relay, spawn: Callable[..., WorkerProcess], make_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """Every shape was run by the time that the worker is ready, and no number of rows compiles anew."""
    log = tmp_path / "shapes.txt"
    path = make_pipeline(COMPILED_YAML.format(log=log), COMPILED)
    relay.register(path)
    worker = spawn(path, stage="mean").ready()
    assert log.read_text().split("\n")[:-1] == ["4 8", "4 4", "2 8", "2 4", "1 8", "1 4"]
    assert "stage 'mean': warmed up 6 shapes in " in worker.log
    for rows in range(1, 5):
        table = {"tokens": [np.full(8, 7)] * (rows - 1) + [np.full(5, 0)]}
        future = relay.submit_table("means", table)
        assert future.result(30)["mean"].tolist() == [7.0] * (rows - 1) + [0.0]
    assert "compiled after warm-up" not in worker.log
