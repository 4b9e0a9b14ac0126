"""What is to be placed: one `Unit` per worker, made of a pipeline and the replicas that its stages are to have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torchrelay.config.fleet import Need
from torchrelay.config.fusing import Group
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.spec import StageConfig

__all__ = ["Unit", "need_of", "units_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One worker to place, or one shard of a group.

    `stage` is the first of those that the worker runs (`fuse`). `replica` counts the workers of a stage, or its groups,
    from 0: lower ones are placed first. The `shards` units of a stage with the same replica are one group.

    `need` is what it takes of its slot and host. With `presumed`, nobody said so for what counts most on its device
    (`compute` of a GPU, `cpus`): where less is left, it makes do with that, so that a pipeline without `resources` runs
    on a small machine.

    `labels` must all be the host's. `apart` are stages of the same ref that must not be on its host; with its own
    name there, each replica is on a host of its own. `neighbours` are stages that it exchanges columns with. `one_host`
    keeps the shards of a group on one host.
    """

    ref: str
    stage: str
    replica: int = 0
    shard: int = 0
    shards: int = 1
    need: Need = Need()
    device: Literal["cpu", "gpu"] = "cpu"
    presumed: bool = False
    labels: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    one_host: bool = False


def units_of(pipeline: Pipeline, wanted: Mapping[str, int]) -> list[Unit]:
    """A unit for each worker of each stage, `wanted` per name of a group's first stage; others are left out."""
    made = []
    for group in pipeline.groups:
        gpu = group.stages[0].device == "gpu"
        need = Need(compute=1.0) if gpu else Need(cpus=1.0)
        made += [
            Unit(pipeline.ref, group.first.name, i, need=need, device="gpu" if gpu else "cpu")
            for i in range(wanted.get(group.first.name, 0))
        ]
    return made


def need_of(group: Group) -> tuple[Need, bool]:
    """What a worker of these fused stages takes, and whether the share of its device is only presumed."""
    raise NotImplementedError


def _unused(stage: StageConfig) -> None:
    return None
