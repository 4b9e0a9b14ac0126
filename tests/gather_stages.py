"""The models of `tests/models.py` as chains of gathered stages: each holds a pair of layers that meet in a sum.

A stage here is what a user would write: `build` makes the whole layers and cuts them, and what is to be there once in
the sum (a residual, the embeddings of positions) is the first shard's. With one shard each stage is the whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests import models
from torchrelay import Batch, StageContext, TorchStage, cutting


class Part(TorchStage):
    """`first`: whether it is the shard that adds what is to be there once."""

    def load(self, context: StageContext) -> None:
        self.first = context.shard == 0
        super().load(context)

    def rows(self, values: torch.Tensor, batch: Batch, column: str) -> list[torch.Tensor]:
        """Each row as long as it came."""
        return [values[i, :n] for i, n in enumerate(batch.lengths[column].tolist())]


class MlpUp(Part):
    """Projects, and the first layer."""

    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("mlp", layers=2)
        cutting.column_linear(whole, context, "project")
        cutting.row_linear(whole, context, "layers.0")
        return nn.ModuleList([whole.project, whole.layers[0]])

    def forward(self, batch: Batch) -> dict[str, Any]:
        up, down = self.model
        return {"h": down(functional.gelu(up(batch["x"].to(self.dtype))))}


class MlpDown(Part):
    """The second layer, and the head."""

    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("mlp", layers=2)
        cutting.column_linear(whole, context, "layers.1")
        cutting.row_linear(whole, context, "head")
        return nn.ModuleList([whole.layers[1], whole.head])

    def forward(self, batch: Batch) -> dict[str, Any]:
        up, down = self.model
        return {"y": down(functional.gelu(up(functional.gelu(batch["h"]))))}


class BertEmbed(Part):
    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("bert", layers=1).embeddings
        cutting.embedding(whole, context, "word_embeddings", by="rows")
        return whole

    def forward(self, batch: Batch) -> dict[str, Any]:
        m, tokens = self.model, batch["tokens"]
        h = m.word_embeddings(tokens)
        if self.first:
            h = h + m.position_embeddings(m.position_ids[: tokens.shape[1]])
            h = h + m.token_type_embeddings(torch.zeros_like(tokens))
        return {"h": self.rows(h, batch, "tokens")}


class BertAttend(Part):
    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("bert", layers=1)
        attention = whole.encoder.layer[0].attention
        parts = nn.ModuleDict({"norm": whole.embeddings.LayerNorm, "self": attention.self})
        parts["self"].out = attention.output.dense
        cutting.heads(parts, context, "self", linears=("query", "key", "value", "out"), count=4)
        return parts

    def forward(self, batch: Batch) -> dict[str, Any]:
        m = self.model
        h = m["norm"](batch["h"])
        made = m["self"].out(m["self"](h, batch.mask("h")[:, None, None, :]))
        return {"h": self.rows(made + h if self.first else made, batch, "h")}


class BertFeed(Part):
    def build(self, context: StageContext) -> nn.Module:
        layer = models.build("bert", layers=1).encoder.layer[0]
        cutting.column_linear(layer, context, "intermediate.dense")
        cutting.row_linear(layer, context, "output.dense")
        return layer

    def forward(self, batch: Batch) -> dict[str, Any]:
        m = self.model
        h = m.attention.output.LayerNorm(batch["h"])
        made = m.output.dense(m.intermediate(h))
        return {"h": self.rows(made + h if self.first else made, batch, "h")}


class BertPool(Part):
    def build(self, context: StageContext) -> nn.Module:
        return models.build("bert", layers=1).encoder.layer[0].output.LayerNorm

    def forward(self, batch: Batch) -> dict[str, Any]:
        weight = batch.mask("h")[:, :, None].float()
        return {"y": (self.model(batch["h"]) * weight).sum(1) / weight.sum(1)}


class LlamaEmbed(Part):
    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("llama", layers=1).model
        cutting.embedding(whole, context, "embed_tokens")
        return whole.embed_tokens

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"h": self.rows(self.model(batch["tokens"]), batch, "tokens")}


class LlamaAttend(Part):
    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("llama", layers=1).model
        cutting.heads(whole, context, "layers.*.self_attn", count=4, kv_count=2, per_kv="copies")
        return whole

    def forward(self, batch: Batch) -> dict[str, Any]:
        h, layer = batch["h"], self.model.layers[0]
        made = layer.self_attn(layer.input_layernorm(h), *self.model.rotary_emb(h.shape[1], h))
        return {"h": self.rows(made + h if self.first else made, batch, "h")}


class LlamaFeed(Part):
    def build(self, context: StageContext) -> nn.Module:
        layer = models.build("llama", layers=1).model.layers[0]
        cutting.column_linear(layer, context, "mlp.gate_proj", "mlp.up_proj")
        cutting.row_linear(layer, context, "mlp.down_proj")
        return layer

    def forward(self, batch: Batch) -> dict[str, Any]:
        h = batch["h"]
        made = self.model.mlp(self.model.post_attention_layernorm(h))
        return {"h": self.rows(made + h if self.first else made, batch, "h")}


class LlamaHead(Part):
    """The scores of the token that follows the last one."""

    def build(self, context: StageContext) -> nn.Module:
        whole = models.build("llama", layers=1)
        cutting.column_linear(whole, context, "lm_head")
        return nn.ModuleList([whole.model.norm, whole.lm_head])

    def forward(self, batch: Batch) -> dict[str, Any]:
        h, lengths = batch["h"], batch.lengths["h"]
        norm, head = self.model
        return {"y": head(norm(h[torch.arange(len(batch)), lengths - 1]))}


SUM: Mapping[str, Any] = {"h": "sum"}
Chain = Sequence[tuple[str, dict[str, str], dict[str, Any] | None]]
"""Of each stage its class, what it returns, and how it is combined; None for one that is whole."""
CHAINS: Mapping[str, Chain] = {
    "mlp": [("MlpUp", {"h": "float32[32]"}, dict(SUM)), ("MlpDown", {"y": "float32[8]"}, {"y": "sum"})],
    "bert": [
        ("BertEmbed", {"h": "float32[*, 32]"}, dict(SUM)),
        ("BertAttend", {"h": "float32[*, 32]"}, dict(SUM)),
        ("BertFeed", {"h": "float32[*, 32]"}, dict(SUM)),
        ("BertPool", {"y": "float32[32]"}, None),
    ],
    "llama": [
        ("LlamaEmbed", {"h": "float32[*, 32]"}, {}),
        ("LlamaAttend", {"h": "float32[*, 32]"}, dict(SUM)),
        ("LlamaFeed", {"h": "float32[*, 32]"}, dict(SUM)),
        ("LlamaHead", {"y": "float32[64]"}, {"y": {"concat": 0}}),
    ],
}


def write_chain(folder: Path, kind: str, count: int, *, dtype: str = "", most: int = 99, **keys: Any) -> Path:
    """A pipeline file with the model of a kind as gathered stages of `count` shards, 1 for whole ones.

    Args:
        dtype: what the model computes in and its stages return; default float32.
        most: how many of its stages, from the first.
        keys: more keys of each stage.
    """
    stages = []
    for number, (use, outputs, combine) in enumerate(CHAINS[kind][:most]):
        shards = {"count": count, "mode": "gather", "combine": combine}
        stages.append(
            {
                "name": use.lower(),
                "use": f"tests.gather_stages:{use}",
                "inputs": ["h" if number else "x" if kind == "mlp" else "tokens"],
                "outputs": {c: text.replace("float32", dtype or "float32") for c, text in outputs.items()},
                "batch": {"max_rows": 8, "pad": {} if kind == "mlp" else {"h" if number else "tokens": 0}},
                **({"torch": {"dtype": dtype}} if dtype else {}),
                **({"shards": shards} if combine is not None and count > 1 else {}),
                **keys,
            }
        )
    rows = {"x": "float32[12]"} if kind == "mlp" else {"tokens": "int64[*]"}
    path = folder / f"{kind}-{count}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({"pipeline": kind, "input": rows, "stages": stages}, indent=2))
    return path
