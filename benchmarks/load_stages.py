"""The stages that `benchmarks.load_memory` gathers: experts that are summed, and a wide pair of layers, of which each
shard reads its share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchrelay import Batch, StageContext, TorchStage
from torchrelay.stages import cutting


class Mixture(nn.Module):
    """The sum of `experts` experts, each of `layers` layers: x float [N, width] -> [N, width]."""

    def __init__(self, experts: int, width: int, layers: int) -> None:
        super().__init__()
        stacks = (nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))) for _ in range(experts))
        self.experts = nn.ModuleList(stacks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(x) for expert in self.experts]).sum(dim=0)


class Mix(TorchStage):
    """What all experts say of x, or those of this shard."""

    def __init__(self, experts: int, width: int, layers: int) -> None:
        self.sizes = (experts, width, layers)

    def build(self, context: StageContext) -> nn.Module:
        model = Mixture(*self.sizes)
        cutting.experts(model, context, "experts")
        return model

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["x"])}


def wide(width: int, hidden: int) -> nn.Sequential:
    """x float [N, width] -> [N, width], by way of many features."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Wide(TorchStage):
    """The same of all features between, or of this shard's."""

    def __init__(self, width: int, hidden: int) -> None:
        self.sizes = (width, hidden)

    def build(self, context: StageContext) -> nn.Module:
        model = wide(*self.sizes)
        cutting.column_linear(model, context, "0")
        cutting.row_linear(model, context, "2")
        return model

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["x"])}
