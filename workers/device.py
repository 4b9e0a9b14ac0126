"""Which device a stage runs on. Imports torch only to ask for a GPU."""

from __future__ import annotations

from torchrelay.config.spec import StageConfig
from torchrelay.errors import DeviceError

__all__ = ["pick_device"]


def pick_device(stage: StageConfig, asked: str) -> str:
    """The torch device name for a stage. `asked` is auto, auto-cpu (fall back), cpu, cuda or cuda:N; auto:N and
    auto-cpu:N mean GPU number N where there are some.

    Raises DeviceError when the stage wants a GPU and there is none.
    """
    how, _, number = asked.partition(":")
    if how not in ("auto", "auto-cpu"):
        if asked.startswith("cuda") and not _cuda():
            raise DeviceError(f"stage {stage.name!r}: no CUDA device here for {asked!r}; use --device cpu")
        return asked
    if stage.device == "cpu":
        return "cpu"
    if _cuda():
        return f"cuda:{number or 0}"
    if how == "auto-cpu":
        return "cpu"
    raise DeviceError(f"stage {stage.name!r} wants a GPU and there is none here; pass --allow-cpu to run it on the CPU")


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
