"""`Relay`: the synchronous client. It puts jobs in and takes results out; the work is done by workers elsewhere."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import redis

from torchrelay.config.columns import row_of_table
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import (
    BrokerError,
    BytesLost,
    DeadlineExceeded,
    InputError,
    JobError,
    PipelineNotFound,
    ResultExpired,
)
from torchrelay.producer.encoding import JobEncoder, SubmitOptions, key_digest, parse_wait
from torchrelay.producer.futures import JobFuture
from torchrelay.producer.inbox import Inbox
from torchrelay.producer.lookups import find_status, reached
from torchrelay.producer.mapping import map_in_order
from torchrelay.producer.submitter import Draft, Submitter
from torchrelay.queues import codec
from torchrelay.queues.blobs import read_blobs
from torchrelay.queues.channel import LOST
from torchrelay.queues.connection import open_broker
from torchrelay.queues.job import Ref, Terminal, decode_payloads
from torchrelay.queues.keys import lane_of
from torchrelay.queues.registry import Registered, Registry, run

Row = Mapping[str, Any]
_WARN_AFTER_S = 5.0
_FOREIGN_POLL_S = (0.005, 0.5)
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}(@[0-9a-f]{8})?")

log = logging.getLogger("torchrelay.producer")


class Relay:
    """A connection to a namespace. Use it as a context manager, or call `close()`. Thread-safe.

    Without a URL it takes `$TORCHRELAY_REDIS_URL`, else the embedded server of the nearest `.torchrelay` folder
    upwards, else it starts one. Nothing is opened before `start()`, `with`, or the first call.
    """

    def __init__(self, url: str | None = None, *, namespace: str | None = None, lanes: int | None = None) -> None:
        self._settings = Settings.load(url=url, namespace=namespace, lanes=lanes)
        self._lock = threading.RLock()
        self._opened = False
        self._closed = False
        self._closing = threading.Event()
        self.fetching = threading.Lock()
        self._warned: set[str] = set()
        self._encoders: dict[str, JobEncoder] = {}

    def __enter__(self) -> Relay:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self) -> Relay:
        """Connects, checks the server and opens the namespace. Raises BrokerUnavailable or BrokerMisconfigured."""
        with self._lock:
            if self._closed:
                raise InputError("this Relay is closed; make a new one")
            if not self._opened:
                self._broker = open_broker(self._settings.url)
                client: redis.Redis = self._broker.client
                self._registry = Registry(client, self._settings.namespace, self._settings.lanes)
                self._registry.open()
                self._inbox = Inbox(client, self._registry.lanes)
                self.settled = self._inbox.settled
                limit = self._settings.results_max_bytes
                self._submitter = Submitter(client, self._registry.lanes, self._inbox, self, limit, self._rest)
                self._submitter.start()
                self._opened = True
        return self

    def close(self) -> None:
        """Sends the last acknowledgements and disconnects. Jobs go on; `job(id)` finds them from anywhere."""
        with self._lock:
            first, self._closed = not self._closed, True
            self._closing.set()
            if self._opened and first:
                self._inbox.close()
                with self.settled:
                    self.settled.notify_all()
                self._submitter.close()
                self._broker.close()

    def _rest(self, seconds: float) -> None:
        """Sleeps for a submit that waits for room; other threads may use the relay meanwhile."""
        self._lock.release()
        try:
            self._closing.wait(seconds)
        finally:
            self._lock.acquire()
        if self._closed:
            raise InputError("this Relay was closed while a submit waited for room")

    @property
    def registry(self) -> Registry:
        """The namespace's pipelines, workers and loads."""
        return self.start()._registry

    @property
    def url(self) -> str:
        """Where the server is, without a password."""
        return self.start()._broker.url

    def register(self, pipeline: str | os.PathLike[str] | Pipeline) -> str:
        """Makes a pipeline file known and its version the one that new jobs take; returns `name@version`. Idempotent.

        Raises ConfigError with every problem of the file.
        """
        loaded = pipeline if isinstance(pipeline, Pipeline) else Pipeline.load(Path(pipeline))
        with reached():
            return self.registry.register(loaded).pipeline.ref

    def submit(
        self,
        pipeline: str,
        row: Row,
        *,
        priority: str | int = "medium",
        key: str | None = None,
        deadline_s: float | None = None,
        delay_s: float = 0.0,
        keep_s: int | None = None,
        wait_s: float = 0.0,
        meta: Mapping[str, Any] | None = None,
    ) -> JobFuture[dict[str, Any]]:
        """Submits one row (column -> value, without a batch axis) to `name` or `name@version`; returns its future.

        The job is durable when this returns. The same `key` with the same row returns the same job. A job past
        `deadline_s` is never started. `keep_s` keeps the result that long for every process (default: until this
        client has it, at most an hour; an hour with a key); 0 keeps nothing: fire and forget. `meta` travels with
        the job to `batch.meta`.

        Raises InputError for a row that does not fit, QueueFull when the entry queue stays full for `wait_s` seconds,
        RunConflict for a key that was used with another row, PipelineNotFound.
        """
        options = SubmitOptions.parse(priority, deadline_s, delay_s, keep_s, meta)
        keys = None if key is None else [key]
        return self._submit(pipeline, [row], keys, options, parse_wait(wait_s))[0]

    def submit_many(
        self,
        pipeline: str,
        rows: Iterable[Row],
        keys: Sequence[str] | None = None,
        *,
        priority: str | int = "medium",
        deadline_s: float | None = None,
        delay_s: float = 0.0,
        keep_s: int | None = None,
        wait_s: float = 0.0,
        meta: Mapping[str, Any] | None = None,
    ) -> list[JobFuture[dict[str, Any]]]:
        """Submits many rows in few round trips, each a job of its own; options as for `submit`.

        Every row is checked before the first is sent. QueueFull and RunConflict carry the futures of the jobs that went
        in as `accepted`.
        """
        options = SubmitOptions.parse(priority, deadline_s, delay_s, keep_s, meta)
        return self._submit(pipeline, rows, keys, options, parse_wait(wait_s))

    def _submit(
        self,
        pipeline: str,
        rows: Iterable[Row],
        keys: Sequence[str] | None,
        options: SubmitOptions,
        wait_s: float,
        first: int = 0,
    ) -> list[JobFuture[dict[str, Any]]]:
        """`first` is the number of the first row, for errors."""
        encoder = self._encoder(pipeline)
        drafts: list[Draft] = []
        for number, row in enumerate(rows, first):
            try:
                drafts.append(Draft(encoder.columns(row), 1))
            except InputError as error:
                raise InputError(f"row {number}: {error}") from error
        if keys is not None:
            if isinstance(keys, str) or len(keys) != len(drafts):
                raise InputError(f"{len(drafts)} rows need {len(drafts)} keys, a sequence; {len(keys)} came")
            for draft, key in zip(drafts, keys, strict=True):
                draft.digest, draft.key = key_digest(encoder.registered.pipeline.name, key), key
        with self._lock, reached():
            self.start()
            self._inbox.start()
            futures = self._submitter.send(encoder, drafts, options, wait_s)
        if options.keep_s == 0:
            for future in futures:
                gone = ResultExpired("it was submitted with keep_s=0: its result is not kept", job_id=future.id)
                with self._inbox.settled:
                    future.settle(gone)
        return futures

    def infer(self, pipeline: str, row: Row, *, deadline_s: float | None = None, **options: Any) -> dict[str, Any]:
        """Submits one row and waits for its result; the job is cancelled when `deadline_s` passes first.

        Raises what `submit` and `JobFuture.result` raise.
        """
        future = self.submit(pipeline, row, deadline_s=deadline_s, **options)
        try:
            # The server ends the job at its deadline; the second beyond it is for the news to arrive.
            return future.result(None if deadline_s is None else deadline_s + 1.0)
        except JobError:
            raise
        except TimeoutError as late:
            future.cancel()
            missing = self._registry.unserved(self._registry.find(future.pipeline).pipeline)
            why = f"; no live worker serves {', '.join(missing)}" if missing else ""
            raise DeadlineExceeded(f"its deadline passed before it ended{why}", job_id=future.id) from late
        except BaseException:
            if not future.done():
                future.cancel()
            raise

    def map(
        self,
        pipeline: str,
        rows: Iterable[Row],
        *,
        in_flight: int = 256,
        on_error: Literal["raise"] = "raise",
        **options: Any,
    ) -> Generator[dict[str, Any], None, None]:
        """Results of all rows, in their order, with at most `in_flight` jobs under way; waits while the queue is full.

        The first job that fails raises its JobError and cancels those under way, as does closing the generator.
        """
        if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
            raise InputError(f"in_flight {in_flight!r} must be a whole number from 1")
        if on_error != "raise":
            raise InputError(f'on_error {on_error!r} is not supported; "raise" is')
        wait_s = parse_wait(options.pop("wait_s", float("inf")))
        parsed = SubmitOptions.parse(**options)

        def submit(part: list[Row], first: int) -> list[JobFuture[dict[str, Any]]]:
            return self._submit(pipeline, part, None, parsed, wait_s, first)

        return map_in_order(iter(rows), in_flight, submit, self._cancel)

    def job(self, job_id: str) -> JobFuture[dict[str, Any]]:
        """The future of a job by its id, from any process. Raises InputError for what is no id of this namespace.

        Its `result()` raises ResultExpired when the result is not kept any more.
        """
        if not isinstance(job_id, str):
            raise InputError(f"{job_id!r:.60} is not a job id; take it from future.id")
        lane = lane_of(job_id)
        if lane >= len(self.registry.lanes):
            raise InputError(f"job {job_id} is of lane {lane}, this namespace has {len(self._registry.lanes)}")
        return JobFuture(self, job_id, "", foreign=True)

    def cancel(self, job_ids: Sequence[str]) -> list[bool]:
        """Ends these jobs; for each whether this call ended it."""
        return self._cancel([self.job(job_id).id for job_id in job_ids])

    # What futures ask of their source.

    def await_terminal(self, future: JobFuture[Any], deadline: float | None) -> None:
        """Blocks until the future is settled; raises TimeoutError at `deadline` (time.monotonic)."""
        if self._inbox.is_this_thread():
            raise InputError(
                "result() of a pending job inside a done callback would wait for itself; use its own future"
            )
        warn_at = time.monotonic() + _WARN_AFTER_S
        poll_s = _FOREIGN_POLL_S[0] if future.foreign else _WARN_AFTER_S
        while not future.done():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"job {future.id} has not ended yet; it goes on, and job({future.id!r}) finds it")
            if self._closed:
                raise InputError(f"this Relay was closed; job {future.id} goes on, and another Relay's job() finds it")
            if future.foreign:
                self._read_foreign(future)
            wait_s = min(poll_s, warn_at - now if warn_at > now else poll_s, (deadline or now + 3600) - now)
            with self.settled:
                self.settled.wait_for(lambda: future.done() or self._closed, timeout=max(wait_s, 0.0))
            if future.foreign:
                poll_s = min(poll_s * 2, _FOREIGN_POLL_S[1])
            if not future.done() and time.monotonic() >= warn_at:
                warn_at = float("inf")
                self._warn_unserved(future.pipeline)

    def _read_foreign(self, future: JobFuture[Any]) -> None:
        self._inbox.watch([future])
        try:
            self._inbox.reconcile([future])
        except LOST as error:
            log.info("job %s: the server is away, looking again: %s", future.id, error)
        finally:
            self._inbox.forget([future])

    def _warn_unserved(self, ref: str) -> None:
        if not ref:
            return
        try:
            pipeline = self._registry.find(ref).pipeline
            unserved = self._registry.unserved(pipeline)
        except (*LOST, BrokerError, PipelineNotFound):
            return  # it is a hint only
        for stage in unserved:
            node = f"{ref}/{stage}"
            if node not in self._warned:
                self._warned.add(node)
                file = pipeline.path or f"{pipeline.name}.yaml"
                warnings.warn(
                    f"no live worker for {node}: jobs wait there; start one with: "
                    f"torchrelay worker {file} --stage {stage}",
                    RuntimeWarning,
                    stacklevel=5,
                )

    def decode_result(self, future: JobFuture[Any], terminal: Terminal) -> dict[str, Any]:
        """The result's row. Columns that lie in Redis are fetched now, and acknowledged."""
        columns = decode_payloads(terminal.payload).columns
        refs = {name: c for name, c in columns.items() if isinstance(c, Ref)}
        if refs:
            lane = self._registry.lanes[lane_of(future.id)]
            try:
                with reached():
                    fetched = read_blobs(self._broker.client, lane, list(refs.values()))
            except BytesLost as error:
                raise ResultExpired(f"its result is not kept any more: {error}", job_id=future.id) from error
            columns.update(zip(refs, fetched, strict=True))
            if terminal.until_ack and not future.foreign:
                self._inbox.ack(future.id)
        table: dict[str, Any] = {
            name: codec.decode(data) for name, data in columns.items() if not isinstance(data, Ref)
        }
        return row_of_table(table)

    def look_up(self, job_id: str) -> str:
        """The status of a job that this process does not know to have ended."""
        with reached():
            return find_status(self.registry, job_id)

    def cancel_job(self, job_id: str) -> bool:
        return self._cancel([job_id])[0]

    def _cancel(self, ids: list[str]) -> list[bool]:
        won: dict[str, bool] = {}
        for number, lane in enumerate(self._registry.lanes):
            mine = [i for i in ids if lane_of(i) == number]
            for at in range(0, len(mine), 256):
                part = mine[at : at + 256]
                with reached():
                    answer = run(self._broker.client, lane.cancel(part))
                won.update((i, letter == "w") for i, letter in zip(part, answer, strict=True))
        return [won.get(i, False) for i in ids]

    def _encoder(self, pipeline: str) -> JobEncoder:
        if not isinstance(pipeline, str) or not _NAME.fullmatch(pipeline):
            raise InputError(f"pipeline must be a name or name@version, not {pipeline!r:.60}")
        with reached():
            registered: Registered = self.registry.find(pipeline)
        encoder = self._encoders.get(registered.pipeline.ref)
        if encoder is None:
            encoder = JobEncoder(registered, self._settings.priority_boost_ms_per_point)
            self._encoders[registered.pipeline.ref] = encoder
        return encoder
