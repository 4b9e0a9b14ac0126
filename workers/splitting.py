"""The parts of a model that is split (`shards: {mode: pipeline}`): each gets the kept plan, or makes it, and becomes
the part that its worker owns. Also for a process that runs all parts, and for one that only tells of the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torchrelay.config.imports import import_use
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.shards import PartConfig, parts_of
from torchrelay.config.spec import StageConfig
from torchrelay.errors import ConfigError, DecodeError, StageLoadError
from torchrelay.queues.plans import SplitPlace
from torchrelay.stages import Stage, StageContext
from torchrelay.stages.loading import make_stage
from torchrelay.stages.runner import configure, is_torch_stage

if TYPE_CHECKING:
    from torchrelay.stages.splitting import SplitPlan
    from torchrelay.stages.torch_stage import TorchStage

__all__ = ["Agree", "LocalPlans", "is_split", "plan_of", "split_stage"]

Agree = Callable[[SplitPlace, Callable[[], str]], str]
"""Gives the plan of a place as text, by the function that makes it where there is none yet."""


def is_split(spec: StageConfig) -> bool:
    """Whether the stage owns a part of a model that is split."""
    return isinstance(spec, PartConfig) and spec.cut == "pipeline"


class LocalPlans:
    """The plans of one process that runs all parts: made in place, once each."""

    def __init__(self) -> None:
        self._made: dict[SplitPlace, str] = {}

    def agree(self, place: SplitPlace, make: Callable[[], str]) -> str:
        if place not in self._made:
            self._made[place] = make()
        return self._made[place]


def split_stage(spec: PartConfig, home: Pipeline, context: StageContext, agree: Agree) -> Stage:
    """The stage of one part, not loaded yet.

    Args:
        spec: the part.
        home: the pipeline that it is of.
        context: where it will be loaded; the plan is made there if it must be.
        agree: gives the plan.

    Raises StageLoadError where the stage's model cannot be split, ConfigError where the stage is none with a model.
    """
    from torchrelay.stages.splitting import PartStage, SplitPlan

    place = SplitPlace(home.base.ref, spec.of, spec.count, _balance(spec))
    text = agree(place, lambda: plan_of(spec, home, context).encode())
    try:
        plan = SplitPlan.decode(text)
    except DecodeError as error:
        raise StageLoadError(f"stage {spec.of!r}: its kept split plan cannot be read: {error}") from error
    types = home.graph.types_of(home.graph.node(spec.name))
    return PartStage(_whole(spec, home), plan, spec, types)


def plan_of(spec: PartConfig, home: Pipeline, context: StageContext) -> SplitPlan:
    """How the model is split, worked out here: the stage is built, traced and measured. Errors as of `split_stage`."""
    from torchrelay.stages.splitting import make_plan

    # What the whole model is given, the first part knows: columns, types and how batches are put together.
    first = home.spec.stages[home.graph.node(parts_of(home.spec, spec.of)[0]).index - 1]
    assert isinstance(first, PartConfig)  # it is one of the parts
    return make_plan(_whole(first, home), context, first, home.graph.types_of(home.graph.node(first.name)))


def _whole(spec: PartConfig, home: Pipeline) -> TorchStage:
    """The user's stage as if it were not split."""
    stage = make_stage(import_use(spec.use or "", home.base_dir), spec.args, spec.of)
    if not is_torch_stage(stage):
        raise ConfigError(
            f"stage {spec.of!r}: mode: pipeline splits the model of a TorchStage, and {type(stage).__qualname__} is a "
            "plain Stage; derive it from torchrelay.TorchStage, or use mode: gather"
        )
    configure(stage, spec)
    return stage


def _balance(spec: PartConfig) -> str:
    return spec.shards.balance if spec.shards is not None else "time"
