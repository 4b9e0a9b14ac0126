"""Workers of this machine for one run: those that its pipeline lacks, from the run's start to its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import READ, WRITE
from torchrelay.errors import NoWorkers, StageLoadError
from torchrelay.queues.registry import Registry
from torchrelay.up import Fleet
from torchrelay.workers.logs import set_up_logs
from torchrelay.workers.patience import Every

__all__ = ["missing_stages", "readers", "workers_here"]

_LOAD_S = 600.0
_LOOK_S = 0.05
_MISSING_EVERY_S = 1.0
_PROCESSORS_PER_READER = 4
_MOST_READERS = 8


def missing_stages(registry: Registry, pipeline: Pipeline) -> list[str]:
    """What no living worker serves of a pipeline and of its reading and writing; of fused stages the first."""
    missing = set(registry.unserved(pipeline.for_runs()))
    firsts = [group.first.name for group in (*pipeline.groups, *pipeline.for_runs().groups)]
    return [name for name in dict.fromkeys(firsts) if not missing.isdisjoint(pipeline.group_of(name).names)]


@contextmanager
def workers_here(
    fleet: Fleet,
    registry: Registry,
    pipeline: Pipeline,
    overrides: dict[str, str],
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], None]]:
    """Lets `fleet`, which is empty, start workers for the stages that nobody serves, and waits until they are ready;
    they drain afterwards.

    Gives a function to call now and then. It starts workers for stages that are served no more: of those that were
    killed a moment ago, the namespace learns only later. It raises StageLoadError once one of this machine gave up.
    Raises that too, and ConfigError for a pipeline that workers cannot load. `tick` is called while they load; what it
    raises ends them.
    """
    set_up_logs(fleet.settings.log, fleet.output)
    due = Every(_MISSING_EVERY_S)

    def start_missing() -> None:
        for name in missing_stages(registry, pipeline):
            group = pipeline.group_of(name)
            if not fleet.nodes.isdisjoint(f"{pipeline.ref}/{mine}" for mine in group.names):
                continue  # its worker is here, and comes back by itself
            for _ in range(readers() if name in (READ, WRITE) else group.replicas):
                fleet.add(pipeline, overrides, stage=name)
        fleet.launch()

    def look() -> None:
        if fleet.failed():
            raise StageLoadError("a worker of this machine gave up; what it logged says why")
        if due.due():
            start_missing()

    with fleet:
        start_missing()
        _await(fleet, look, tick)
        yield look


def _await(fleet: Fleet, look: Callable[[], None], tick: Callable[[], None]) -> None:
    deadline = time.monotonic() + _LOAD_S
    while not fleet.nodes <= {n for r in fleet.registry.workers() if r.state == "ready" for n in r.nodes}:
        look()
        tick()
        if time.monotonic() > deadline:
            raise NoWorkers(f"the workers of this machine were not ready within {_LOAD_S:g} s")
        time.sleep(_LOOK_S)


def readers() -> int:
    """How many processes read, and how many write."""
    return min(max((os.cpu_count() or 1) // _PROCESSORS_PER_READER, 1), _MOST_READERS)
