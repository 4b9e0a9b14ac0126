"""The receiving thread of a Relay: takes replies from its lists, settles futures, acknowledges results.

A reply is a hint, the terminal record the truth (rule 9 of the transport): after a lost connection, and every five
seconds for futures older than that, the records are read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import redis

from torchrelay.errors import BrokerError, DecodeError, JobError, ResultExpired, TorchrelayError
from torchrelay.producer.futures import JobFuture
from torchrelay.queues.channel import Channel
from torchrelay.queues.job import Terminal, split_reply
from torchrelay.queues.keys import job_field, lane_of
from torchrelay.queues.transitions import Transitions

log = logging.getLogger("torchrelay.producer")
RECONCILE_S = 5.0
_TEND_EVERY_S = 1.0
_ACK_BATCH = 256


class Inbox:
    """Futures by job id, and the thread that settles them. `start()` runs it; `close()` ends it.

    `after_settling` is called when some were settled, once for many; it must not raise. `tend` is called about once a
    second: this thread is the one that also runs in a client that only waits, or sleeps.
    """

    def __init__(self, client: redis.Redis, lanes: tuple[Transitions, ...]) -> None:
        self._client = client
        self._lanes = lanes
        self._channel = Channel(client, patience_s=float("inf"))
        self.settled = threading.Condition()
        self._futures: dict[str, list[JobFuture[Any]]] = {}
        self._reply_keys: list[str] = []
        self._acks: list[str] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._reconnects = 0
        self.after_settling: Callable[[], object] = _nothing
        self.tend: Callable[[], object] = _nothing

    def listen(self, lane: int, client: str) -> None:
        """Adds the reply list of a client name."""
        with self.settled:
            self._reply_keys = [*self._reply_keys, self._lanes[lane].keys.reply(client)]

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="torchrelay-inbox", daemon=True)
            self._thread.start()

    def is_this_thread(self) -> bool:
        """Whether the caller is the receiving thread itself: in a done callback."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Sends the last acknowledgements and ends the thread."""
        self._stopping.set()
        self._wake()
        self._channel.give_up()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _wake(self) -> None:
        """An empty reply ends the thread's wait at once."""
        if self._thread is None or not self._reply_keys:
            return
        pipe = self._client.pipeline(transaction=False)
        pipe.rpush(self._reply_keys[0], b"")
        pipe.pexpire(self._reply_keys[0], 60_000)
        try:
            pipe.execute()
        except (redis.RedisError, OSError):
            log.debug("the server is away; the receiving thread ends when it notices")

    def watch(self, futures: Iterable[JobFuture[Any]]) -> None:
        """Registers futures before their jobs are sent, so that no reply comes too early."""
        with self.settled:
            for future in futures:
                self._futures.setdefault(future.id, []).append(future)

    def forget(self, futures: Iterable[JobFuture[Any]]) -> None:
        """Undoes `watch` for jobs that were refused."""
        with self.settled:
            for future in futures:
                kept = [f for f in self._futures.get(future.id, ()) if f is not future]
                if kept:
                    self._futures[future.id] = kept
                else:
                    self._futures.pop(future.id, None)

    @property
    def outstanding(self) -> int:
        return len(self._futures)

    def ack(self, job_id: str) -> None:
        """Says that this result is in hand; sent in batches."""
        with self.settled:
            self._acks.append(job_id)

    def reconcile(self, futures: list[JobFuture[Any]]) -> None:
        """Reads the terminal records of these futures; one that is neither live nor ended expired."""
        for lane_number, lane in enumerate(self._lanes):
            mine = [f for f in futures if lane_of(f.id) == lane_number]
            for at in range(0, len(mine), 256):
                part = mine[at : at + 256]
                pipe = self._client.pipeline(transaction=False)
                # The live records come first: a job that ends in between is then found among the terminal ones.
                for future in part:
                    pipe.hexists(lane.keys.bucket(future.id), job_field(future.id))
                pipe.hmget(lane.keys.done, [f.id for f in part])
                *live, ended = pipe.execute()
                outcomes: list[tuple[str, Terminal | JobError]] = []
                for future, alive, record in zip(part, live, ended, strict=True):
                    if record is not None:
                        try:
                            outcomes.append((future.id, Terminal.decode(record)))
                        except DecodeError as error:
                            log.warning("job %s: %s", future.id, error)  # the others' ends are told all the same
                    elif not alive:
                        gone = ResultExpired("its result is not kept any more, or it never was", job_id=future.id)
                        outcomes.append((future.id, gone))
                if outcomes:
                    self._settle(outcomes)

    def _run(self) -> None:
        next_look = time.monotonic() + RECONCILE_S
        next_tend = 0.0
        while not self._stopping.is_set():
            self._attempt(self._receive)
            if time.monotonic() > next_tend:
                self._attempt(self.tend)
                next_tend = time.monotonic() + _TEND_EVERY_S
            reconnected = self._channel.reconnects != self._reconnects
            if reconnected or time.monotonic() > next_look:
                self._reconnects = self._channel.reconnects
                next_look = time.monotonic() + RECONCILE_S
                # After an outage a reply may have been lost on its way, whatever its age.
                self._attempt(partial(self._reconcile_older, 0.0 if reconnected else RECONCILE_S))
        try:
            self._flush_acks(all_of_them=True)
        except (BrokerError, redis.RedisError, OSError):
            log.debug("the last acknowledgements were not sent; the results expire by themselves")
        self._channel.close()

    def _attempt(self, step: Callable[[], object]) -> None:
        """Whatever happens to the server or in its data, this thread goes on."""
        try:
            step()
        except (TorchrelayError, redis.RedisError, OSError) as error:
            log.warning("receiving results: %s; trying again", error)
            self._stopping.wait(0.5)

    def _receive(self) -> None:
        keys = self._reply_keys
        popped = self._channel.block_pop(keys, 0.2 if self._acks else 1.0) if keys else None
        if popped is not None:
            self._take(popped[1])
            more: Any = self._client.lpop(popped[0], 64)
            for data in more or ():
                self._take(data)
        elif not keys:
            self._stopping.wait(0.05)
        self._flush_acks(all_of_them=popped is None)

    def _reconcile_older(self, age_s: float) -> None:
        now = time.monotonic()
        with self.settled:
            old = [f for fs in self._futures.values() for f in fs if now - f.submitted_at >= age_s]
        if old:
            self.reconcile(old)

    def _take(self, data: bytes) -> None:
        self._settle([(job_id, Terminal.decode(record)) for job_id, record in split_reply(data)])

    def _settle(self, outcomes: list[tuple[str, Terminal | JobError]]) -> None:
        calls: list[tuple[Callable[[Any], object], JobFuture[Any]]] = []
        with self.settled:
            for job_id, outcome in outcomes:
                futures = self._futures.pop(job_id, ())
                for future in futures:
                    calls += [(fn, future) for fn in future.settle(outcome)]
                # What nobody here waits for, such as a job redriven elsewhere, is left for those who do.
                mine = any(not f.foreign for f in futures)
                if mine and isinstance(outcome, Terminal) and outcome.until_ack and not outcome.has_refs:
                    self._acks.append(job_id)
            self.settled.notify_all()
        for fn, future in calls:
            try:
                fn(future)
            except Exception:
                log.exception("a done callback of job %s raised", future.id)
        self.after_settling()

    def _flush_acks(self, *, all_of_them: bool) -> None:
        while len(self._acks) >= _ACK_BATCH or (all_of_them and self._acks):
            with self.settled:
                batch, self._acks = self._acks[:_ACK_BATCH], self._acks[_ACK_BATCH:]
            for lane_number, lane in enumerate(self._lanes):
                mine = [i for i in batch if lane_of(i) == lane_number]
                if mine:
                    self._channel.run(lane.ack(mine))


def _nothing() -> None:
    pass
