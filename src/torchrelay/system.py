"""`torchrelay up`: server, coordinator and agent in one process, so that one machine decides as many hosts would.

Where another coordinator leads the namespace already, that one decides; this one stands by.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import redis

from torchrelay.config.pipeline import Pipeline
from torchrelay.coordinator.service import Coordinator
from torchrelay.errors import BrokerError
from torchrelay.host_service import HostService
from torchrelay.queues.fleet import FleetRecords
from torchrelay.up import Fleet
from torchrelay.workers.host_agent import Host, HostAgent
from torchrelay.workers.reconcile import Servable
from torchrelay.workers.slots import SlotReader, open_nvml

__all__ = ["System"]

log = logging.getLogger("torchrelay.up")
_LOOK_S = 1.0
# What is refused for so long is not only on its way from one place to another.
_HOPELESS_S = 3.0


class System(Fleet):
    """A fleet whose workers the coordinator places: `add` says what this machine can run. What is added as a single
    stage runs here besides, as in any `Fleet`."""

    def __init__(
        self, host: str, url: str | None = None, namespace: str | None = None, *, allow_cpu: bool = False
    ) -> None:
        super().__init__(url, namespace, allow_cpu=allow_cpu)
        self._name = f"{host}-{os.getpid()}"
        self._placed_on_cpu = allow_cpu
        self._servable: dict[str, Servable] = {}
        self._stop = threading.Event()
        self._look_at = 0.0
        self._hopeless_since: float | None = None
        self._hopeless = False

    def add(
        self,
        pipeline: Pipeline,
        overrides: dict[str, str] | None = None,
        *,
        stage: str | None = None,
        shard: int | None = None,
        device: str = "auto",
        group: str = "",
    ) -> None:
        """Adds a pipeline that the coordinator may place here, or one stage that runs here in any case."""
        before = len(self._plans)
        super().add(pipeline, overrides, stage=stage, device=device, shard=shard, group=group)
        if stage is None:
            del self._plans[before:]
            self._servable[pipeline.ref] = Servable(pipeline, overrides or {})

    def start(self) -> None:
        """Connects, registers the pipelines, and starts to decide and to run what is decided."""
        super().start()
        host = Host(self._name, SlotReader("auto", open_nvml()), allow_cpu=self._placed_on_cpu)
        agent = HostAgent(self.registry, self._broker.address, self.settings, host, self._servable, self.output)
        self._host = HostService(agent, self.registry)
        coordinator = Coordinator(self.registry, self._name, self.settings.priority_boost_ms_per_point)
        self._records = FleetRecords(self.registry.client, self.registry.control)
        agent.on_report = coordinator.poke
        coordinator.on_written = agent.poke
        self._host.start()
        self._decides = threading.Thread(target=coordinator.run, args=(self._stop,), name="torchrelay-coordinator")
        self._decides.start()

    def pipelines(self) -> list[tuple[Pipeline, dict[str, str]]]:
        """Each with what `--set` says of it."""
        return [(one.pipeline, one.overrides) for one in self._servable.values()]

    @property
    def nodes(self) -> set[str]:
        """Of every stage that may run here."""
        placed = {
            f"{one.pipeline.ref}/{name}"
            for one in self._servable.values()
            for group in one.pipeline.groups
            for name in group.names
        }
        return placed | super().nodes

    def running(self) -> bool:
        return not self._stop.is_set()

    def failed(self) -> bool:
        """Whether a stage has no worker and no place for one, here or on another host; the log says why."""
        now = time.monotonic()
        if self._hopeless or super().failed():
            return True
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_S
        why = self._refused()
        self._hopeless_since = (self._hopeless_since or now) if why else None
        self._hopeless = self._hopeless_since is not None and now - self._hopeless_since >= _HOPELESS_S
        if self._hopeless:
            log.error("%s", why)
        return self._hopeless

    def _refused(self) -> str:
        """Why a stage of ours runs nowhere, where that is so."""
        try:
            refused: Any = self._records.view().reasons.get("refused", [])
            mine = [one for one in refused if isinstance(one, dict) and one.get("ref") in self._servable]
            if not mine:
                return ""
            served = {node for report in self.registry.workers() for node in report.nodes}
        except (redis.RedisError, BrokerError, OSError):
            return ""
        for one in mine:
            if f"{one['ref']}/{one.get('stage')}" not in served:
                return f"stage {one.get('stage')!r} of {one['ref']} has no worker: {one.get('why')}"
        return ""

    def stop(self) -> None:
        """Asks every worker to drain."""
        super().stop()
        self._host.stop()

    def wait(self) -> int:
        """Waits for every worker; 0 when all drained, 1 when a stage had none."""
        status = super().wait()
        self._host.join()
        self._stop.set()
        self._decides.join()
        return max(status, int(self._hopeless))
