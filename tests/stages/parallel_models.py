"""Small models of the kinds that groups of ranks compute, in plain torch, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 12), nn.LayerNorm(12), nn.Linear(12, 5))


class Fused(nn.Module):
    """Queries, keys and values in one Linear, and names and counts that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.all3, self.back, self.h = nn.Linear(16, 48), nn.Linear(16, 16), 4
        self.out = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.h, 4)).transpose(1, 2) for t in self.all3(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v)
        found: torch.Tensor = self.out(self.back(y.transpose(1, 2).flatten(2)))
        return found


FUSED = {"all3": "column:3", "h": "divide", "back": "row", "out": "column_gather"}


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        split = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        return y.transpose(1, 2).reshape(*x.shape[:2], self.all_head_size)


class Output(nn.Module):
    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(inner, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.dense(x) + before)
        return found


class Bert(nn.Module):
    """Embeddings with a vocabulary that does not divide, post-norm layers, a tied head with a bias."""

    def __init__(self, words: int = 31, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.word_embeddings, self.positions = nn.Embedding(words, width), nn.Embedding(32, width)
        self.register_buffer("ids", torch.arange(32), persistent=False)
        self.layers = nn.ModuleList()
        for _ in range(2):
            attention = nn.ModuleDict({"self": SelfAttention(width, heads), "output": Output(width, width)})
            inner = nn.ModuleDict({"dense": nn.Linear(width, 2 * width)})
            whole = {"attention": attention, "intermediate": inner, "output": Output(2 * width, width)}
            self.layers.append(nn.ModuleDict(whole))
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.word_embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.word_embeddings(ids) + self.positions(self.ids[: ids.shape[1]])
        for layer in self.layers:
            parts: Any = layer
            x = parts["attention"]["output"](parts["attention"]["self"](x, ids > 0), x)
            x = parts["output"](functional.gelu(parts["intermediate"]["dense"](x)), x)
        found: torch.Tensor = self.decoder(x)
        return found


class GroupedAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, 8
        self.q_proj, self.o_proj = nn.Linear(width, heads * 8, bias=False), nn.Linear(heads * 8, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * 8, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, 8).transpose(1, 2) * turn
        k = self.k_proj(x).view(batch, length, self.num_key_value_heads, 8).transpose(1, 2) * turn
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, 8).transpose(1, 2)
        k, v = (t.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=1) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: torch.Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return found


class Llama(nn.Module):
    """Grouped queries, a gated MLP, a buffer that is computed and never saved, a head of its own."""

    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(32, 24), nn.Linear(24, 32, bias=False)
        self.register_buffer("turn", (1 / 100 ** (torch.arange(8) / 8)).cos(), persistent=False)
        self.layers = nn.ModuleList()
        for _ in range(2):
            parts = {"attention": GroupedAttention(24, 8, kv_heads), "one": nn.LayerNorm(24), "two": nn.LayerNorm(24)}
            linears = {"gate_proj": (24, 40), "up_proj": (24, 40), "down_proj": (40, 24)}
            mlp = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in linears.items()})
            self.layers.append(nn.ModuleDict({**parts, "mlp": mlp}))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            parts: Any = layer
            x = x + parts["attention"](parts["one"](x), self.turn)
            y, mlp = parts["two"](x), parts["mlp"]
            x = x + mlp["down_proj"](functional.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        found: torch.Tensor = self.lm_head(x)
        return found
