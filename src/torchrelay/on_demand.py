"""What reads and writes for `torchrelay up`: started when a run lacks it, ended when none has needed it for a while."""

from __future__ import annotations

import logging
import time

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import READ, WRITE
from torchrelay.errors import ConfigError
from torchrelay.run_here import readers
from torchrelay.up import Fleet
from torchrelay.workers.patience import Every
from torchrelay.workers.supervisor import Supervisor

__all__ = ["ReadersOnDemand"]

log = logging.getLogger("torchrelay.up")
_LOOK_S = 1.0
_IDLE_S = 60.0


class ReadersOnDemand:
    """For the pipelines of a fleet. `tick()` is to be called often, and looks once a second; while no run wants
    anything that costs the server two commands."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._due = Every(_LOOK_S)
        self._here: dict[str, list[Supervisor]] = {}
        self._needed_at: dict[str, float] = {}

    def tick(self) -> None:
        """Starts what is wanted and not here, asks what was idle for a minute to drain."""
        if not self._due.due():
            return
        wanted = self._fleet.registry.wanted()
        for pipeline, overrides in self._fleet.pipelines():
            for name in (READ, WRITE):
                node = _node(pipeline, name)
                if node in wanted:
                    self._needed_at[node] = time.monotonic()
                    if node not in self._here:
                        self._start(pipeline, name, node, overrides)
        if self._here:
            self._end_idle()

    def _start(self, pipeline: Pipeline, name: str, node: str, overrides: dict[str, str]) -> None:
        log.info("a run wants %s: it is served here", node)
        before = len(self._fleet.supervisors)
        for _ in range(readers()):
            self._fleet.add(pipeline, overrides, stage=name)
        self._fleet.launch()
        self._here[node] = self._fleet.supervisors[before:]

    def _end_idle(self) -> None:
        loads = self._fleet.registry.loads()
        now = time.monotonic()
        for node, supervisors in list(self._here.items()):
            if loads.get(f"{node}.ready_rows", 0) or loads.get(f"{node}.held_rows", 0):
                self._needed_at[node] = now
            elif now - self._needed_at[node] > _IDLE_S:
                log.info("no run has needed %s for %g s: it is served here no more", node, _IDLE_S)
                for supervisor in supervisors:
                    supervisor.stop()
                del self._here[node]


def _node(pipeline: Pipeline, name: str) -> str:
    try:
        return f"{pipeline.for_runs().ref}/{name}"
    except ConfigError:
        return ""  # it has no runs
