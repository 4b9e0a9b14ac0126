"""Drives one run: keeps some chunks under way, takes down what became of each, and ends with a summary.

It neither reads nor writes the dataset: jobs carry descriptors, and parts are written by workers. Whatever ends it, the
folder holds a run that can go on; chunks that were under way are found again by their keys.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import redis

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import CHUNK, RESULT, ROWS
from torchrelay.errors import BrokerError, JobError, JobFailed, QueueFull, ResultExpired, RunConflict, TorchrelayError
from torchrelay.producer.core import Core
from torchrelay.producer.encoding import Draft, JobEncoder, SubmitOptions
from torchrelay.producer.futures import JobFuture
from torchrelay.producer.runs.finishing import ChunkFailure
from torchrelay.producer.runs.folder import RunFolder
from torchrelay.producer.runs.options import RunOptions
from torchrelay.producer.runs.pace import Progress, Throughput, bottleneck, chunks_in_flight
from torchrelay.producer.runs.searching import Searches, Step
from torchrelay.producer.runs.watching import StageWatch
from torchrelay.producer.runs.works import Work
from torchrelay.queues.dead import drop
from torchrelay.stages.writing.found import find

__all__ = ["Driver"]

log = logging.getLogger("torchrelay.runs")
_LOOK_S = 0.5
_HINT_S = 5.0
_PART, _PART_BYTES = 32, 8 << 20
_MOST_BYTES = 128 << 20
_TRIES, _MOST_JOINED = 3, 100
# How a job fails through no fault of its rows: once more may help. Of one that ends its worker, which was tried three
# times, the rows at fault are searched.
_NOT_ITS_FAULT = ("BytesLost",)
_WAIT_FOR_ROOM_S = 1.0
_KEEP_S = 600


class _Flight(NamedTuple):
    work: Work
    future: JobFuture[Any]


class Driver:
    """One run from its first chunk to its last. `run()` blocks; `cancel()` may be called from any thread.

    Args:
        core: the client.
        twin: the run graph of the pipeline, registered.
        folder: held by this driver.
        works: what there is to do.
        options: as asked for.
    """

    def __init__(
        self, core: Core, twin: Pipeline, folder: RunFolder, works: Iterator[Work], options: RunOptions
    ) -> None:
        self._core = core
        self._twin = twin
        self._folder = folder
        self._works = works
        self._options = options
        self._encoder: JobEncoder = core.encoder(twin.ref)
        # What a job ended with is of no use once its part is there.
        self._submit = SubmitOptions(
            priority=options.priority, wait_s=_WAIT_FOR_ROOM_S, keep_s=_KEEP_S, tenant=options.tenant
        )
        self._again: deque[Work] = deque()
        self._flights: list[_Flight] = []
        self._cancelled = threading.Event()
        self._throughput = Throughput()
        self._watch = StageWatch(twin)
        self._told_at = 0.0
        self._moved_at = time.monotonic()
        self._searches = Searches()
        self.failures: list[ChunkFailure] = []
        self.rows = self.failed_rows = 0
        self.chunks: int | None = None
        """How many there are to do, once somebody counted them."""
        self.status = "done"

    def cancel(self) -> None:
        """Ends the run soon: what is under way is cancelled, and can be done by a later run that goes on."""
        self._cancelled.set()
        if self._core.opened:
            with self._core.settled:
                self._core.settled.notify_all()

    def run(self) -> str:
        """Until its end: "done", "failed" where a chunk has no part, "stopped" at too many errors, or "cancelled"."""
        self._throughput = Throughput()
        self._moved_at = time.monotonic()
        try:
            self._loop()
            if self._cancelled.is_set():
                self.status = "cancelled"
            elif self.status == "done" and self.failures:
                self.status = "failed"
        except BaseException:
            self.status = "cancelled"
            raise
        finally:
            self._throughput.over = time.monotonic()
            self._call_off()
            self._tell(last=True)
        return self.status

    def _loop(self) -> None:
        more = True
        while not self._cancelled.is_set():
            while more and (room := self._room()) > 0:
                sent = len(self._flights)
                more = self._send(room)
                if more and len(self._flights) == sent:
                    break  # the queue is full: what ends first makes room
            if not self._flights and not self._again and not more:
                return
            self._wait()
            ended = [f for f in self._flights if f.future.done()]
            self._flights = [f for f in self._flights if not f.future.done()]
            for flight in ended:
                self._ended(flight)
            if self._too_many_errors():
                self.status = "stopped"
                return
            more = more or bool(self._again)
            self._folder.renew()
            self._tell()

    def _room(self) -> int:
        if self._cancelled.is_set() or sum(len(f.work.rows or b"") for f in self._flights) > _MOST_BYTES:
            return 0
        return self._window() - len(self._flights)

    def _window(self) -> int:
        if self._options.in_flight is not None:
            return self._options.in_flight
        self._watch.look(self._core.registry)
        return chunks_in_flight(self._watch.nodes(), self._watch.reports)

    def _send(self, room: int) -> bool:
        """Submits some of what is next; False when nothing is left to submit."""
        part: list[Work] = []
        nbytes = 0
        # Rows that lie in memory are held once more here, and by the server until they were read.
        while len(part) < min(room, _PART) and nbytes < _PART_BYTES:
            work = self._again.popleft() if self._again else next(self._works, None)
            if work is None:
                break
            part.append(work)
            nbytes += len(work.rows or b"")
        if not part:
            return False
        outcomes = self._core.send_each(self._encoder, [self._draft(work) for work in part], self._submit)
        refused: TorchrelayError | None = None
        for work, outcome in zip(part, outcomes, strict=True):
            if isinstance(outcome, JobFuture):
                self._flights.append(_Flight(work, outcome))
                continue
            self._again.append(work)
            if not isinstance(outcome, QueueFull):
                refused = outcome
        if refused is not None:
            raise refused
        return True

    def _draft(self, work: Work) -> Draft:
        """The same job of the same run has the same key, so that one that is under way already is joined."""
        text = work.task.encode()
        content = blake2b(text.encode() + (work.rows or b""), digest_size=8).hexdigest()
        key = f"{work.task.run}/{work.place[0]}/{work.place[1]}/{work.attempts}/{content}"
        return self._encoder.table({CHUNK: [text], ROWS: [work.rows]}, "keep", key)

    def _wait(self) -> None:
        """Until a chunk ended, or for a moment."""
        flights = self._flights

        def over() -> bool:
            return self._cancelled.is_set() or self._core.closed or any(f.future.done() for f in flights)

        with self._core.settled:
            self._core.settled.wait_for(over, _LOOK_S)
        if self._core.closed:
            raise self._core.is_closed()
        if any(f.future.done() for f in flights):
            self._moved_at = time.monotonic()
        elif time.monotonic() - self._moved_at > _HINT_S:
            self._moved_at = time.monotonic()
            for text in self._core.unserved_hints(self._twin.ref):
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _ended(self, flight: _Flight) -> None:
        work, future = flight
        error = future.exception(0)
        if work.task.span is not None:
            self._follow(work, self._searches.ended(work, error), error)
            return
        if error is None:
            try:
                (written,) = future.result()[RESULT]
                # A job that was there before may have written what somebody took away since.
                if not future.joined or find(self._folder.output, self._folder.part(*work.place)) is not None:
                    self._written(work, written)
                    return
                error = ResultExpired("its part is gone", job_id=future.id)
            except ResultExpired as expired:
                error = expired
        if self._once_more(work, error, joined=future.joined):
            self._again.append(work._replace(attempts=work.attempts + 1))
            return
        self._follow(work, self._searches.begin(work, error, patient=self.rows > 0), error)

    def _follow(self, work: Work, step: Step, error: JobError | None) -> None:
        """Of a chunk that ended its workers comes what finds the rows at fault."""
        # First to its depth: how small pieces fare tells whether the search is of use.
        self._again.extendleft(reversed(step.works))
        if step.failed is not None:
            self._failed(work, step.failed)
        if error is not None:
            self._forget(error)

    def _once_more(self, work: Work, error: JobError, *, joined: bool) -> bool:
        if self._cancelled.is_set():
            return False
        if joined and work.attempts < _MOST_JOINED:
            return True  # it failed when the run went this way before, and what was in the way may be gone
        if work.attempts + 1 >= _TRIES:
            return False
        return not isinstance(error, JobFailed) or error.error_type in _NOT_ITS_FAULT

    def _written(self, work: Work, written: dict[str, Any]) -> None:
        self._folder.commit(work.place[0], written["name"], work.place[1])
        self.rows += written["rows"]
        self.failed_rows += written["failed"]
        self._throughput.ended(written["rows"] + written["failed"])

    def _failed(self, work: Work, error: JobError) -> None:
        chunk = work.task.chunk
        log.warning("chunk %d of %s: %s", chunk.number, chunk.path, error)
        # Of a retry, the rows' former errors are in the part that they failed in.
        if work.task.only is None:
            rows = chunk.end - chunk.start if chunk.unit == "rows" else None
            kind, text = error.error_type or type(error).__name__, error.message
            self.failures.append(
                ChunkFailure(chunk.number, chunk.source, rows, error.stage, kind, text, error.attempts)
            )
        self._throughput.ended(0)

    def _forget(self, error: JobError) -> None:
        if isinstance(error, JobFailed) and error.job_id:
            # It stands in the run's errors, from where the run goes on: among the dead letters it would be done twice.
            try:
                drop(self._core.registry, [error.job_id])
            except (BrokerError, redis.RedisError) as away:
                log.info("dead letter %s is left: %s", error.job_id, away)

    def _too_many_errors(self) -> bool:
        most = self._options.max_errors
        return most is not None and self.failed_rows + sum(f.rows or 1 for f in self.failures) > most

    def _call_off(self) -> None:
        left = [f.future.id for f in self._flights if not f.future.done()]
        if left and not self._core.closed:
            try:
                self._core.cancel(left)
            except (BrokerError, redis.RedisError, OSError, RunConflict) as away:
                log.warning("%d chunks stay under way: %s", len(left), away)

    def progress(self) -> Progress:
        """How it stands now."""
        through = self._throughput
        left = None if self.chunks is None else max(self.chunks - through.chunks, 0)
        return Progress(
            self.chunks,
            through.chunks,
            self.rows,
            self.failed_rows,
            len(self.failures),
            through.seconds,
            through.rates()[0],
            through.eta_s(left),
            self._watch.stages,
            bottleneck(self._watch.stages),
        )

    def _tell(self, *, last: bool = False) -> None:
        told, now = self._options.on_progress, time.monotonic()
        if not last and now - self._told_at < _LOOK_S:
            return
        self._told_at = now
        if last and self.status != "cancelled":
            self._watch.last_look(self._core.registry)
        else:
            self._watch.look(self._core.registry)
        if told is not None:
            told(self.progress())
