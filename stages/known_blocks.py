"""The blocks of models that can be cut without being told how: found by their modules' names and sizes, not by class.

Each is a Linear or several by columns, what is computed of their outputs element by element or head by head, and a
Linear by rows. Promise: a block is taken only if whatever else its module holds fits no width that is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torchrelay.config.shard_plans import Style
from torchrelay.errors import StageLoadError
from torchrelay.stages.head_counts import heads_of

__all__ = ["find_blocks", "find_vocabularies"]


@dataclass(frozen=True, slots=True)
class _Block:
    """The paths, within one module, of the Linear that are cut by columns and of the one by rows behind them; `plans`
    that have it, beside "auto"."""

    columns: tuple[str, ...]
    row: str
    plans: str = ""
    attention: bool = False


_ATTENTION = (
    (("q_proj", "k_proj", "v_proj"), "o_proj", "llama vit"),
    (("q_proj", "k_proj", "v_proj"), "out_proj", "vit"),
    (("self.query", "self.key", "self.value"), "output.dense", "bert"),
    (("attention.query", "attention.key", "attention.value"), "output.dense", "vit"),
    (("query", "key", "value"), "out", ""),
    (("query", "key", "value"), "output", ""),
    (("wq", "wk", "wv"), "wo", ""),
    # Not ("q", "k", "v") with "o": it is T5's and MPNet's, whose first layer hands a bias of all heads to the others.
    (("q", "k", "v"), "out", ""),
    (("q", "k", "v"), "proj", ""),
    (("to_q", "to_k", "to_v"), "to_out.0", ""),
    (("q_lin", "k_lin", "v_lin"), "out_lin", "bert"),
)
_MLP = (
    (("gate_proj", "up_proj"), "down_proj", "llama"),
    (("w1", "w3"), "w2", ""),
    (("gate", "up"), "down", ""),
    (("wi_0", "wi_1"), "wo", ""),
    (("intermediate.dense",), "output.dense", "bert vit"),
    (("fc1",), "fc2", "vit mlp"),
    (("lin1",), "lin2", "bert"),
    (("linear1",), "linear2", ""),
    (("up_proj",), "down_proj", ""),
    (("up",), "down", ""),
    (("c_fc",), "c_proj", ""),
    (("dense_h_to_4h",), "dense_4h_to_h", ""),
    (("wi",), "wo", ""),
)
_BLOCKS = (*(_Block(*a, attention=True) for a in _ATTENTION), *(_Block(*m) for m in _MLP))
_VOCABULARIES = {"llama": ("embed_tokens",), "bert": ("word_embeddings",), "vit": (), "mlp": ()}
_VOCABULARIES["auto"] = ("embed_tokens", "word_embeddings", "tok_embeddings", "wte")
_OUTPUTS = ("lm_head", "decoder", "output", "embed_out")
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity, nn.Dropout),
)  # fmt: skip


def find_blocks(model: nn.Module, plan: str) -> dict[str, Style]:
    """The modules, by name, that known blocks consist of, with how they are cut; empty where there is none."""
    found: dict[str, Style] = {}
    for prefix, module in model.named_modules():
        # It computes with its layers' weights itself.
        if isinstance(module, nn.TransformerEncoderLayer):
            continue
        # One that overrides forward may compute anything.
        in_order = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        for path, style in _pairs(module) if in_order and plan in ("auto", "mlp") else _named(module, plan):
            name = f"{prefix}.{path}" if prefix else path
            found.setdefault(name, style)
    return found


def _named(module: nn.Module, plan: str) -> Iterator[tuple[str, Style]]:
    for block in _BLOCKS:
        if plan != "auto" and plan not in block.plans.split():
            continue
        columns = [_linear(module, path) for path in block.columns]
        row = _linear(module, block.row)
        if row is None or not (there := [c for c in columns if c is not None]) or len(there) < len(columns):
            continue
        if row.in_features == there[0].out_features and _closed(module, block, there):
            yield from ((path, Style("column")) for path in block.columns)
            yield block.row, Style("row")


def _closed(module: nn.Module, block: _Block, columns: list[nn.Linear]) -> bool:
    """Whether nothing else of the columns' module could lie between them and the row."""
    path = block.columns[0].rpartition(".")[0]
    owner = module.get_submodule(path) if path else module
    leaves = [column.rpartition(".")[2] for column in block.columns]
    cut = {id(c) for c in columns} | {id(_linear(module, block.row))}
    # Norms of what a block takes or returns are as wide; they are told apart only where it is widened.
    widths = {c.out_features for c in columns}
    allowed = 0
    if block.attention:
        try:
            heads = heads_of("", owner, {leaf: (c, 1) for leaf, c in zip(leaves, columns, strict=True)})
        except StageLoadError:
            return False
        if heads is None or any(True for _ in owner.parameters(recurse=False)):
            return False
        widths |= {heads.heads, heads.kv_heads}
        allowed = heads.size
    for child in (owner, *(c for c in owner.children() if id(c) not in cut)):
        for tensor in _tensors(child, recurse=child is not owner):
            per_head = tensor.ndim == 1 and len(tensor) == allowed
            if widths & set(tensor.shape) and not per_head:
                return False
    return True


def _tensors(module: nn.Module, *, recurse: bool) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def _pairs(module: nn.Module) -> Iterator[tuple[str, Style]]:
    """Of a Sequential, each two Linear with nothing but functions of single elements between them."""
    before: tuple[str, nn.Linear] | None = None
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            if before is not None and before[1].out_features == child.in_features:
                yield before[0], Style("column")
                yield name, Style("row")
                before = None
            else:
                before = name, child
        elif type(child) not in _ELEMENTWISE:
            before = None


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    """The Linear of this path; None if there is none, or it is of a class of its own."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, "_modules", {}).get(name)
    return found if type(found) is nn.Linear else None


def find_vocabularies(model: nn.Module, plan: str, count: int) -> dict[str, Style]:
    """Embeddings of words, of which each of `count` ranks gets some, and the Linear that turns back into as many."""
    names = _VOCABULARIES[plan]
    found: dict[str, Style] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Embedding or name.rpartition(".")[2] not in names or module.max_norm is not None:
            continue
        if (count - 1) * -(-module.num_embeddings // count) < module.num_embeddings:
            found[name] = Style("embedding")
    sizes = {module.num_embeddings for n in found if isinstance(module := model.get_submodule(n), nn.Embedding)}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rpartition(".")[2] in _OUTPUTS and module.out_features in sizes:
            found[name] = Style("column_gather")
    return found
