"""The work that `benchmarks.expand` times, in three stages and in one: pages, eleven crops each, a small conv net.

A page is uint8[256, 256]. Its crops are 32 x 32 at places that its `boxes` say; a convolutional net (about 0.1 million
multiply-adds per crop) gives each a label and a score; the page's result is the labels and scores of its crops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from torchrelay import Batch, Expand, StageContext, TorchStage

PAGE, CROP, CROPS, CLASSES = 256, 32, 11, 10


def cut_page(page: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The crops of one page, uint8[11, 32, 32]."""
    return np.stack([page[y : y + CROP, x : x + CROP] for y, x in boxes.tolist()])


def cut(batch: Batch) -> Expand:
    """The crops of all pages."""
    crops = [cut_page(page, boxes) for page, boxes in zip(batch["page"], batch["boxes"], strict=True)]
    return Expand({"crop": np.concatenate(crops)}, [len(c) for c in crops])


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, CLASSES),
    )


class Classify(TorchStage):
    """A label and a score per crop."""

    def build(self, context: StageContext) -> nn.Module:
        torch.set_num_threads(1)
        return net()

    def classify(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score, label = self.model(crops[:, None].float() / 255).max(dim=1)
        return label, score

    def forward(self, batch: Batch) -> dict[str, Any]:
        label, score = self.classify(batch["crop"])
        return {"label": label, "score": score}


class Whole(Classify):
    """The same, page by page in and out, as one stage."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        pages, boxes = batch["page"].numpy(), batch["boxes"].numpy()
        crops = [cut_page(page, places) for page, places in zip(pages, boxes, strict=True)]
        label, score = self.classify(torch.from_numpy(np.concatenate(crops)))
        return {"label": label.reshape(-1, CROPS), "score": score.reshape(-1, CROPS)}
