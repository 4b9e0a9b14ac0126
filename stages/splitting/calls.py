"""How a stage's `forward` calls its model: a stand-in for the model, and the call's form as a plain value.

Promise: `forward` is the user's and runs unchanged; a call of another form than planned is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from torchrelay.errors import DecodeError, InputError, StageLoadError

__all__ = ["Call", "Fixed", "Reached", "StandIn", "TensorArgument"]

Fixed = None | bool | int | float | str
"""An argument that is no tensor, and must be the same at every call."""
_ONCE = "call self.model(...) once in forward, or use mode: gather or tensor"


class Reached(BaseException):
    """A part's end, thrown through the user's `forward`; no Exception, so that no handler there takes it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class StandIn:
    """Stands for a model that is not whole here: its attributes are the model's, a call is answered by `answer`.

    Args:
        model: the model without values, for its attributes.
        device: what its `device` says.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self.device = device
        self.answer: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        if name == "_model":
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > 1 or self.answer is None:
            raise StageLoadError(f"its forward calls the model more than once for a batch, which parts cannot; {_ONCE}")
        return self.answer(args, kwargs)

    def during(
        self, answer: Callable[[tuple[Any, ...], dict[str, Any]], Any], forward: Callable[[], Any]
    ) -> tuple[Any, Any]:
        """Runs a forward whose call of the model `answer` answers. Returns: what `forward` returned, None where it
        ended at the call; and what the call's `Reached` carried, None where there was none."""
        self.answer, self.calls = answer, 0
        try:
            returned = forward()
        except Reached as end:
            return None, end.value
        finally:
            self.answer = None
        if not self.calls:
            raise StageLoadError(f"its forward does not call self.model, so there is nothing to split; {_ONCE}")
        return returned, None


@dataclass(frozen=True, slots=True)
class TensorArgument:
    """A tensor among the arguments: as it was in the first sample, and which of its dimensions varied.

    `rows`: whether its first dimension is the rows of the batch.
    """

    dtype: str
    shape: tuple[int, ...]
    varies: tuple[int, ...]
    rows: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True, slots=True)
class Call:
    """The form of a model's call: the structure of `(args, kwargs)` as torch's pytree writes it, and its leaves."""

    spec: str
    leaves: tuple[TensorArgument | Fixed, ...]

    @classmethod
    def of(cls, samples: Sequence[tuple[int, tuple[Any, ...], Mapping[str, Any]]]) -> Call:
        """Of the same call at several batches, each with its number of rows.

        Raises StageLoadError for arguments that cannot be described.
        """
        found = [(rows, *tree_flatten((args, dict(kwargs)))) for rows, args, kwargs in samples]
        _, first, spec = found[0]
        if any(other != spec for _, _, other in found):
            raise StageLoadError("its forward calls the model with other arguments for other batches")
        leaves: list[TensorArgument | Fixed] = []
        for number, leaf in enumerate(first):
            if isinstance(leaf, torch.Tensor):
                leaves.append(_tensor(number, [(rows, more[number]) for rows, more, _ in found]))
                continue
            if not isinstance(leaf, Fixed):
                what = f"argument {number} of the model's call is a {type(leaf).__name__}"
                raise StageLoadError(f"{what}; only tensors, numbers, text and None can be passed to a model in parts")
            if any(more[number] != leaf for _, more, _ in found):
                what = f"argument {number} of the model's call, {leaf!r:.40}, differs from batch to batch"
                raise StageLoadError(f"{what}; pass it as a tensor with a row for each row of the batch")
            leaves.append(leaf)
        if not any(isinstance(leaf, TensorArgument) and leaf.rows for leaf in leaves):
            raise StageLoadError("its forward calls the model with no tensor that has the batch's rows first")
        try:
            return cls(treespec_dumps(spec), tuple(leaves))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise StageLoadError(f"the model's arguments have a form that cannot be written down: {error}") from error

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call of this form. Raises InputError for one of another."""
        leaves, spec = tree_flatten((args, dict(kwargs)))
        if spec != self._spec() or len(leaves) != len(self.leaves):
            raise InputError("forward calls the model with other arguments than when it was split")
        for number, (leaf, planned) in enumerate(zip(leaves, self.leaves, strict=True)):
            if isinstance(planned, TensorArgument):
                _check(number, leaf, planned)
            elif isinstance(leaf, torch.Tensor) or leaf != planned:
                raise InputError(f"argument {number} of the model's call is {leaf!r:.40}, and was {planned!r:.40}")
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def rebuilt(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of a call with these tensors."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, TensorArgument) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self._spec())
        return args, kwargs

    @property
    def arguments(self) -> list[TensorArgument]:
        """Its tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorArgument)]

    def _spec(self) -> Any:
        found = _specs.get(self.spec)
        if found is None:
            found = _specs[self.spec] = treespec_loads(self.spec)
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        leaves = [
            {"dtype": a.dtype, "shape": list(a.shape), "varies": list(a.varies), "rows": a.rows}
            if isinstance(a, TensorArgument)
            else {"value": a}
            for a in self.leaves
        ]
        return {"spec": self.spec, "leaves": leaves}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Call:
        """Raises KeyError, TypeError or DecodeError for what `plain` did not make."""
        leaves: list[TensorArgument | Fixed] = []
        for leaf in plain["leaves"]:
            if "value" in leaf:
                leaves.append(leaf["value"])
                continue
            made = TensorArgument(leaf["dtype"], tuple(leaf["shape"]), tuple(leaf["varies"]), leaf["rows"])
            if not isinstance(getattr(torch, made.dtype, None), torch.dtype):
                raise DecodeError(f"torch has no dtype {made.dtype!r:.40}")
            leaves.append(made)
        return cls(plain["spec"], tuple(leaves))


# By their text, as it takes long to read.
_specs: dict[str, Any] = {}


def _tensor(number: int, found: Sequence[tuple[int, Any]]) -> TensorArgument:
    _, first = found[0]
    for _, other in found:
        if not isinstance(other, torch.Tensor) or other.dtype != first.dtype or other.ndim != first.ndim:
            raise StageLoadError(f"argument {number} of the model's call has another form for other batches")
    if first.is_meta:
        raise StageLoadError(
            f"argument {number} of the model's call was brought to the device of the model's parameters, which have "
            "none where the model is split; use self.device in forward"
        )
    varies = tuple(d for d in range(first.ndim) if any(t.shape[d] != first.shape[d] for _, t in found))
    rows = first.ndim > 0 and all(t.shape[0] == rows for rows, t in found)
    return TensorArgument(str(first.dtype).removeprefix("torch."), tuple(first.shape), varies, rows)


def _check(number: int, leaf: Any, planned: TensorArgument) -> None:
    if not isinstance(leaf, torch.Tensor) or leaf.dtype != planned.torch_dtype or leaf.ndim != len(planned.shape):
        came = f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"{leaf!r:.40}"
        raise InputError(
            f"argument {number} of the model's call is {came}, and was {planned.dtype}{list(planned.shape)}"
        )
    for dim, (size, before) in enumerate(zip(leaf.shape, planned.shape, strict=True)):
        if size != before and dim not in planned.varies:
            raise InputError(
                f"argument {number} of the model's call has shape {list(leaf.shape)}, and had {before} in dimension "
                f"{dim} of every batch when the model was split"
            )
