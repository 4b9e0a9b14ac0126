"""The stages that `benchmarks.gpu.efficiency` times: a CPU stage that passes its rows on, and a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.gpu.models import build, set_up
from benchmarks.gpu.workloads import Workload
from torchrelay import Batch, StageContext, TorchStage


def pass_on(batch: Batch) -> dict[str, Any]:
    """The rows as they came."""
    return {name: batch[name] for name in batch}


class Classify(TorchStage):
    """The best class and its score, of rows of one shape."""

    def __init__(self, workload: str, mode: str) -> None:
        self.workload = Workload.decode(workload)
        self.mode = mode

    def load(self, context: StageContext) -> None:
        set_up(self.mode, torch.device(context.device).type)
        super().load(context)

    def build(self, context: StageContext) -> nn.Module:
        return build(self.workload)

    def forward(self, batch: Batch) -> dict[str, Any]:
        label, score = self.model(batch[self.workload.column])
        return {"label": label, "score": score}


class ClassifyText(Classify):
    """The same of ragged tokens."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        label, score = self.model(batch["tokens"], batch.lengths["tokens"])
        return {"label": label, "score": score}


class MakeWide(TorchStage):
    """A tensor as large as the column is declared, whose first byte is the seed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def build(self, context: StageContext) -> nn.Module:
        self._wide = torch.zeros(1, self.nbytes, dtype=torch.uint8, device=self.device)
        return nn.Identity()

    def forward(self, batch: Batch) -> dict[str, Any]:
        self._wide[0, 0] = batch["seed"][0]
        return {"wide": self._wide}


class UseWide(TorchStage):
    """The first byte of each row."""

    def build(self, context: StageContext) -> nn.Module:
        return nn.Identity()

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"first": batch["wide"][:, 0].long()}
