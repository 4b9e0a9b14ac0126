"""Attention modules whose projections are cut: by whole heads, and the module's own counts and widths with them.

Promise: what a module says of itself stays consistent: its counts of heads, of key-value heads and how many of the
former share one of the latter, and the widths that are their product, are those of this rank; the size of a head is as
it was. Where heads do not divide, the error says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from torchrelay.config.shard_plans import Style
from torchrelay.errors import StageLoadError
from torchrelay.stages.cuts import Cut

__all__ = ["Heads", "even_cut", "heads_of"]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "n_local_heads", "num_local_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_local_kv_heads")
_GROUPS = ("num_key_value_groups", "num_kv_groups", "n_rep")
_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "dim_per_head")
_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "embed_dim", "hidden_size", "d_model", "dim", "n_embd", "q_size")
_KV_WIDTHS = ("kv_size", "kv_dim")
_KEYS = ("k_proj", "v_proj", "key", "value", "wk", "wv", "to_k", "to_v", "k", "v", "k_lin", "v_lin")
_QUERIES = ("q_proj", "query", "wq", "to_q", "q", "q_lin")


@dataclass(frozen=True, slots=True)
class Heads:
    """An attention module: `heads` of `size` outputs each, that share `kv_heads`; `keys` are its children that
    compute those, and `queries` those of the heads."""

    name: str
    heads: int
    kv_heads: int
    size: int
    keys: frozenset[str]
    queries: frozenset[str]

    def kv_parts(self, count: int) -> int:
        """How many key-value heads each of `count` ranks has."""
        return max(1, self.kv_heads // count)

    def check(self, count: int) -> None:
        """Raises StageLoadError where its heads do not divide by `count`."""
        if self.heads % count:
            fits = [n for n in range(2, 65) if self.heads % n == 0]
            remedy = f"choose a count of {', '.join(map(str, fits))}" if fits else "leave it whole"
            what = f"module {self.name!r}: its {self.heads} heads"
            raise StageLoadError(f"{what} do not divide by {count} shards; {remedy}")
        if self.kv_heads % count and count % self.kv_heads:
            raise StageLoadError(
                f"module {self.name!r}: its {self.kv_heads} key-value heads neither divide by {count} shards nor "
                f"{count} by them; choose another count, or leave its projections whole"
            )

    def cut(self, child: str, whole: nn.Linear, style: Style, rank: int, count: int) -> Cut:
        """What of a projection's outputs a rank has: keys and values that are fewer than the ranks, several have."""
        where = f"{self.name}.{child}"
        if child not in self.keys or self.kv_heads % count == 0:
            return even_cut(whole.out_features, style.blocks, rank, count, where)
        size = whole.out_features // self.kv_heads
        first = rank * self.kv_heads // count * size
        return Cut(0, ((first, first + size),))

    def adapt(self, module: nn.Module, count: int, kept: Collection[str]) -> None:
        """Writes what this rank has into the module's own attributes, but for those that are `kept`."""
        mine, kv = self.heads // count, self.kv_parts(count)
        told = {
            **dict.fromkeys(_HEADS, (self.heads, mine)),
            **dict.fromkeys(_KV_HEADS, (self.kv_heads, kv)),
            **dict.fromkeys(_GROUPS, (self.heads // self.kv_heads, mine // kv)),
            **dict.fromkeys(_WIDTHS, (self.heads * self.size, mine * self.size)),
            **dict.fromkeys(_KV_WIDTHS, (self.kv_heads * self.size, kv * self.size)),
        }
        for attribute, (before, after) in told.items():
            if _number(module, attribute) == before and attribute not in kept:
                setattr(module, attribute, after)


def even_cut(total: int, blocks: int, rank: int, count: int, where: str, *, dim: int = 0) -> Cut:
    """A rank's part of `total` outputs, or inputs, that consist of so many `blocks`.

    Raises:
        StageLoadError: they do not divide, naming `where`.
    """
    if total % (blocks * count):
        of = f" in {blocks} blocks" if blocks > 1 else ""
        what = "inputs" if dim else "outputs"
        remedy = "choose another count, or the style whole"
        raise StageLoadError(f"module {where!r}: its {total} {what}{of} do not divide by {count} shards; {remedy}")
    block, part = total // blocks, total // blocks // count
    return Cut(dim, tuple((b * block + rank * part, b * block + (rank + 1) * part) for b in range(blocks)))


def heads_of(name: str, module: nn.Module, columns: Mapping[str, tuple[nn.Linear, int]]) -> Heads | None:
    """What a module whose children `columns` (each with its blocks) are cut says of heads; None if it has none.

    Raises:
        StageLoadError: what it says does not fit the sizes of its projections.
    """
    heads, size = _first(module, _HEADS), _first(module, _SIZES)
    if heads is None and size is None:
        return None
    widths = {child: linear.out_features // blocks for child, (linear, blocks) in columns.items()}
    keys = frozenset(child for child in widths if child in _KEYS)
    known = (*_KEYS, *_QUERIES)
    left = [c for c, m in module.named_children() if c in known and type(m) is nn.Linear and c not in widths]
    if left and widths.keys() & {*known}:
        what = f"module {name!r}: {', '.join(widths)} are cut and {', '.join(left)} not"
        raise StageLoadError(f"{what}; cut all of its projections, or none")
    query = next((c for c in widths if c in _QUERIES), next((c for c in widths if c not in keys), None))
    if query is None:
        return None  # keys and values alone, as where queries are left whole
    total = widths[query]
    if size is None or (heads is not None and heads * size != total):
        size = total // heads if heads and total % heads == 0 else 0
    heads = total // size if size and total % size == 0 else 0
    kv = _first(module, _KV_HEADS) or (min(widths[c] for c in keys) // size if keys and size else heads)
    if not size or not heads or not kv or heads % kv or any(widths[c] % kv for c in keys):
        sizes = ", ".join(f"{child} {width}" for child, width in widths.items())
        raise StageLoadError(
            f"module {name!r}: its projections ({sizes}) do not fit what it says of heads; leave them whole, or write "
            "the style divide for what its forward counts with"
        )
    queries = frozenset(c for c in widths if c not in keys and widths[c] == total)
    return Heads(name, heads, kv, size, keys, queries)


def _first(module: nn.Module, names: Collection[str]) -> int | None:
    return next((number for name in names if (number := _number(module, name))), None)


def _number(module: nn.Module, name: str) -> int | None:
    value = vars(module).get(name)
    return value if type(value) is int and value > 0 else None
