"""The part of an agent that makes its host run what the leader decided, and tells what the host offers.

Every two seconds, and when it is poked, it reports, hears the desired state, and starts and drains workers until they
match. How often it is poked, or whether at all, changes nothing but the time. While the server is away, the workers run
on as they are. Versions come from the files that the agent was given, and from nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

import redis

from torchrelay.config.fleet import Assignment, Desired, HostReport
from torchrelay.config.settings import Settings
from torchrelay.errors import BrokerError, ConfigError, TorchrelayError
from torchrelay.queues.connection import connect
from torchrelay.queues.fleet import FleetRecords
from torchrelay.queues.groups import Member
from torchrelay.queues.job import host_text
from torchrelay.queues.keys import new_token
from torchrelay.queues.placement import open_home
from torchrelay.queues.registry import Registry
from torchrelay.workers.reconcile import Reconciler, Servable
from torchrelay.workers.slots import ORDER, Offer, SlotReader
from torchrelay.workers.supervisor import Supervisor, WorkerPlan

__all__ = ["EVERY_S", "Host", "HostAgent"]

log = logging.getLogger("torchrelay.agent")
EVERY_S = 2.0
_STANDBY_S = 0.5
_PATIENCE_S = 3.0
_LOOK_S = 0.25
_NEVER = -math.inf


@dataclass(frozen=True)
class Host:
    """Who this host is: its name, the labels that it was given, what it offers."""

    name: str
    slots: SlotReader
    labels: tuple[str, ...] = ()
    allow_cpu: bool = False


@dataclass
class _Worker:
    """One supervisor and its thread; `status` is None while it runs."""

    supervisor: Supervisor
    thread: threading.Thread
    status: int | None = None


class HostAgent:
    """Runs what its host is to run. `start()` begins; `stop()` drains, and `join()` waits for that.

    While another agent of this name is alive it runs nothing and stands by: it takes the name once that one is silent.

    Args:
        registry: open.
        url, settings: for the workers.
        host: who it is, and what it offers.
        servable: what it can run, by ref.
        output: where its workers' logs go; None is standard error.
    """

    def __init__(
        self,
        registry: Registry,
        url: str,
        settings: Settings,
        host: Host,
        servable: Mapping[str, Servable],
        output: TextIO | None = None,
    ) -> None:
        self._registry = registry
        # A link that was cut is back for the agent as soon as it is back.
        self._client = connect(url, timeout_s=_PATIENCE_S)
        self._records = FleetRecords(self._client, registry.control)
        self._url = url
        self._settings = settings
        self._host = host
        self._servable = dict(servable)
        self._output = output
        self.incarnation = new_token(8)
        self._host_id = ""
        self._wake = threading.Event()
        self._passed = threading.Condition()
        self._passes = 0
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._workers: dict[str, _Worker] = {}
        self._reconciler = Reconciler(self._servable, self._redis_time)
        self._desired: Desired | None = None
        self._heard_at = _NEVER
        self._offer = Offer(0.0, 0, 0)
        self._standby = False
        self.on_report: Callable[[], object] = int  # for a coordinator in the same process: what it may now decide

    @property
    def name(self) -> str:
        return self._host.name

    @property
    def supervisors(self) -> list[Supervisor]:
        """Of the workers that run now."""
        return [worker.supervisor for worker in list(self._workers.values())]

    def start(self) -> None:
        """Raises ConfigError for slots that are not there."""
        os.environ.update(ORDER)  # of the workers that it will start
        self._host.slots.check()
        for one in self._servable.values():
            self._registry.register(one.pipeline, current=False)
        try:
            home = open_home(self._registry, self._settings)
            self._host_id = "" if home is None else host_text(home.host)
        except (redis.RedisError, OSError) as error:
            log.warning("large columns go through Redis: %s", error)
        self._hear()
        self._thread = threading.Thread(target=self._loop, name="torchrelay-host-agent")
        self._thread.start()

    def poke(self, wait_s: float = 0.0) -> int:
        """Asks for a pass now, and waits for its end so long; the number of the state that was last made true."""
        with self._passed:
            before = self._passes
            self._heard_at = _NEVER
            self._wake.set()
            # The pass that is under way may have read before this was asked.
            self._passed.wait_for(lambda: self._passes >= before + 2 or self._stopping, wait_s)
        return self._reconciler.applied

    def stop(self) -> None:
        """Asks every worker to drain, and tells the leader to place nothing here; any thread may call it."""
        self._stopping = True
        self._heard_at = _NEVER
        self._wake.set()

    def join(self) -> None:
        """Waits until all have drained, and the host has taken its leave."""
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while not (self._stopping and not self._workers):
            try:
                self._pass()
            except Exception:
                log.exception("the host could not be brought to what it is to run; it is tried again")
            with self._passed:
                self._passes += 1
                self._passed.notify_all()
            self._wake.wait(_LOOK_S)
            self._wake.clear()
        self._tell(leave=True)
        self._client.close()

    def _pass(self) -> None:
        if time.monotonic() >= self._heard_at + (_STANDBY_S if self._standby else EVERY_S):
            self._hear()
        self._gather()
        turn = self._reconciler.turn(None if self._stopping else self._desired, self._offer, time.monotonic())
        for worker_id in turn.drain:
            log.info("%s drains", self._workers[worker_id].supervisor.name)
            self._workers[worker_id].supervisor.stop()
        for one in turn.start:
            try:
                self._start(one)
            except Exception as error:
                log.exception("%s on %s could not be started", one.stage, one.slot)
                self._reconciler.ended(one.id, f"{type(error).__name__}: {error}", time.monotonic())
                self._heard_at = _NEVER
        if turn.news:
            self._heard_at = _NEVER

    def _hear(self) -> None:
        """Reports, and hears the desired state."""
        self._offer = self._host.slots.read()
        self._heard_at = time.monotonic()
        self._tell()

    def _tell(self, *, leave: bool = False) -> None:
        offer = self._offer
        report = HostReport(
            name=self.name,
            incarnation=self.incarnation,
            pid=os.getpid(),
            cpus=offer.cpus,
            memory=offer.memory,
            free_memory=offer.free_memory,
            host_id=self._host_id,
            gpus=offer.gpus,
            links=offer.links,
            labels=self._host.labels,
            refs=tuple(sorted(self._servable)),
            draining=self._stopping,
            applied=self._reconciler.applied,
            trouble=self._reconciler.trouble(),
            allow_cpu=self._host.allow_cpu,
        )
        try:
            heard = self._records.beat(report, leave=leave)
        except (BrokerError, redis.RedisError, OSError) as error:
            log.warning("the host cannot report; its workers run on as they are: %s", error)
            return
        if bool(heard.owner) != self._standby:
            self._standby = bool(heard.owner)
            if self._standby:
                log.warning("another agent has the name %r (%s); this one stands by", self.name, heard.owner)
            else:
                log.info("the name %r is free; this agent has it now", self.name)
        self._desired = None if self._standby else heard.desired
        if not leave:
            self.on_report()

    def _gather(self) -> None:
        """Takes note of workers that ended, and of those that are ready."""
        for worker_id, worker in list(self._workers.items()):
            if worker.status is None:
                if worker.supervisor.state == "ready":
                    self._reconciler.ready(worker_id, time.monotonic())
                continue
            worker.thread.join()
            del self._workers[worker_id]
            failure = str(worker.supervisor.error or "its supervisor failed; see the log") if worker.status else ""
            if self._reconciler.ended(worker_id, failure, time.monotonic()):
                self._heard_at = _NEVER

    def _redis_time(self) -> float:
        with contextlib.suppress(redis.RedisError, OSError):
            seconds, micros = self._registry.client.time()
            return seconds + micros / 1e6
        return time.time()

    def _start(self, one: Assignment) -> None:
        servable = self._servable[one.ref]
        member = Member(one.group, one.shard, one.shards, f"{one.ref}/{one.stage}") if one.shards > 1 else None
        plan = WorkerPlan(servable.pipeline, one.stage, one.slot, servable.overrides, one.id, member)
        supervisor = Supervisor(plan, self._registry, self._url, self._settings, self._output)
        thread = threading.Thread(target=self._run, args=(one.id, supervisor), name=supervisor.name)
        self._workers[one.id] = _Worker(supervisor, thread)
        log.info("%s on %s: %s", supervisor.name, one.slot, one.why or "as the leader decided")
        thread.start()

    def _run(self, worker_id: str, supervisor: Supervisor) -> None:
        status = 1
        try:
            status = supervisor.run()
        except (TorchrelayError, ConfigError) as error:
            log.error("the supervisor of %s failed: %s", supervisor.name, error)
        except Exception:
            log.exception("the supervisor of %s failed", supervisor.name)
        self._workers[worker_id].status = status
        self._wake.set()
