"""What the namespace tells of a run's stages while the run goes on: read now and then, kept for its figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import redis

from torchrelay.config.graph import is_runs
from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import BrokerError
from torchrelay.producer.runs.pace import StageFigures, stage_figures
from torchrelay.queues.registry import Registry, WorkerReport

__all__ = ["StageWatch"]

log = logging.getLogger("torchrelay.runs")
# A short run is looked at often enough to tell how long its rows waited.
_LEAST_S, _MOST_S, _SHARE = 0.1, 1.0, 0.05
_POLL_S, _SETTLED_S = 0.05, 1.0


class StageWatch:
    """Figures of the stages of a run graph and of its pipeline, which the same workers serve, from the first `look` on.

    How many rows stand at a stage, waiting or computed, is seen at each look. By Little's law the time that one stands
    there is their mean number, over how many come through in a second.
    """

    def __init__(self, twin: Pipeline) -> None:
        self._twin = twin
        self._refs = (twin.ref, twin.base.ref)
        self.reports: list[WorkerReport] = []
        self.stages: tuple[StageFigures, ...] = ()
        self._loads: dict[str, int] = {}
        self._loads_before: dict[str, int] = {}
        self._before: dict[str, WorkerReport] = {}
        self._stood_row_s: dict[str, float] = {}
        self._standing: dict[str, int] = {}
        self._began = 0.0
        self._at = 0.0

    def look(self, registry: Registry, *, now: bool = False) -> None:
        """Ten times a second at first, then once, unless it is wanted now. While the server is away, what was known
        stays."""
        every_s = min(max(_SHARE * (self._at - self._began), _LEAST_S), _MOST_S)
        if not now and time.monotonic() - self._at < every_s:
            return
        since, self._at = self._at, time.monotonic()
        try:
            reports, loads = registry.workers(), registry.loads()
            self._want_readers(registry, reports)
        except (BrokerError, redis.RedisError, OSError) as away:
            log.info("how the stages stand is not known: %s", away)
            return
        if not self._began:
            self._began, since, self._loads_before = self._at, self._at, loads
        self.reports, self._loads = reports, loads
        for report in reports:
            self._before.setdefault(report.worker, report)
        graph = self._twin.graph
        names = [n.name for n in sorted(graph.nodes, key=lambda n: n.rank)]
        for name in names:
            rows = self._count(loads, name, "ready_rows") + self._count(loads, name, "held_rows")
            mean = (self._standing.get(name, rows) + rows) / 2
            self._standing[name] = rows
            self._stood_row_s[name] = self._stood_row_s.get(name, 0.0) + mean * (self._at - since)
        seconds = self._at - self._began
        self.stages = tuple(stage_figures(names, self._refs, loads, reports, self._before, seconds, self._stood_row_s))

    def _want_readers(self, registry: Registry, reports: Sequence[WorkerReport]) -> None:
        """`up` serves what reads and writes when it is wanted."""
        served = {node for report in reports if report.state != "failed" for node in report.nodes}
        nodes = (f"{self._twin.ref}/{n.name}" for n in self._twin.graph.nodes if is_runs(n.name))
        if lacking := [node for node in nodes if node not in served]:
            registry.want(lacking)

    def last_look(self, registry: Registry) -> None:
        """When the run has ended: as soon as workers have told of all that they did, or a second later. They tell every
        two seconds, and soon after they have run out of work."""
        deadline = time.monotonic() + _SETTLED_S
        self.look(registry, now=True)
        while not self._settled() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self.look(registry, now=True)

    def _settled(self) -> bool:
        """Whether the jobs that workers tell of are as many as the server has counted."""
        return all(self._told(node.name) >= self._committed(node.name) for node in self._twin.graph.nodes)

    def _told(self, name: str) -> int:
        wanted = {f"{ref}/{name}" for ref in self._refs}
        mine = [w for w in self.reports if not wanted.isdisjoint(w.nodes)]
        return sum(w.jobs - (b.jobs if (b := self._before[w.worker]).jobs <= w.jobs else 0) for w in mine)

    def _committed(self, name: str) -> int:
        return self._count(self._loads, name, "committed") - self._count(self._loads_before, name, "committed")

    def _count(self, loads: dict[str, int], name: str, kind: str) -> int:
        return sum(loads.get(f"{ref}/{name}.{kind}", 0) for ref in self._refs)

    def nodes(self) -> Sequence[str]:
        """Every node of the run graph."""
        return [f"{self._twin.ref}/{n.name}" for n in self._twin.graph.nodes]
