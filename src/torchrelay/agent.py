"""`torchrelay agent`: drives the detached runs of a namespace on this host, with the pipeline files that it was given.
Beside that its host serves stages as the leader decides (`host_service.py`).

One run at a time, by the same driver as `torchrelay run`, with workers of this host for what nobody serves. A run
belongs to its job of RQ's: who takes the job up again, here or elsewhere, goes on with the folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from rq.exceptions import InvalidJobOperation
from rq.job import JobStatus

from torchrelay.agent_worker import AgentWorker, GivenBack, Stopped
from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import BrokerError, ConfigError, TorchrelayError, UsageError
from torchrelay.producer.relay import Relay
from torchrelay.producer.runs.detached import ENTRY, RunRequest, announced, queue_of
from torchrelay.producer.runs.holding import Held
from torchrelay.producer.runs.pace import Progress
from torchrelay.producer.runs.run import Run
from torchrelay.producer.runs.timetable import Timetable
from torchrelay.queues.control import ControlJob
from torchrelay.queues.run_records import RunRecords
from torchrelay.run_here import workers_here
from torchrelay.up import Fleet

__all__ = ["Loaded", "RunsAgent"]

T = TypeVar("T")
log = logging.getLogger("torchrelay.agent")
_LOOK_S = 0.2
_TELL_S = 1.0
# A driver that died on another host holds a folder of a URL for a minute.
_HELD_S = 90.0


class RunFailed(TorchrelayError):
    """Chunks have no part; taken up again, the run tries them once more."""


@dataclass(frozen=True)
class Loaded:
    """A pipeline file as the agent was given it, with what `--set` says of it."""

    pipeline: Pipeline
    overrides: dict[str, str]


class RunsAgent:
    """Takes up runs of these levels until it is told to stop. `serve()` blocks.

    Args:
        relay: open.
        loaded: what it can run.
        levels: of high, medium and low; runs of the first go first.
        fleet: makes an empty fleet for workers of one run.
    """

    def __init__(
        self, relay: Relay, loaded: Sequence[Loaded], levels: Sequence[str], fleet: Callable[[], Fleet]
    ) -> None:
        self._relay = relay
        self._loaded = {one.pipeline.ref: one for one in loaded}
        self._fleet = fleet
        client, control = relay.registry.client, relay.registry.control
        self._records = RunRecords(client, control)
        queues = [queue_of(control.namespace, level) for level in levels]
        self.worker = AgentWorker(queues, client, {ENTRY: self._run}, self._can_drive, announced(self._loaded))
        self._timetable = Timetable(client, control, self.worker.name)
        self._over = threading.Event()

    def serve(self) -> None:
        """Until SIGTERM or SIGINT: what it drives then goes back to the queue, and can go on."""
        for one in self._loaded.values():
            self._relay.registry.register(one.pipeline, current=False)
        keeper = threading.Thread(target=self._keep_time, name="torchrelay-agent-timetable", daemon=True)
        keeper.start()
        try:
            self.worker.serve()
        finally:
            self._over.set()
            keeper.join()

    def _keep_time(self) -> None:
        while not self._over.wait(_TELL_S):
            try:
                self._timetable.tick()
            except (redis.RedisError, BrokerError, OSError) as away:
                log.info("the timetable waits for the server: %s", away)
            except Exception:
                log.exception("the timetable could not be kept")
        try:
            self._timetable.release()
        except (redis.RedisError, OSError):
            pass  # the locks run out by themselves

    def _can_drive(self, job: ControlJob) -> bool:
        """Not a run of a version that this agent lacks. What is no run is taken, and refused."""
        try:
            ref = RunRequest.parse(job.request({ENTRY: self._run})[1]).pipeline
        except UsageError:
            return True
        if ref not in self._loaded:
            log.info("job %s is left to others: it needs %s, which this agent lacks", job.id, ref)
        return ref in self._loaded

    def _run(self, job: ControlJob, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The entry: drives one run to its end, and returns the short form of its summary."""
        request = RunRequest.parse(arguments)
        one = self._find(request.pipeline)
        fleet = self._fleet()
        self._check_writer(request, fleet)
        watch = _Watch(self.worker, job, self._records)
        watch.look()
        options: Any = {**request.options, "run_id": watch.job.id}
        data, output = list(request.input), request.output
        checked = _once_free(watch, lambda: self._relay.check_run(one.pipeline, input=data, output=output, **options))
        with workers_here(fleet, self._relay.registry, one.pipeline, one.overrides, watch.look) as look:
            run = _once_free(watch, checked.open)
            try:
                return watch.follow(run.start(), look)
            finally:
                if not run.done():
                    run.end()

    def _find(self, ref: str) -> Loaded:
        if ref in self._loaded:
            return self._loaded[ref]
        mine = ", ".join(sorted(self._loaded)) or "none"
        raise ConfigError(
            f"the run needs {ref}, and this agent has {mine}: its files differ from those that the run was asked for "
            f"with; start an agent with the files of {ref}, or ask for the run anew"
        )

    def _check_writer(self, request: RunRequest, fleet: Fleet) -> None:
        """A writer's class is code, so the operator names it."""
        wanted = request.options.get("format", "parquet")
        if ":" in wanted and wanted != fleet.settings.run_writer:
            raise ConfigError(
                f"the run's format is {wanted!r:.80}, which this agent may not import; "
                f"start it with TORCHRELAY_RUN_WRITER={wanted:.80}"
            )


def _once_free(watch: _Watch, act: Callable[[], T]) -> T:
    """A folder that another driver has is waited for: it may have died a moment ago."""
    given_up_at = time.monotonic() + _HELD_S
    while True:
        try:
            return act()
        except Held:
            if time.monotonic() > given_up_at:
                raise
        watch.look()
        time.sleep(_LOOK_S)


class _Watch:
    """One run between its job and its driver: tells the job how it stands, and the driver when the job is to end."""

    def __init__(self, worker: AgentWorker, job: ControlJob, records: RunRecords) -> None:
        self._worker = worker
        self.job = job
        self._records = records
        self._looked_at = self._told_at = 0.0

    def look(self) -> None:
        """Raises Stopped or GivenBack when the run is to end."""
        why = self._worker.ending(self.job)
        if why == "given back":
            raise GivenBack("the agent ends")
        if why == "stopped":
            raise Stopped("cancelled through RQ")
        if time.monotonic() - self._looked_at < _TELL_S:
            return
        self._looked_at = time.monotonic()
        try:
            asked = self._records.cancel_asked(self.job.id) or self.job._fetch_status() == JobStatus.CANCELED
        except InvalidJobOperation:
            asked = True  # somebody removed the job
        except (redis.RedisError, OSError) as away:
            log.info("job %s: whether it is cancelled is not known: %s", self.job.id, away)
            return
        if asked:
            raise Stopped("cancelled")

    def follow(self, run: Run, look: Callable[[], None]) -> dict[str, Any]:
        """Until the run has ended; what becomes of the job is in what this returns or raises."""
        self.job.meta["run"] = run.id
        self.job.meta.pop("error", None)
        try:
            while not run.done():
                look()
                self.look()
                self._tell(run.progress())
                time.sleep(_LOOK_S)
        except BaseException:
            run.end()
            raise
        finally:
            self._told_at = 0.0
            self._tell(run.progress())
        return _outcome(run.summary())

    def _tell(self, now: Progress) -> None:
        if time.monotonic() - self._told_at < _TELL_S:
            return
        self._told_at = time.monotonic()
        self.job.meta["progress"] = {
            "rows": now.rows,
            "rows_per_s": round(now.rows_per_s, 1),
            "eta_s": None if now.eta_s is None else round(now.eta_s, 1),
            "errors": now.failed_rows + now.failed_chunks,
            "chunks_done": now.chunks_done,
            "chunks": now.chunks,
            "seconds": round(now.seconds, 1),
        }
        try:
            # A job that was removed must not come back as a hash of nothing but this.
            if self.job.connection.exists(self.job.key):
                self.job.save_meta()  # type: ignore[no-untyped-call]  # RQ is typed in part
        except (redis.RedisError, OSError) as away:
            log.info("job %s: its progress is not written down: %s", self.job.id, away)


def _outcome(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the job returns; raises where it counts as failed."""
    status, failed = summary["status"], summary["failed_chunks"]
    if status == "cancelled":
        raise Stopped("cancelled")
    if status == "stopped":
        raise Stopped(f"too many errors: {summary['errors']} rows failed")
    if status != "done" or failed:
        raise RunFailed(f"{failed} chunks have no part; see _run/errors.parquet")
    names = ("run", "status", "rows", "errors", "failed_chunks", "seconds", "rows_per_s", "bytes", "merged")
    return {name: summary[name] for name in names if name in summary}
