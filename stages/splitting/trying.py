"""Tries a model that does not trace by calling it: in which order its modules are called, how long each module of the
chain takes, what it is called with, and whether the code around them keeps what they return.

Promise: of its weights no more is on the device than the modules that are being called own themselves; what they hold
means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from torchrelay.errors import StageLoadError
from torchrelay.stages.splitting.measuring import made_up
from torchrelay.stages.splitting.modules import Chain, Form, cut_before
from torchrelay.stages.splitting.source import own_tensors

__all__ = ["ModelCall", "Tried", "keeps_nothing", "try_model"]

_PASSES = 3
ModelCall = tuple[int, tuple[Any, ...], Mapping[str, Any]]
"""How many rows a batch has, and what the model is called with for it."""


@dataclass
class Tried:
    """What was seen. `seconds` of each module of the chain, with what is before it in the first, and what is behind in
    the last; `arguments` which of its arguments have the batch's rows first, and their bytes per row; `returned` by the
    model; the others as in `Form`."""

    seconds: list[float] = field(default_factory=list)
    arguments: list[dict[int, int]] = field(default_factory=list)
    tuples: list[int] = field(default_factory=list)
    behind: set[str] = field(default_factory=set)
    returned: Any = None

    @property
    def row_bytes(self) -> list[int]:
        """Of what each module is called with."""
        return [sum(found.values()) for found in self.arguments]

    @property
    def form(self) -> Form:
        """How the modules are called."""
        return Form(tuple(self.tuples), tuple(map(tuple, self.arguments)), frozenset(self.behind))


def try_model(model: nn.Module, chain: Chain, calls: Sequence[ModelCall], device: torch.device) -> Tried:
    """Calls a model whose tensors are on the meta device, a few times.

    Args:
        calls: that differ in their rows alone: what is as long in one of them by chance is not in all. The first one is
            measured.

    Raises StageLoadError where it cannot be called so, or does not call the chain's modules one behind the other.
    """
    tried = [_Trial(model, chain, call[0], device).run(call) for call in [calls[0]] * _PASSES + list(calls[1:])]
    best = tried[_PASSES - 1]
    best.seconds = [min(times) for times in zip(*(t.seconds for t in tried[:_PASSES]), strict=True)]
    best.arguments = [
        {leaf: size for leaf, size in mine.items() if all(leaf in other for other in others)}
        for mine, *others in zip(best.arguments, *(t.arguments for t in tried[_PASSES:]), strict=True)
    ]
    return best


def keeps_nothing(model: nn.Module, chain: Chain, form: Form, cut: int, call: ModelCall, device: torch.device) -> bool:
    """Whether the code around the chain needs of the modules before this cut only what it passes on across the cut.

    It is run as a later part runs it, with values of no meaning in place of what those modules returned.
    """
    came: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = tree_flatten((args, kwargs))[0]
        came.extend(leaves[number].clone() for number in form.leaves[cut])

    kept = [(tensor, tensor.clone()) for _, tensor in own_tensors(model) if not tensor.is_meta]
    whole = _called(model, call, device, {chain.names[cut]: note})
    for tensor, before in kept:
        tensor.copy_(before)  # the model may change its own buffers
    with cut_before(model, chain, cut, form, came):
        try:
            part = _called(model, call, device, {})
        except Exception:  # of code that got what it did not expect
            return False
    return len(whole) == len(part) and all(map(_alike, whole, part))


def _called(model: nn.Module, call: ModelCall, device: torch.device, notes: Mapping[str, Any]) -> list[Any]:
    """The leaves of what a model on the meta device returns, with made-up weights."""
    _, args, kwargs = call
    weights = _Weights(device)
    with weights.filled(model):
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name, note in notes.items()
        ]
        try:
            with torch.inference_mode():
                return tree_flatten(model(*args, **kwargs))[0]
        finally:
            for hook in hooks:
                hook.remove()


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one.to(torch.complex128), other.to(torch.complex128), rtol=1e-3, atol=1e-6, equal_nan=True)


class _Weights:
    """Gives modules values while they are called; what they own otherwise is on the meta device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._put_back: list[tuple[dict[str, Any], str, Any]] = []

    @contextmanager
    def filled(self, model: nn.Module) -> Iterator[None]:
        hooks = []
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(lambda module, args: self.fill(module)))
            hooks.append(
                module.register_forward_hook(lambda module, args, output: self.empty(module), always_call=True)
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.close()

    def fill(self, module: nn.Module) -> None:
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

    def empty(self, module: nn.Module) -> None:
        """Takes from a module what it was given, and from those inside it."""
        mine = {id(holder) for inner in module.modules() for holder in (inner._parameters, inner._buffers)}
        kept = []
        for holder, leaf, tensor in self._put_back:
            if id(holder) in mine:
                holder[leaf] = tensor
            else:
                kept.append((holder, leaf, tensor))
        self._put_back = kept

    def close(self) -> None:
        """Takes it from all."""
        for holder, leaf, tensor in reversed(self._put_back):
            holder[leaf] = tensor
        self._put_back.clear()


class _Trial:
    def __init__(self, model: nn.Module, chain: Chain, rows: int, device: torch.device) -> None:
        self._model, self._chain, self._rows, self._device = model, chain, rows, device
        self._found = Tried()
        self._at: dict[str, float] = {}
        self._before: set[str] = set()
        self._started: list[str] = []
        self._weights = _Weights(device)

    def run(self, call: ModelCall) -> Tried:
        _, args, kwargs = call
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
            self._weights.close()
        names = self._chain.names
        if self._started != names:
            raise StageLoadError(
                f"the modules of {self._chain.path or 'the model'} are not called one behind the other, each once; "
                "split the stage by hand, or use mode: gather or tensor"
            )
        if len(self._found.tuples) != len(names):
            raise StageLoadError(
                f"a module of {self._chain.path or 'the model'} returns nothing, and parts need a tensor"
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
                self._found.arguments.append(
                    {i: t[:1].numel() * t.element_size() for i, t in leaves.items() if self._has_rows(t)}
                )
            self._note(name)
            self._weights.fill(module)
            if name in self._chain.names:
                self._at[name] = self._now()

        return hook

    def _left(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del args
            self._weights.empty(module)
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
