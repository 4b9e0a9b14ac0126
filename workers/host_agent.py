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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import redis

from torchrelay.config.fleet import CPU, Assignment, Desired, HostReport, SlotTrouble, set_aside_s
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import BrokerError, ConfigError, TorchrelayError
from torchrelay.queues.connection import connect
from torchrelay.queues.fleet import FleetRecords
from torchrelay.queues.groups import Member
from torchrelay.queues.job import host_text
from torchrelay.queues.keys import new_token
from torchrelay.queues.placement import open_home
from torchrelay.queues.registry import Registry
from torchrelay.workers.slots import ORDER, Offer, SlotReader
from torchrelay.workers.supervisor import Supervisor, WorkerPlan

__all__ = ["EVERY_S", "Host", "HostAgent", "Servable"]

log = logging.getLogger("torchrelay.agent")
EVERY_S = 2.0
_STANDBY_S = 0.5
_PATIENCE_S = 3.0
_LOOK_S = 0.25
_NEVER = -math.inf
_FORGOTTEN_S = 3600.0
_MOST_REASON = 500


@dataclass(frozen=True)
class Servable:
    """A version that this host can run: its pipeline as it was loaded from a file, and what `--set` said of it."""

    pipeline: Pipeline
    overrides: dict[str, str] = field(default_factory=dict)


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

    assignment: Assignment
    supervisor: Supervisor
    thread: threading.Thread
    status: int | None = None
    leaving: bool = False
    began: float = field(default_factory=time.monotonic)


@dataclass
class _Failures:
    """How often a stage failed on a slot, when last (by Redis's clock, and by ours), and why."""

    count: int = 0
    since: float = 0.0
    at: float = -math.inf
    reason: str = ""

    def may_start(self) -> bool:
        return not self.count or time.monotonic() >= self.at + set_aside_s(self.count)


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
        self._failures: dict[tuple[str, str, str], _Failures] = {}
        self._desired: Desired | None = None
        self._applied = 0
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

    def trouble(self) -> tuple[SlotTrouble, ...]:
        """What failed here lately."""
        return tuple(
            SlotTrouble(slot, ref, stage, failed.count, failed.since, failed.reason)
            for (slot, ref, stage), failed in sorted(self._failures.items())
        )

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
        return self._applied

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
        wanted = {} if self._stopping else self._wanted()
        for worker_id, worker in self._workers.items():
            now = wanted.get(worker_id)
            if now is not None and worker.assignment.is_worker(now):
                worker.assignment = now
            elif not worker.leaving:
                log.info("%s on %s drains", worker.supervisor.name, worker.assignment.slot)
                worker.leaving = True
                worker.supervisor.stop()
        started = [self._start(one) for one in wanted.values() if one.id not in self._workers]
        done = self._desired is not None and all(started) and not any(w.leaving for w in self._workers.values())
        if self._desired is not None and done and self._applied != self._desired.number:
            self._applied = self._desired.number
            self._heard_at = _NEVER  # others may wait for it

    def _wanted(self) -> dict[str, Assignment]:
        return {} if self._desired is None else {one.id: one for one in self._desired.workers}

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
            applied=self._applied,
            trouble=self.trouble(),
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
        """Takes note of workers that ended, and of stages that run again."""
        for worker_id, worker in list(self._workers.items()):
            if worker.status is None:
                if worker.supervisor.state == "ready":
                    self._failures.pop(_key(worker.assignment), None)
                continue
            worker.thread.join()
            del self._workers[worker_id]
            if worker.status and not worker.leaving:
                reason = str(worker.supervisor.error or "its supervisor failed; see the log")
                self._fail(worker.assignment, reason, worker.began)
        now = time.monotonic()
        for key, failed in list(self._failures.items()):
            if now > failed.at + _FORGOTTEN_S:
                del self._failures[key]

    def _fail(self, one: Assignment, reason: str, began: float = math.inf) -> None:
        failed = self._failures.setdefault(_key(one), _Failures())
        failed.count += began > failed.at  # of several that were started together, the first one counts
        failed.at = time.monotonic()
        failed.reason = reason[:_MOST_REASON]
        failed.since = time.time()
        with contextlib.suppress(redis.RedisError, OSError):
            seconds, micros = self._registry.client.time()
            failed.since = seconds + micros / 1e6
        self._heard_at = _NEVER  # the leader is to hear of it now
        log.error(
            "%s of %s is not started on %s for %g s: %s",
            one.stage,
            one.ref,
            one.slot,
            set_aside_s(failed.count),
            reason,
        )

    def _start(self, one: Assignment) -> bool:
        """Whether it runs now, or is not to for a reason that the leader knows."""
        failed = self._failures.get(_key(one))
        if failed is not None and not failed.may_start():
            return True
        why = self._unfit(one)
        if why:
            self._fail(one, why)
            return True
        if not self._room(one):
            return False
        servable = self._servable[one.ref]
        member = Member(one.group, one.shard, one.shards, f"{one.ref}/{one.stage}") if one.shards > 1 else None
        plan = WorkerPlan(servable.pipeline, one.stage, one.slot, servable.overrides, one.id, member)
        supervisor = Supervisor(plan, self._registry, self._url, self._settings, self._output)
        thread = threading.Thread(target=self._run, args=(one.id, supervisor), name=supervisor.name)
        self._workers[one.id] = _Worker(one, supervisor, thread)
        log.info("%s on %s: %s", supervisor.name, one.slot, one.why or "as the leader decided")
        thread.start()
        return True

    def _unfit(self, one: Assignment) -> str:
        servable = self._servable.get(one.ref)
        if servable is None:
            mine = ", ".join(sorted(self._servable)) or "nothing"
            return f"this agent has {mine} and not {one.ref}: its files differ; start it with the files of that version"
        if one.stage not in servable.pipeline.stage_names:
            return f"{one.ref} has no stage {one.stage!r:.80}"
        if one.slot != CPU and one.slot not in {gpu.slot for gpu in self._offer.gpus}:
            return f"this host has no slot {one.slot!r:.80}"
        return ""

    def _room(self, one: Assignment) -> bool:
        """Whether what still drains leaves room; without any that drains, the leader knows what fits."""
        beside = [w for w in self._workers.values() if w.assignment.slot == one.slot]
        if not any(worker.leaving for worker in beside):
            return True
        needs = [one.need, *(worker.assignment.need for worker in beside)]
        gpu = next((gpu for gpu in self._offer.gpus if gpu.slot == one.slot), None)
        if gpu is None:
            return sum(need.cpus for need in needs) <= self._offer.cpus + 1e-6
        return sum(need.compute for need in needs) <= 1 + 1e-6 and sum(need.memory for need in needs) <= gpu.memory

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


def servable_of(pipelines: Sequence[tuple[Pipeline, dict[str, str]]]) -> dict[str, Servable]:
    """What an agent can run, of the files that it was given."""
    return {pipeline.ref: Servable(pipeline, overrides) for pipeline, overrides in pipelines}


def _key(one: Assignment) -> tuple[str, str, str]:
    return one.slot, one.ref, one.stage
