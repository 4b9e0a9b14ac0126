"""RQ as the control plane: queues of rare, long work, and jobs as they can be taken from a queue that anybody wrote to.

A job is data: JSON, the name of an entry, and plain arguments. Nothing that lies in Redis is unpickled, looked up as an
import path or called, be it the function, a callback or a webhook; what is malformed or huge is a job that is refused,
and costs no other. RQ itself keeps order, retries, schedules and history, so `rq info` and any dashboard show them.
"""

from __future__ import annotations

import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

import redis
from rq import Queue
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from torchrelay.errors import InputError

__all__ = ["MOST_BYTES", "ControlJob", "ControlQueue", "Entry"]

log = logging.getLogger("torchrelay.control")
MOST_BYTES: Final = 1 << 20
"""What a job may say, unpacked."""
_STUCK_S = 10.0
_PAGE = 1000
_ID = re.compile(rb"[A-Za-z0-9_-]{1,200}")
# Left out when a job is read: RQ would import or fetch what they name, or unpack without a bound.
_IGNORED = frozenset(
    b"success_callback_name failure_callback_name stopped_callback_name webhooks result exc_info dependency_ids "
    b"dependency_id rate_limit_key repeats_left repeat_intervals".split()
)
_MOST_RETRIES, _LONGEST_S = 100, 30 * 24 * 3600

Entry = Callable[["ControlJob", dict[str, Any]], Any]
"""What executes a job: takes it and its arguments, and returns plain values."""


class ControlJob(Job):
    """A job that calls nothing but one of `entries`, which whoever executes it sets. Any hash can be read as one; one
    that is not fit to be executed says why in `refusal`."""

    entries: Mapping[str, Entry] = {}  # replaced, never changed
    refusal: str = ""

    def __init__(self, id: str | None = None, connection: redis.Redis | None = None, serializer: object = None) -> None:
        super().__init__(id, connection, JSONSerializer)  # whatever was asked for: RQ's default is pickle

    def refresh(self) -> None:
        """Raises NoSuchJobError."""
        length: Any = self.connection.hstrlen(self.key, "data")
        if length > MOST_BYTES:
            self._refuse(f"it has {length} bytes, at most {MOST_BYTES} are read")
            return
        super().refresh()  # type: ignore[no-untyped-call]  # RQ is typed in part

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Takes over the fields of a hash; never raises."""
        fields = {k: v for k, v in raw_data.items() if k not in _IGNORED and len(v) <= MOST_BYTES}
        try:
            text = _unpacked(fields.pop(b"data", b""))
            super().restore(fields | {b"data": b"null"})
            self.data = text
            self._check_retries()
        except Exception as error:  # whatever it was made of
            self._refuse(f"it is malformed: {error!r:.200}")
        if not isinstance(self.meta, dict) or "unserialized" in self.meta:
            self.meta = {}

    def _refuse(self, why: str) -> None:
        self.refusal = why
        self.data = b"null"
        self.retries_left = None

    def _deserialize_data(self) -> None:
        """For whatever of RQ shows a job: one that is no call is none of this name."""
        try:
            super()._deserialize_data()  # type: ignore[no-untyped-call]
        except DeserializationError:
            self._func_name, self._instance, self._args, self._kwargs = "(no call)", None, (), {}

    def _check_retries(self) -> None:
        left, intervals = self.retries_left or 0, self.retry_intervals
        if not 0 <= left <= _MOST_RETRIES:
            raise InputError(f"it is to be tried {left} times more")
        if intervals is not None and not (
            isinstance(intervals, list)
            and len(intervals) > 0
            and all(type(i) is int and 0 <= i <= _LONGEST_S for i in intervals)
        ):
            raise InputError(f"it is to be tried again after {intervals!r:.60} seconds")

    def request(self, entries: Mapping[str, Entry] | None = None) -> tuple[str, dict[str, Any]]:
        """Name of the entry, and its arguments. Raises InputError for anything but one that is allowed: of `entries`,
        by default its own."""
        entries = self.entries if entries is None else entries
        if self.refusal:
            raise InputError(f"job {self.id} is refused: {self.refusal}")
        try:
            name, instance, args, kwargs = json.loads(self.data)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"job {self.id} is refused: it is no call in JSON ({error!r:.100})") from error
        if instance is not None or args != [] or not isinstance(kwargs, dict):
            raise InputError(f"job {self.id} is refused: a call has keyword arguments alone")
        if not isinstance(name, str) or name not in entries:
            known = ", ".join(sorted(entries)) or "nothing"
            raise InputError(f"job {self.id} is refused: it calls {name!r:.100}, and only {known} may be called")
        return name, kwargs

    def perform(self) -> Any:
        """Calls the entry."""
        name, arguments = self.request()
        return self.entries[name](self, arguments)


class ControlQueue(Queue):
    """A queue of such jobs. One that was taken lies aside until its execution is registered, so that none is lost."""

    job_class = ControlJob

    def __init__(self, name: str, connection: redis.Redis, **options: Any) -> None:
        options |= {"serializer": JSONSerializer, "job_class": ControlJob}
        super().__init__(name, connection=connection, **options)
        self._aside_since: dict[bytes, float] = {}
        self._others: set[bytes] = set()

    def take(self, wait_s: float = 0.0) -> ControlJob | None:
        """The next job, which lies aside now; None when there is none within so many seconds."""
        source, aside = self.key, self.intermediate_queue_key
        try:
            move: Any = self.connection.blmove if wait_s else self.connection.lmove
            raw = move(source, aside, wait_s) if wait_s else move(source, aside)
        except redis.ResponseError as error:
            log.warning("queue %s cannot be read: %s", self.name, error)
            time.sleep(wait_s)
            return None
        if raw is None:
            return None
        job = self._job(raw)
        if job is None:
            self._drop(raw)
        return job

    @property
    def has_others(self) -> bool:
        """Whether `take_wanted` found jobs, at its last look, that were not wanted."""
        return bool(self._others)

    def take_wanted(self, wanted: Callable[[ControlJob], bool]) -> ControlJob | None:
        """The first job that is wanted, which lies aside now; the others keep their places. `wanted` is asked once of
        each."""
        seen: set[bytes] = set()
        try:
            for raw in self._waiting():
                seen.add(raw)
                if raw in self._others:
                    continue
                job = self._job(raw)
                if job is not None and not wanted(job):
                    self._others.add(raw)
                elif self._move_aside(raw):
                    if job is not None:
                        return job
                    self._drop(raw)
        except redis.ResponseError as error:
            log.warning("queue %s cannot be read: %s", self.name, error)
        self._others &= seen
        return None

    def _waiting(self) -> Iterator[bytes]:
        start = 0
        while page := cast(list[bytes], self.connection.lrange(self.key, start, start + _PAGE - 1)):
            yield from page
            start += _PAGE

    def _move_aside(self, raw: bytes) -> bool:
        """False where somebody else took it meanwhile."""

        def move(pipe: Any) -> bool:
            there = pipe.lpos(self.key, raw) is not None
            pipe.multi()
            if there:
                pipe.lrem(self.key, 1, raw)
                pipe.rpush(self.intermediate_queue_key, raw)
            return there

        transaction: Any = self.connection.transaction  # typed as if `move` could return nothing
        return bool(transaction(move, self.key, value_from_callable=True))

    def give_back(self, job: ControlJob) -> None:
        """Puts a job that was taken, and is not wanted, in front again."""
        with self.connection.pipeline() as pipe:
            pipe.lrem(self.intermediate_queue_key, 1, job.id)
            pipe.lpush(self.key, job.id)
            pipe.execute()

    def _drop(self, raw: bytes) -> None:
        log.warning("queue %s: %r is no job, and is dropped", self.name, raw[:80])
        self.connection.lrem(self.intermediate_queue_key, 1, raw)  # type: ignore[arg-type]  # bytes as they came

    def _job(self, raw: bytes) -> ControlJob | None:
        if not _ID.fullmatch(raw):
            return None
        try:
            job = self._fetch(raw.decode())
        except (NoSuchJobError, redis.ResponseError):  # none, or of another type
            return None
        job.origin = self.name
        return job

    def _fetch(self, job_id: str) -> ControlJob:
        job = ControlJob(job_id, connection=self.connection)
        job.refresh()
        return job

    def find(self, job_id: str) -> ControlJob | None:
        """The job of this id, if this is its queue."""
        if not _ID.fullmatch(job_id.encode("utf-8", "replace")):
            return None
        try:
            job = self._fetch(job_id)
        except (NoSuchJobError, redis.ResponseError):
            return None
        return job if job.origin == self.name else None

    def return_stuck(self) -> None:
        """Puts back jobs that somebody took and died before he registered it; to be called every few seconds."""
        now, aside = time.monotonic(), self.intermediate_queue_key
        lying: Any = self.connection.lrange(aside, 0, -1)
        self._aside_since = {raw: self._aside_since.get(raw, now) for raw in lying}
        for raw, since in self._aside_since.items():
            if now - since > _STUCK_S:
                with self.connection.pipeline() as pipe:
                    pipe.lrem(aside, 1, raw)  # type: ignore[arg-type]  # bytes as they came
                    pipe.lpush(self.key, raw)
                    pipe.execute()


def _unpacked(data: bytes) -> bytes:
    """As RQ packs it; raises InputError for what would unpack to more than a job may say."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MOST_BYTES + 1)
    except zlib.error:
        return data
    if len(text) > MOST_BYTES:
        raise InputError(f"unpacked it has more than {MOST_BYTES} bytes")
    return text
