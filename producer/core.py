"""What both clients stand on: connection, registry, the sending and the receiving side, and the source of futures.

Everything here may block; the asynchronous client calls it from threads of its own.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import (
    BrokerError,
    DeadlineExceeded,
    InputError,
    PipelineNotFound,
    QueueFull,
    RunConflict,
    TorchrelayError,
)
from torchrelay.producer.encoding import Draft, JobEncoder, Outcome, SubmitOptions
from torchrelay.producer.futures import JobFuture
from torchrelay.producer.inbox import Inbox
from torchrelay.producer.lookups import find_status, reached
from torchrelay.producer.results import Decoded, read_result
from torchrelay.producer.submitter import Submitter
from torchrelay.queues.channel import LOST
from torchrelay.queues.connection import open_broker
from torchrelay.queues.job import Terminal
from torchrelay.queues.keys import lane_of
from torchrelay.queues.placement import Placer, open_writer
from torchrelay.queues.registry import Registry, run

WARN_AFTER_S = 5.0
FOREIGN_POLL_S = (0.005, 0.5)
_CANCELS_PER_CALL = 256
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}(@[0-9a-f]{8}(\+run)?)?")

log = logging.getLogger("torchrelay.producer")


class Core:
    """One client's share of a namespace. `lock` guards the submitter, and starting and closing. Thread-safe."""

    def __init__(self, settings: Settings, client: str) -> None:
        """`client` is what users call it, for errors."""
        self.settings = settings
        self.lock = threading.RLock()
        self.fetching = threading.Lock()
        self.opened = False
        self.closed = False
        self._client = client
        self._closing = threading.Event()
        self._warned: set[str] = set()
        self._encoders: dict[str, JobEncoder] = {}

    def start(self) -> Core:
        if self.opened and not self.closed:
            return self  # without the lock, which a submit holds while the server is away
        with self.lock:
            if self.closed:
                raise self.is_closed()
            if not self.opened:
                self.broker = open_broker(self.settings.url)
                client: redis.Redis = self.broker.client
                self._registry = Registry(client, self.settings.namespace, self.settings.lanes)
                self._registry.open()
                self.inbox = Inbox(client, self._registry.lanes)
                limit = self.settings.results_max_bytes
                placer = Placer(self._registry, open_writer(self._registry, self.settings))
                if placer.writer is not None:
                    self.inbox.tend = placer.writer.tend
                self.submitter = Submitter(client, self._registry.lanes, self.inbox, self, limit, self._rest, placer)
                self.submitter.start()
                self.opened = True
        return self

    def is_closed(self) -> InputError:
        return InputError(f"this {self._client} is closed; make a new one")

    def close(self) -> None:
        if self.opened:
            self.submitter.give_up()  # who submits while the server is away must not hold this up
        with self.lock:
            first, self.closed = not self.closed, True
            self._closing.set()
            if self.opened and first:
                self.inbox.close()
                with self.settled:
                    self.settled.notify_all()
                self.submitter.close()
                self.broker.close()

    def _rest(self, seconds: float) -> None:
        """Sleeps for a submit that waits for room; other threads may submit meanwhile."""
        self.lock.release()
        try:
            self._closing.wait(seconds)
        finally:
            self.lock.acquire()
        if self.closed:
            raise InputError(f"this {self._client} was closed while a submit waited for room")

    @property
    def registry(self) -> Registry:
        return self.start()._registry

    @property
    def settled(self) -> threading.Condition:
        return self.inbox.settled

    def register(self, pipeline: Any) -> str:
        loaded = pipeline if isinstance(pipeline, Pipeline) else Pipeline.load(_source(pipeline))
        with reached():
            return self.registry.register(loaded).pipeline.ref

    def encoder(self, pipeline: str) -> JobEncoder:
        """Of `name` or `name@version`. Raises InputError, PipelineNotFound, BrokerUnavailable."""
        if not isinstance(pipeline, str) or not _NAME.fullmatch(pipeline):
            raise InputError(f"pipeline must be a name or name@version, not {pipeline!r:.60}")
        with reached():
            registered = self.registry.find(pipeline)
        encoder = self._encoders.get(registered.pipeline.ref)
        if encoder is None:
            encoder = JobEncoder(registered, self.settings.priority_boost_ms_per_point)
            self._encoders[registered.pipeline.ref] = encoder
        return encoder

    def send(self, encoder: JobEncoder, drafts: list[Draft], options: SubmitOptions) -> list[JobFuture[Any]]:
        """Submits all and returns their futures; raises the first refusal, which carries what went in."""
        return all_in(self.send_each(encoder, drafts, options))

    def send_each(self, encoder: JobEncoder, drafts: list[Draft], options: SubmitOptions) -> list[Outcome]:
        """Submits all; for each its future, or why it did not go in."""
        with self.lock, reached():
            self.start()
            self.inbox.start()
            return self.submitter.send(encoder, drafts, options)

    def job(self, job_id: str) -> JobFuture[Any]:
        """The future of any job of the namespace. Raises InputError for what is no id of it."""
        if not isinstance(job_id, str):
            raise InputError(f"{job_id!r:.60} is not a job id; take it from future.id")
        if self.closed:
            raise self.is_closed()
        lane = lane_of(job_id)
        if lane >= self.settings.lanes:
            raise InputError(f"job {job_id} is of lane {lane}, this namespace has {self.settings.lanes}")
        return JobFuture(self, job_id, "", foreign=True)

    def cancel(self, ids: list[str]) -> list[bool]:
        """Ends these jobs; for each whether this call ended it."""
        won: dict[str, bool] = {}
        for number, lane in enumerate(self.registry.lanes):
            mine = [i for i in ids if lane_of(i) == number]
            for at in range(0, len(mine), _CANCELS_PER_CALL):
                part = mine[at : at + _CANCELS_PER_CALL]
                with reached():
                    answer = run(self.broker.client, lane.cancel(part))
                won.update((i, letter == "w") for i, letter in zip(part, answer, strict=True))
        return [won.get(i, False) for i in ids]

    def look_up(self, job_id: str) -> str:
        """The status of a job that this process does not know to have ended."""
        with reached():
            return find_status(self.registry, job_id)

    def decode_result(self, future: JobFuture[Any], terminal: Terminal) -> Decoded:
        """The result. Columns that lie in Redis are fetched now, and acknowledged."""
        decoded = read_result(self.broker.client, self._registry.lanes[lane_of(future.id)], future.id, terminal)
        if terminal.has_refs and terminal.until_ack and not future.foreign:
            self.inbox.ack(future.id)
        return decoded

    def await_terminal(self, future: JobFuture[Any], deadline: float | None) -> None:
        """Blocks until the future is settled; raises TimeoutError at `deadline` (time.monotonic)."""
        self.await_any(future, future.done, deadline)

    def await_any(self, future: JobFuture[Any], condition: Callable[[], bool], deadline: float | None = None) -> None:
        """Blocks until the condition holds, looked at whenever jobs ended; `future` is one of those waited for."""
        self.start()
        if self.inbox.is_this_thread():
            raise InputError(
                "result() of a pending job inside a done callback would wait for itself; use its own future"
            )
        warn_at = time.monotonic() + WARN_AFTER_S
        poll_s = FOREIGN_POLL_S[0] if future.foreign else WARN_AFTER_S
        while not condition():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise not_yet(future)
            if self.closed:
                raise self.closed_while_waiting(future)
            if future.foreign:
                self.read_foreign([future])
            wait_s = min(poll_s, warn_at - now if warn_at > now else poll_s, (deadline or now + 3600) - now)
            with self.settled:
                self.settled.wait_for(lambda: condition() or self.closed, timeout=max(wait_s, 0.0))
            if future.foreign:
                poll_s = min(poll_s * 2, FOREIGN_POLL_S[1])
            if not condition() and time.monotonic() >= warn_at:
                warn_at = float("inf")
                for text in self.unserved_hints(future.pipeline):
                    warnings.warn(text, RuntimeWarning, stacklevel=6)

    def closed_while_waiting(self, future: JobFuture[Any]) -> InputError:
        return InputError(
            f"this {self._client} was closed; job {future.id} goes on, and job({future.id!r}) of another finds it"
        )

    def read_foreign(self, futures: list[JobFuture[Any]]) -> None:
        """Looks whether jobs ended whose replies go to other clients."""
        self.inbox.watch(futures)
        try:
            self.inbox.reconcile(futures)
        except LOST as error:
            log.info("job %s: the server is away, looking again: %s", futures[0].id, error)
        finally:
            self.inbox.forget(futures)

    def unserved(self, ref: str) -> list[str]:
        """Stages of this version without a live worker."""
        return self._registry.unserved(self._registry.find(ref).pipeline)

    def unserved_hints(self, ref: str) -> list[str]:
        """A line for each stage that nobody serves, once for each; none when the server cannot tell."""
        if not ref:
            return []
        try:
            pipeline = self._registry.find(ref).pipeline
            unserved = self._registry.unserved(pipeline)
        except (*LOST, BrokerError, PipelineNotFound):
            return []  # it is a hint only
        file = pipeline.source or f"{pipeline.name}.yaml"
        fresh = [stage for stage in unserved if f"{ref}/{stage}" not in self._warned]
        self._warned.update(f"{ref}/{stage}" for stage in fresh)
        return [
            f"no live worker for {ref}/{stage}: jobs wait there; start one with: "
            f"torchrelay worker {file} --stage {stage}"
            for stage in fresh
        ]


def _source(pipeline: Any) -> Any:
    return pipeline if isinstance(pipeline, str) else Path(pipeline)


def not_yet(future: JobFuture[Any]) -> TimeoutError:
    return TimeoutError(f"job {future.id} has not ended yet; it goes on, and job({future.id!r}) finds it")


def all_in(outcomes: Iterable[Outcome]) -> list[JobFuture[Any]]:
    """The futures of jobs that all went in; else raises the first refusal, which carries those that did."""
    outcomes = list(outcomes)
    accepted = [o for o in outcomes if isinstance(o, JobFuture)]
    refusals: dict[type, list[TorchrelayError]] = {}
    for outcome in outcomes:
        if not isinstance(outcome, JobFuture):
            refusals.setdefault(type(outcome), []).append(outcome)
    if not refusals:
        return accepted
    kind, errors = next(iter(refusals.items()))
    # One error may stand for many jobs, and several callers may hold it: what went in is each caller's own.
    if issubclass(kind, QueueFull | RunConflict):
        more = f" (and {len(errors) - 1} more)" if issubclass(kind, RunConflict) and len(errors) > 1 else ""
        raise kind(f"{errors[0]}{more}", accepted=tuple(accepted)) from errors[0]
    # Each caller raises its own copy: many tasks may be told of one lost server.
    raise copy.copy(errors[0]) from errors[0]


def options_of(options: Mapping[str, Any], **defaults: Any) -> SubmitOptions:
    """Parsed options, with this call's own defaults."""
    return SubmitOptions.parse({**defaults, **options})


def past_deadline(future: JobFuture[Any], unserved: Sequence[str]) -> DeadlineExceeded:
    """What `infer` raises when no news of the job's end came in time."""
    why = f"; no live worker serves {', '.join(unserved)}" if unserved else ""
    return DeadlineExceeded(f"its deadline passed before it ended{why}", job_id=future.id)
