"""Gathered stages in this process: the same results as the whole model's, and errors that say what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import models
from tests.conftest import MakePipeline
from tests.gather_stages import write_chain
from torchrelay.config import Pipeline
from torchrelay.errors import JobFailed


def outputs(path: Path, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(row["y"]) for row in Pipeline.load(path).run_local(rows)])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["mlp", "bert", "llama"])
def test_shards_give_what_the_whole_model_gives(tmp_path: Path, kind: str, count: int) -> None:
    """In float32, rtol 1e-5 and atol 1e-5: sums of shards round in another order. Rows are of many lengths."""
    rows = models.rows_of(kind, 21)
    whole = outputs(write_chain(tmp_path, kind, 1), rows)
    np.testing.assert_allclose(outputs(write_chain(tmp_path, kind, count), rows), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_bfloat16_differs_within_its_rounding(tmp_path: Path, count: int) -> None:
    """Each shard's share is rounded to 8 bits once more than the whole's: a few units of that, of what is summed."""
    rows = models.rows_of("mlp", 21)
    exact = outputs(write_chain(tmp_path, "mlp", 1), rows)
    made = outputs(write_chain(tmp_path, "mlp", count, dtype="bfloat16"), rows)
    assert made.dtype.name == "bfloat16"
    np.testing.assert_allclose(made.astype(np.float32), exact, rtol=0, atol=4 * 2.0**-8 * np.abs(exact).max())


def test_the_chain_of_whole_stages_is_the_model(tmp_path: Path) -> None:
    """What the others are compared with is what the model computes."""
    import torch

    rows = models.rows_of("bert", 1)
    tokens = torch.from_numpy(rows[0]["tokens"])[None]
    model = models.build("bert", layers=1)
    expected = model(tokens, torch.ones_like(tokens, dtype=torch.bool)).numpy()
    np.testing.assert_allclose(outputs(write_chain(tmp_path, "bert", 1), rows), expected, rtol=1e-5, atol=1e-5)


CODE = """
import numpy as np
from torchrelay import Stage

class Shares(Stage):
    '''Shard k returns the k-th share of x, or k + 1 times x.'''
    def __init__(self, wrong: int = -1, how: str = ""):
        self.wrong, self.how = wrong, how
    def load(self, context):
        self.shard, self.shards = context.shard, context.shards
    def forward(self, batch):
        x = batch["x"]
        parts = np.array_split(np.asarray(x), self.shards, axis=1)
        bad = self.shard == self.wrong
        if bad and self.how == "raise":
            if (x[:, 0] < 0).any():
                raise ValueError("a negative number")
        if bad and self.how == "reject":
            for i in np.flatnonzero(x[:, 0] < 0):
                batch.reject(int(i), "a negative number")
        if bad and self.how == "width":
            return {"part": parts[self.shard][:, 1:], "total": x}
        return {"part": parts[self.shard], "total": x * (self.shard + 1)}

class Ragged(Stage):
    '''Shard 1 is one shorter for rows that begin with a negative number.'''
    def load(self, context):
        self.shard = context.shard
    def forward(self, batch):
        short = [self.shard == 1 and x[0] < 0 for x in batch["x"]]
        return {"y": [np.ones((3 - s, 2), np.float32) * (self.shard + 1) for s in short]}
"""
YAML = """
pipeline: p
input: {x: "float32[6]", go: bool = true}
output: [part, total]
stages:
  - name: s
    use: stages.py:Shares
    inputs: [x]
    args: {ARGS}
    outputs: {part: "float32[6]NULL", total: "float32[6]NULL"}
    retry: {attempts: 1}
    shards: {count: 3, mode: gather, combine: {total: sum}}
    WHEN
"""


def load(make_pipeline: MakePipeline, args: str = "", when: str = "") -> Pipeline:
    text = YAML.replace("ARGS", args).replace("WHEN", when).replace("NULL", "?" if when else "")
    return Pipeline.load(make_pipeline(text, CODE))


def rows_of(*first: float) -> list[dict[str, Any]]:
    return [{"x": np.arange(6, dtype=np.float32) + f} for f in first]


def test_what_is_not_named_is_concatenated(make_pipeline: MakePipeline) -> None:
    for row, made in zip(rows_of(0, 5), load(make_pipeline).run_local(rows_of(0, 5)), strict=True):
        np.testing.assert_array_equal(made["part"], row["x"])
        np.testing.assert_array_equal(made["total"], 6 * row["x"])


@pytest.mark.parametrize(("how", "kind"), [("raise", "ValueError"), ("reject", "Rejected")])
def test_what_one_shard_refuses_costs_that_row_alone(make_pipeline: MakePipeline, how: str, kind: str) -> None:
    """The others of the batch are combined as ever, and the error names the shard."""
    pipeline = load(make_pipeline, f"wrong: 1, how: {how}")
    first, bad, last = pipeline.run_local(rows_of(0, -1, 2), on_error="return")
    assert isinstance(bad, JobFailed)
    assert (bad.stage, bad.error_type, bad.message) == ("s.1", kind, "a negative number")
    np.testing.assert_array_equal(first["total"], 6 * np.arange(6))
    np.testing.assert_array_equal(last["part"], np.arange(6) + 2)


def test_a_shard_that_returns_another_shape_is_named(make_pipeline: MakePipeline) -> None:
    """With the column, both shapes and what to look at."""
    with pytest.raises(JobFailed) as raised:
        load(make_pipeline, "wrong: 2, how: width").run_local(rows_of(1))
    for part in ("stage 's.2'", "'part'", "float32[2]", "shard 2 of 3", "what s declares", "torchrelay.cutting"):
        assert part in str(raised.value)


def test_uneven_rows_are_rejected_with_their_shapes(make_pipeline: MakePipeline) -> None:
    """A row whose parts do not fit fails; its neighbours go on."""
    text = """
    pipeline: p
    input: {x: "float32[6]"}
    stages:
      - {name: s, use: "stages.py:Ragged", outputs: {y: "float32[*, 4]"}, shards: {count: 2, mode: gather}}
    """
    first, bad, last = Pipeline.load(make_pipeline(text, CODE)).run_local(rows_of(0, -1, 2), on_error="return")
    assert isinstance(bad, JobFailed)
    assert bad.message == (
        "stage 's': column 'y': the parts of a row, float32[3, 2] from shard 0, float32[2, 2] from shard 1, cannot be "
        "concatenated along dimension -1; in all others they must be equal: cut the layer that makes it alike in each "
        "shard, or name another dimension in shards.combine"
    )
    np.testing.assert_array_equal(first["y"], [[1, 1, 2, 2]] * 3)
    np.testing.assert_array_equal(last["y"], first["y"])


def test_rows_that_skip_the_stage_skip_all_its_shards(make_pipeline: MakePipeline) -> None:
    """They keep what they had: null, where nothing made the columns before."""
    rows = [{**row, "go": go} for row, go in zip(rows_of(0, 1, 2), [True, False, True], strict=True)]
    first, skipped, last = load(make_pipeline, when="when: go").run_local(rows)
    assert (skipped["part"], skipped["total"]) == (None, None)
    np.testing.assert_array_equal(first["part"], np.arange(6))
    np.testing.assert_array_equal(last["total"], 6 * (np.arange(6) + 2))
    assert load(make_pipeline, when="when: go").run_local(rows[1:2]) == [{"part": None, "total": None}]


@pytest.mark.parametrize("rule", ["sum", "{concat: 0}"])
def test_rows_that_skip_keep_the_value_of_before(make_pipeline: MakePipeline, rule: str) -> None:
    """Of the stage before the cut one, and never what a shard made of other rows."""
    text = f"""
    pipeline: p
    input: {{x: "float32[6]", total: "float32[6]", go: bool}}
    output: [total]
    stages:
      - name: s
        use: stages.py:double
        args: {{width: {6 if rule == "sum" else 3}}}
        when: go
        outputs: {{total: "float32[6]"}}
        shards: {{count: 2, mode: gather, combine: {{total: {rule}}}}}
    """
    code = "def double(batch, *, width):\n    return {'total': batch['x'][:, :width] * 2}\n"
    rows = [{**row, "total": row["x"] * 0 - 7, "go": i % 2 == 0} for i, row in enumerate(rows_of(0, 1, 2))]
    made = Pipeline.load(make_pipeline(text, code)).run_local(rows)
    for i, (row, result) in enumerate(zip(rows, made, strict=True)):
        expected = 4 * row["x"] if rule == "sum" else 2 * np.tile(row["x"][:3], 2)
        np.testing.assert_array_equal(result["total"], row["total"] if i % 2 else expected)
