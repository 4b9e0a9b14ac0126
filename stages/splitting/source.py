"""The model that is split, as every part has it: its modules without values, and a way to the values of each tensor.

Promise: with `weights`, of the file no more is read than what is asked for. Without, the stage's `build` makes all of
the model, also in a worker that owns a part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchrelay.errors import StageLoadError
from torchrelay.stages.building import parameters_on_meta
from torchrelay.stages.slices import Weights, open_weights
from torchrelay.stages.stage import StageContext
from torchrelay.stages.weights import check_names, tied_names

if TYPE_CHECKING:
    from torchrelay.stages.torch_stage import TorchStage

__all__ = ["Source", "own_tensors"]

log = logging.getLogger("torchrelay.stages")


class Source:
    """A model on the meta device, and the values of its tensors by name.

    Args:
        model: the module; its tensors are moved to the meta device.
        weights: the open file with what is saved of it; None where the module's own values count.
    """

    def __init__(self, model: nn.Module, weights: Weights | None = None) -> None:
        self.model = model
        self._weights = weights
        self._names: dict[str, str] = {}
        saved = model.state_dict(keep_vars=True)
        if weights is not None:
            found = {name: weights.shape(name) for name in weights.names()}
            own = {name: tuple(tensor.shape) for name, tensor in saved.items()}
            self._names = check_names(own, tied_names(saved), found, str(weights.path))
        # What is never saved has its values only here.
        self._values = {n: t.detach() for n, t in own_tensors(model) if n not in self._names and not t.is_meta}
        lost = [name for name, tensor in own_tensors(model) if tensor.is_meta and name not in self._names]
        if lost:
            raise StageLoadError(
                f"{', '.join(lost[:8])} of the model are computed of parameters; save them, or split by hand"
            )
        _to_meta(model)
        self._like = dict(own_tensors(model))

    @classmethod
    def of(cls, stage: TorchStage, context: StageContext) -> Source:
        """The model that a stage builds, in its `torch: {dtype}`. Raises StageLoadError where it or its weights are
        not to be had."""
        path = stage.weights_path(context)
        if path is None:
            return cls(_typed(stage.built(context), stage.dtype))
        try:
            with parameters_on_meta():
                model = stage.built(context)
        except (NotImplementedError, RuntimeError) as error:
            log.info("the model is built on the CPU, since the meta device refused: %s", error)
            model = stage.built(context)
        if any(t.is_meta for n, t in model.named_buffers() if n not in model.state_dict()):
            log.info("the model is built on the CPU for its unsaved buffers")
            model = stage.built(context)
        return cls(_typed(model, stage.dtype), open_weights(Path(path)))

    def names(self) -> list[str]:
        """Of all its tensors."""
        return list(self._like)

    def others(self) -> list[str]:
        """Of those that are no parameters, and whose values are in no file."""
        return [n for n, like in self._like.items() if n in self._values and not isinstance(like, nn.Parameter)]

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """The values of a tensor of the model, on a device, in the model's type; memory of their own."""
        like = self._like[name]
        if self._weights is not None and name in self._names:
            return self._weights.read(self._names[name], device=device, dtype=like.dtype)
        return self._values[name].to(device, copy=True)

    def parameters(self, names: set[str]) -> tuple[int, int]:
        """How many numbers the parameters among these have, and how many bytes all of these."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        once = {id(self._like[name]): (name, self._like[name]) for name in names}
        numbers = sum(t.numel() for name, t in once.values() if name in parameters)
        return numbers, sum(t.numel() * t.element_size() for _, t in once.values())

    def close(self) -> None:
        """Lets go of the file, and of values that nobody asked for."""
        if self._weights is not None:
            self._weights.close()
        self._values.clear()


def own_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes, each under all its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


def _typed(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    model = model.eval().requires_grad_(False)
    return model if dtype is None else model.to(dtype=dtype)


def _to_meta(model: nn.Module) -> None:
    model.to("meta")
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to("meta"))
