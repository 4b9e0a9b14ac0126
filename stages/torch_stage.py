"""A stage whose model is a torch module: build, weights, device, eval and the YAML's `torch:` options.

Promise: weights are read without running code from them, and either all of them fit or the stage does not load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrelay.config.shard_plans import Plan, check_plan
from torchrelay.errors import ConfigError, DeviceError, StageLoadError
from torchrelay.stages.batch import Batch
from torchrelay.stages.building import parameters_on_meta
from torchrelay.stages.cut_pieces import pieces_of
from torchrelay.stages.outputs import Expand
from torchrelay.stages.shapes import ShapedModel, allow_shapes
from torchrelay.stages.stage import Stage, StageContext
from torchrelay.stages.weights import fill_model, read_weights

__all__ = ["TorchOptions", "TorchStage"]

log = logging.getLogger("torchrelay.stages")
_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """A stage's `torch:` entry: `dtype` of the model's floating parameters (None: as built), and what to apply.

    `compile` and `cuda_graphs` pad batches to `row_buckets`, rising.
    """

    dtype: str | None = None
    compile: bool = False
    channels_last: bool = False
    cuda_graphs: bool = False
    row_buckets: tuple[int, ...] = (32,)


class TorchStage(Stage):
    """Derive from it, define `build` and `forward`; `self.model` and `self.device` are there in `forward`.

    `forward` runs under `torch.inference_mode`, and its batch holds private writable tensors on `self.device`. They are
    its own until it returns: on a GPU their memory is then used again.
    Floating tensors are not cast for you: with `torch: {dtype: float16}` call `batch["x"].to(self.dtype)`. With
    `compile` or `cuda_graphs`, a call of `self.model` pads the rows of what it is given, and cuts what it returns.
    """

    # True lets tensors on the CPU be the jobs' own memory, uncopied: `forward` must then not write to them.
    share: bool = False
    model: Any
    device: torch.device = torch.device("cpu")
    # What `torch: {dtype}` says; None if it says nothing.
    dtype: torch.dtype | None = None
    on_host: frozenset[str] = frozenset()
    _takes_tensors = True
    _options: TorchOptions = TorchOptions()
    _weights: str | None = None
    _plan: Plan = None
    _instead: Callable[[], Any] | None = None

    def configure(self, options: TorchOptions, weights: str | None, plan: Plan = None) -> None:
        """Take the YAML's `torch:` options, `weights:` path and `shards: {plan}`; called once, before `load`.

        Raises:
            ConfigError: the dtype is none that a model can have, or the plan is none.
        """
        try:
            check_plan(plan)
        except ValueError as error:
            raise ConfigError(f"shards.plan: {error}") from error
        self._plan = plan
        if options.dtype is not None and options.dtype not in _FLOATS:
            raise ConfigError(f"torch.dtype {options.dtype!r} must be one of {', '.join(_FLOATS)}")
        self._options = options
        self._weights = weights
        self.dtype = None if options.dtype is None else _FLOATS[options.dtype]

    def build(self, context: StageContext) -> nn.Module:
        """Return the module. With `weights:` it is built on the meta device, so that nothing is initialised twice."""
        raise NotImplementedError(f"{type(self).__qualname__} must define build(self, context)")

    def load(self, context: StageContext) -> None:
        """Build the model, fill in its weights and bring it to the device; see the class. In a process group, this
        rank's part of it.

        Raises:
            StageLoadError: the weights or the plan do not fit, or `build` returned no module.
            DeviceError: the device is not there.
        """
        self.device = _device(context.device)
        if self._instead is not None:
            self.model = self._instead()
            return
        if context.world_size > 1 and self._plan != "own":
            model = self._load_part(context)
        elif self._weights is None:
            model = self.built(context)
        else:
            model = self._build_with(self._weights, context)
        model = model.to(self.device).eval().requires_grad_(False)
        if self.dtype is not None:
            model = model.to(dtype=self.dtype)
        if self._options.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        self.model = self._shaped(model)

    def load_instead(self, model: Callable[[], Any]) -> None:
        """`load` takes what this makes as the model: the stage has only a part of it here."""
        self._instead = model

    @property
    def options(self) -> TorchOptions:
        """The YAML's `torch:` options."""
        return self._options

    def weights_path(self, context: StageContext) -> Path | None:
        """The file of `weights:`; None without."""
        return None if self._weights is None else context.path(self._weights)

    @property
    def shaped(self) -> ShapedModel | None:
        """The model, if it is compiled or recorded for each shape."""
        model = getattr(self, "model", None)
        return model if isinstance(model, ShapedModel) else None

    def tensors(self, batch: Batch, device: str) -> Batch:
        """The batch's arrays as tensors on `device`, made as compiled code expects them: in inference mode."""
        with torch.inference_mode():
            return batch.to_torch(device, share=self.share)

    def infer(self, batch: Batch) -> Mapping[str, Any] | Expand:
        """`forward` as the runner calls it: without gradients, on a batch of tensors."""
        if self.shaped is not None:
            self.shaped.batch_rows = len(batch)
        with torch.inference_mode():
            return self.forward(batch)

    def close(self) -> None:
        """Drop the model, so that its memory can be used again."""
        self.model = None

    def _shaped(self, model: nn.Module) -> Any:
        options, who = self._options, type(self).__qualname__
        graphs = options.cuda_graphs and self.device.type == "cuda"
        if options.cuda_graphs and not graphs:
            log.info("%s runs on %s, where cuda_graphs does nothing", who, self.device)
        if options.compile:
            allow_shapes()
            return ShapedModel(torch.compile(model, dynamic=False), who, options.row_buckets, graphs=graphs)
        return ShapedModel(model, who, options.row_buckets, graphs=True) if graphs else model

    def built(self, context: StageContext) -> nn.Module:
        """What `build` returns; raises StageLoadError for anything but a module."""
        model = self.build(context)
        if not isinstance(model, nn.Module):
            raise StageLoadError(f"{type(self).__qualname__}.build returned a {type(model).__name__}, not an nn.Module")
        return model

    def _load_part(self, context: StageContext) -> nn.Module:
        from torchrelay.stages.tensor_parallel import Wanted, load_parallel

        if self._options.cuda_graphs:
            # A recording runs the model several times, which the other ranks would have to do at the same moment.
            raise StageLoadError(
                "torch.cuda_graphs does not go with shards of mode: tensor; take it out, or use compile"
            )
        wanted = Wanted(self._plan, self.weights_path(context), self.device, self.dtype)
        return load_parallel(lambda: self.built(context), wanted)

    def _build_with(self, weights: str, context: StageContext) -> nn.Module:
        try:
            with torch.device("meta"):
                model = self.built(context)
        except (NotImplementedError, RuntimeError) as error:
            # Some modules compute with their tensors while they are built, which meta tensors cannot do.
            log.info("%s is built on the CPU, since the meta device refused: %s", type(self).__qualname__, error)
            model = self.built(context)
        # Of layers that were cut for shards, only this shard's parts.
        state = read_weights(context.path(weights), self.device, pieces_of(model))
        left = fill_model(model, state, weights, self.dtype)
        if left:
            # Buffers that are not saved (persistent=False) get their values only from a real build.
            with parameters_on_meta():
                model = self.built(context)
            left = fill_model(model, state, weights, self.dtype)
        if left:
            # They are computed of parameters.
            log.info("%s is built on the CPU for its unsaved buffers %s", type(self).__qualname__, ", ".join(left))
            model = self.built(context)
            fill_model(model, state, weights, self.dtype)
        return model


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} is unknown: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise DeviceError(f"device {name!r} is not there: torch sees {count} GPUs; use another, or --device cpu")
        # Streams and allocations of this thread then belong to the right GPU.
        torch.cuda.set_device(device)
    return device
