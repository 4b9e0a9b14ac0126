"""Runs at a later time, or again and again: `--at` and `--every`, on RQ's own scheduled jobs and cron rules.

What waits for its time is an ordinary scheduled job of RQ's. A run that is repeated is a record too, which says when it
is due next; whoever keeps the timetable makes the job of that time, once, since its id is made of the two. So no
repetition is lost with an agent, and none runs twice; those that were missed while nobody kept it are not made up for.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import redis
from rq.cron import CronJob
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler

from torchrelay.errors import InputError, UsageError
from torchrelay.producer.runs.detached import ENTRY, RunRequest, enqueue, runs_queues
from torchrelay.queues.control import ControlQueue
from torchrelay.queues.keys import ControlKeys

__all__ = [
    "STARTED",
    "Schedule",
    "Timetable",
    "first_time",
    "folders",
    "moment",
    "next_time",
    "parse_every",
    "remove",
    "save",
    "schedules",
    "with_started",
]

log = logging.getLogger("torchrelay.control")
STARTED = "{started}"
_SHORTEST_S = 1
_LOCKED_S = 15


@dataclass(frozen=True)
class Schedule:
    """A run that is repeated.

    `every` is seconds, or a cron rule in the local time of whoever keeps the timetable; `due` is when it runs next, in
    seconds since the epoch, and `made` whether there is a job for that already.
    """

    id: str
    namespace: str
    request: RunRequest
    every: int | str
    due: float
    retries: int = 0
    made: bool = False

    def encode(self) -> str:
        return json.dumps({**asdict(self), "request": self.request.arguments()})

    @classmethod
    def decode(cls, data: bytes | str) -> Schedule | None:
        """None for what is no schedule."""
        try:
            values = json.loads(data)
            made = cls(**{**values, "request": RunRequest.parse(values["request"])})
            next_time(made.every, made.due)
            ok = isinstance(made.id, str) and isinstance(made.namespace, str) and isinstance(made.retries, int)
            return made if ok else None
        except (TypeError, ValueError, KeyError, RecursionError, UsageError):
            return None

    def make(self, client: redis.Redis) -> Schedule:
        """Makes the job of the time at which it is due."""
        run = f"{self.id}-{datetime.fromtimestamp(self.due, UTC):%Y%m%d-%H%M%S}"
        request = self.request.into(with_started(self.request.output, self.due))
        enqueue(client, self.namespace, request, run, at=self.due, retries=self.retries, schedule=self.id)
        return replace(self, made=True)


def with_started(output: str, at: float) -> str:
    """The folder of the repetition of this time."""
    return output.replace(STARTED, f"{datetime.fromtimestamp(at, UTC):%Y%m%d-%H%M%S}")


def moment(text: str, now: float) -> float:
    """Seconds since the epoch of an ISO time, local where it names no zone. Raises InputError, also for the past."""
    try:
        at = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(f"--at {text!r:.60}: write a time as 2026-01-31T08:00, or 2026-01-31T08:00Z") from error
    if at < now:
        raise InputError(f"--at {text!r:.60} has passed; leave it out to run now")
    return at


def next_time(every: int | str, after: float) -> float:
    """When a run that is repeated is due, after this time. Raises InputError for what is no rule."""
    if type(every) is int and every >= _SHORTEST_S:
        return after + every
    if not isinstance(every, str) or len(every) > 200:
        raise InputError(f"--every {every!r:.60}: write seconds from {_SHORTEST_S}, or a cron rule as '0 3 * * *'")
    try:
        rule = CronJob("", func_name=ENTRY, cron=every)
        rule.latest_enqueue_time = datetime.fromtimestamp(after, UTC)
        return rule.get_next_enqueue_time().timestamp()
    except (ValueError, KeyError, OverflowError) as error:
        raise InputError(f"--every {every!r:.60} is neither seconds nor a cron rule: {error}") from error


def save(client: redis.Redis, control: ControlKeys, schedule: Schedule) -> Schedule:
    """Adds a schedule, and makes its first job."""
    client.hset(control.schedules, schedule.id, schedule.encode())
    made = schedule.make(client)
    _change(client, control, made)
    return made


def remove(client: redis.Redis, control: ControlKeys, schedule: str) -> bool:
    """Ends a schedule; the job that waits for its time is the caller's to cancel."""
    return bool(client.hdel(control.schedules, schedule))


def schedules(client: redis.Redis, control: ControlKeys) -> list[Schedule]:
    """Those of the namespace."""
    found = (Schedule.decode(data) for data in client.hvals(control.schedules))
    return [s for s in found if s is not None and s.namespace == control.namespace]


def _change(client: redis.Redis, control: ControlKeys, schedule: Schedule) -> None:
    """Writes a schedule, unless it was removed meanwhile."""

    def write(pipe: Any) -> None:
        there = pipe.hexists(control.schedules, schedule.id)
        pipe.multi()
        if there:
            pipe.hset(control.schedules, schedule.id, schedule.encode())

    client.transaction(write, control.schedules)


class Timetable:
    """Keeps the time of a namespace's runs.

    Of several keepers one has RQ's scheduler locks; when it dies, another takes over within seconds.
    """

    def __init__(self, client: redis.Redis, control: ControlKeys, name: str) -> None:
        self._client = client
        self._control = control
        self._queues = {q.name: q for q in runs_queues(client, control.namespace)}
        # A lock of RQ's stands for its interval and a minute; nobody sleeps by this interval, and a minute is long.
        self._scheduler = RQScheduler(
            list(self._queues),
            client,
            interval=_LOCKED_S - 60,
            logging_level="WARNING",
            serializer="json",
            name=name,
        )

    def tick(self) -> None:
        """To be called about once a second."""
        mine = self._scheduler.acquire_locks()  # type: ignore[no-untyped-call]  # RQ is typed in part
        if len(mine) < len(self._queues):
            return
        self._repeat(time.time())
        for queue in self._queues.values():
            self._enqueue_due(queue)

    def release(self) -> None:
        """Lets another keeper take over at once."""
        self._scheduler.release_locks()  # type: ignore[no-untyped-call]

    def _repeat(self, now: float) -> None:
        for schedule in schedules(self._client, self._control):
            if schedule.made and schedule.due <= now:
                due = next_time(schedule.every, schedule.due)
                # Nobody kept the timetable for a while.
                if due <= now:
                    due = next_time(schedule.every, now)
                schedule = replace(schedule, due=due, made=False)
            if not schedule.made:
                _change(self._client, self._control, schedule.make(self._client))

    def _enqueue_due(self, queue: ControlQueue) -> None:
        waiting = ScheduledJobRegistry(queue=queue)  # type: ignore[no-untyped-call]
        for job_id in waiting.get_jobs_to_schedule():
            job = queue.find(job_id)
            with self._client.pipeline() as pipe:
                if job is not None:
                    queue._enqueue_job(job, pipeline=pipe, at_front=job.should_enqueue_at_front())
                waiting.remove(job_id, pipeline=pipe)
                pipe.execute()


def first_time(every: int | str | None, at: float | None, now: float) -> float:
    """When a run that is repeated runs first: at that time, or by its rule, or now."""
    if at is not None:
        return at
    return next_time(every, now) if isinstance(every, str) else now


def parse_every(text: str) -> int | str:
    """Seconds or a cron rule, of `--every`. Raises InputError."""
    every: int | str = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    next_time(every, time.time())
    return every


def folders(output: str) -> str:
    """Where repetitions go: each into a folder of its own."""
    return output if STARTED in output else f"{output.rstrip('/')}/{STARTED}"
