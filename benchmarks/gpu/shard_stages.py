"""The stages that `benchmarks.gpu.shards` times: an encoder, a stack of Llama-like blocks, and experts that are summed.

They are what a user would write: only `Experts` knows of shards, since in gather mode a stage builds its own share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu.models import best, set_up
from tests import models
from torchrelay import Batch, StageContext, TorchStage


class Sized(TorchStage):
    """A stage with its model's sizes; one thread on a CPU, as the cases share it."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        self.sizes = sizes

    def load(self, context: StageContext) -> None:
        set_up("eager", torch.device(context.device).type)
        super().load(context)


class Encode(Sized):
    """The best dimension of a BERT-like encoder's vector, of rows of uint8 tokens, all of one length."""

    def build(self, context: StageContext) -> nn.Module:
        return models.BertLike(**self.sizes)

    def forward(self, batch: Batch) -> dict[str, Any]:
        tokens = batch["tokens"].long()
        label, score = best(self.model(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        return {"label": label, "score": score}


class Blocks(Sized):
    """The last token's hidden state after a stack of Llama-like blocks, of rows of int64 tokens."""

    def build(self, context: StageContext) -> nn.Module:
        return models.LlamaModel(**self.sizes)

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"hidden": self.model(batch["tokens"])[:, -1].float()}


class Expert(nn.Module):
    """uint8 features [N, features] -> [N, scores] by `layers` layers of `width` x `width`."""

    def __init__(self, seed: int, features: int, width: int, layers: int, scores: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, scores)
        models.fill(self, seed)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.project(features.to(self.project.weight.dtype) / 255)
        for layer in self.layers:
            x = layer(F.gelu(x))
        return self.head(F.gelu(x)).float()


class Summed(nn.Module):
    """The sum of some experts."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(features) for expert in self.experts]).sum(dim=0)


class Experts(Sized):
    """Scores of all experts, or of the share of them that is this shard's, summed."""

    def build(self, context: StageContext) -> nn.Module:
        count = self.sizes["experts"]
        sizes = {k: v for k, v in self.sizes.items() if k != "experts"}
        return Summed([Expert(seed, **sizes) for seed in range(context.shard, count, context.shards)])

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"scores": self.model(batch["features"])}
