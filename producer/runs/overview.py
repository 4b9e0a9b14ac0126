"""The runs of a namespace, whoever drives them: agents or the foreground; waiting, running and ended.

What a run's driver wrote of it and what RQ knows of its job are put together here; the driver's word counts while the
job is being executed, and RQ's before and after.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import redis
from rq.exceptions import InvalidJobOperation
from rq.job import JobStatus
from rq.registry import (
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.worker import BaseWorker

from torchrelay.errors import InputError
from torchrelay.producer.runs.detached import runs_queues, versions_driven
from torchrelay.producer.runs.timetable import Schedule, remove, schedules
from torchrelay.queues.control import ControlJob, ControlQueue
from torchrelay.queues.keys import ControlKeys
from torchrelay.queues.run_records import LOST, RUNNING, RunRecord, RunRecords

__all__ = ["Overview", "RunView"]

_STATES: Final = {
    JobStatus.QUEUED: "queued",
    JobStatus.SCHEDULED: "scheduled",
    JobStatus.STARTED: RUNNING,
    JobStatus.FINISHED: "done",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "cancelled",
    JobStatus.CANCELED: "cancelled",
}
_REGISTRIES: Final[tuple[Any, ...]] = (
    StartedJobRegistry,
    ScheduledJobRegistry,
    FinishedJobRegistry,
    FailedJobRegistry,
    CanceledJobRegistry,
)
_WAITING: Final = frozenset({"queued", "scheduled", "repeating"})
_MOST = 1000
"""Jobs that are looked at, of each kind."""
ENDED: Final = frozenset({"done", "failed", "stopped", "cancelled", LOST})


@dataclass(frozen=True)
class RunView:
    """One run as it is shown. Times are seconds since the epoch.

    `state` is queued, scheduled, repeating (a schedule), running, done, failed, stopped (too many errors), cancelled,
    or lost (its driver died: it goes on with --resume). `total_rows` is None where nobody counted.
    """

    id: str
    state: str
    pipeline: str = ""
    input: str = ""
    output: str = ""
    driver: str = ""
    """`host:pid` of the process that drives it, or the last that did."""
    detached: bool = False
    began: float | None = None
    due: float | None = None
    seconds: float | None = None
    rows: int | None = None
    total_rows: int | None = None
    chunks_done: int | None = None
    chunks: int | None = None
    errors: int | None = None
    rows_per_s: float | None = None
    eta_s: float | None = None
    retries_left: int | None = None
    every: int | str | None = None
    error: str = ""
    waits_for: str = ""
    """Of one that is queued, what is missing for it to begin."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _of_record(record: RunRecord) -> RunView:
    told = asdict(record)
    host, pid = told.pop("host"), told.pop("pid")
    return RunView(told.pop("run"), driver=f"{host}:{pid}", **told)


def _of_job(job: ControlJob, due: float | None, record: RunRecord | None) -> RunView:
    state = _STATES.get(job.get_status(refresh=False), "queued")
    meta = {k: v for k, v in job.meta.items() if isinstance(v, str)}
    view = _of_record(record) if record is not None else RunView(job.id, state)
    if state == RUNNING and view.state in (LOST, RUNNING):
        state = view.state
    elif view.state == "stopped" and state in ("failed", "cancelled"):
        state = "stopped"
    if state in ("queued", "scheduled"):
        view = replace(view, eta_s=None, rows_per_s=None)
    return replace(
        view,
        id=job.id,
        state=state,
        detached=True,
        pipeline=view.pipeline or meta.get("pipeline", ""),
        input=view.input or meta.get("input", ""),
        output=view.output or meta.get("output", ""),
        due=due,
        retries_left=job.retries_left,
        error=(view.error or meta.get("error", "")) if state not in ("done", RUNNING) else "",
    )


def _of_schedule(schedule: Schedule) -> RunView:
    request = schedule.request
    return RunView(
        schedule.id,
        "repeating",
        request.pipeline,
        " ".join(request.input),
        request.output,
        detached=True,
        due=schedule.due,
        every=schedule.every,
    )


class Overview:
    """Lists, finds and cancels the runs of a namespace. Which agents there are it asks once: make one for each look."""

    def __init__(self, client: redis.Redis, control: ControlKeys) -> None:
        self._client = client
        self._control = control
        self._records = RunRecords(client, control)
        self._queues = runs_queues(client, control.namespace)
        self._agents: dict[str, tuple[int, set[str]]] = {}

    def all(self) -> list[RunView]:
        """Those under way first, then what waits, then what ended, the latest first."""
        records = {r.run: r for r in self._records.all()}
        views = [_of_schedule(s) for s in schedules(self._client, self._control)]
        driven = set()
        for queue in self._queues:
            for job_id, due in self._job_ids(queue).items():
                if (job := queue.find(job_id)) is None:
                    continue
                record = records.get(self._run_of(job))
                driven.add(self._run_of(job))
                views.append(self._waiting(_of_job(job, due, record), queue))
        views += [_of_record(record) for run, record in records.items() if run not in driven]
        order = {RUNNING: 0, "queued": 1, "scheduled": 2, "repeating": 3}
        return sorted(views, key=lambda v: (order.get(v.state, 4), -(v.began or 0), v.id))

    def _waiting(self, view: RunView, queue: ControlQueue) -> RunView:
        """With what it waits for, where no agent could drive it."""
        if view.state not in _WAITING:
            return view
        if queue.name not in self._agents:
            self._agents[queue.name] = BaseWorker.count(queue=queue), versions_driven(self._client, queue)
        agents, versions = self._agents[queue.name]
        if view.pipeline in versions:
            return view
        level = queue.name.rpartition("-")[2]
        if not agents:
            why = f"no agent takes {level} runs yet; start one with: torchrelay agent FILE"
        else:
            why = (
                f"no agent that takes {level} runs has {view.pipeline}; start one with its files: torchrelay agent FILE"
            )
        return replace(view, waits_for=why)

    def find(self, run: str) -> RunView:
        """Raises InputError for a run that nobody knows of."""
        for schedule in schedules(self._client, self._control):
            if schedule.id == run:
                (queue,) = runs_queues(self._client, self._control.namespace, [schedule.request.level])
                return self._waiting(_of_schedule(schedule), queue)
        if (found := self._job(run)) is not None:
            queue, job = found
            return self._waiting(_of_job(job, self._due(queue, run), self._records.find(self._run_of(job))), queue)
        if (record := self._records.find(run)) is not None:
            return _of_record(record)
        raise InputError(
            f"no run {run!r:.80} is known in namespace {self._control.namespace!r}; see: torchrelay runs list"
        )

    def cancel(self, run: str) -> str:
        """Ends a run, or a schedule with what waits of it; "cancelled", or "asked" where its driver will end it within
        seconds. Raises InputError for one that has ended or that nobody knows of."""
        view = self.find(run)
        if view.state == "repeating":
            remove(self._client, self._control, run)
            for queue in self._queues:
                for job_id in self._job_ids(queue):  # also those that wait for an agent
                    if (job := queue.find(job_id)) is not None and job.meta.get("schedule") == run:
                        self._cancel_job(job)
            return "cancelled"
        if view.state in ENDED:
            raise InputError(f"run {run} has ended: {view.state}")
        found = self._job(run)
        if found is None:
            self._records.cancel(run)
            return "asked"
        # First the word to its driver: it may be taken up at this very moment.
        self._records.cancel(self._run_of(found[1]))
        self._records.cancel(run)
        return self._cancel_job(found[1])

    def _cancel_job(self, job: ControlJob) -> str:
        if job.get_status() not in (JobStatus.QUEUED, JobStatus.SCHEDULED):
            return "asked"
        try:
            job.cancel()
        except InvalidJobOperation:  # somebody else did
            pass
        return "cancelled"

    def _job(self, run: str) -> tuple[ControlQueue, ControlJob] | None:
        pairs = ((queue, queue.find(run)) for queue in self._queues)
        return next(((queue, job) for queue, job in pairs if job is not None), None)

    def _run_of(self, job: ControlJob) -> str:
        """The run that it drives: its own, or the one that it goes on with."""
        run = job.meta.get("run")
        return run if isinstance(run, str) else job.id

    def _job_ids(self, queue: ControlQueue) -> dict[str, float | None]:
        """Every job of the queue, with the time at which it is due."""
        found: dict[str, float | None] = dict.fromkeys(_texts(self._client.lrange(queue.key, 0, _MOST)))
        found |= dict.fromkeys(_texts(self._client.lrange(queue.intermediate_queue_key, 0, _MOST)))
        for kind in _REGISTRIES:
            members: Any = self._client.zrevrange(kind(queue=queue).key, 0, _MOST, withscores=True)
            for raw, score in members:
                job_id = raw.decode("utf-8", "replace").partition(":")[0]
                found[job_id] = score if kind is ScheduledJobRegistry else None
        return found

    def _due(self, queue: ControlQueue, run: str) -> float | None:
        key = ScheduledJobRegistry(queue=queue).key  # type: ignore[no-untyped-call]
        score = self._client.zscore(key, run)
        return None if score is None else float(score)


def _texts(values: Any) -> Iterable[str]:
    return [v.decode("utf-8", "replace") for v in values]
