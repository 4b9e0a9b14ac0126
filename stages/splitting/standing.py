"""Loads a user's stage whose model is not whole here, with a stand-in in the model's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrelay.errors import StageLoadError
from torchrelay.stages.splitting.calls import StandIn
from torchrelay.stages.splitting.source import Source
from torchrelay.stages.stage import StageContext

if TYPE_CHECKING:
    from torchrelay.stages.torch_stage import TorchStage

__all__ = ["stand_in_for"]


def stand_in_for(stage: TorchStage, context: StageContext) -> Source:
    """Calls the stage's `load` with a stand-in as `stage.model`; returns what its parts are made of."""
    made: list[Source] = []

    def model() -> StandIn:
        source = Source.of(stage, context)
        made.append(source)
        return StandIn(source.model, stage.device)

    stage.load_instead(model)
    stage.load(context)
    if not made or not isinstance(stage.model, StandIn):
        raise StageLoadError(
            "its load() makes the model itself; define build() and let TorchStage.load() call it, or it cannot be split"
        )
    return made[0]
