"""Layers of which each rank of a process group owns a part, and computes with it as with the whole.

Plain local layers and one collective each, without DTensor: its dispatch costs each operation some tens of microseconds
on the CPU, and what is cut here are matrices whose neighbours need not know. The scheme is Megatron's
(https://arxiv.org/abs/1909.08053): a Linear by columns, what is computed of each element, a Linear by rows, a sum.

Their parameters are made on the meta device: what they own is filled in later.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from torchrelay.stages.cuts import Cut

__all__ = ["ColumnLinear", "Ranks", "RowLinear", "VocabEmbedding"]

# Torch 2.13 calls it otherwise.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """This process's place in its group, and what the group does together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._name: str = group.group_name

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, which may be written over."""
        if torch.compiler.is_compiling():
            ops = torch.ops._c10d_functional
            return cast(torch.Tensor, ops.wait_tensor(ops.all_reduce(part, "sum", self._name)))
        dist.all_reduce(part, group=self.group)
        return part

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' parts, `[count, *part.shape]`."""
        part = part.contiguous()
        if torch.compiler.is_compiling():
            ops = torch.ops._c10d_functional
            flat = part.reshape(-1)
            whole = ops.wait_tensor(ops.all_gather_into_tensor(flat, self.count, self._name))
            return cast(torch.Tensor, whole.view(self.count, *part.shape))
        found = part.new_empty((self.count * part.numel(),))
        _all_gather(found, part.view(-1), group=self.group)
        return found.view(self.count, *part.shape)


class _Part(nn.Module):
    """`cuts` says which part of the whole layer's parameters it owns."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, ranks: Ranks, cuts: dict[str, Cut]) -> None:
        super().__init__()
        self.ranks = ranks
        self.cuts = cuts

    def _own(self, name: str, whole: torch.Tensor | None) -> None:
        part = None
        if whole is not None:
            cut = self.cuts.get(name)
            shape = whole.shape if cut is None else cut.shape(whole.shape)
            part = nn.Parameter(torch.empty(shape, dtype=whole.dtype, device="meta"), requires_grad=False)
        self.register_parameter(name, part)


class ColumnLinear(_Part):
    """A Linear cut by its outputs. It takes the whole input, and returns its own outputs; with `gather` all of them.

    Args:
        blocks: of how many parts, each cut by itself, the outputs consist; matters to `gather` alone.
    """

    def __init__(self, whole: nn.Linear, ranks: Ranks, cut: Cut, *, gather: bool = False, blocks: int = 1) -> None:
        super().__init__(ranks, {"weight": cut, "bias": cut})
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.gather, self.blocks = gather, blocks
        self._own("weight", whole.weight)
        self._own("bias", whole.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = functional.linear(x, self.weight, self.bias)
        if not self.gather:
            return part
        found = self.ranks.gather(part)
        found = found.view(*found.shape[:-1], self.blocks, -1)  # [rank, ..., block, own]
        whole = found.movedim(0, -2).flatten(-3)
        return whole if whole.shape[-1] == self.out_features else whole[..., : self.out_features]


class RowLinear(_Part):
    """A Linear cut by its inputs. It takes its part of the input, or the whole, and returns the whole output.

    Rank 0 alone has the bias, so that the sum has it once.
    """

    def __init__(self, whole: nn.Linear, ranks: Ranks, cut: Cut) -> None:
        super().__init__(ranks, {"weight": cut})
        self.in_features, self.out_features = whole.in_features, whole.out_features
        (self.first, self.last), *_ = cut.ranges
        self._own("weight", whole.weight)
        self._own("bias", whole.bias if ranks.rank == 0 else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = x[..., self.first : self.last] if x.shape[-1] == self.in_features else x
        return self.ranks.sum(functional.linear(part, self.weight, self.bias))


class VocabEmbedding(_Part):
    """An Embedding cut by its vocabulary: each rank looks up what it owns, and the others add zeros."""

    def __init__(self, whole: nn.Embedding, ranks: Ranks, cut: Cut) -> None:
        super().__init__(ranks, {"weight": cut})
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.padding_idx = whole.padding_idx
        (self.first, self.last), *_ = cut.ranges
        self._own("weight", whole.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Where this can be seen without waiting for a device, all ranks refuse together, and none waits for another.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.num_embeddings:
                wrong = int(low if low < 0 else high)
                raise IndexError(f"index {wrong} is out of range for {self.num_embeddings} embeddings")
        own = ids - self.first
        others = own >= self.last - self.first
        # Ids that are nobody's are left to the first and last rank, whose lookup then fails like the whole layer's.
        if self.last == self.num_embeddings:
            others = own < 0
        elif self.first > 0:
            others = others | (own < 0)
        found = functional.embedding(own.masked_fill(others, 0), self.weight[: self.last - self.first])
        return self.ranks.sum(found.masked_fill(others.unsqueeze(-1), 0))
