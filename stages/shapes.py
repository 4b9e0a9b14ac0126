"""A model that sees few shapes: rows are padded to buckets around its call, compiled code and graphs are per shape.

Promise: a forward calls it like the model, with any number of rows, and gets as many back. The model must compute each
row by itself, as a batch holds rows of strangers anyway, and take and return rows in the first dimension.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_flatten, tree_unflatten  # as torch.compile takes arguments apart

from torchrelay.errors import StageLoadError
from torchrelay.stages.graphs import PLAIN, Recording, can_record, record
from torchrelay.stages.warm_up import row_bucket

__all__ = ["ShapedModel", "allow_shapes"]

log = logging.getLogger("torchrelay.stages")
# Torch falls back to running uncompiled after eight shapes, which few row buckets of two sizes exceed.
_SHAPES = 512


def allow_shapes() -> None:
    """Lets one model be compiled for many shapes in this process."""
    config: Any = torch._dynamo.config
    # Before torch 2.7 the names were others, and the new one may stand for the old.
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), _SHAPES))


class ShapedModel:
    """Stands for a model: called like it, and its attributes are the model's.

    Args:
        model: the module, compiled or not.
        name: whose it is, for the log.
        row_buckets: the numbers of rows that calls are padded to, rising.
        graphs: whether calls are recorded as CUDA graphs while it warms up, and replayed from then on.
    """

    def __init__(
        self, model: Callable[..., Any], name: str, row_buckets: Sequence[int], *, graphs: bool = False
    ) -> None:
        self._model = model
        self._name = name
        self._row_buckets = row_buckets
        self._graphs = graphs
        # By shapes: the structure of the arguments, the call, and the structure of what it returns.
        self._recordings: dict[Any, tuple[Any, Recording, Any]] = {}
        self._pool: Any = None
        self._warming = False
        self._pads = True
        self._told: set[Any] = set()
        # Whether every shape that is expected was seen: another is then worth an error in the log.
        self.warm = False
        # How many rows the batch under way has: what is as long has its rows.
        self.batch_rows = 0

    def __getattr__(self, name: str) -> Any:
        if name == "_model":
            raise AttributeError(name)  # not there before __init__, as when a copy is made
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments."""
        leaves, spec = tree_flatten((args, kwargs))
        rows = self._rows(leaves) if self._pads else 0
        padded = row_bucket(rows, self._row_buckets) if rows else 0
        key = tuple(_key(leaf, rows, padded) for leaf in leaves)
        known = self._recordings.get(key) if self._recordings else None
        if known is not None and known[0] == spec:
            _, recording, returned = known
            return tree_unflatten([_first(leaf, padded, rows) for leaf in recording(leaves)], returned)
        full = [_grown(leaf, padded) if _has_rows(leaf, rows) else leaf for leaf in leaves] if rows else leaves
        outputs, returned = self._call(full, spec, key)
        if rows != padded and not all(isinstance(leaf, (torch.Tensor, *PLAIN)) for leaf in outputs):
            log.warning("%s: its model returns more than tensors, so its batches are not padded", self._name)
            self._pads = False
            return self(*args, **kwargs)
        if self._graphs:
            self._record(full, spec, key)
        return tree_unflatten([_first(leaf, padded, rows) for leaf in outputs], returned)

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Calls inside are recorded, if graphs are wanted."""
        self._warming = True
        try:
            yield
        finally:
            self._warming = False

    def _rows(self, leaves: Sequence[Any]) -> int:
        """Which length is that of the rows; 0 where that cannot be told."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(t.layout is torch.strided and not t.is_nested for t in tensors):
            return 0
        lengths = {t.shape[0] for t in tensors if t.ndim}
        if self.batch_rows in lengths:
            return self.batch_rows
        return lengths.pop() if len(lengths) == 1 else 0

    def _call(self, leaves: list[Any], spec: Any, key: Any) -> tuple[list[Any], Any]:
        compiled, started = counters["stats"]["unique_graphs"], time.monotonic()
        args, kwargs = tree_unflatten(leaves, spec)
        outputs = tree_flatten(self._model(*args, **kwargs))
        if counters["stats"]["unique_graphs"] != compiled:
            level, when = (logging.ERROR, "after warm-up") if self.warm else (logging.INFO, "at first use")
            seconds = time.monotonic() - started
            log.log(level, "%s: compiled %s for %s, in %.1f s", self._name, when, _told(key), seconds)
        return outputs

    def _record(self, leaves: list[Any], spec: Any, key: Any) -> None:
        if not self._warming or not can_record(leaves):
            if key not in self._told and len(self._told) < _SHAPES:
                self._told.add(key)
                log.warning("%s: runs without a CUDA graph for %s", self._name, _told(key))
            return
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inputs, spec)
        returned: Any = None

        def run() -> list[Any]:
            nonlocal returned
            outputs, returned = tree_flatten(self._model(*args, **kwargs))
            return outputs

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            outputs, replay = record(run, self._pool)
        except RuntimeError as error:
            raise StageLoadError(
                f"{self._name}: its model cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); it may "
                "read a value back from the device; take torch: {cuda_graphs} out, or change the model"
            ) from error
        if not can_record(outputs):
            raise StageLoadError(
                f"{self._name}: its model returns more than tensors of its device, which a CUDA graph cannot; take "
                "torch: {cuda_graphs} out"
            )
        self._recordings[key] = spec, Recording(inputs, outputs, replay), returned


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


def _grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Its rows, and its last one repeated: values that the model knows. Dense, as the strides are part of the shape."""
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    channels_last = channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # Compiled code is also for either tensors that were made in inference mode, as padded ones are, or others.
    if rows == len(tensor) and tensor.is_inference() == torch.is_inference_mode_enabled():
        return tensor.contiguous(memory_format=layout)
    grown = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device, memory_format=layout)
    grown[: len(tensor)] = tensor
    grown[len(tensor) :] = tensor[-1:]
    return grown


def _first(leaf: Any, padded: int, rows: int) -> Any:
    return leaf[:rows] if rows != padded and _has_rows(leaf, padded) else leaf


def _key(leaf: Any, rows: int, padded: int) -> Any:
    """What code is compiled for."""
    if isinstance(leaf, torch.Tensor):
        shape = (padded, *leaf.shape[1:]) if rows and _has_rows(leaf, rows) else tuple(leaf.shape)
        return shape, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, PLAIN) else type(leaf)


def _told(key: Sequence[Any]) -> str:
    tensors = [k for k in key if isinstance(k, tuple) and isinstance(k[0], tuple)]
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype, _ in tensors) or "no tensors"
