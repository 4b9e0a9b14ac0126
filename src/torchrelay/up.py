"""Runs workers of this machine together: one supervisor thread each, one signal drains them all."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

import redis
from rich.console import RenderableType
from rich.live import Live

from torchrelay import terminal
from torchrelay.config.graph import is_runs
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.config.shards import PartConfig, written_names
from torchrelay.config.spec import StageConfig
from torchrelay.errors import BrokerError, ConfigError
from torchrelay.queues.connection import open_broker
from torchrelay.queues.groups import Member, check_group
from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import Registry
from torchrelay.workers.logs import set_up_logs
from torchrelay.workers.supervisor import Supervisor, WorkerPlan

log = logging.getLogger("torchrelay.up")
_DEVICE = re.compile(r"^(auto|cpu|cuda(:\d+)?)$")
_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0


class Fleet:
    """Workers to start. `start()` connects and starts them; `stop()` drains; `wait()` returns the exit status.

    With `make_current` False new jobs go on with the version that they take, unless there is none yet.
    """

    def __init__(
        self,
        url: str | None = None,
        namespace: str | None = None,
        *,
        allow_cpu: bool = False,
        make_current: bool = True,
        output: TextIO | None = None,
    ) -> None:
        self.settings = Settings.load(url=url, namespace=namespace)
        self._allow_cpu = allow_cpu
        self._make_current = make_current
        self.output = output
        self._pipelines: list[Pipeline] = []
        self._registered: set[str] = set()
        self._plans: list[WorkerPlan] = []
        self.supervisors: list[Supervisor] = []
        self._threads: list[threading.Thread] = []
        self._statuses: list[int] = []

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        self.wait()
        self.close()

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
        """Adds one stage, or every stage with `replicas.min` workers each; stages that are fused share a worker.

        Of a stage that is cut (`shards`) a worker of each part, or of number `shard`. With `mode: tensor` a worker is a
        group of ranks, all of them here, or number `shard` alone of the group of that name.
        """
        if pipeline.source is None:
            raise ConfigError(
                f"{pipeline.ref} is only in this process, and workers load it anew: save it in a module and name it "
                "as module.py:name, or write a YAML file"
            )
        names = None if stage is None else _names(pipeline, stage, shard)
        if not _DEVICE.match(device):
            raise ConfigError(f"device {device!r:.40} is none of auto, cpu, cuda, cuda:N")
        if device == "auto" and self._allow_cpu:
            device = "auto-cpu"
        self._pipelines.append(pipeline)
        if stage is not None and is_runs(stage):
            self._plans.append(WorkerPlan(pipeline, stage, "cpu", overrides or {}))
        for served in pipeline.groups:
            if names is None or not names.isdisjoint(served.names):
                count = 1 if stage is not None else served.replicas
                plan = WorkerPlan(pipeline, served.first.name, device, overrides or {})
                self._plans += [one for _ in range(count) for one in _ranks(plan, shard, group)]

    def start(self) -> None:
        """Connects, registers the pipelines and starts the workers."""
        self._broker = open_broker(self.settings.url)
        self.registry = Registry(self._broker.client, self.settings.namespace, self.settings.lanes)
        self.registry.open()
        self.launch()

    def launch(self) -> None:
        """Starts what was added since; once it was started itself."""
        for pipeline in self._pipelines:
            # Once: somebody may have made another version current since.
            if pipeline.ref not in self._registered:
                self.registry.register(pipeline, current=self._make_current)
                self._registered.add(pipeline.ref)
        for plan in self._plans[len(self.supervisors) :]:
            supervisor = Supervisor(plan, self.registry, self._broker.address, self.settings, self.output)
            thread = threading.Thread(target=self._run, args=(supervisor,), name=supervisor.name)
            self.supervisors.append(supervisor)
            self._threads.append(thread)
            thread.start()

    def pipelines(self) -> list[tuple[Pipeline, dict[str, str]]]:
        """Each with what `--set` says of it."""
        overrides = {plan.pipeline.ref: plan.overrides for plan in self._plans}
        return [(p, overrides.get(p.ref, {})) for p in {p.ref: p for p in self._pipelines}.values()]

    @property
    def nodes(self) -> set[str]:
        """`name@version/stage` of every stage that its workers serve."""
        return {node for plan in self._plans for node in plan.nodes}

    def not_current(self) -> list[str]:
        """`name@version` of the pipelines here that new jobs do not take."""
        current = set(self.registry.current().values())
        return [p.ref for p in self._pipelines if p.ref not in current]

    @property
    def url(self) -> str:
        return self._broker.url

    def _run(self, supervisor: Supervisor) -> None:
        try:
            status = supervisor.run()
        except Exception:
            log.exception("the supervisor of %s failed", supervisor.name)
            status = 1
        self._statuses.append(status)

    def running(self) -> bool:
        return any(t.is_alive() for t in self._threads)

    def stop(self) -> None:
        """Asks every worker to drain."""
        for supervisor in self.supervisors:
            supervisor.stop()

    def wait(self) -> int:
        """Waits for every worker; 0 when all drained, 1 when one did not load."""
        for thread in self._threads:
            thread.join()
        return max(self._statuses, default=0)

    def failed(self) -> bool:
        """Whether a worker gave up."""
        return any(self._statuses)

    def close(self) -> None:
        self._broker.close()


def _names(pipeline: Pipeline, stage: str, shard: int | None) -> set[str]:
    """The stages that are meant; raises ConfigError where there are none."""
    parts = pipeline.parts_of(stage)
    if not parts:
        if is_runs(stage):
            pipeline.for_runs()  # says why there are none
        known = ", ".join(written_names(pipeline.spec, pipeline.stage_names))
        raise ConfigError(f"{pipeline.source}: no stage {stage!r}; its stages are {known}")
    if shard is None:
        return set(parts)
    if any(s.name == stage and _is_tensor(s) for s in pipeline.spec.stages):
        return {stage}
    mine = [s for s in pipeline.spec.stages if isinstance(s, PartConfig) and s.of == stage]
    found = {s.name for s in mine if s.shard == shard and not s.combines}
    if not found:
        why = f"no shard {shard}; its parts are {', '.join(parts)}" if mine else "no shards; leave --shard out"
        raise ConfigError(f"{pipeline.source}: stage {stage!r} has {why}")
    return found


def _is_tensor(stage: StageConfig) -> bool:
    return stage.shards is not None and stage.shards.mode == "tensor"


def _ranks(plan: WorkerPlan, shard: int | None, group: str) -> list[WorkerPlan]:
    """The processes of one worker: itself, or the ranks of its group, each on a GPU of its own where there are some."""
    stage = plan.group.stages[0]
    if stage.shards is None or not _is_tensor(stage):
        return [plan]
    size = stage.shards.count
    if shard is not None and (not group or not 0 <= shard < size):
        raise ConfigError(
            f"stage {stage.name!r} has ranks 0 to {size - 1}: one of them is started with --shard K --group NAME, "
            "with the same new NAME for each"
        )
    if group and shard is None:
        raise ConfigError(f"--group {group!r:.60} joins ranks of several hosts; say with --shard which one this is")
    name = check_group(group) if group else f"g{new_token(12)}"
    of = f"{plan.pipeline.ref}/{stage.name}"
    found = []
    for rank in range(size) if shard is None else (shard,):
        device = plan.device
        if shard is None and device in ("cuda", "auto", "auto-cpu"):
            device = f"{device}:{rank}"
        elif shard is None and device.startswith("cuda:"):
            raise ConfigError(f"stage {stage.name!r}: its {size} ranks take a GPU each; say cuda, not {device}")
        found.append(replace(plan, device=device, member=Member(name, rank, size, of)))
    return found


def run_fleet(fleet: Fleet, *, live: bool, tick: Callable[[], object] = int) -> int:
    """Runs until SIGINT or SIGTERM, or until a worker gives up; returns the exit status. `tick` is called twice a
    second."""
    if live:
        fleet.output = terminal.above_the_table()
    set_up_logs(fleet.settings.log, fleet.output)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    fleet.start()
    terminal.err.print(f"workers on {fleet.url}, namespace {fleet.settings.namespace}; Ctrl-C drains", soft_wrap=True)
    for ref in fleet.not_current():
        terminal.err.print(
            f"{ref} gets no new jobs yet: another version is current; switch with: torchrelay deploy FILE",
            soft_wrap=True,
        )
    try:
        if live:
            with Live(console=terminal.out, auto_refresh=False) as view:
                while not stop.is_set() and fleet.running() and not fleet.failed():
                    _unless_away(tick)
                    view.update(_or_away(lambda: terminal.status_view(fleet.registry)), refresh=True)
                    stop.wait(_REFRESH_S)
        else:
            next_line = time.monotonic() + _LINE_EVERY_S
            while not stop.is_set() and fleet.running() and not fleet.failed():
                stop.wait(_REFRESH_S)
                _unless_away(tick)
                if time.monotonic() >= next_line:
                    next_line = time.monotonic() + _LINE_EVERY_S
                    terminal.err.print(_or_away(lambda: _status_line(fleet)), soft_wrap=True)
    finally:
        fleet.stop()
        status = fleet.wait()
        fleet.close()
    return status


def _status_line(fleet: Fleet) -> str:
    """The nodes that this fleet serves; what else the namespace holds is for `status`."""
    mine = fleet.nodes
    rows = [r for r in terminal.status_of(fleet.registry, 1)["nodes"] if r["node"] in mine]
    return "; ".join(f"{r['node']} {r['waiting_rows']} waiting {r['running_rows']} running" for r in rows)


def _unless_away(tick: Callable[[], object]) -> None:
    try:
        tick()
    except (redis.RedisError, BrokerError, OSError) as away:
        log.info("the server is away: %s", away)


def _or_away(show: Callable[[], RenderableType]) -> RenderableType:
    """What `show` returns; while the server is away, that. The workers wait for it by themselves."""
    try:
        return show()
    except (redis.RedisError, BrokerError, OSError) as error:
        return f"the server is away, the workers wait for it: {terminal.clean(error)}"
