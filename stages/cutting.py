"""Cuts the layers of a model for the shards of a gathered stage: `build` makes the whole, and calls these on it.

    def build(self, context):
        model = Mlp()                                       # on the meta device, where the stage has `weights:`
        cutting.column_linear(model, context, "up")         # each shard has its share of the hidden features,
        cutting.row_linear(model, context, "down")          # and makes a share of every output: combine: {y: sum}
        return model

Each function changes the module in place: shard k of N keeps its part of the tensors, and a note of which part that is.
By these notes a TorchStage reads only its parts of the whole model's weights (`weights:`), and `cut_state` cuts a state
dict. With one shard nothing is changed. What one function cut, the next ones may not cut again.

Names are paths as `named_modules()` has them, with `*` for any part: "layers.*.mlp.up". Raises ConfigError that names
the module, for one that is not there, is of another kind, or does not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from torchrelay.errors import ConfigError
from torchrelay.stages.cut_pieces import (
    NOTES,
    check_divides,
    cut,
    cut_state,
    matching,
    modules,
    pieces_of,
    share,
)
from torchrelay.stages.cuts import NOTHING, Cut
from torchrelay.stages.stage import StageContext

__all__ = [
    "column_linear",
    "cut_state",
    "embedding",
    "experts",
    "heads",
    "parameter",
    "pieces_of",
    "row_linear",
]


def column_linear(model: nn.Module, context: StageContext, *names: str, blocks: int = 1) -> None:
    """Each shard computes its share of a Linear's output features, and has that share of its bias.

    Args:
        names: of the Linears.
        blocks: how many layers of equal size one Linear holds (3 for query, key and value): each is cut by itself.
    """
    for name, module in modules(model, names, nn.Linear, "column_linear"):
        check_divides(name, "out_features", module.out_features, context, blocks)
        step = module.out_features // blocks
        ranges = [(b * step + start, b * step + stop) for b in range(blocks) for start, stop in [share(step, context)]]
        _cut_columns(model, name, module, ranges, context)


def row_linear(model: nn.Module, context: StageContext, *names: str) -> None:
    """Each shard has its share of a Linear's input features, which a layer cut by columns made; what they return is to
    be summed. The bias is the first shard's alone."""
    for name, module in modules(model, names, nn.Linear, "row_linear"):
        check_divides(name, "in_features", module.in_features, context)
        _cut_rows(model, name, module, [share(module.in_features, context)], context)


def embedding(model: nn.Module, context: StageContext, *names: str, by: str = "features") -> None:
    """Cuts an Embedding.

    Args:
        names: of the Embeddings.
        by: "features": each shard has its share of every vector, to be concatenated. "rows": its share of the entries;
            it gives zeros for those of others, to be summed.
    """
    if by not in ("features", "rows"):
        raise ConfigError(f'embedding: by is "features" or "rows", {by!r:.40} came')
    for name, module in modules(model, names, nn.Embedding, "embedding"):
        if module.max_norm is not None:
            raise ConfigError(f"module {name!r} has max_norm, which changes its vectors as they are read; take it out")
        if by == "features":
            check_divides(name, "embedding_dim", module.embedding_dim, context)
            if context.shards > 1:
                cut(
                    model,
                    name,
                    module,
                    "weight",
                    Cut(1, (share(module.embedding_dim, context),), whole=module.embedding_dim),
                )
                module.embedding_dim //= context.shards
        else:
            check_divides(name, "num_embeddings", module.num_embeddings, context)
            if context.shards > 1:
                _cut_entries(model, name, module, context)


def heads(
    model: nn.Module,
    context: StageContext,
    *names: str,
    linears: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    count: str | int = "num_heads",
    kv_count: str | int = "num_key_value_heads",
    per_kv: str = "num_key_value_groups",
    also: Sequence[str] = (),
) -> None:
    """Each shard computes its share of the heads of an attention; what they return is to be summed.

    Where there are fewer key and value heads than shards, several shards have the same one. The module must work with
    as many heads as its Linears make, or as its attributes say.

    Args:
        names: of the modules that hold these Linears.
        linears: what the module calls those for queries, keys, values and the heads' outputs; or two, where one makes
            queries, keys and values, in this order.
        count, kv_count: attributes with the number of heads, and of key and value heads where the module has it; they
            become this shard's numbers. Or these numbers themselves, where the module keeps none.
        per_kv: the attribute, where the module has it, with how many heads share a key and value head.
        also: other attributes that are multiples of the number of heads, such as the sum of their sizes; they are
            divided by the number of shards.
    """
    if len(linears) not in (2, 4):
        raise ConfigError(
            f"heads: linears names 4 layers (query, key, value, out) or 2 (all three, out): {linears!r:.80}"
        )
    for name, module in modules(model, names, nn.Module, "heads"):
        total, kv = _head_counts(name, module, count, kv_count)
        _check_heads(name, total, kv, context)
        mine, my_kv = _head_range(total, context), _head_range(kv, context)
        if len(linears) == 4:
            made = [(linears[0], total, [mine]), (linears[1], kv, [my_kv]), (linears[2], kv, [my_kv])]
        else:
            later = [(at + my_kv[0], at + my_kv[1]) for at in (total, total + kv)]
            made = [(linears[0], total + 2 * kv, [mine, *later])]
        for leaf, number, parts in made:
            path, linear = _linear(name, module, leaf)
            size = _head_size(path, linear.out_features, number)
            _cut_columns(model, path, linear, [(start * size, stop * size) for start, stop in parts], context)
        path, linear = _linear(name, module, linears[-1])
        size = _head_size(path, linear.in_features, total)
        _cut_rows(model, path, linear, [(mine[0] * size, mine[1] * size)], context)
        numbers = {count: mine[1] - mine[0], kv_count: my_kv[1] - my_kv[0]}
        numbers[per_kv] = numbers[count] // numbers[kv_count]
        for attribute, number in numbers.items():
            if isinstance(attribute, str) and hasattr(module, attribute):
                setattr(module, attribute, number)
        _divide(name, module, also, context)


def experts(model: nn.Module, context: StageContext, *names: str) -> None:
    """Each shard keeps its share of the modules of a ModuleList; the others give zeros of their input's shape.

    So a loop over all of them, each weighted by its gate, makes this shard's share of the sum.
    """
    for name, module in modules(model, names, nn.ModuleList, "experts"):
        check_divides(name, "the number of modules", len(module), context)
        start, stop = share(len(module), context)
        for number, one in enumerate(module):
            if not start <= number < stop:
                module[number] = Absent(one)


def parameter(model: nn.Module, context: StageContext, *names: str, dim: int = 0) -> None:
    """Each shard has its share of a parameter or buffer along a dimension: weights of experts in one tensor, for
    example. What else the module knows of its sizes is the caller's to change."""
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for pattern in names:
        for path in matching(model, known, pattern, "parameter"):
            size = _dim_size(path, known[path], dim)
            check_divides(path, f"dimension {dim}", size, context)
            if context.shards > 1:
                owner, _, leaf = path.rpartition(".")
                piece = Cut(dim % known[path].ndim, (share(size, context),), whole=size)
                cut(model, owner, model.get_submodule(owner), leaf, piece)


class Absent(nn.Module):
    """An expert that another shard has: zeros of its input's shape."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        setattr(self, NOTES, dict.fromkeys(expert.state_dict(), NOTHING))

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(x)


class EntriesOfShard(nn.Module):
    """Some entries of an Embedding, from number `first` on; the vectors of all others are zeros."""

    def __init__(self, whole: nn.Embedding, weight: nn.Parameter, first: int) -> None:
        super().__init__()
        self.weight = weight
        self.first = first
        self.num_embeddings = whole.num_embeddings
        self.embedding_dim = whole.embedding_dim
        self.padding_idx = whole.padding_idx

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        if numbers.device.type == "cpu" and numbers.numel() and not torch.compiler.is_compiling():
            # As the whole one does: an entry that no shard has would be zeros without a word.
            low, high = int(numbers.min()), int(numbers.max())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"entries {low} to {high} were asked for; the embedding has {self.num_embeddings}")
        local = numbers - self.first
        others = (local < 0) | (local >= len(self.weight))
        found = functional.embedding(local.masked_fill(others, 0), self.weight)
        return found.masked_fill(others.unsqueeze(-1), 0)


def _cut_columns(
    model: nn.Module, name: str, module: nn.Linear, ranges: Sequence[tuple[int, int]], context: StageContext
) -> None:
    if context.shards == 1:
        return
    piece = Cut(0, tuple(ranges), whole=module.out_features)
    for leaf in ("weight", "bias"):
        if getattr(module, leaf) is not None:
            cut(model, name, module, leaf, piece)
    module.out_features = sum(stop - start for start, stop in ranges)


def _cut_rows(
    model: nn.Module, name: str, module: nn.Linear, ranges: Sequence[tuple[int, int]], context: StageContext
) -> None:
    if context.shards == 1:
        return
    cut(model, name, module, "weight", Cut(1, tuple(ranges), whole=module.in_features))
    if module.bias is not None and context.shard:
        # It would be added once per shard.
        cut(model, name, module, "bias", NOTHING)
    module.in_features = sum(stop - start for start, stop in ranges)


def _cut_entries(model: nn.Module, name: str, module: nn.Embedding, context: StageContext) -> None:
    if not name:
        raise ConfigError("embedding: the model is the Embedding itself, which is replaced; put it into a module")
    mine = share(module.num_embeddings, context)
    cut(model, name, module, "weight", Cut(0, (mine,), whole=module.num_embeddings))
    part = EntriesOfShard(module, nn.Parameter(module.weight, module.weight.requires_grad), mine[0])
    part.__dict__[NOTES] = module.__dict__[NOTES]
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, part)


def _linear(name: str, module: nn.Module, leaf: str) -> tuple[str, nn.Linear]:
    inner = getattr(module, leaf, None)
    path = f"{name}.{leaf}" if name else leaf
    if not isinstance(inner, nn.Linear):
        there = ", ".join(n for n, m in module.named_children() if isinstance(m, nn.Linear))
        what = "not there" if inner is None else f"a {type(inner).__qualname__}"
        raise ConfigError(
            f"heads: {path!r} is {what}, and heads cuts nn.Linear; say what {type(module).__qualname__} calls its "
            f"Linears in `linears` (there are {there or 'none'})"
        )
    return path, inner


def _head_counts(name: str, module: nn.Module, count: str | int, kv_count: str | int) -> tuple[int, int]:
    total = count if isinstance(count, int) else getattr(module, count, None)
    if not isinstance(total, int) or total < 1:
        numbers = ", ".join(n for n, v in vars(module).items() if type(v) is int)
        raise ConfigError(
            f"heads: module {name!r} has no attribute {count!r} with its number of heads; name it in `count`, or give "
            f"the number (there are {numbers or 'none'})"
        )
    kv = kv_count if isinstance(kv_count, int) else getattr(module, kv_count, None)
    return total, kv if isinstance(kv, int) and kv > 0 else total


def _check_heads(name: str, total: int, kv: int, context: StageContext) -> None:
    check_divides(name, "a number of heads", total, context)
    if total % kv or (kv % context.shards and context.shards % kv):
        raise ConfigError(
            f"module {name!r}: {total} heads share {kv} key and value heads, which {context.shards} shards cannot "
            f"split; set shards.count to a divisor or a multiple of {kv}"
        )


def _head_range(number: int, context: StageContext) -> tuple[int, int]:
    """The heads that this shard has; one that several shards share, where there are fewer than shards."""
    if number % context.shards:
        mine = context.shard * number // context.shards
        return mine, mine + 1
    return share(number, context)


def _head_size(name: str, features: int, number: int) -> int:
    if features % number:
        raise ConfigError(f"module {name!r}: {features} features are no multiple of its {number} heads")
    return features // number


def _divide(name: str, module: nn.Module, attributes: Sequence[str], context: StageContext) -> None:
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if not isinstance(value, int):
            raise ConfigError(f"heads: module {name!r} has no whole number {attribute!r}; take it out of `also`")
        check_divides(name, attribute, value, context)
        setattr(module, attribute, value // context.shards)


def _dim_size(path: str, tensor: torch.Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ConfigError(f"parameter: {path!r} has shape {list(tensor.shape)}, and no dimension {dim}")
    return int(tensor.shape[dim])
