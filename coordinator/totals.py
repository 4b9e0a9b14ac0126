"""Whether hosts have room for so many workers of each stage, by their totals. Pure.

It errs towards yes: memory, labels and what must be apart are known to who places workers, and bound the next question
(`bounds.py`). A no is final, so what could be placed with all that it asks for is never refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torchrelay.config.fleet import HostReport
from torchrelay.config.pipeline import Pipeline
from torchrelay.coordinator.demand import Limits
from torchrelay.coordinator.loads import Node
from torchrelay.coordinator.sharing import Fits
from torchrelay.coordinator.units import need_of

__all__ = ["room_for"]

_A_LITTLE = 1e-9


@dataclass(frozen=True, slots=True)
class _Take:
    """What a worker takes: of a GPU, nothing for a stage of the processors; and of processors where it runs on them."""

    gpu: float
    cpus: float


@dataclass(frozen=True, slots=True)
class _Totals:
    """GPUs, all processors, and those of them that `stand_in` for GPUs (`allow_cpu`)."""

    gpus: float
    cpus: float
    stand_in: float
    takes: Mapping[Node, _Take] = field(default_factory=dict)

    def used(self, counts: Mapping[Node, int]) -> tuple[float, float]:
        """The processors that so many workers take, and how much of that in place of GPUs: as little as will do."""
        taken = [(self.takes[key], count) for key, count in counts.items()]
        cpus = sum(take.cpus * count for take, count in taken if not take.gpu)
        over, instead = sum(take.gpu * count for take, count in taken) - self.gpus, 0.0
        # Those leave the GPUs first that free most of them for a processor.
        for take, count in sorted(taken, key=lambda one: one[0].cpus / one[0].gpu if one[0].gpu else 0.0):
            if take.gpu and over > _A_LITTLE:
                moved = min(over / take.gpu, count)
                over -= moved * take.gpu
                instead += moved * take.cpus
        return cpus + instead, instead

    def with_least(self, least: Mapping[Node, int]) -> _Totals:
        """Made so large that these have room, by more GPUs where processors cannot stand in."""
        gpus = self.gpus if self.stand_in else max(self.gpus, sum(self.takes[k].gpu * n for k, n in least.items()))
        cpus, instead = _Totals(gpus, 0.0, 0.0, self.takes).used(least)
        return _Totals(gpus, max(self.cpus, cpus), max(self.stand_in, instead), self.takes)

    def fit(self, counts: Mapping[Node, int]) -> bool:
        cpus, instead = self.used(counts)
        return cpus <= self.cpus + _A_LITTLE and instead <= self.stand_in + _A_LITTLE


def room_for(
    limits: Sequence[Limits],
    pipelines: Mapping[str, Pipeline],
    hosts: Iterable[HostReport],
    most: Mapping[Node, int] | None = None,
) -> Fits:
    """Whether the hosts could have so many workers, by totals of processors and GPUs and by what has a place at `most`.
    What the stages have at least counts as room, as workers that presume may make do with less; what of it has no place
    takes none."""
    bounds = most or {}
    least = {one.key: min(one.least, bounds.get(one.key, one.least)) for one in limits}
    totals = _totals(limits, pipelines, [host for host in hosts if not host.draining]).with_least(least)
    allowed = {one.key: max(bounds[one.key], one.least) for one in limits if one.key in bounds}

    def fits(replicas: Mapping[Node, int]) -> bool:
        if any(count > allowed.get(key, count) for key, count in replicas.items()):
            return False
        return totals.fit({key: min(count, bounds.get(key, count)) for key, count in replicas.items()})

    return fits


def _totals(limits: Sequence[Limits], pipelines: Mapping[str, Pipeline], living: Sequence[HostReport]) -> _Totals:
    gpus = float(sum(len(host.gpus) for host in living))
    cpus = sum(host.cpus for host in living)
    stand_in = sum(host.cpus for host in living if host.allow_cpu and not host.gpus)
    if not gpus and not stand_in:
        stand_in = cpus  # who places workers says why none of them may serve a GPU's stage
    takes = {}
    for one in limits:
        need, _ = need_of(pipelines[one.ref].group_of(one.stage))
        takes[one.key] = _Take(need.compute if one.device == "gpu" else 0.0, need.cpus or 1.0)
    return _Totals(gpus, cpus, stand_in, takes)
