"""What runs on a device: stages, batches, and the runner that puts them together. Knows nothing of Redis.

Importing this needs no torch: `TorchStage` is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrelay.errors import ConfigError
from torchrelay.stages.batch import Batch
from torchrelay.stages.checking import check_stages
from torchrelay.stages.fusing import make_group_runner
from torchrelay.stages.loading import make_stage
from torchrelay.stages.outputs import Expand, Made
from torchrelay.stages.runner import Runner, make_runner
from torchrelay.stages.stage import Stage, StageContext

if TYPE_CHECKING:
    from torchrelay.stages.torch_stage import TorchStage

__all__ = [
    "Batch",
    "Expand",
    "Made",
    "Runner",
    "Stage",
    "StageContext",
    "TorchStage",
    "check_stages",
    "make_group_runner",
    "make_runner",
    "make_stage",
]


def __getattr__(name: str) -> object:
    if name != "TorchStage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import torch  # noqa: F401  # only to tell a missing torch from an error in torch_stage
    except ImportError as error:
        raise ConfigError('torch is missing: pip install "torchrelay[worker]"') from error
    from torchrelay.stages.torch_stage import TorchStage

    return TorchStage
