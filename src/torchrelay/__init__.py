"""torchrelay: multi-stage model inference over Redis.

Producers need no torch; `TorchStage` and `cutting` are loaded at their first use and say what to install where torch
is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torchrelay import errors

if TYPE_CHECKING:
    from torchrelay import testing
    from torchrelay.config.pipeline import Pipeline
    from torchrelay.config.stage_spec import StageSpec
    from torchrelay.producer.async_futures import AsyncJobFuture
    from torchrelay.producer.async_relay import AsyncRelay
    from torchrelay.producer.futures import JobFuture
    from torchrelay.producer.relay import Relay
    from torchrelay.queues.priority import Priority
    from torchrelay.stages import cutting
    from torchrelay.stages.batch import Batch
    from torchrelay.stages.outputs import Expand
    from torchrelay.stages.stage import Stage, StageContext
    from torchrelay.stages.torch_stage import TorchStage

__version__ = "0.1.0"
__all__ = [
    "AsyncJobFuture",
    "AsyncRelay",
    "Batch",
    "Expand",
    "JobFuture",
    "Pipeline",
    "Priority",
    "Relay",
    "Stage",
    "StageContext",
    "StageSpec",
    "TorchStage",
    "__version__",
    "cutting",
    "errors",
    "testing",
]
# Where each public name lives; they are imported at first use, so that a small process stays small.
_HOMES = {
    "AsyncJobFuture": "torchrelay.producer.async_futures",
    "AsyncRelay": "torchrelay.producer.async_relay",
    "Batch": "torchrelay.stages",
    "Expand": "torchrelay.stages",
    "JobFuture": "torchrelay.producer.futures",
    "Pipeline": "torchrelay.config.pipeline",
    "Priority": "torchrelay.queues.priority",
    "Relay": "torchrelay.producer.relay",
    "Stage": "torchrelay.stages",
    "StageContext": "torchrelay.stages",
    "StageSpec": "torchrelay.config.stage_spec",
    "TorchStage": "torchrelay.stages",
}


def __getattr__(name: str) -> object:
    if name == "testing":
        return importlib.import_module("torchrelay.testing")
    if name == "cutting":
        importlib.import_module("torchrelay.stages").TorchStage  # noqa: B018  # says what is missing where torch is
        return importlib.import_module("torchrelay.stages.cutting")
    if name not in _HOMES:
        raise AttributeError(f"module 'torchrelay' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
