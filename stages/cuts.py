"""Which part of a tensor a process owns, of a model that several have together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchrelay.errors import ConfigError

__all__ = ["NOTHING", "Cut", "check_whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a tensor: along dimension `dim` the `ranges` of [start, stop), one behind the other; then zeros up to
    `size` (None: no zeros). `whole` is how long the dimension is in the whole tensor, where that is to be checked."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    size: int | None = None
    whole: int | None = None

    @property
    def taken(self) -> int:
        """How many of the tensor's own are in it, along `dim`."""
        return sum(stop - start for start, stop in self.ranges)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape, of a tensor of this shape."""
        part = list(whole)
        part[self.dim] = self.taken if self.size is None else self.size
        return tuple(part)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part, of a tensor that is there: memory of its own."""
        part = whole.new_zeros(self.shape(whole.shape))
        at = 0
        for start, stop in self.ranges:
            part.narrow(self.dim, at, stop - start).copy_(whole.narrow(self.dim, start, stop - start))
            at += stop - start
        return part


NOTHING = Cut(0, ())
"""Of a tensor that the process does not have at all."""


def check_whole(name: str, cut: Cut, shape: Sequence[int]) -> None:
    """Raises ConfigError for a shape that is not that of the whole model's tensor."""
    if cut.whole is not None and (cut.dim >= len(shape) or shape[cut.dim] != cut.whole):
        raise ConfigError(
            f"{name!r} has shape {list(shape)}, and the whole model's has {cut.whole} in dimension {cut.dim}; "
            "give the weights of the model before it was cut"
        )
