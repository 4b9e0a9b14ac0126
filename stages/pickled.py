"""Weights in .pt and .pth files: read without running code from them, and all at once."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from torchrelay.errors import StageLoadError
from torchrelay.stages.safetensors_files import first_line, must_be_there

__all__ = ["read_pickled"]


def read_pickled(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """A state dict, onto the device. Raises StageLoadError for anything but named tensors, and other kinds of files."""
    must_be_there(path)
    if path.suffix not in (".pt", ".pth"):
        raise StageLoadError(f"weights {str(path)!r} must be a .safetensors, .safetensors.index.json, .pt or .pth file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise StageLoadError(
            f"weights {str(path)!r} cannot be read as plain tensors ({first_line(error)}); "
            "save model.state_dict(), best as .safetensors"
        ) from error
    if not isinstance(state, Mapping):
        raise StageLoadError(f"weights {str(path)!r} hold a {type(state).__name__}; save model.state_dict()")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise StageLoadError(
                f"weights {str(path)!r} hold a {type(value).__name__} under {key!r}; save model.state_dict() alone"
            )
    return dict(state)
