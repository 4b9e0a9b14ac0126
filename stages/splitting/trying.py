"""Tries a model that does not trace by calling it: in which order its modules are called, how long each module of the
chain takes, and what it is called with.

Promise: of its weights no more is on the device than the modules that are being called own themselves; what they hold
means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from torchrelay.errors import StageLoadError
from torchrelay.stages.splitting.measuring import made_up
from torchrelay.stages.splitting.modules import Chain, Form

__all__ = ["Tried", "try_model"]

_PASSES = 3


@dataclass
class Tried:
    """What was seen. `seconds` of each module of the chain, with what is before it in the first, and what is behind in
    the last; `row_bytes` of what each is called with; `returned` by the model; the others as in `Form`."""

    seconds: list[float] = field(default_factory=list)
    row_bytes: list[int] = field(default_factory=list)
    tuples: list[int] = field(default_factory=list)
    leaves: list[tuple[int, ...]] = field(default_factory=list)
    behind: set[str] = field(default_factory=set)
    returned: Any = None

    @property
    def form(self) -> Form:
        """How the modules are called."""
        return Form(tuple(self.tuples), tuple(self.leaves), frozenset(self.behind))


def try_model(
    model: nn.Module, chain: Chain, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, device: torch.device
) -> Tried:
    """Calls a model whose tensors are on the meta device, a few times.

    Raises StageLoadError where it cannot be called so, or does not call the chain's modules one behind the other.
    """
    best: Tried | None = None
    for _ in range(_PASSES):
        tried = _Trial(model, chain, rows, device).run(args, kwargs)
        if best is not None:
            tried.seconds = [min(a, b) for a, b in zip(tried.seconds, best.seconds, strict=True)]
        best = tried
    assert best is not None  # there is more than one pass
    return best


class _Trial:
    def __init__(self, model: nn.Module, chain: Chain, rows: int, device: torch.device) -> None:
        self._model, self._chain, self._rows, self._device = model, chain, rows, device
        self._found = Tried()
        self._at: dict[str, float] = {}
        self._before: set[str] = set()
        self._started: list[str] = []
        self._put_back: list[tuple[dict[str, Any], str, Any]] = []

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tried:
        hooks = []
        for name, module in self._model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._left(name), always_call=True))
        try:
            with torch.inference_mode():
                began = self._now()
                self._found.returned = self._model(*args, **kwargs)
                ended = self._now()
        except StageLoadError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise StageLoadError(
                f"its model raised when it was tried with weights of no meaning: {text:.200}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for holder, leaf, tensor in reversed(self._put_back):
                holder[leaf] = tensor
        names = self._chain.names
        if self._started != names:
            raise StageLoadError(
                f"the modules of {self._chain.path or 'the model'} are not called one behind the other, each once; "
                "split the stage by hand, or use mode: gather or tensor"
            )
        starts = [began, *(self._at[name] for name in names[1:]), ended]
        self._found.seconds = [b - a for a, b in pairwise(starts)]
        return self._found

    def _entered(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in self._chain.names:
                if name in self._started:
                    raise StageLoadError(f"module {name!r} is called more than once, and a chain's only once")
                self._started.append(name)
                leaves = dict(enumerate(tree_flatten((args, kwargs))[0]))
                with_rows = {i: t for i, t in leaves.items() if self._has_rows(t)}
                self._found.leaves.append(tuple(with_rows))
                self._found.row_bytes.append(sum(t[:1].numel() * t.element_size() for t in with_rows.values()))
            self._note(name)
            self._fill(module)
            if name in self._chain.names:
                self._at[name] = self._now()

        return hook

    def _left(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del args
            self._empty(module)
            if name in self._chain.names and output is not None:
                self._found.tuples.append(_tuple_of(name, output))

        return hook

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == self._rows

    def _note(self, name: str) -> None:
        inside = any(name == n or name.startswith(f"{n}.") for n in self._chain.names)
        if inside:
            return
        if len(self._started) < len(self._chain.names):
            self._before.add(name)
            self._found.behind.discard(name)
        elif name not in self._before:
            self._found.behind.add(name)

    def _fill(self, module: nn.Module) -> None:
        """Gives what it owns values. One of torch's own takes its children's weights without calling them."""
        whole = type(module).__module__.startswith("torch.nn") and not isinstance(
            module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        )
        for inner in module.modules() if whole else [module]:
            holders: list[dict[str, Any]] = [inner._parameters, inner._buffers]
            for holder in holders:
                for leaf, tensor in holder.items():
                    if tensor is not None and tensor.is_meta:
                        self._put_back.append((holder, leaf, tensor))
                        made = made_up(tensor, self._device)
                        holder[leaf] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made

    def _empty(self, module: nn.Module) -> None:
        mine = {id(holder) for inner in module.modules() for holder in (inner._parameters, inner._buffers)}
        kept = []
        for holder, leaf, tensor in self._put_back:
            if id(holder) in mine:
                holder[leaf] = tensor
            else:
                kept.append((holder, leaf, tensor))
        self._put_back = kept

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _tuple_of(name: str, output: Any) -> int:
    if isinstance(output, torch.Tensor):
        return 0
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return len(output)
    raise StageLoadError(
        f"module {name!r} returns a {type(output).__name__}, and parts need modules that return a tensor, or a tuple "
        "that begins with one"
    )
