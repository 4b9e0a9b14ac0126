"""Models with random weights for tests of shards: an MLP, a BERT-like, a Llama-like and a ResNet-like one.

Plain torch. Each is tiny by default, larger by its arguments, and deterministic: the same seed gives the same weights.
Names of modules are those of the models that they are like, so that plans by name patterns fit. Nothing here knows
torchrelay; the stages that run them are in `tests/model_stages.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


class Mlp(nn.Module):
    """`layers` hidden layers: x float [N, features] -> [N, classes]."""

    def __init__(self, features: int = 12, width: int = 32, layers: int = 6, classes: int = 8) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        for layer in self.layers:
            x = layer(F.gelu(x))
        return self.head(F.gelu(x))


class BertEmbeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, vocabulary: int, width: int, longest: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(longest, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width)
        self.register_buffer("position_ids", torch.arange(longest), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.position_ids[: tokens.shape[1]]
        x = self.word_embeddings(tokens) + self.position_embeddings(places)
        return self.LayerNorm(x + self.token_type_embeddings(torch.zeros_like(tokens)))


class BertSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        # As many heads as the layers give: a shard of them has fewer.
        parts = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2).flatten(2)


class BertOutput(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(before, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + skipped)


class BertAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(width, heads)
        self.output = BertOutput(width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.output(self.self(x, seen), x)


class BertIntermediate(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads)
        self.intermediate = BertIntermediate(width, 4 * width)
        self.output = BertOutput(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.attention(x, seen)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, seen)
        return x


class BertLike(nn.Module):
    """tokens int64 [N, L] and mask bool [N, L], True where a token is -> [N, width], the mean over the tokens."""

    def __init__(
        self, width: int = 32, heads: int = 4, layers: int = 4, vocabulary: int = 64, longest: int = 64
    ) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(vocabulary, width, longest)
        self.encoder = BertEncoder(width, heads, layers)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(self.embeddings(tokens), mask[:, None, None, :])
        weight = mask[:, :, None].to(x.dtype)
        return (x * weight).sum(dim=1) / weight.sum(dim=1)


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Rotary(nn.Module):
    """Cosines and sines of every place, [L, size], in the type of `like`."""

    inv_freq: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        # Never saved, as in the models that this is like: whoever loads only what is saved must make it anew.
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        self.register_buffer("inv_freq", 10_000.0**-steps, persistent=False)

    def forward(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(length, device=like.device, dtype=torch.float32)
        angles = torch.outer(places, self.inv_freq.float()).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, L, size] turned by the angles of its places."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.copies = width // heads, heads // kv_heads
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = k.repeat_interleave(self.copies, dim=1), v.repeat_interleave(self.copies, dim=1)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class LlamaMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(width, heads, kv_heads)
        self.mlp = LlamaMlp(width, inner)
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width), RmsNorm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBlocks(nn.Module):
    """The layers alone: x float [N, L, width] -> [N, L, width]."""

    def __init__(
        self, width: int = 32, heads: int = 4, kv_heads: int = 2, layers: int = 4, inner: int | None = None
    ) -> None:
        super().__init__()
        inner = inner or 4 * width
        self.layers = nn.ModuleList(LlamaLayer(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm = RmsNorm(width)
        self.rotary_emb = Rotary(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.rotary_emb(x.shape[1], x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class LlamaModel(LlamaBlocks):
    """tokens int64 [N, L] -> [N, L, width]; its layers are run `passes` times, one after the other."""

    def __init__(self, vocabulary: int, width: int, passes: int = 1, **sizes: Any) -> None:
        super().__init__(width, **sizes)
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.passes = passes

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for _ in range(self.passes):
            x = super().forward(x)
        return x


class LlamaLike(nn.Module):
    """tokens int64 [N, L] -> scores of the next token [N, L, vocabulary]; what is padded at the end is seen by none.

    With `tied` the head's weight is the embedding's.
    """

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 4,
        vocabulary: int = 64,
        inner: int | None = None,
        *,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.model = LlamaModel(vocabulary, width, heads=heads, kv_heads=kv_heads, layers=layers, inner=inner)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))


class BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        short = stride == 1 and before == width
        shortcut = (nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = None if short else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        skipped = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + skipped)


class ResNetLike(nn.Module):
    """image float [N, 3, H, W] -> [N, classes]; `blocks` of each of the stages, whose widths double."""

    def __init__(self, width: int = 8, blocks: Sequence[int] = (1, 1, 1), classes: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        before = width
        for number, count in enumerate(blocks, 1):
            after, made = width << (number - 1), []
            for block in range(count):
                made.append(BasicBlock(before, after, 2 if number > 1 and not block else 1))
                before = after
            setattr(self, f"layer{number}", nn.Sequential(*made))
        self.groups = len(blocks)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.groups + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean(dim=(2, 3)))


KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "bert": BertLike,
    "llama": LlamaLike,
    "resnet": ResNetLike,
}


def build(kind: str, seed: int = 0, dtype: torch.dtype | None = None, **sizes: Any) -> nn.Module:
    """The model of a kind with the random weights of this seed, for inference on the CPU."""
    return fill(KINDS[kind](**sizes), seed).to(dtype=dtype).eval().requires_grad_(False)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, so large that values neither grow nor vanish from layer to layer."""
    random = torch.Generator().manual_seed(seed)
    norms = (nn.LayerNorm, nn.BatchNorm2d, RmsNorm)
    with torch.no_grad():
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in getattr(module, "_non_persistent_buffers_set", ()) or not value.is_floating_point():
                    continue
                noise = torch.randn(value.shape, generator=random)
                if name == "running_var" or (isinstance(module, norms) and name == "weight"):
                    value.copy_(1 + 0.1 * noise.abs())
                elif value.dim() < 2:
                    value.copy_(0.1 * noise)
                else:
                    fan_in = 1 if isinstance(module, nn.Embedding) else math.prod(value.shape[1:])
                    value.copy_(noise / math.sqrt(fan_in))
    return model


def save(model: nn.Module, path: Path) -> Path:
    """Writes its weights as safetensors; of tied ones the first name, as such files have it."""
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value.detach().contiguous()
    save_file(state, path)
    return path


def rows_of(
    kind: str, count: int, seed: int = 0, *, longest: int = 24, features: int = 12, side: int = 32
) -> list[dict[str, Any]]:
    """Rows for the stage of a kind: tokens of various lengths, features, or images."""
    random = np.random.default_rng(seed)
    if kind == "mlp":
        return [{"x": random.standard_normal(features, np.float32)} for _ in range(count)]
    if kind == "resnet":
        return [{"image": random.standard_normal((3, side, side), np.float32)} for _ in range(count)]
    lengths = random.integers(1, longest + 1, count)
    return [{"tokens": random.integers(0, 64, length)} for length in lengths]
