"""A model that does not trace, cut between the modules of a chain: an `nn.Sequential`, or an `nn.ModuleList` whose
modules its code calls one behind the other.

The code around the chain is the model's own and runs in every part: with stand-ins for the modules of other parts, up
to the call of the first module of the next part. So what comes before the chain is computed in each part, on the call's
own arguments, and its weights are in each; what comes behind it only in the last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchrelay.errors import StageLoadError
from torchrelay.stages.splitting.calls import Call, Reached
from torchrelay.stages.splitting.crossing import Crossing
from torchrelay.stages.splitting.source import own_tensors
from torchrelay.stages.weights import set_tensor

__all__ = ["Chain", "Form", "ModulePiece", "cut_before", "find_chain"]


class Chain:
    """A chain in a model: its path, and the names of its modules in order."""

    def __init__(self, path: str, children: Sequence[str]) -> None:
        self.path = path
        self.names = [f"{path}.{child}".lstrip(".") for child in children]

    @property
    def digest(self) -> str:
        """Of what is cut."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]

    def owned(self, model: nn.Module, start: int, stop: int, form: Form) -> set[str]:
        """The names of the model's tensors that a part with these modules needs."""
        mine, last = self.names[start:stop], stop == len(self.names)

        def needed(name: str) -> bool:
            if _inside(name, self.names):
                return _inside(name, mine)
            return last or name.rpartition(".")[0] not in form.behind

        return {name for name, _ in own_tensors(model) if needed(name)}


def find_chain(model: nn.Module, count: int) -> Chain | None:
    """The chain with the most parameters that has so many modules; the outermost where one is in another."""
    best, most = None, 0
    for path, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) >= count:
            size = sum(p.numel() for p in module.parameters()) + 1
            if size > most:
                best, most = Chain(path, [name for name, _ in module.named_children()]), size
    return best


@dataclass(frozen=True, slots=True)
class Form:
    """How a chain's modules are called, as a trial showed it.

    Args:
        tuples: of each module, of how many a tuple it returns that begins with a tensor; 0 for a tensor alone.
        leaves: of each module, which of its arguments are tensors that have the batch's rows first.
        behind: modules that are called behind the chain alone.
    """

    tuples: tuple[int, ...]
    leaves: tuple[tuple[int, ...], ...]
    behind: frozenset[str]


class _Skipped(nn.Module):
    """A module of an earlier part: what it returned lies in what came, and only its form is needed here."""

    def __init__(self, tuple_of: int) -> None:
        super().__init__()
        self._tuple_of = tuple_of

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor))
        return (first, *[None] * (self._tuple_of - 1)) if self._tuple_of else first


class _Entry(nn.Module):
    """The first module of a part, called with what came instead of what the skipped ones returned."""

    def __init__(self, module: nn.Module, leaves: Sequence[int]) -> None:
        super().__init__()
        self.inner = module
        self._leaves = leaves
        self.came: Sequence[torch.Tensor] = ()

    @property
    def count(self) -> int:
        """Of the tensors that come."""
        return len(self._leaves)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        for number, tensor in zip(self._leaves, self.came, strict=True):
            leaves[number] = tensor
        args, kwargs = tree_unflatten(leaves, spec)
        return self.inner(*args, **kwargs)


class _Exit(nn.Module):
    """The first module of the next part: what it is called with goes there."""

    def __init__(self, leaves: Sequence[int]) -> None:
        super().__init__()
        self._leaves = leaves

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_flatten((args, kwargs))[0]
        raise Reached([leaves[number] for number in self._leaves])


class _Unknown(_Skipped):
    """A skipped module that returns values which say nothing of what it would have returned."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        returned = super().forward(*args, **kwargs)
        first = returned[0] if isinstance(returned, tuple) else returned
        # No two values alike, since a norm takes what all have in common away.
        values = torch.linspace(-7, 7, first.numel(), device=first.device).reshape(first.shape).to(first.dtype)
        return (values, *returned[1:]) if isinstance(returned, tuple) else values


@contextmanager
def cut_before(model: nn.Module, chain: Chain, cut: int, form: Form, came: Sequence[torch.Tensor]) -> Iterator[None]:
    """For a while the model is what a part is that begins with module `cut`, which takes `came`; what the modules
    before it return is made up."""
    modules = [model.get_submodule(name) for name in chain.names[: cut + 1]]
    entry = _Entry(modules[-1], form.leaves[cut])
    entry.came = came
    try:
        for i, name in enumerate(chain.names[:cut]):
            _put(model, name, _Unknown(form.tuples[i]))
        _put(model, chain.names[cut], entry)
        yield
    finally:
        for name, module in zip(chain.names, modules, strict=False):
            _put(model, name, module)


class ModulePiece:
    """One part.

    Args:
        model: all of it, without values; changed for good.
        chain: where it is cut.
        start, stop: the modules of the chain that are this part's.
        call: the form of the model's call.
        form: how the chain's modules are called.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        start: int,
        stop: int,
        call: Call,
        form: Form,
    ) -> None:
        self.names = chain.owned(model, start, stop, form)
        self._model, self._call = model, call
        self._entry: _Entry | None = None
        # Middle parts need the call's own arguments to run the code before the chain.
        self._arguments = len(call.arguments)
        for i, name in enumerate(chain.names):
            if i < start:
                _put(model, name, _Skipped(form.tuples[i]))
            elif i == start and start:
                self._entry = _Entry(model.get_submodule(name), form.leaves[i])
                _put(model, name, self._entry)
            elif i >= stop:
                _put(model, name, _Exit(form.leaves[i]))
        self._moved = {f"{chain.names[start]}.": f"{chain.names[start]}.inner."} if start else {}

    def fill(self, reader: Any, device: torch.device) -> None:
        """Puts the values in, on the device."""
        read: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for name, like in list(own_tensors(self._model)):
                if self._plain(name) not in self.names:
                    continue
                if id(like) not in read:
                    value = reader.read(self._plain(name), device)
                    read[id(like)] = nn.Parameter(value, False) if isinstance(like, nn.Parameter) else value
                set_tensor(self._model, name, read[id(like)])

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Crossing:
        """What the first part makes of a call."""
        return self._to_exit(self._call.tensors(args, kwargs), args, kwargs)

    def middle(self, came: Crossing) -> Crossing:
        """What it makes of what came."""
        self._enter(came)
        tensors = list(came.tensors[: self._arguments])
        args, kwargs = self._call.rebuilt(tensors)
        return self._to_exit(tensors, args, kwargs)

    def last(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], came: Crossing) -> Any:
        """What the model returns."""
        self._enter(came)
        return self._model(*args, **kwargs)

    def _enter(self, came: Crossing) -> None:
        assert self._entry is not None  # it is not the first part
        came.check(self._arguments + self._entry.count, 0)
        self._entry.came = came.tensors[self._arguments :]

    def _to_exit(self, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Crossing:
        try:
            self._model(*args, **kwargs)
        except Reached as end:
            return Crossing([*tensors, *end.value], [])
        raise StageLoadError("its model did not call the modules of its chain one behind the other, as it did before")

    def _plain(self, name: str) -> str:
        """The name that a tensor had before a stand-in came round its module."""
        for plain, moved in self._moved.items():
            if name.startswith(moved):
                return plain + name.removeprefix(moved)
        return name


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._modules[leaf] = module
