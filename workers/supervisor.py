"""Keeps one child at work: starts it, renews its leases while it makes progress, ends it when it hangs, retires it when
it dies. Knows neither torch nor CUDA. With `output`, what the child logs goes there instead of to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TextIO

import redis

from torchrelay.config.fusing import Group
from torchrelay.config.graph import is_runs
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import BrokerError, ConfigError, DeviceError, StageLoadError, WorkerError
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.groups import Kind, Member
from torchrelay.queues.job import Failure, host_text
from torchrelay.queues.keys import new_token
from torchrelay.queues.placement import MOVED, open_home, wanted_by
from torchrelay.queues.registry import Registry, WorkerReport, run
from torchrelay.queues.spiller import Spiller
from torchrelay.queues.upkeep import Upkeep
from torchrelay.workers.child import EXIT_BROKER, EXIT_CONFIG, EXIT_DEVICE, EXIT_DRAINED, EXIT_FAILED, Orders
from torchrelay.workers.device_deaths import DeviceDeaths
from torchrelay.workers.group import GroupWatch
from torchrelay.workers.progress import DRAINING, LOADING, STATES, Progress, ProgressPage, Tallies

log = logging.getLogger("torchrelay.supervisor")
HEARTBEAT_S = 2.0
_NEWS_S = 0.3
GRACE_S = 30.0
_LOOK_S = 0.25
_LOOK_LOADING_S = 0.05
_KEEP_S = 1.0
_LOADS_BEFORE_BREAKER = 3
# A child between forwards may wait half a minute for the server, twice.
_SILENT_S = 90.0
_DEVICE_PAUSE_S = 0.5
_WINDOWS_IN_HAND = 16
# How an epoch of a group ends without any fault of the jobs under way, or of the stage.
_NO_FAULT = ("room", "vanished", "drained")


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to run: which stage of which pipeline, and where. It serves what is fused to the stage as well.
    `assignment` is the coordinator's decision by which it runs, '' for none. `member` is its place in a group of
    ranks."""

    pipeline: Pipeline
    stage: str
    device: str = "auto"
    overrides: dict[str, str] = field(default_factory=dict)
    assignment: str = ""
    member: Member | None = None

    @property
    def group(self) -> Group:
        """All that the worker serves."""
        return self.pipeline.group_of(self.stage)

    @property
    def home(self) -> Pipeline:
        """The pipeline whose graph has the stage: its own, or for what reads and writes that of its runs."""
        return self.pipeline.for_runs() if is_runs(self.stage) else self.pipeline

    @property
    def nodes(self) -> list[str]:
        """`pipeline@version/stage` of each of these stages, then the same in the graph of the pipeline's runs."""
        twin = self.home.twin
        refs = [self.home.ref] if twin is None else [self.home.ref, twin.ref]
        return [f"{ref}/{name}" for ref in refs for name in self.group.names]


class Supervisor:
    """Runs one worker until `stop()` or until it cannot load. `run()` blocks; call it from any thread."""

    def __init__(
        self, plan: WorkerPlan, registry: Registry, url: str, settings: Settings, output: TextIO | None = None
    ) -> None:
        self._plan = plan
        self._registry = registry
        self._url = url
        self._settings = settings
        self._output = output
        self._upkeep = Upkeep(registry)
        self._home: ArenaHome | None = None
        self._keeper: ArenaKeeper | None = None
        self._spiller: Spiller | None = None
        self._changed = threading.Event()
        self._stopping = False
        self._child: subprocess.Popen[bytes] | None = None
        self._page: ProgressPage | None = None
        self._incarnation = ""
        self._started_at = self._load_s = 0.0
        self._tallies = Tallies()
        self._next_beat = 0.0
        self._told_jobs = 0
        self._next_renewal = 0.0
        self._keep_at = 0.0
        group = plan.group
        number = plan.device.partition(":")[2] or "0"
        chosen = {"gpu": f"cuda:{number}", "cpu": "cpu"}[group.stages[0].device]
        self._device = chosen if plan.device.startswith("auto") else plan.device
        # Of all entrances: a job that stands at a later stage may come in larger batches than the first one's.
        self._timeout_s = max(group.behind(passed).timeout_s for passed in range(len(group.nodes)))
        self._max_rows = group.stages[0].batch.max_rows
        self.name = f"{socket.gethostname()}-{os.getpid()}-{'+'.join(group.names)}-{new_token(4)}"
        self.nodes = plan.nodes
        # Claimed, being made ready, ready, launched, and on their way back to the server.
        windows = _WINDOWS_IN_HAND + (group.stages[0].batch.ahead or 0)
        self._jobs_in_hand = max(stage.batch.window_rows for stage in group.stages) * windows
        self._deaths = DeviceDeaths()
        self._row_cap = 0
        self._epoch, self._hangs = 0, False
        self._watchers = GroupWatch(registry, plan.member, self.name, self._changed.set) if plan.member else None
        self.error: WorkerError | None = None
        self.state = "loading"

    @property
    def child_pid(self) -> int:
        """The process that computes now; 0 before the first."""
        return self._child.pid if self._child is not None else 0

    def stop(self) -> None:
        """Asks for a drain: the child finishes its batch, gives the rest back, and `run()` returns."""
        self._stopping = True
        if self._watchers is not None:
            self._watchers.drain()
        self._changed.set()

    def run(self) -> int:
        """0 after a drain; 1 when the stage cannot start, failed to load three times in a row, or its device fails
        whatever it computes (`error` says why)."""
        failed_loads, pause_s = 0, 0.25
        try:
            self._open_arena()
            if self._watchers is not None:
                self._watchers.start()
            while not self._stopping:
                if self._watchers is not None and not self._form(self._watchers):
                    return 1 if self.error is not None else 0
                status, was_ready = self._live_once()
                if self._stopping or status == EXIT_DRAINED:
                    break
                # While the server is away nothing can be said about the stage.
                failed_loads = 0 if was_ready else failed_loads + (status != EXIT_BROKER and not self._spared())
                if failed_loads >= _LOADS_BEFORE_BREAKER or status == EXIT_CONFIG:
                    self.error = StageLoadError(
                        f"stage {self._plan.stage!r} does not start (exit status {status}); its reason is logged above"
                    )
                    log.error("%s", self.error)
                    self._give_up_group()
                    return 1
                if self._deaths.bad_device:
                    self.error = DeviceError(
                        f"device {self._device} at {socket.gethostname()} failed under several jobs in a row; "
                        f"check it. The worker of stage {self._plan.stage!r} stops, and leaves the jobs to others"
                    )
                    log.error("%s", self.error)
                    self._give_up_group()
                    return 1
                pause_s = 0.1 if was_ready else min(pause_s * 2, 10.0)
                # Another worker, with a device that does not fail, may take the suspects meanwhile.
                self._pause(_DEVICE_PAUSE_S if status == EXIT_DEVICE else pause_s)
        finally:
            if self._watchers is not None:
                self._watchers.stop()
            self._beat(Progress(), "gone")
            self._keep_arena(last=True)
        return 0

    def _form(self, watchers: GroupWatch) -> bool:
        """Waits until all ranks are there; False when this one is to end, with `error` if that is a failure."""
        told_at = 0.0
        while not self._stopping:
            state = watchers.ready()
            if watchers.refused is not None:
                self.error = StageLoadError(str(watchers.refused))
            elif (
                watchers.state is not None
                and watchers.state.kind == "hopeless"
                and watchers.state.epoch > watchers.joined
            ):
                self.error = StageLoadError(f"stage {self._plan.stage!r}: {watchers.state.why}")
            if self.error is not None:
                log.error("%s", self.error)
                return False
            if watchers.state is not None and watchers.state.draining:
                self._stopping = True
                return False
            if state is not None:
                self._epoch, self._row_cap = state.epoch, state.cap
                return True
            if time.monotonic() >= told_at + HEARTBEAT_S:
                told_at = time.monotonic()
                self._beat(Progress(), "loading")
            self._pause(_LOOK_LOADING_S)
        return False

    def _spared(self) -> bool:
        """Whether the group ended for what is no failure of its stage."""
        state = None if self._watchers is None else self._watchers.state
        return state is not None and state.kind in _NO_FAULT and state.epoch == self._epoch + 1

    def _give_up_group(self) -> None:
        """Nobody waits for a rank that does not come back."""
        if self._watchers is not None and self._watchers.state is not None:
            rank = self._watchers.member.rank
            self._watchers.end(
                self._watchers.state.epoch, "hopeless", f"rank {rank} of its group gave up: {self.error}"
            )

    def _end_epoch(self, status: int) -> None:
        watchers = self._watchers
        if watchers is None:
            return
        kind: Kind = "drained" if status == EXIT_DRAINED else "hung" if self._hangs else "died"
        what = "did not end its forward in time" if self._hangs else f"ended with status {status}"
        watchers.end(self._epoch, kind, f"rank {watchers.member.rank} at {socket.gethostname()} {what}")
        state = watchers.state
        if state is not None and state.epoch == self._epoch + 1 and not self._stopping:
            log.warning("epoch %d of group %s is over: %s", self._epoch, watchers.member.group, state.why)

    def _open_arena(self) -> None:
        """Each supervisor also keeps what dead processes of this host left in shared memory. One of them copies what
        other hosts wait for."""
        try:
            self._home = open_home(self._registry, self._settings)
        except (redis.RedisError, OSError) as error:
            log.warning("large columns go through Redis: %s", error)
        if self._home is not None:
            self._keeper = ArenaKeeper(self._home, wanted_by(self._registry))
            self._spiller = Spiller(self._registry, self._home)
            self._spiller.start()

    def _keep_arena(self, *, last: bool = False) -> None:
        if self._keeper is None or not (last or time.monotonic() >= self._keep_at):
            return
        self._keep_at = time.monotonic() + _KEEP_S
        if last and self._spiller is not None:
            self._spiller.stop()
        try:
            self._keeper.close() if last else self._keeper.tick()
        except (OSError, ConfigError) as error:
            log.warning("shared memory of dead processes was not looked at: %s", error)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < deadline:
            self._upkeep.tick()
            self._keep_arena()
            time.sleep(0.05)

    def _live_once(self) -> tuple[int, bool]:
        """Runs one child from start to end: (exit status, whether it was ever ready)."""
        self._incarnation = new_token(8)
        self._page = page = ProgressPage.create(self._jobs_in_hand)
        self._started_at, self._load_s = time.time(), 0.0
        self._next_renewal = 0.0
        child = self._start_child(page)
        try:
            self._watch(child, page)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            with contextlib.suppress(OSError):
                child.stdin.close()  # type: ignore[union-attr]  # opened by PIPE
        last = page.read(dead=True)
        was_ready = last.state > 0
        page.close(unlink=True)
        status = child.returncode
        if status == EXIT_DRAINED and last.state != DRAINING:
            status = EXIT_FAILED  # the stage ended the process, in good order or so it says
        self._end_epoch(status)
        if status != EXIT_DRAINED:
            if not self._stopping:
                log.warning("the worker ended with status %s", status, extra={"fields": {"worker": self.name}})
            self._retire(replace(last, started=b"") if self._spared() else last, status)
        if status == EXIT_DEVICE:
            self._deaths.note(last.started, last.batches)
        else:
            self._deaths.clear()
        return status, was_ready

    def _start_child(self, page: ProgressPage) -> subprocess.Popen[bytes]:
        plan = self._plan
        orders = Orders(
            pipeline=plan.pipeline.source or "",
            ref=plan.pipeline.ref,
            overrides=plan.overrides,
            stages=plan.group.names,
            url=self._url,
            namespace=self._settings.namespace,
            lanes=self._settings.lanes,
            lease_ms=self._settings.lease_ms,
            device=plan.device,
            incarnation=self._incarnation,
            worker=self.name,
            page=str(page.path),
            log=self._settings.log,
            arena_bytes=self._settings.arena_bytes,
            arena_dir=self._settings.arena_dir,
            device_arena_bytes=self._settings.device_arena_bytes,
            run_writer=self._settings.run_writer,
            **self._place(),
        )
        command = [sys.executable, "-m", "torchrelay.workers.child"]
        stderr = None if self._output is None else subprocess.PIPE
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr, cwd=Path.cwd())
        if child.stderr is not None:
            threading.Thread(target=self._copy_output, args=(child.stderr,), daemon=True).start()
        self._child = child
        assert child.stdin is not None  # asked for by PIPE
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(orders.encode().encode())
            child.stdin.flush()
        threading.Thread(target=self._announce_exit, args=(child,), daemon=True).start()
        return child

    def _place(self) -> dict[str, Any]:
        """What the child is told of its group."""
        member = self._plan.member
        if member is None:
            return {}
        return {
            "group": member.group,
            "rank": member.rank,
            "ranks": member.size,
            "epoch": self._epoch,
            "group_address": self._settings.group_address,
            "row_cap": self._row_cap,
        }

    def _copy_output(self, lines: IO[bytes]) -> None:
        assert self._output is not None  # only then is the child's output a pipe
        with lines:
            for line in lines:
                self._output.write(line.decode(errors="replace"))

    def _announce_exit(self, child: subprocess.Popen[bytes]) -> None:
        child.wait()
        self._changed.set()

    def _watch(self, child: subprocess.Popen[bytes], page: ProgressPage) -> None:
        kill_at, told, began, self._hangs = float("inf"), "", time.monotonic(), False
        while child.poll() is None:
            if self._watchers is not None:
                if self._watchers.over(self._epoch):
                    return
                self._stopping = self._stopping or (self._watchers.state is not None and self._watchers.state.draining)
            if self._stopping and kill_at == float("inf"):
                # The other ranks are needed until rank 0 has finished, which then ends them.
                if self._plan.member is None or self._plan.member.rank == 0:
                    child.send_signal(signal.SIGTERM)
                kill_at = time.monotonic() + GRACE_S
            if time.monotonic() > kill_at:
                log.error("the worker did not drain in %d s; ending it", GRACE_S)
                return
            progress = page.read()
            if self._stopping and progress.state == LOADING:
                return  # it holds no jobs, and loading may take minutes
            if self._hung(progress):
                self._hangs = True
                self._dump_stack(child)
                return
            self._renew(progress)
            if not self._load_s and progress.state != LOADING:
                self._load_s = time.monotonic() - began
            self._tallies = page.tallies()
            state = "draining" if self._stopping else STATES[progress.state]
            if state != told or time.monotonic() >= self._next_beat or self._has_news(progress):
                self._beat(progress, state)
                told = state
            self._upkeep.tick()
            self._keep_arena()
            self._changed.wait(_LOOK_LOADING_S if progress.state == LOADING else _LOOK_S)
            self._changed.clear()

    def _has_news(self, progress: Progress) -> bool:
        """Whether jobs ended that nobody was told of, and none is computed: whoever waited for them counts by them."""
        told_long_ago = time.monotonic() >= self._next_beat - HEARTBEAT_S + _NEWS_S
        return told_long_ago and progress.jobs != self._told_jobs and not progress.forward_since

    def _hung(self, progress: Progress) -> bool:
        """Whether a forward is past its time-out, or a loaded child has said nothing for much longer than it may."""
        now = time.monotonic()
        if self._plan.member is not None and self._plan.member.rank:
            return False  # rank 0's supervisor minds the forwards of all, and between them there may be days
        if progress.forward_since > 0:
            return now - progress.forward_since > self._timeout_s
        return progress.state > 0 and now - progress.beat > self._timeout_s + _SILENT_S

    def _dump_stack(self, child: subprocess.Popen[bytes]) -> None:
        log.error("nothing moved within timeout_s (%g s); the stack follows, then the worker is ended", self._timeout_s)
        if hasattr(signal, "SIGUSR1"):
            child.send_signal(signal.SIGUSR1)
            time.sleep(0.2)

    def _renew(self, progress: Progress) -> None:
        now = time.monotonic()
        if now < self._next_renewal or not progress.fences:
            return
        self._next_renewal = now + self._settings.lease_ms / 3000.0
        try:
            for lane in self._registry.lanes:
                answers = run(self._registry.client, lane.renew(self._settings.lease_ms, progress.fences))
                for fence, (_, revoked) in zip(progress.fences, answers, strict=True):
                    if revoked:
                        log.info("%d jobs of grant %s ended meanwhile", len(revoked), fence)
        except (BrokerError, redis.RedisError, OSError) as error:
            self._next_renewal = now + 0.5
            log.warning("leases were not renewed: %s", error)

    def _beat(self, progress: Progress, state: str) -> None:
        self._next_beat = time.monotonic() + HEARTBEAT_S
        self.state = state
        self._told_jobs = progress.jobs
        report = WorkerReport(
            worker=self.name,
            host=socket.gethostname(),
            pid=self.child_pid,
            node=self.nodes[0],
            fused=self.nodes[1:],
            device=self._plan.device,
            state=state,
            started_at=self._started_at,
            jobs=progress.jobs,
            rows=progress.rows,
            batches=progress.batches,
            max_rows=self._max_rows,
            busy_s=round(progress.busy_s, 3),
            failures=progress.failures,
            host_id="" if self._home is None else host_text(self._home.host),
            device_idle_s=round(progress.idle_s, 3),
            moved=dict(zip(MOVED, progress.moved, strict=True)),
            gpus=[host_text(gpu) for gpu in progress.gpus],
            service=_without_zeros(self._tallies.service),
            fills=_without_zeros(self._tallies.fills),
            memory=list(self._tallies.memory),
            load_s=round(self._load_s, 3),
            assignment=self._plan.assignment,
            sent_at=time.time(),
            rank=0 if self._plan.member is None else self._plan.member.rank,
            ranks=1 if self._plan.member is None else self._plan.member.size,
            group="" if self._plan.member is None else self._plan.member.group,
        )
        try:
            self._registry.beat(report, leave=state == "gone")
        except (BrokerError, redis.RedisError, OSError) as error:
            log.warning("no heartbeat: %s", error)

    def _retire(self, last: Progress, status: int) -> None:
        """Gives back what the dead child held, at once; tries until the server answers or a lease's time is over."""
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        message = f"the worker died ({name}) while it computed this job alone"
        why = Failure(self._plan.stage, "WorkerDied", message, "", self.name)
        deadline = time.monotonic() + self._settings.lease_ms / 1000.0
        while True:
            try:
                for lane in self._registry.lanes:
                    back, buried = run(self._registry.client, lane.retire(self._incarnation, last.started, why))
                    if back or buried:
                        log.warning("gave back %d jobs of the dead worker, %d went to the dead letters", back, buried)
                return
            except (BrokerError, redis.RedisError, OSError) as error:
                if time.monotonic() > deadline:
                    log.warning("could not retire the worker; its leases run out by themselves: %s", error)
                    return
                time.sleep(0.2)


def _without_zeros(counts: Sequence[int]) -> list[int]:
    """Those at the end left out."""
    last = max((i for i, n in enumerate(counts) if n), default=-1)
    return list(counts[: last + 1])
