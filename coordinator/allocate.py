"""Interim: replaced by the branch that allocates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrelay.config.fleet import CPU, Assignment, HostReport, Need
from torchrelay.config.pipeline import Pipeline
from torchrelay.queues.keys import new_token


@dataclass(frozen=True)
class Unit:
    ref: str
    stage: str
    shard: int = 0
    shards: int = 1
    group: str = ""
    need: Need = Need()  # noqa: RUF009 - it is frozen
    device: str = "cpu"
    labels: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    unit: Unit
    why: str


@dataclass(frozen=True)
class Allocation:
    assignments: tuple[Assignment, ...]
    refused: tuple[Refusal, ...]


def units_of(pipeline: Pipeline, wanted: Mapping[str, int]) -> list[Unit]:
    made = []
    for group in pipeline.groups:
        gpu = group.stages[0].device == "gpu"
        need = Need(compute=1.0) if gpu else Need(cpus=1.0)
        made += [
            Unit(pipeline.ref, group.first.name, need=need, device="gpu" if gpu else "cpu")
            for _ in range(wanted.get(group.first.name, 0))
        ]
    return made


def allocate(hosts: Sequence[HostReport], wanted: Sequence[Unit], current: Sequence[Assignment]) -> Allocation:
    left = list(current)
    placed: list[Assignment] = []
    refused: list[Refusal] = []
    fresh: list[Unit] = []
    names = {host.name for host in hosts if not host.draining}
    for unit in wanted:
        stays = next((a for a in left if (a.ref, a.stage) == (unit.ref, unit.stage) and a.host in names), None)
        if stays is None:
            fresh.append(unit)
        else:
            left.remove(stays)
            placed.append(stays)
    for unit in fresh:
        best: tuple[int, str, str] | None = None
        for host in hosts:
            if host.draining or unit.ref not in host.refs:
                continue
            slots = [gpu.slot for gpu in host.gpus] if unit.device == "gpu" else [CPU]
            for slot in slots:
                here = [a for a in placed if a.host == host.name and a.slot == slot]
                if unit.device == "gpu" and here:
                    continue
                if unit.device == "cpu" and sum(a.need.cpus for a in here) + unit.need.cpus > host.cpus:
                    continue
                if any((t.slot, t.ref, t.stage) == (slot, unit.ref, unit.stage) for t in host.trouble):
                    continue
                choice = (len(here), host.name, slot)
                best = choice if best is None else min(best, choice)
        if best is None:
            refused.append(Refusal(unit, "no slot"))
        else:
            placed.append(
                Assignment(new_token(8), best[1], best[2], unit.ref, unit.stage, need=unit.need, why="fewest workers")
            )
    return Allocation(tuple(placed), tuple(refused))
