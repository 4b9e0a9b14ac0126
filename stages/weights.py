"""Weights files into modules: read without running code, and strictly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from torchrelay.errors import ConfigError, StageLoadError
from torchrelay.stages.cuts import Cut, check_whole
from torchrelay.stages.pickled import read_pickled
from torchrelay.stages.safetensors_files import first_line, is_index, must_be_there, read_index, refuse
from torchrelay.stages.slices import open_weights

__all__ = ["check_names", "fill_model", "read_weights", "set_tensor", "tied_names"]

_SHOWN = 8


def read_weights(path: Path, device: torch.device, cuts: Mapping[str, Cut] | None = None) -> dict[str, torch.Tensor]:
    """Read a state dict onto the device.

    Args:
        path: a .safetensors file, the `.safetensors.index.json` of a model in several, or a .pt or .pth file, of which
            only tensors are taken.
        cuts: of the file's tensors, the parts that are wanted; of .safetensors files nothing else is ever in memory.

    Raises:
        StageLoadError: the file is missing, damaged, of another kind, or holds anything but named tensors.
    """
    if cuts:
        return _read_parts(path, device, cuts)
    if is_index(path):
        return _read_several(path, device)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, device)
    return read_pickled(path, device)


def _read_parts(path: Path, device: torch.device, cuts: Mapping[str, Cut]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with open_weights(path) as weights:
        for name in weights.names():
            cut = cuts.get(name)
            if cut is not None:
                _check_whole(name, cut, weights.shape(name), path)
            if cut is None or cut.ranges:
                found[name] = weights.read(name, cut, device=device)
    return found


def _check_whole(name: str, cut: Cut, shape: Sequence[int], path: Path) -> None:
    try:
        check_whole(name, cut, shape)
    except ConfigError as error:
        raise StageLoadError(f"weights {str(path)!r} do not fit the model: {error}") from error


def _read_safetensors(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    must_be_there(path)
    try:
        state: dict[str, torch.Tensor] = load_file(path, str(device))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise refuse(path, first_line(error)) from error
    return state


def _read_several(index: Path, device: torch.device) -> dict[str, torch.Tensor]:
    files: dict[Path, list[str]] = {}
    for name, place in read_index(index).items():
        files.setdefault(place.path, []).append(name)
    found: dict[str, torch.Tensor] = {}
    for path, names in files.items():
        state = _read_safetensors(path, device)
        found |= {name: state[name] for name in names}
    return found


def fill_model(
    model: nn.Module, state: dict[str, torch.Tensor], source: str, dtype: torch.dtype | None = None
) -> list[str]:
    """Put the tensors into the module in place of its own, floating ones in `dtype`, else as it was built.

    Parameters that share memory stay shared, and one name of them suffices in the file. What is of another dtype in
    `state` is replaced there by what the module gets, so that no more than one tensor is in memory twice.

    Returns: the names of tensors that are still on the meta device, since they are never saved.

    Raises:
        StageLoadError: naming the keys that are missing or unexpected, or the shapes that differ.
    """
    own = model.state_dict(keep_vars=True)
    groups = tied_names(own)
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = check_names({name: tuple(tensor.shape) for name, tensor in own.items()}, groups, sizes, source)
    for name, ours in own.items():
        wanted = dtype if dtype is not None and ours.is_floating_point() else ours.dtype
        state[names[name]] = state[names[name]].to(wanted)
    full = {name: state[names[name]] for name in own}
    try:
        model.load_state_dict(full, strict=True, assign=True)
    except RuntimeError as error:
        raise StageLoadError(f"weights {source!r} do not fit the model: {error}") from error
    _tie(model, groups)
    return [name for name, tensor in _tensors(model) if tensor.is_meta]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes of a module."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


def check_names(
    own: Mapping[str, Sequence[int]], groups: Iterable[list[str]], found: Mapping[str, Sequence[int]], source: str
) -> dict[str, str]:
    """Of each of a model's tensors, under which name its values are in the file.

    Args:
        own, found: the shapes of the model's tensors, and of those in the file.
        groups: names of the model's that share memory, of which one suffices in the file.

    Raises:
        StageLoadError: naming the keys that are missing or unexpected, or the shapes that differ.
    """
    names = {name: name for name in own}
    for group in groups:
        present = next((name for name in group if name in found), None)
        if present is not None:
            names.update({name: present for name in group if name not in found})
    missing, unexpected = {n for n in own if names[n] not in found}, found.keys() - own.keys()
    if missing or unexpected:
        parts = [f"missing {_some(missing)}"] * bool(missing) + [f"unexpected {_some(unexpected)}"] * bool(unexpected)
        raise StageLoadError(f"weights {source!r} do not fit the model: {'; '.join(parts)}")
    for name, shape in own.items():
        theirs = found[names[name]]
        if tuple(shape) != tuple(theirs):
            raise StageLoadError(
                f"weights {source!r} do not fit the model: {name!r} has shape {list(theirs)}, "
                f"the model's has {list(shape)}"
            )
    return names


def tied_names(own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names, in a state dict that keeps its variables, that stand for one tensor."""
    by_identity: dict[int, list[str]] = {}
    for name, tensor in own.items():
        by_identity.setdefault(id(tensor), []).append(name)
    return [names for names in by_identity.values() if len(names) > 1]


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer in the place of the one of this name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def _tie(model: nn.Module, groups: Iterable[list[str]]) -> None:
    for first, *others in groups:
        path, _, leaf = first.rpartition(".")
        shared = getattr(model.get_submodule(path), leaf)
        for other in others:
            set_tensor(model, other, shared)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
