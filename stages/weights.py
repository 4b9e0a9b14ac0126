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

__all__ = ["fill_model", "read_weights"]

_SHOWN = 8


def read_weights(
    path: Path, device: torch.device, pieces: Mapping[str, Piece] | None = None
) -> dict[str, torch.Tensor]:
    """Read a state dict onto the device.

    Args:
        path: a .safetensors file, or a .pt or .pth file, of which only tensors are taken.
        pieces: of the file's tensors, the parts that are wanted; of a .safetensors file nothing else is read.

    Raises:
        StageLoadError: the file is missing, damaged, of another kind, or holds anything but named tensors.
    """
    if not path.is_file():
        raise StageLoadError(f"weights {str(path)!r} do not exist or are no regular file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, device, pieces or {})
    if path.suffix not in (".pt", ".pth"):
        raise StageLoadError(f"weights {str(path)!r} must be a .safetensors, .pt or .pth file")
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
        with path.open("rb") as file:
            start = file.read(4)
        # A pickle begins with its protocol, and torch.save wraps one in a zip archive.
        renamed = "; it looks like a pickle that was renamed" if start[:1] == b"\x80" or start[:2] == b"PK" else ""
        raise StageLoadError(
            f"weights {str(path)!r} are no safetensors file ({_first_line(error)}){renamed}"
        ) from error
    return state


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
    groups = _tied(own)
    full = dict(state)
    for names in groups:
        present = next((name for name in names if name in state), None)
        if present is not None:
            full.update({name: state[present] for name in names if name not in state})
    missing, unexpected = own.keys() - full.keys(), full.keys() - own.keys()
    if missing or unexpected:
        parts = [f"missing {_some(missing)}"] * bool(missing) + [f"unexpected {_some(unexpected)}"] * bool(unexpected)
        raise StageLoadError(f"weights {source!r} do not fit the model: {'; '.join(parts)}")
    for name, tensor in full.items():
        ours = own[name]
        if ours.shape != tensor.shape:
            raise StageLoadError(
                f"weights {source!r} do not fit the model: {name!r} has shape {list(tensor.shape)}, "
                f"the model's has {list(ours.shape)}"
            )
        full[name] = tensor.to(ours.dtype)
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


def _tied(own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    by_identity: dict[int, list[str]] = {}
    for name, tensor in own.items():
        by_identity.setdefault(id(tensor), []).append(name)
    return [names for names in by_identity.values() if len(names) > 1]


def _tie(model: nn.Module, groups: Iterable[list[str]]) -> None:
    for first, *others in groups:
        shared = _owner(model, first)
        for other in others:
            module, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(module), leaf, shared)


def _owner(model: nn.Module, name: str) -> object:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
