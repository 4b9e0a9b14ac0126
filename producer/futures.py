"""What a submit returns: the job's future. It performs no I/O of its own; its `Source` does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np

from torchrelay.errors import DeadlineExceeded, InputError, JobCancelled, JobError, JobFailed
from torchrelay.producer.results import Decoded
from torchrelay.queues.job import Failure, Terminal

R = TypeVar("R")
Row = dict[str, Any]
"""A result row: column -> value."""
Table = dict[str, Any]
"""A result table: column -> N values, an array `[N, ...]` or a list."""


class Source(Protocol):
    """Where a future's answers come from: the client that made it."""

    @property
    def settled(self) -> threading.Condition: ...
    @property
    def fetching(self) -> threading.Lock: ...
    def await_terminal(self, future: JobFuture[Any], deadline: float | None) -> None: ...
    def decode_result(self, future: JobFuture[Any], terminal: Terminal) -> Decoded: ...
    def look_up(self, job_id: str) -> str: ...
    def cancel(self, ids: list[str]) -> list[bool]: ...


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
    """The result of one job, now or later. Safe to use from several threads.

    Another process gets it by its id: `relay.job(future.id)`.
    """

    __slots__ = (
        "_callbacks",
        "_decoded",
        "_error",
        "_source",
        "_terminal",
        "foreign",
        "id",
        "joined",
        "pipeline",
        "submitted_at",
    )

    def __init__(self, source: Source, job_id: str, pipeline: str, *, foreign: bool = False) -> None:
        self.id = job_id
        self.pipeline = pipeline
        self.foreign = foreign
        self.joined = False  # its key led to a job that was there before
        self.submitted_at = math.inf  # time.monotonic() once the server took it
        self._source = source
        self._terminal: Terminal | None = None
        self._error: JobError | None = None
        self._decoded: Decoded | None = None
        self._callbacks: list[Callable[[JobFuture[R]], object]] | None = None

    def __repr__(self) -> str:
        return f"<JobFuture {self.id}{' of ' if self.pipeline else ''}{self.pipeline}: {self.state()}>"

    def __reduce__(self) -> NoReturn:
        raise no_pickle(self)

    def state(self) -> str:
        """How the job ended as far as this process knows, "gone" for a result not kept, else "pending"."""
        return self._known() or ("gone" if self._error is not None else "pending")

    def _known(self) -> str | None:
        return self._terminal.status if self._terminal is not None else None

    def done(self) -> bool:
        """Whether the job has ended, as far as this process knows; never asks the server."""
        return self._terminal is not None or self._error is not None

    def status(self) -> str:
        """waiting, delayed, running, done, failed, cancelled, expired or unknown; asks the server while not done."""
        return self._known() or self._source.look_up(self.id)

    def result(self, timeout: float | None = None) -> R:
        """Waits for the result and returns it: a row, or of `submit_table` a table.

        Raises JobFailed, JobCancelled, DeadlineExceeded or ResultExpired for how the job ended, and TimeoutError when
        `timeout` seconds pass first; the job goes on then.
        """
        value: R = self._result(timeout).value
        return value

    @property
    def errors(self) -> dict[int, JobFailed]:
        """Waits like `result()`; the rows that failed of a table submitted with `on_error="keep"`, by row number."""
        return {
            f.row: JobFailed(f.message, job_id=self.id, stage=f.stage, attempts=f.attempts, error_type=f.error_type)
            for f in self._result(None).failures
        }

    @property
    def source_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Waits like `result()`; int64 [N]: which submitted row each row of the result came from."""
        return self._result(None).source_rows

    def _result(self, timeout: float | None) -> Decoded:
        error = self.exception(timeout)
        if error is not None:
            raise error
        if self._decoded is None:
            assert self._terminal is not None  # exception() returned: the job is done
            if self._terminal.has_refs:
                return self._fetch(self._terminal)
            self._decoded = self._source.decode_result(self, self._terminal)
        return self._decoded

    def _fetch(self, terminal: Terminal) -> Decoded:
        """Bytes kept until delivered are gone once they were fetched: of several threads, one fetches them."""
        with self._source.fetching:
            if self._decoded is None:
                self._decoded = self._source.decode_result(self, terminal)
            return self._decoded

    def is_at_hand(self, most_bytes: int) -> bool:
        """Whether a done job's result can be had at once: it is decoded, or small and nothing needs fetching."""
        terminal = self._terminal
        if terminal is None or self._decoded is not None or terminal.status != "done":
            return True
        return not terminal.has_refs and len(terminal.payload) <= most_bytes

    def exception(self, timeout: float | None = None) -> JobError | None:
        """Waits; returns the error with which the job ended, or None. Raises TimeoutError after `timeout` seconds."""
        if not self.done():
            self._source.await_terminal(self, None if timeout is None else time.monotonic() + timeout)
        if self._error is None and self._terminal is not None:
            self._error = error_of(self.id, self._terminal)
        return self._error

    def cancel(self) -> bool:
        """Ends the job unless it has ended; True when this call did it. A batch that runs now is not interrupted."""
        return self._terminal is None and self._source.cancel([self.id])[0]

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


def no_pickle(future: Any) -> InputError:
    """What pickling or copying a future raises."""
    kind = type(future).__name__
    return InputError(f"a {kind} cannot be pickled or copied: send future.id, and call relay.job({future.id!r}) there")
