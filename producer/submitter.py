"""Sends encoded jobs: in batches, several in flight, waiting for room where asked. One owner at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import redis

from torchrelay.errors import BrokerError, QueueFull, RunConflict, TorchrelayError
from torchrelay.producer.encoding import JobEncoder, SubmitOptions, lane_of_key
from torchrelay.producer.futures import JobFuture, Source
from torchrelay.producer.inbox import Inbox
from torchrelay.queues.blobs import write_blobs
from torchrelay.queues.channel import Channel, Pending
from torchrelay.queues.keys import IdSource
from torchrelay.queues.transitions import (
    MAX_BYTES_PER_CALL,
    MAX_JOBS_PER_CALL,
    NewJob,
    Session,
    Submitted,
    Transitions,
)

_IN_FLIGHT = 8


def _pauses() -> Iterator[float]:
    pause_s = 0.005
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, 0.1)


@dataclass(slots=True)
class Draft:
    """One checked row on its way: what is needed to encode it, again if its id turns out to be taken."""

    columns: dict[str, bytes]
    rows: int
    digest: bytes = b""
    key: str = ""


@dataclass(slots=True)
class _Sent:
    lane: int
    drafts: list[Draft]
    futures: list[JobFuture[Any]]
    jobs: list[NewJob]
    pending: Pending[Submitted]


class Submitter:
    """Owns the producer's channel, sessions and id sources. Not thread-safe: the Relay holds its lock around it."""

    def __init__(
        self,
        client: redis.Redis,
        lanes: tuple[Transitions, ...],
        inbox: Inbox,
        source: Source,
        results_max_bytes: int,
        rest: Callable[[float], None],
    ) -> None:
        """`rest` sleeps so many seconds and lets others use the submitter meanwhile."""
        self._client = client
        self._lanes = lanes
        self._inbox = inbox
        self._source = source
        self._results_max_bytes = results_max_bytes
        self._sleep = rest
        self._channel = Channel(client)
        self._ids: list[IdSource] = []
        self._sessions: list[Session] = []
        self._turn = 0

    def start(self) -> None:
        for lane in range(len(self._lanes)):
            self._new_client(lane)

    def close(self) -> None:
        self._channel.close()

    def _new_client(self, lane: int) -> None:
        ids = IdSource(lane)
        self._ids[lane : lane + 1] = [ids]
        self._sessions[lane : lane + 1] = [Session(ids.client)]
        self._inbox.listen(lane, ids.client)

    def send(
        self, encoder: JobEncoder, drafts: Iterable[Draft], options: SubmitOptions, wait_s: float
    ) -> list[JobFuture[Any]]:
        """Submits all; returns their futures in order.

        Raises QueueFull once `wait_s` has passed without room, and RunConflict when a key was used with other content;
        both carry the futures of the jobs that went in as `accepted`.
        """
        deadline = time.monotonic() + wait_s
        flight: deque[_Sent] = deque()
        futures: list[JobFuture[Any]] = []
        try:
            for lane, group in self._groups(drafts):
                flight.append(self._send_group(encoder, lane, group, options, deadline))
                if len(flight) >= _IN_FLIGHT:
                    futures += self._settle(encoder, flight.popleft(), options, deadline)
            while flight:
                futures += self._settle(encoder, flight.popleft(), options, deadline)
        except (QueueFull, RunConflict) as error:
            error.accepted = (*futures, *error.accepted, *self._abandon(flight))
            raise
        except BaseException:
            self._abandon(flight)
            raise
        return futures

    def _abandon(self, flight: deque[_Sent]) -> list[JobFuture[Any]]:
        """What became of the batches behind one that was refused: those that went in are accepted too."""
        accepted: list[JobFuture[Any]] = []
        for sent in flight:
            try:
                statuses = sent.pending.result().statuses
            except TorchrelayError:
                statuses = ""
            for future, status in zip(sent.futures, statuses.ljust(len(sent.futures), "-"), strict=True):
                if status == "n":
                    future.submitted_at = time.monotonic()
                    accepted.append(future)
                else:
                    self._inbox.forget([future])
        return accepted

    def _groups(self, drafts: Iterable[Draft]) -> Iterator[tuple[int, list[Draft]]]:
        """Batches of one lane each: a key chooses its lane, other jobs take the lanes in turn."""
        lanes = len(self._lanes)
        group: list[Draft] = []
        group_lane = self._turn % lanes
        self._turn += 1
        for draft in drafts:
            lane = lane_of_key(draft.digest, lanes) if draft.digest else group_lane
            if group and (lane != group_lane or len(group) >= MAX_JOBS_PER_CALL):
                yield group_lane, group
                group = []
            group_lane = lane
            group.append(draft)
        if group:
            yield group_lane, group

    def _send_group(
        self, encoder: JobEncoder, lane: int, drafts: list[Draft], options: SubmitOptions, deadline: float
    ) -> _Sent:
        ids = self._ids[lane]
        jobs: list[NewJob] = []
        futures: list[JobFuture[Any]] = []
        blobs: dict[str, bytes] = {}
        ref = encoder.registered.pipeline.ref
        for draft in drafts:
            job, large = encoder.encode(ids.take(), draft.columns, draft.rows, options, draft.digest)
            jobs.append(job)
            futures.append(JobFuture(self._source, job.id, ref))
            blobs.update(large)
        if options.keep_s != 0:
            self._inbox.watch(futures)
        try:
            if blobs:
                self._write_blobs(lane, blobs, deadline)
        except (TorchrelayError, redis.RedisError):
            self._inbox.forget(futures)
            raise
        return _Sent(lane, drafts, futures, jobs, self._dispatch(encoder, lane, jobs))

    def _write_blobs(self, lane: int, blobs: dict[str, bytes], deadline: float) -> None:
        for pause_s in _pauses():
            try:
                write_blobs(self._client, self._lanes[lane], blobs)
                return
            except QueueFull:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
                self._rest(min(pause_s, left_s))

    def _rest(self, seconds: float) -> None:
        # Others send over the same session meanwhile: what is in flight is answered first, to keep its window.
        self._channel.drain()
        self._sleep(seconds)

    def _dispatch(self, encoder: JobEncoder, lane: int, jobs: list[NewJob]) -> Pending[Submitted]:
        """One call where the batch fits its limit of bytes; else the first parts are waited for here."""
        parts: list[list[NewJob]] = [[]]
        size = 0
        for job in jobs:
            if parts[-1] and size + len(job.payload) > MAX_BYTES_PER_CALL:
                parts.append([])
                size = 0
            parts[-1].append(job)
            size += len(job.payload)
        number = encoder.registered.number
        calls = [self._lanes[lane].submit(self._sessions[lane], number, p, self._results_max_bytes) for p in parts]
        if len(calls) == 1:
            return self._channel.send(calls[0])
        answers = [self._channel.run(call) for call in calls]
        joined = Submitted("".join(a.statuses for a in answers), [i for a in answers for i in a.named])
        pending: Pending[Submitted] = Pending(self._channel, replace(calls[0], read=lambda _: joined))
        pending.settle(None)
        return pending

    def _settle(
        self, encoder: JobEncoder, sent: _Sent, options: SubmitOptions, deadline: float, *, again: bool = False
    ) -> list[JobFuture[Any]]:
        answer = self._answer(encoder, sent, deadline)
        now = time.monotonic()
        for future in sent.futures:
            future.submitted_at = now
        if answer.statuses.count("n") == len(sent.futures):
            return sent.futures
        named = iter(answer.named)
        conflicts: list[str] = []
        moved: list[JobFuture[Any]] = []
        kept: list[JobFuture[Any]] = []
        for i, status in enumerate(answer.statuses):
            future = sent.futures[i]
            if status == "n":
                kept.append(future)
                continue
            self._inbox.forget([future])
            if status in "ke":
                future.id = next(named)
                moved.append(future)
                kept.append(future)
            elif status == "x":
                next(named)
                conflicts.append(sent.drafts[i].key)
            elif again:
                raise BrokerError(f"job {future.id} was refused twice ({status}): does something else write here?")
            else:
                if status in "dt":
                    # Another client drew the same random name: take a new one.
                    self._new_client(sent.lane)
                # Else its blobs ran out while it waited for room. Either way it is sent once more.
                more = self._send_group(encoder, sent.lane, [sent.drafts[i]], options, deadline)
                kept += self._settle(encoder, more, options, deadline, again=True)
        self._inbox.watch(moved)
        self._inbox.reconcile(moved)
        if conflicts:
            raise RunConflict(
                f"key {conflicts[0]!r:.80} was already used with other content"
                + (f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else "")
                + "; use another key, or submit the same row to get the same job",
                accepted=tuple(kept),
            )
        return kept

    def _answer(self, encoder: JobEncoder, sent: _Sent, deadline: float) -> Submitted:
        """The server's answer; while the queue is full and there is time, the batch is sent again."""
        pending, pauses, started = sent.pending, _pauses(), time.monotonic()
        while True:
            try:
                return pending.result()
            except QueueFull:
                now = time.monotonic()
                if now >= deadline:
                    self._inbox.forget(sent.futures)
                    raise
                self._rest(min(next(pauses), deadline - now))
                waited_ms = (time.monotonic() - started) * 1000.0
                jobs = [
                    j._replace(deadline_ms=max(j.deadline_ms - waited_ms, 1.0)) if j.deadline_ms else j
                    for j in sent.jobs
                ]
                pending = self._dispatch(encoder, sent.lane, jobs)
            except TorchrelayError:
                self._inbox.forget(sent.futures)
                raise
