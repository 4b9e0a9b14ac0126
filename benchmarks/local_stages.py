"""The stages that `benchmarks.local` times: a small torch model between two cheap numpy stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from torchrelay import Stage, StageContext, TorchStage

WIDTH, HIDDEN, CLASSES = 384, 1536, 32


class Normalise(Stage):
    """Centres and scales each vector."""

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        x = batch["x"]
        x = x - x.mean(axis=1, keepdims=True)
        return {"x": x / np.linalg.norm(x, axis=1, keepdims=True)}


class Encode(TorchStage):
    """A multi-layer perceptron 384 -> 1536 -> 384, 2.4 MFLOP per row."""

    def build(self, context: StageContext) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"vector": self.model(batch["x"])}


class Classify(Stage):
    """Compares each vector with 32 centres."""

    def load(self, context: StageContext) -> None:
        self.centres = np.random.default_rng(2).standard_normal((WIDTH, CLASSES), np.float32)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        scores = batch["vector"] @ self.centres
        return {"label": scores.argmax(axis=1), "score": scores.max(axis=1)}
