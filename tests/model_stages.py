"""Stages that run the models of `tests/models.py`, and pipeline files with them.

A stage here is what a user would write: `build` and a `forward` that calls the model once. It knows nothing of shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import models
from torchrelay import Batch, StageContext, TorchStage


class ModelStage(TorchStage):
    """A model of tests.models, whose weights lie in the stage's file."""

    kind = ""

    def __init__(self, sizes: dict[str, Any] | None = None) -> None:
        self.sizes = sizes or {}

    def build(self, context: StageContext) -> nn.Module:
        return models.KINDS[self.kind](**self.sizes)


class MlpStage(ModelStage):
    kind = "mlp"

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["x"].to(dtype=self.dtype)).float()}


class BertStage(ModelStage):
    kind = "bert"

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["tokens"], batch.mask("tokens")).float()}


class LlamaStage(ModelStage):
    """The scores of the token that follows the last one."""

    kind = "llama"

    def forward(self, batch: Batch) -> dict[str, Any]:
        scores = self.model(batch["tokens"])
        lengths = batch.lengths["tokens"]
        return {"y": scores[torch.arange(len(batch), device=scores.device), lengths - 1].float()}


class ResNetStage(ModelStage):
    kind = "resnet"

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["image"].to(dtype=self.dtype)).float()}


STAGES = {cls.kind: cls.__name__ for cls in (MlpStage, BertStage, LlamaStage, ResNetStage)}
OUTPUTS = {"mlp": ("classes", 8), "bert": ("width", 32), "llama": ("vocabulary", 64), "resnet": ("classes", 8)}


def input_of(kind: str, sizes: Mapping[str, Any], side: int = 32) -> dict[str, str]:
    """The columns of a row; images are of `side` x `side`."""
    if kind == "mlp":
        return {"x": f"float32[{sizes.get('features', 12)}]"}
    return {"image": f"float32[3, {side}, {side}]"} if kind == "resnet" else {"tokens": "int64[*]"}


def write_pipeline(
    folder: Path,
    kind: str,
    *,
    shards: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
    name: str = "pipeline.yaml",
    **stage: Any,
) -> Path:
    """A pipeline whose one stage `model` returns `y`, with weights beside it.

    Args:
        shards: the stage's `shards`; None for the whole model.
        sizes: arguments of the model.
        stage: other keys of the stage; `batch` is added to.
    """
    sizes = dict(sizes or {})
    weights = folder / f"{kind}-{seed}.safetensors"
    if not weights.exists():
        models.save(models.build(kind, seed, **sizes), weights)
    argument, usual = OUTPUTS[kind]
    entry = {
        "name": "model",
        "use": f"tests.model_stages:{STAGES[kind]}",
        "args": {"sizes": sizes},
        "weights": weights.name,
        "outputs": {"y": f"float32[{sizes.get(argument, usual)}]"},
        "batch": {"max_rows": 8, "pad": {"tokens": 0} if kind in ("bert", "llama") else {}, **stage.pop("batch", {})},
        **({} if shards is None else {"shards": dict(shards)}),
        **stage,
    }
    pipeline = {"pipeline": kind, "input": input_of(kind, sizes), "output": ["y"], "stages": [entry]}
    path = folder / name
    # JSON is YAML.
    path.write_text(json.dumps(pipeline, indent=2))
    return path
