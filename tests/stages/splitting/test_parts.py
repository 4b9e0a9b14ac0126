"""Stages in parts, run in one process: what their forwards may do, and what is told of those that cannot be split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import MakePipeline
from torchrelay import Pipeline
from torchrelay.errors import JobFailed, TorchrelayError

CODE = """
    import torch
    from torch import nn

    from torchrelay import Expand, TorchStage


    class Wide(nn.Module):
        def __init__(self, by_values=False, layers=4):
            super().__init__()
            torch.manual_seed(3)
            self.embed = nn.Embedding(50, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
            self.head = nn.Linear(8, 3)
            self.by_values = by_values

        def forward(self, tokens, seen):
            x = self.embed(tokens)
            if self.by_values and float(x.sum()) == 1e30:
                x = -x
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head((x * seen[..., None]).sum(1)), seen.sum(1)


    class Model(TorchStage):
        def __init__(self, **sizes):
            self.sizes = sizes

        def build(self, context):
            return Wide(**self.sizes)


    class Plain(Model):
        def forward(self, batch):
            y, n = self.model(batch["tokens"], batch.mask("tokens"))
            for row, tokens in enumerate(batch["tokens"]):
                if tokens[0] == 49:
                    batch.reject(row, "it begins with 49")
            return {"y": y, "n": n, "text": [f"{t} of {len(batch)}"[:1] for t in batch["name"]]}


    class Grow(Model):
        def forward(self, batch):
            y, n = self.model(batch["tokens"], batch.mask("tokens"))
            return Expand({"y": y.repeat_interleave(n, 0), "n": n.repeat_interleave(n)}, counts=n)


    class Twice(Model):
        def forward(self, batch):
            y, n = self.model(batch["tokens"], batch.mask("tokens"))
            return {"y": self.model(batch["tokens"], batch.mask("tokens"))[0] + y, "n": n}


    class Never(Model):
        def forward(self, batch):
            return {"y": [[0.0] * 3] * len(batch), "n": [0] * len(batch)}


    class Picky(Model):
        def forward(self, batch):
            if not batch["tokens"].any():
                raise ValueError("no tokens at all")
            y, n = self.model(batch["tokens"], batch.mask("tokens"))
            return {"y": y, "n": n}


    class Swallows(Model):
        def forward(self, batch):
            try:
                y, n = self.model(batch["tokens"], batch.mask("tokens"))
            except Exception:
                raise RuntimeError("hidden")
            return {"y": y, "n": n}


    class Own(Model):
        def load(self, context):
            self.model = Wide()

        def forward(self, batch):
            y, n = self.model(batch["tokens"], batch.mask("tokens"))
            return {"y": y, "n": n}


    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1)

        def forward(self, tokens, seen):
            if float(tokens.sum()) == 1e30:
                tokens = -tokens
            return self.a(tokens[:, :1].float()).expand(-1, 3), seen.sum(1)


    class Short(Plain):
        def build(self, context):
            return Two()


    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))

        def forward(self, tokens, seen):
            x = tokens[:, :1].float()
            if float(tokens.sum()) == 1e30:
                x = -x
            for layer in reversed(self.layers):
                x = layer(x)
            return x.expand(-1, 3), seen.sum(1)


    class Backwards(Plain):
        def build(self, context):
            return Back()
"""
YAML = """
    pipeline: cut
    input: {{name: str, tokens: "int64[*]"}}
    output: [y, n]
    stages:
      - name: model
        use: stages.py:{stage}
        args: {{{args}}}
        inputs: [name, tokens]
        {rows}
        outputs: {{y: "float32[3]", n: int64{text}}}
        batch: {{max_rows: 6, pad: {{tokens: 0}}{batch}}}
        {shards}
        {more}
"""
ROWS = [{"name": f"r{i}", "tokens": list(range(1 + i, 2 + i + (i * 5) % 4))} for i in range(11)]


class Made:
    """Pipelines of one stage, whole and in parts."""

    def __init__(self, make: MakePipeline) -> None:
        self._make = make

    def __call__(
        self, stage: str = "Plain", parts: int = 0, *, args: str = "", rows: str = "", batch: str = "", more: str = ""
    ) -> Pipeline:
        shards = f"shards: {{count: {parts}, mode: pipeline}}" if parts else ""
        text = ", text: str" if stage in ("Plain", "Short", "Backwards") else ""
        filled = YAML.format(stage=stage, args=args, rows=rows, batch=batch, shards=shards, more=more, text=text)
        return Pipeline.load(self._make(filled, CODE, f"{stage}-{parts}.yaml"))


@pytest.fixture
def made(make_pipeline: MakePipeline) -> Made:
    return Made(make_pipeline)


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine["y"], other["y"], rtol=1e-5, atol=1e-6)
        assert mine["n"] == other["n"]


@pytest.mark.parametrize("how", ["graph", "modules"])
@pytest.mark.parametrize("parts", [2, 3])
def test_rows_of_many_lengths_in_batches_of_the_whole(made: Made, how: str, parts: int) -> None:
    """Through a cut graph and a cut chain of modules; a batch of one row at the end."""
    args = f"by_values: {how == 'modules'}".lower()
    whole, cut = made(args=args), made(parts=parts, args=args)
    assert_same(cut.run_local(ROWS + ROWS[:2]), whole.run_local(ROWS + ROWS[:2]))
    assert_same(cut.run_local(ROWS[:1]), whole.run_local(ROWS[:1]))


def test_the_last_part_rejects_and_expands_as_the_whole_does(made: Made) -> None:
    """A row that the user's forward rejects ends alone; rows that become several keep their order."""
    bad = [*ROWS[:4], {"name": "bad", "tokens": [49, 1]}, *ROWS[4:]]
    cut = made(parts=2)
    with pytest.raises(JobFailed, match="it begins with 49"):
        cut.run_local(bad)
    assert_same(cut.run_local(ROWS), made().run_local(ROWS))
    grown = made("Grow", 2, rows="rows: expand"), made("Grow", rows="rows: expand")
    ours, theirs = (pipeline.run_local(ROWS) for pipeline in grown)
    assert len(ours) == len(theirs)
    assert str(ours) == str(theirs) or all(
        np.allclose(a["y"], b["y"], rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("stage", "args", "says"),
    [
        ("Twice", "", "stage 'model': its forward calls the model more than once for a batch"),
        ("Never", "", "stage 'model': its forward does not call self.model, so there is nothing to split"),
        ("Picky", "", r"stage 'model': its forward raised ValueError: no tokens at all for a made-up batch"),
        ("Own", "", "stage 'model': its load.. makes the model itself; define build"),
        ("Short", "", "does not trace .*no nn.Sequential or nn.ModuleList of 2 modules or more"),
        ("Backwards", "", "the modules of layers are not called one behind the other, each once"),
        ("Plain", "by_values: true, layers: 1", "no nn.Sequential or nn.ModuleList of 2 modules or more"),
    ],
)
def test_a_stage_that_cannot_be_split_is_told_with_the_remedy(made: Made, stage: str, args: str, says: str) -> None:
    with pytest.raises(TorchrelayError, match=says):
        made(stage, 2, args=args).run_local(ROWS)


def test_a_forward_that_handles_every_exception_is_split_all_the_same(made: Made) -> None:
    """The end of a part is none that it could take for an error."""
    assert_same(made("Swallows", 2).run_local(ROWS), made("Swallows").run_local(ROWS))


@pytest.mark.parametrize("how", ["graph", "modules"])
def test_compiled_parts_compute_the_same_or_say_why_not(made: Made, how: str) -> None:
    """A chain of modules cannot be compiled, and the message says what to take out."""
    args = f"layers: 2, by_values: {how == 'modules'}".lower()
    cut = made(parts=2, args=args, batch=", buckets: {tokens: [4]}", more="torch: {compile: true}")
    if how == "modules":
        with pytest.raises(TorchrelayError, match=r"compile, cuda_graphs.* need a model that traces"):
            cut.run_local(ROWS)
        return
    whole = made(args=args, batch=", buckets: {tokens: [4]}")
    assert_same(cut.run_local(ROWS), whole.run_local(ROWS))
