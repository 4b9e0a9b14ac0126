"""How long each operation of a traced model takes on a device, with weights of no meaning.

Promise: no more weights are on the device at a time than one operation takes, and results live no longer than they are
needed, so that a model is measured where it does not fit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from torchrelay.stages.splitting.tracing import Traced

__all__ = ["made_up", "seconds_of"]

_PASSES = 4
_ENOUGH_S = 20.0


def seconds_of(traced: Traced, tensors: Sequence[torch.Tensor], device: torch.device) -> np.ndarray:
    """Seconds of each of `traced.nodes` for a call with these tensors: the least of a few passes, the first of which
    does not count."""
    took: list[np.ndarray] = []
    began = time.monotonic()
    with torch.inference_mode():
        for number in range(_PASSES):
            seconds = _Pass(traced, device).run(tensors)
            if number or time.monotonic() - began > _ENOUGH_S:
                took.append(seconds)
            if time.monotonic() - began > _ENOUGH_S:
                break
    least: np.ndarray = np.min(took, axis=0)
    return least


def made_up(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of this shape and dtype with small values that are no trouble to any operation."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    return torch.full(like.shape, 0.01, dtype=like.dtype, device=device)


class _Pass:
    """The whole graph once."""

    def __init__(self, traced: Traced, device: torch.device) -> None:
        self._traced, self._device = traced, device
        self._clock = _DeviceClock(device) if device.type == "cuda" else _Clock()
        self._left: dict[fx.Node, int] = {}
        for node in traced.nodes:
            for other in node.all_input_nodes:
                self._left[other] = self._left.get(other, 0) + 1

    def run(self, tensors: Sequence[torch.Tensor]) -> np.ndarray:
        traced = self._traced
        values: dict[fx.Node, Any] = dict(zip(traced.inputs, tensors, strict=True))
        for node in traced.nodes:
            for other in node.all_input_nodes:
                if other not in values:
                    values[other] = self._of_model(other)
            self._clock.start()
            values[node] = self._value(node, values)
            self._clock.stop()
            for other in node.all_input_nodes:
                self._left[other] -= 1
                # What the model owns is made anew where it is needed again.
                if not self._left[other] or other in traced.names:
                    del values[other]
            if not self._left.get(node):
                del values[node]
        return self._clock.seconds()

    def _of_model(self, node: fx.Node) -> torch.Tensor:
        constant = self._traced.constants.get(node)
        if constant is None:
            return made_up(node.meta["val"], self._device)
        return constant.to(self._device) if node.meta["val"].device.type == "meta" else constant

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            found: Any = self._traced.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        place = fx.node.map_aggregate
        args = place(fx.map_arg(node.args, values.__getitem__), self._placed)
        kwargs = place(fx.map_arg(node.kwargs, values.__getitem__), self._placed)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _placed(self, value: Any) -> Any:
        return self._device if isinstance(value, torch.device) and value.type == "meta" else value


class _Clock:
    def __init__(self) -> None:
        self._took: list[float] = []

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._took.append(time.perf_counter() - self._began)

    def seconds(self) -> np.ndarray:
        return np.array(self._took)


class _DeviceClock:
    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.current_stream(device)
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._events.append((self._event(), None))

    def stop(self) -> None:
        self._events[-1] = self._events[-1][0], self._event()

    def seconds(self) -> np.ndarray:
        self._stream.synchronize()
        return np.array([began.elapsed_time(ended) / 1000.0 for began, ended in self._events])

    def _event(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # so in its stubs
        event.record(self._stream)
        return event
