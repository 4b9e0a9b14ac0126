"""Two models behind one class, and the function that joins what they say."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

from torchrelay import Batch, Stage, StageContext

__all__ = ["Classifier", "average", "split_digits"]


class Classifier(Stage):
    """`image`: float32 `[64]` -> `probabilities`: float32 `[10]`, and when it `ran`: float64 (start, end)."""

    def __init__(self, model: Literal["neighbours", "network"]) -> None:
        self.name = model

    def load(self, context: StageContext) -> None:
        images, digits, _, _ = split_digits()
        if self.name == "neighbours":
            self.model = KNeighborsClassifier(5, weights="distance")
        else:
            self.model = MLPClassifier([32], max_iter=500, random_state=0)
        self.model.fit(images, digits)

    def forward(self, batch: Batch) -> dict[str, Any]:
        start = time.monotonic()
        probabilities = self.model.predict_proba(batch["image"]).astype(np.float32)
        return {"probabilities": probabilities, "ran": np.tile([start, time.monotonic()], (len(batch), 1))}


def average(batch: Batch) -> dict[str, Any]:
    """The digit that both models together find the likeliest, beside what each of them says."""
    return {
        "digit": (batch["neighbours"] + batch["network"]).argmax(axis=1),
        "neighbours": batch["neighbours"].argmax(axis=1),
        "network": batch["network"].argmax(axis=1),
        "ran": np.stack([batch["neighbours_ran"], batch["network_ran"]], axis=1),
    }


def split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images float32 `[N, 64]` and digits to learn from, then those to test with."""
    images, digits = load_digits(return_X_y=True)
    known, unseen, answers, questions = train_test_split(
        (images / 16).astype(np.float32), digits, test_size=0.5, random_state=0, stratify=digits
    )
    return known, answers, unseen, questions
