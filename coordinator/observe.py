"""What the leader looks at before it decides: one snapshot of hosts, versions, workers and work, in few round trips."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import ConfigError
from torchrelay.queues import operate
from torchrelay.queues.fleet import FleetRecords, FleetView
from torchrelay.queues.registry import Registry, WorkerReport
from torchrelay.queues.waiting import Standings, standings

__all__ = ["Observer", "Snapshot"]

log = logging.getLogger("torchrelay.coordinator")
_CENSUS_S = 2.0
_DELAYED_SEEN = 20_000


@dataclass(frozen=True)
class Snapshot:
    """Everything at one moment. `pipelines` are those that a host has or is to run; `jobs` counts, by ref, what has not
    ended of those that take no new jobs, or of all where there are none such."""

    view: FleetView
    current: Mapping[str, str] = field(default_factory=dict)
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)
    workers: tuple[WorkerReport, ...] = ()
    standings: Standings = field(default_factory=lambda: Standings(0.0, {}))
    jobs: Mapping[str, int] = field(default_factory=dict)


class Observer:
    """Reads snapshots; keeps what it decoded while the bytes stay the same."""

    def __init__(self, registry: Registry, records: FleetRecords, boost_ms_per_point: float) -> None:
        self._registry = registry
        self._boost = boost_ms_per_point
        self._records = records
        self._decoded: dict[str, tuple[bytes, Pipeline | None]] = {}
        self._jobs: dict[str, int] = {}
        self._counted_at = float("-inf")

    def read(self) -> Snapshot:
        """Raises what the client raises while the server is away."""
        view = self._records.view()
        registry = self._registry
        current = registry.current()
        refs = {ref for host in view.hosts for ref in host.refs}
        refs |= {one.ref for state in view.desired.values() for one in state.workers}
        pipelines = self._pipelines(refs)
        self._count_jobs(set(pipelines) - set(current.values()))
        workers = tuple(registry.workers())
        return Snapshot(view, current, pipelines, workers, standings(registry, self._boost), dict(self._jobs))

    def _pipelines(self, refs: Iterable[str]) -> dict[str, Pipeline]:
        """As they were registered last: their tuning may have changed since."""
        asked = sorted(refs)
        if not asked:
            return {}
        texts: Any = self._registry.client.hmget(self._registry.control.records, asked)
        for ref, text in zip(asked, texts, strict=True):
            if text is not None and self._decoded.get(ref, (b"", None))[0] != text:
                self._decoded[ref] = (text, _decoded(ref, text))
        found = {ref: self._decoded[ref][1] for ref, text in zip(asked, texts, strict=True) if text is not None}
        return {ref: pipeline for ref, pipeline in found.items() if pipeline is not None}

    def _count_jobs(self, old: set[str]) -> None:
        """Only where there is a version that may have to drain: it looks at every queue."""
        now = time.monotonic()
        if not old:
            self._jobs, self._counted_at = {}, float("-inf")
        elif now >= self._counted_at + _CENSUS_S:
            self._counted_at = now
            self._jobs = {}
            for node, standing in operate.census(self._registry, _DELAYED_SEEN).items():
                ref = node.partition("/")[0]
                count = standing.waiting + standing.running + standing.delayed
                self._jobs[ref] = self._jobs.get(ref, 0) + count


def _decoded(ref: str, text: bytes) -> Pipeline | None:
    try:
        return Pipeline.from_record(text.decode())
    except (ConfigError, ValueError) as error:
        log.error("%s is given no workers: %s", ref, error)
        return None
