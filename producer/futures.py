"""What a submit returns: the job's future. It performs no I/O of its own; its `Source` does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from torchrelay.errors import DeadlineExceeded, JobCancelled, JobError, JobFailed
from torchrelay.queues.job import Failure, Terminal

R = TypeVar("R")


class Source(Protocol):
    """Where a future's answers come from: the Relay that made it."""

    settled: threading.Condition
    fetching: threading.Lock

    def await_terminal(self, future: JobFuture[Any], deadline: float | None) -> None: ...
    def decode_result(self, future: JobFuture[Any], terminal: Terminal) -> Any: ...
    def look_up(self, job_id: str) -> str: ...
    def cancel_job(self, job_id: str) -> bool: ...


def error_of(job_id: str, terminal: Terminal) -> JobError | None:
    """The error that a terminal record stands for, or None for a result."""
    if terminal.status == "done":
        return None
    if terminal.status == "cancelled":
        return JobCancelled("the job was cancelled", job_id=job_id)
    if terminal.status == "expired":
        return DeadlineExceeded("its deadline passed before it ended", job_id=job_id)
    why = Failure.decode(terminal.payload)
    return JobFailed(
        why.message,
        job_id=job_id,
        stage=why.stage,
        attempts=terminal.attempts,
        error_type=why.error_type,
        traceback=why.traceback,
    )


class JobFuture(Generic[R]):
    """The result of one job, now or later. Safe to use from several threads."""

    __slots__ = ("_callbacks", "_error", "_source", "_terminal", "_value", "foreign", "id", "pipeline", "submitted_at")

    def __init__(self, source: Source, job_id: str, pipeline: str, *, foreign: bool = False) -> None:
        self.id = job_id
        self.pipeline = pipeline
        self.foreign = foreign
        self.submitted_at = math.inf  # time.monotonic() once the server took it
        self._source = source
        self._terminal: Terminal | None = None
        self._error: JobError | None = None
        self._value: R | None = None
        self._callbacks: list[Callable[[JobFuture[R]], object]] | None = None

    def __repr__(self) -> str:
        state = self._known() or ("gone" if self._error is not None else "pending")
        return f"<JobFuture {self.id}{' of ' if self.pipeline else ''}{self.pipeline}: {state}>"

    def _known(self) -> str | None:
        return self._terminal.status if self._terminal is not None else None

    def done(self) -> bool:
        """Whether the job has ended, as far as this process knows; never asks the server."""
        return self._terminal is not None or self._error is not None

    def status(self) -> str:
        """waiting, delayed, running, done, failed, cancelled, expired or unknown; asks the server while not done."""
        return self._known() or self._source.look_up(self.id)

    def result(self, timeout: float | None = None) -> R:
        """Waits for the result and returns it.

        Raises JobFailed, JobCancelled, DeadlineExceeded or ResultExpired for how the job ended, and TimeoutError when
        `timeout` seconds pass first; the job goes on then.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        if self._value is None:
            assert self._terminal is not None  # exception() returned: the job is done
            if self._terminal.has_refs:
                self._fetch(self._terminal)
            else:
                self._value = self._source.decode_result(self, self._terminal)
        return self._value  # type: ignore[return-value]  # decoded above

    def _fetch(self, terminal: Terminal) -> None:
        """Bytes kept until delivered are gone once they were fetched: of several threads, one fetches them."""
        with self._source.fetching:
            if self._value is None:
                self._value = self._source.decode_result(self, terminal)

    def exception(self, timeout: float | None = None) -> JobError | None:
        """Waits; returns the error with which the job ended, or None. Raises TimeoutError after `timeout` seconds."""
        if not self.done():
            self._source.await_terminal(self, None if timeout is None else time.monotonic() + timeout)
        if self._error is None and self._terminal is not None:
            self._error = error_of(self.id, self._terminal)
        return self._error

    def cancel(self) -> bool:
        """Ends the job unless it has ended; True when this call did it. A batch that runs now is not interrupted."""
        return self._terminal is None and self._source.cancel_job(self.id)

    def add_done_callback(self, fn: Callable[[JobFuture[R]], object]) -> None:
        """Calls `fn(future)` once it is done: in the receiving thread, or at once when it is done already."""
        with self._source.settled:
            if not self.done():
                self._callbacks = [*(self._callbacks or ()), fn]
                return
        fn(self)

    def settle(self, outcome: Terminal | JobError) -> list[Callable[[JobFuture[R]], object]]:
        """For the Source, under its lock: takes the outcome, returns the callbacks to call afterwards."""
        if self.done():
            return []
        if isinstance(outcome, Terminal):
            self._terminal = outcome
        else:
            self._error = outcome
        callbacks, self._callbacks = self._callbacks or [], None
        return callbacks
