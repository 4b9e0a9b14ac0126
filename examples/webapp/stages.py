"""From an uploaded file to a label: a function that refuses what is no image, and a class that holds the model."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import train_test_split

from torchrelay import Batch, Stage, StageContext

__all__ = ["Classify", "decode", "shrink", "split_digits"]

_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS = 16_000_000
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode(batch: Batch) -> dict[str, Any]:
    """`image`: the bytes of a PNG, JPEG or WebP file, dark ink on light paper -> `pixels`: float32 `[64]`."""
    pixels = np.zeros((len(batch), 64), np.float32)
    for row, data in enumerate(batch["image"]):
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    batch.reject(row, f"the image has {image.width} x {image.height} pixels; send a smaller one")
                else:
                    pixels[row] = shrink(image)
        except _BROKEN:
            batch.reject(row, "this is no PNG, JPEG or WebP image, or a broken one")
    return {"pixels": pixels}


class Classify(Stage):
    """`pixels` -> `label`: int64, and its `score`: float64, the share of trees that say so."""

    def load(self, context: StageContext) -> None:
        images, digits, _, _ = split_digits()
        pixels = [shrink(Image.fromarray((255 - 15 * image).astype(np.uint8))) for image in images]
        self.model = ExtraTreesClassifier(random_state=0).fit(pixels, digits)

    def forward(self, batch: Batch) -> dict[str, Any]:
        shares = self.model.predict_proba(batch["pixels"])
        return {"label": shares.argmax(axis=1), "score": shares.max(axis=1)}


def shrink(image: Image.Image) -> np.ndarray:
    """The ink of an image, cut out and shrunk to 8 x 8: float32 `[64]`, from 0 (paper) to 1."""
    ink = ImageOps.autocontrast(ImageOps.invert(image.convert("L")))
    cut = ink.crop(ink.point(lambda value: value if value > 32 else 0).getbbox())
    return np.asarray(ImageOps.pad(cut, (8, 8), Image.Resampling.BOX), np.float32).ravel() / 255


def split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images `[N, 8, 8]` with ink from 0 to 16 and digits to learn from, then
    those that the model has not seen."""
    digits = load_digits()
    known, unseen, answers, questions = train_test_split(
        digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return known, answers, unseen, questions
