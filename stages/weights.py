"""Weights files into modules: read without running code, and strictly."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from torchrelay.errors import ConfigError, StageLoadError
from torchrelay.stages.cut_pieces import Piece, check_whole
from torchrelay.stages.safetensors_files import is_index, read_index, refuse

__all__ = ["check_names", "fill_model", "read_weights", "set_tensor", "tied_names"]

_SHOWN = 8


def read_weights(
    path: Path, device: torch.device, pieces: Mapping[str, Piece] | None = None
) -> dict[str, torch.Tensor]:
    """Read a state dict onto the device.

    Args:
        path: a .safetensors file, the `.safetensors.index.json` of a model in several, or a .pt or .pth file, of which
            only tensors are taken.
        pieces: of the file's tensors, the parts that are wanted; of a .safetensors file nothing else is read.

    Raises:
        StageLoadError: the file is missing, damaged, of another kind, or holds anything but named tensors.
    """
    if not path.is_file():
        raise StageLoadError(f"weights {str(path)!r} do not exist or are no regular file")
    if is_index(path):
        return _read_several(path, device, pieces or {})
    if path.suffix == ".safetensors":
        return _read_safetensors(path, device, pieces or {})
    if path.suffix not in (".pt", ".pth"):
        raise StageLoadError(f"weights {str(path)!r} must be a .safetensors, .safetensors.index.json, .pt or .pth file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise StageLoadError(
            f"weights {str(path)!r} cannot be read as plain tensors ({_first_line(error)}); "
            "save model.state_dict(), best as .safetensors"
        ) from error
    if not isinstance(state, Mapping):
        raise StageLoadError(f"weights {str(path)!r} hold a {type(state).__name__}; save model.state_dict()")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise StageLoadError(
                f"weights {str(path)!r} hold a {type(value).__name__} under {key!r}; save model.state_dict() alone"
            )
    return _cut(dict(state), path, pieces or {})


def _cut(state: dict[str, torch.Tensor], path: Path, pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    """With the parts that are wanted in place of the whole tensors; these go one by one."""
    for name in pieces.keys() & state.keys():
        whole = state.pop(name)
        _check_whole(name, pieces[name], whole.shape, path)
        if pieces[name].ranges:
            state[name] = pieces[name].of(whole)
    return state


def _check_whole(name: str, piece: Piece, shape: Sequence[int], path: Path) -> None:
    try:
        check_whole(name, piece, shape)
    except ConfigError as error:
        raise StageLoadError(f"weights {str(path)!r} do not fit the model: {error}") from error


def _read_safetensors(path: Path, device: torch.device, pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = _read_pieces(path, device, pieces) if pieces else load_file(path, str(device))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise refuse(path, _first_line(error)) from error
    return state


def _read_several(index: Path, device: torch.device, pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    files: dict[Path, list[str]] = {}
    for name, place in read_index(index).items():
        files.setdefault(place.path, []).append(name)
    found: dict[str, torch.Tensor] = {}
    for path, names in files.items():
        state = _read_safetensors(path, device, {name: pieces[name] for name in names if name in pieces})
        found |= {name: state[name] for name in names if name in state}
    return found


def _read_pieces(path: Path, device: torch.device, pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping, and does not say how to iterate
            piece = pieces.get(name)
            if piece is None:
                found[name] = file.get_tensor(name).to(device)
                continue
            part = file.get_slice(name)
            _check_whole(name, piece, part.get_shape(), path)
            if piece.ranges:
                before = (slice(None),) * piece.dim
                parts = [part[(*before, slice(start, stop))] for start, stop in piece.ranges]
                found[name] = (parts[0] if len(parts) == 1 else torch.cat(parts, piece.dim)).to(device)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def fill_model(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> list[str]:
    """Put the tensors into the module in place of its own, in the dtypes that it was built with.

    Parameters that share memory stay shared, and one name of them suffices in the file.

    Returns: the names of tensors that are still on the meta device, since they are never saved.

    Raises:
        StageLoadError: naming the keys that are missing or unexpected, or the shapes that differ.
    """
    own = model.state_dict(keep_vars=True)
    groups = tied_names(own)
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = check_names({name: tuple(tensor.shape) for name, tensor in own.items()}, groups, sizes, source)
    full = {name: state[names[name]].to(ours.dtype) for name, ours in own.items()}
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
