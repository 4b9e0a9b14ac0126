"""What is to be placed: one `Unit` per worker, made of a pipeline and the replicas that its stages are to have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torchrelay.config.fleet import Need
from torchrelay.config.fusing import Group
from torchrelay.config.graph import is_runs
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.shards import PartConfig
from torchrelay.errors import ConfigError

__all__ = ["Unit", "need_of", "units_of"]

_NOTHING = Need()
_READS = Need(cpus=1.0)


@dataclass(frozen=True, slots=True)
class Unit:
    """One worker to place, or one shard of a group.

    `stage` is the first of those that the worker runs (`fuse`). `replica` counts the workers of a stage, or its groups,
    from 0: lower ones are placed first. The `shards` units of a stage with the same replica are one group.

    `need` is what it takes of its slot and host. With `presumed`, nobody said so for what counts most on its device
    (`compute` of a GPU, `cpus`): where less is left, it makes do with that, so that a pipeline without `resources` runs
    on a small machine.

    `labels` must all be the host's. `apart` are stages of the same ref that must not be on its host; with its own
    name there, each replica is on a host of its own. `neighbours` are stages that it exchanges columns with, and the
    other parts of a stage that is cut; of these, `kin` own a part of the model too, and take what it takes. `one_host`
    keeps the shards of a group on one host.
    """

    ref: str
    stage: str
    replica: int = 0
    shard: int = 0
    shards: int = 1
    need: Need = _NOTHING
    device: Literal["cpu", "gpu"] = "cpu"
    presumed: bool = False
    labels: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    one_host: bool = False
    kin: tuple[str, ...] = ()


def units_of(pipeline: Pipeline, wanted: Mapping[str, int]) -> list[Unit]:
    """A unit for each worker that is wanted.

    Args:
        pipeline: the pipeline itself, also for the nodes of its run graph.
        wanted: how many workers a stage is to have, by the first name of those that are fused. Stages that it does not
            name get none; `@read` and `@write` are stages, too.

    Raises ConfigError for a name that is no first stage of the pipeline.
    """
    firsts = {name: group.first.name for group in pipeline.groups for name in group.names}
    known = set(firsts.values()) | {name for name in pipeline.stage_names if is_runs(name)}
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"{pipeline.ref} has no worker for {name!r:.80}; its workers are {', '.join(sorted(known))}"
            )
    found: list[Unit] = []
    for name, count in wanted.items():
        if is_runs(name):
            node = pipeline.for_runs().graph.node(name)
            beside = _names(pipeline, (*node.preds, *node.succs), firsts)
            kind, least = Unit(pipeline.ref, name, need=_READS, presumed=True, neighbours=beside), count
        else:
            group = pipeline.group_of(name)
            kind, least = _kind(pipeline, group, firsts), 1 if group.stages[0].device == "gpu" else group.replicas
        # Only those without which the pipeline would not run make do with less than is presumed.
        shards = 1 if is_runs(name) else ranks_of(pipeline, name)
        found += [
            _numbered(kind, number, kind.presumed and number < least and shards == 1, shard, shards)
            for number in range(count)
            for shard in range(shards)
        ]
    return found


def need_of(group: Group) -> tuple[Need, bool]:
    """What a worker of these fused stages takes, and whether the share of its device is only presumed.

    They compute one after the other and all stay loaded, so compute and processors are the most that one of them wants,
    and memory is the sum. A GPU's stage that says nothing takes the whole GPU, and no processor is set aside for it; a
    CPU's stage one processor.
    """
    given = [stage.resources for stage in group.stages]
    compute = [one.compute for one in given if one.compute is not None]
    cpus = [one.cpus for one in given if one.cpus is not None]
    on_gpu = group.stages[0].device == "gpu"
    need = Need(
        compute=max(compute, default=1.0) if on_gpu else 0.0,
        memory=sum(one.memory or 0 for one in given),
        cpus=max(cpus, default=0.0 if on_gpu else 1.0),
        host_memory=sum(one.host_memory or 0 for one in given),
    )
    return need, not (compute if on_gpu else cpus)


def ranks_of(pipeline: Pipeline, stage: str) -> int:
    """How many processes make one worker of this stage."""
    shards = pipeline.group_of(stage).stages[0].shards
    return shards.count if shards is not None and shards.mode == "tensor" else 1


def _kind(pipeline: Pipeline, group: Group, firsts: Mapping[str, str]) -> Unit:
    need, presumed = need_of(group)
    apart = {firsts[name] for stage in group.stages for name in stage.apart}
    # Being apart is mutual, so the allocation need not look it up twice.
    apart |= {
        firsts[other.name] for other in pipeline.spec.stages for name in other.apart if firsts[name] == group.first.name
    }
    beside = set(_names(pipeline, [i for node in group.nodes for i in (*node.preds, *node.succs)], firsts))
    parts, kin = _parts(pipeline, group)
    beside.update(parts)
    return Unit(
        pipeline.ref,
        group.first.name,
        need=need,
        device=group.stages[0].device,
        presumed=presumed,
        labels=tuple(sorted({label for stage in group.stages for label in stage.hosts.labels})),
        apart=tuple(sorted(apart)),
        neighbours=tuple(sorted(beside - {group.first.name})),
        kin=kin,
    )


def _parts(pipeline: Pipeline, group: Group) -> tuple[list[str], tuple[str, ...]]:
    """All parts of the stage that it is a part of; and, of one that owns a part of the model, the others that do."""
    mine = group.stages[0]
    if not isinstance(mine, PartConfig):
        return [], ()
    parts = [s for s in pipeline.spec.stages if isinstance(s, PartConfig) and s.of == mine.of]
    kin = () if mine.combines else tuple(s.name for s in parts if not s.combines and s.name != mine.name)
    return [s.name for s in parts], kin


def _names(pipeline: Pipeline, nodes: Iterable[int], firsts: Mapping[str, str]) -> tuple[str, ...]:
    """The workers of these nodes, of which 0 is the input."""
    names = [node.name for node in pipeline.graph.nodes]
    return tuple(sorted({firsts[names[i - 1]] for i in nodes if 0 < i <= len(names)}))


def _numbered(kind: Unit, replica: int, presumed: bool, shard: int = 0, shards: int = 1) -> Unit:
    return replace(kind, replica=replica, presumed=presumed, shard=shard, shards=shards)
