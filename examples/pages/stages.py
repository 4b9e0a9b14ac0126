"""From a page to its digits: two plain functions, and one class because it has a model to load."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from torchrelay import Batch, Expand, Stage, StageContext

__all__ = ["Classify", "crop", "detect", "split_digits"]

_TOUCHING = np.ones((3, 3))
_SIDE = 8


def detect(batch: Batch, *, threshold: int = 12) -> Expand:
    """`page`: uint8 `[H, W]` -> `box`: int32 (top, left, bottom, right) of each connected blot of ink."""
    boxes: list[tuple[int, ...]] = []
    counts = []
    for row, page in enumerate(batch["page"]):
        ink = page > threshold
        found = ndimage.find_objects(ndimage.label(ink, _TOUCHING)[0])
        if ink.mean() > 0.5:
            batch.reject(row, f"{ink.mean():.0%} of the page is ink: this is no scan of a page")
            found = []
        boxes += [(y.start, x.start, y.stop, x.stop) for y, x in found]
        counts.append(len(found))
    return Expand({"box": np.array(boxes, np.int32).reshape(-1, 4)}, counts)


def crop(batch: Batch) -> dict[str, Any]:
    """`page` and `box` -> `crop`: uint8 `[height, width]`."""
    boxes = batch["box"].tolist()
    return {"crop": [page[y0:y1, x0:x1] for page, (y0, x0, y1, x1) in zip(batch["page"], boxes, strict=True)]}


class Classify(Stage):
    """`crop` -> `digit`: int64, by its nearest neighbours among digits that no page shows."""

    def load(self, context: StageContext) -> None:
        known, _ = split_digits()
        crops = [image[np.ix_(image.any(axis=1), image.any(axis=0))] for image, _ in known]
        self.model = KNeighborsClassifier(3).fit(features(crops), [digit for _, digit in known])

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"digit": self.model.predict(features(batch["crop"]))}


def features(crops: list[np.ndarray]) -> np.ndarray:
    """Crops of any size, set into squares, shrunk to 8 x 8, at length 1: float64 `[N, 64]`."""
    rows = np.empty((len(crops), _SIDE * _SIDE))
    for row, ink in zip(rows, crops, strict=True):
        side = max(ink.shape)
        before = [(side - n) // 2 for n in ink.shape]
        square = np.pad(ink.astype(float), [(b, side - n - b) for b, n in zip(before, ink.shape, strict=True)])
        row[:] = ndimage.zoom(square, _SIDE / side, order=1, grid_mode=True, mode="nearest").ravel()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def split_digits() -> tuple[list[tuple[np.ndarray, int]], list[tuple[np.ndarray, int]]]:
    """scikit-learn's handwritten digits, 8 x 8 with ink from 0 to 16: those to learn from, and those to be read."""
    digits = load_digits()
    pairs = list(zip(digits.images, digits.target.tolist(), strict=True))
    known, unseen = train_test_split(pairs, test_size=0.4, random_state=0)
    return known, unseen
