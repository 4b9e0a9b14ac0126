"""Which part of each tensor of a model a shard owns: the notes that `cutting` leaves in the modules it cuts.

By these the weights of the whole model are read (`weights`), or a state dict of it is cut.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from torchrelay.errors import ConfigError
from torchrelay.stages.cuts import Cut, check_whole
from torchrelay.stages.stage import StageContext

__all__ = [
    "NOTES",
    "check_divides",
    "cut",
    "cut_state",
    "matching",
    "modules",
    "pieces_of",
    "share",
]

NOTES = "_torchrelay_pieces"
"""The attribute of a module with the piece of each of its tensors that was cut, by the tensor's name."""
_MOST_SHARDS = 16


def pieces_of(model: nn.Module) -> dict[str, Cut]:
    """Of each tensor that was cut, by its name in the whole model's state dict, this shard's part."""
    return {
        f"{prefix}.{leaf}" if prefix else leaf: piece
        for prefix, module in model.named_modules(remove_duplicate=False)
        for leaf, piece in getattr(module, NOTES, {}).items()
    }


def cut_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This shard's part of the state dict of the whole model, for `load_state_dict` of the model that was cut.

    Raises ConfigError for a tensor that is not as large as the whole model's.
    """
    pieces = pieces_of(model)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        piece = pieces.get(name)
        if piece is None:
            found[name] = tensor
        elif piece.ranges:
            check_whole(name, piece, tuple(tensor.shape))
            found[name] = piece.of(tensor)
    return found


def share(size: int, context: StageContext) -> tuple[int, int]:
    """Where this shard's part of so many begins and ends."""
    step = size // context.shards
    return context.shard * step, (context.shard + 1) * step


def check_divides(name: str, what: str, size: int, context: StageContext, blocks: int = 1) -> None:
    """Raises ConfigError for a size that the shards, in each of these blocks, cannot split evenly."""
    if size % (blocks * context.shards):
        parts = f"{blocks} blocks of {context.shards} shards" if blocks > 1 else f"{context.shards} shards"
        counts = [n for n in range(2, _MOST_SHARDS + 1) if size % (blocks * n) == 0]
        remedy = f"set shards.count to {' or '.join(map(str, counts))}" if counts else "leave this one whole"
        raise ConfigError(f"module {name!r}: {what} of {size} does not divide into {parts}; {remedy}, or pad the layer")


def matching(model: nn.Module, known: Mapping[str, object], pattern: str, what: str) -> list[str]:
    """The known names that a pattern means; raises ConfigError where there is none."""
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, [n for n in known if n], 1)
        some = ", ".join(list(filter(None, known))[:8])
        hint = f"did you mean {near[0]!r}?" if near else f"there are {some or 'none'}"
        raise ConfigError(f"{what}: {pattern!r:.120} matches nothing in {type(model).__qualname__}; {hint}")
    return found


def modules(model: nn.Module, names: Sequence[str], kind: type[Any], what: str) -> Iterator[tuple[str, Any]]:
    """The modules that these names mean; raises ConfigError for one that is of another kind."""
    for pattern in names:
        known = dict(model.named_modules())
        for name in matching(model, known, pattern, what):
            module = known[name]
            if not isinstance(module, kind):
                inner = [
                    n.removeprefix(f"{name}.")
                    for n, m in known.items()
                    if n.startswith(f"{name}.") and isinstance(m, kind)
                ]
                hint = f"; in it there are {', '.join(inner[:8])}" if inner else ""
                found = type(module).__qualname__
                raise ConfigError(f"{what}: module {name!r} is a {found}, and {what} cuts {kind.__qualname__}{hint}")
            yield name, module


def cut(model: nn.Module, name: str, module: nn.Module, leaf: str, piece: Cut) -> None:
    """Leaves this part of a parameter or buffer, and the note."""
    path = f"{name}.{leaf}" if name else leaf
    notes: dict[str, Cut] = module.__dict__.setdefault(NOTES, {})
    if leaf in notes:
        raise ConfigError(f"{path!r} is cut already; name it once")
    tensor = getattr(module, leaf)
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is tensor and n != path]
    if tied:
        raise ConfigError(f"{path!r} is tied to {tied[0]!r}; give one of them a parameter of its own before it is cut")
    notes[leaf] = piece
    if not piece.ranges:
        setattr(module, leaf, None)
        return
    with torch.no_grad():
        part = piece.of(tensor)
    setattr(module, leaf, nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part)
