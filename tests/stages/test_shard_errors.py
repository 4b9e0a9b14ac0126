"""What a worker says of a model that cannot be cut as its file says: the stage, the module, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.stages.parallel_models import FUSED, Bert, Fused, Llama, mlp
from torchrelay import StageContext, TorchStage, cutting, testing
from torchrelay.config.spec import ShardsSpec, StageConfig
from torchrelay.errors import ConfigError, InputError, JobFailed, StageLoadError
from torchrelay.stages import make_runner

COUNT = 3
HEADS = {f"**.self.{name}": "column" for name in ("query", "key", "value")} | {"**.attention.output.dense": "row"}
Build = Callable[[StageContext], nn.Module]


@pytest.fixture
def of_three() -> Iterator[None]:
    """A process group of three of which this is rank 0; the others do not exist, and nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=COUNT, store=FakeStore())
    yield
    dist.destroy_process_group()


def load(build: Build, spec: StageConfig, context: StageContext) -> None:
    class Model(TorchStage):
        def build(self, context: StageContext) -> nn.Module:
            return build(context)

        def forward(self, batch: Any) -> dict[str, Any]:
            return {}

    make_runner(Model(), spec).load(context)


@pytest.mark.usefixtures("of_three")
@pytest.mark.parametrize(
    ("model", "plan", "says"),
    [
        (mlp, None, "module '0': its 32 outputs do not divide by 3 shards; choose another count, or the style whole"),
        (mlp, {"1": "row"}, "plan: '1' is a GELU, and style row is for nn.Linear"),
        (mlp, {"2": "row"}, "module '2': its 32 inputs do not divide by 3 shards; choose another count, or the style"),
        (Bert, HEADS, "attention.self': its 4 heads do not divide by 3 shards; choose a count of 2, 4"),
        (
            Llama,
            {"layers.*.mlp.up": "row"},
            "plan: 'layers.*.mlp.up' names no module of Llama; did you mean 'layers.*.",
        ),
        (Llama, "bert", "model Llama has no blocks of the plan 'bert' (self.query"),
        (Fused, None, "model Fused has no blocks of the plan 'auto'"),
        (
            lambda: nn.Sequential(nn.Linear(6, 6)),
            {"0": "column"},
            "module '0' is cut by columns, and none by rows, so th",
        ),
        (
            Fused,
            {"h": FUSED["h"]},
            "module '': its h of 4 does not divide by 3 shards; choose a count of 2, 4",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(4, 6)),
            {"0": "embedding"},
            "module '0': its 4 embeddings are too few for 3 shards; choose a smaller count, or the style whole",
        ),
    ],
)
def test_of_ranks(model: Callable[[], nn.Module], plan: Any, says: str) -> None:
    spec = StageConfig(name="s", use="a.py:Model", shards=ShardsSpec(count=COUNT, mode="tensor", plan=plan))
    with pytest.raises(StageLoadError) as raised:
        load(lambda _: model(), spec, StageContext(rank=0, world_size=COUNT))
    assert str(raised.value).startswith("stage 's': ")
    assert says in str(raised.value)


def up(name: str, features: int) -> Build:
    def build(context: StageContext) -> nn.Module:
        model = nn.ModuleDict({"up": nn.Linear(4, features)})
        cutting.column_linear(model, context, name)
        return model

    return build


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            up("up", 8),
            "module 'up': out_features of 8 does not divide into 3 shards; set shards.count to 2 or 4 or 8, or",
        ),
        (up("ups", 9), "column_linear: 'ups' matches nothing in ModuleDict; did you mean 'up'?"),
    ],
)
def test_of_gathered_shards(build: Build, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(build, StageConfig(name="s", use="a.py:Model"), StageContext(shard=1, shards=COUNT))
    assert str(raised.value).startswith("stage 's': ")
    assert says in str(raised.value)


class Uneven(TorchStage):
    """Its first shard returns more than its share."""

    def build(self, context: StageContext) -> nn.Module:
        return nn.Linear(4, 3 if context.shard == 0 else 2)

    def forward(self, batch: Any) -> dict[str, Any]:
        made = self.model(batch["x"])
        return {"y": made, "z": made[:, None, :].expand(-1, made.shape[1], -1)}


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (
            {"y": "float32[4]", "z": "float32[*, *]"},
            "stage 'uneven.0': column 'y': float32[2] is expected in each of 1 rows, float32[3] came; it is shard 0 of",
        ),
        (
            {"y": "float32[*]", "z": "float32[*, *]"},
            "stage 'uneven': column 'z': the parts of a row, float32[3, 3] from shard 0, float32[2, 2] from shard 1, "
            "cannot be concatenated along dimension -1; in all others they must be equal: cut the layer that makes it "
            "alike in each shard, or name another dimension in shards.combine",
        ),
    ],
)
def test_of_outputs_that_do_not_fit_together(outputs: dict[str, str], says: str) -> None:
    """Where the share is known, the shard that returns another is named; else what combines them finds it."""
    with pytest.raises((InputError, JobFailed)) as raised:
        testing.run_stage(
            Uneven(), {"x": torch.ones(1, 4).numpy()}, outputs=outputs, shards={"count": 2, "mode": "gather"}
        )
    assert says in str(raised.value)
