"""What a submit of the asynchronous client returns: a job's future for the tasks of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np

from torchrelay.errors import InputError, JobError, JobFailed
from torchrelay.producer.core import not_yet
from torchrelay.producer.futures import JobFuture, no_pickle

R = TypeVar("R")
T = TypeVar("T")
# A result up to this size is decoded in the loop: a trip to a thread would take longer.
_DECODED_AT_ONCE_BYTES = 64 << 10


class AsyncSource(Protocol):
    """What a future asks of the AsyncRelay that made it; called in its loop."""

    def check(self) -> asyncio.AbstractEventLoop: ...
    async def ready(self) -> asyncio.AbstractEventLoop: ...
    def post(self, fn: Callable[[], object]) -> None: ...
    def run(self, fn: Callable[..., T], *args: Any) -> Coroutine[Any, Any, T]: ...
    def wait_begins(self, future: AsyncJobFuture[Any]) -> None: ...
    def wait_ends(self, future: AsyncJobFuture[Any]) -> None: ...
    async def cancel_jobs(self, ids: list[str]) -> list[bool]: ...


async def result_of(source: AsyncSource, job: JobFuture[R]) -> R:
    """The result of a job that has ended."""
    if job.is_at_hand(_DECODED_AT_ONCE_BYTES):
        return job.result()
    return await source.run(job.result)


class AsyncJobFuture(Generic[R]):
    """The result of one job, now or later: `await` it. For the event loop of its AsyncRelay.

    Cancelling a task that awaits it leaves the job alone; `cancel()` ends the job. Another process gets it by its id:
    `relay.job(future.id)`.
    """

    __slots__ = ("_callbacks", "_listens", "_source", "_waiters", "job")

    def __init__(self, source: AsyncSource, job: JobFuture[R]) -> None:
        self.job = job
        self._source = source
        self._listens = False
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[AsyncJobFuture[R]], object]] = []

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def pipeline(self) -> str:
        """`name@version`, or nothing for a job found by its id."""
        return self.job.pipeline

    def __repr__(self) -> str:
        return f"<Async{repr(self.job)[1:]}"

    def __reduce__(self) -> NoReturn:
        raise no_pickle(self)

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()

    def done(self) -> bool:
        """Whether the job has ended, as far as this process knows; never asks the server."""
        return self.job.done()

    async def status(self) -> str:
        """waiting, delayed, running, done, failed, cancelled, expired or unknown; asks the server while not done."""
        await self._source.ready()
        return self.job.status() if self.job.done() else await self._source.run(self.job.status)

    async def result(self, timeout: float | None = None) -> R:
        """Waits for the result and returns it: a row, or of `submit_table` a table.

        Raises JobFailed, JobCancelled, DeadlineExceeded or ResultExpired for how the job ended, and TimeoutError when
        `timeout` seconds pass first; the job goes on then.
        """
        await self._ended(timeout)
        return await result_of(self._source, self.job)

    async def exception(self, timeout: float | None = None) -> JobError | None:
        """Waits; returns the error with which the job ended, or None. Raises TimeoutError after `timeout` seconds."""
        await self._ended(timeout)
        return self.job.exception()

    @property
    def errors(self) -> dict[int, JobFailed]:
        """The rows that failed of a table submitted with `on_error="keep"`, by row number; await the result first."""
        self._need_result()
        return self.job.errors

    @property
    def source_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [N]: which submitted row each row of the result came from; await the result first."""
        self._need_result()
        return self.job.source_rows

    def _need_result(self) -> None:
        if not (self.job.done() and self.job.is_at_hand(0)):
            raise InputError(f"the result of job {self.id} is not here yet; await the future first")

    async def cancel(self) -> bool:
        """Ends the job unless it has ended; True when this call did it. A batch that runs now is not interrupted."""
        await self._source.ready()
        return not self.job.done() and (await self._source.cancel_jobs([self.id]))[0]

    def add_done_callback(self, fn: Callable[[AsyncJobFuture[R]], object]) -> None:
        """Has `fn(future)` called in the loop once the job is done, soon when it is done already."""
        loop = self._source.check()
        if self.job.done() and not self._callbacks:
            loop.call_soon(fn, self)
            return
        self._callbacks.append(fn)
        self._listen()

    async def _ended(self, timeout: float | None) -> None:
        loop = await self._source.ready()
        if self.job.done():
            return
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        late = None if timeout is None else loop.call_later(max(timeout, 0.0), self._late, waiter)
        self._source.wait_begins(self)
        try:
            self._listen()
            await waiter
        finally:
            self._source.wait_ends(self)
            self._waiters.remove(waiter)
            if late is not None:
                late.cancel()

    def _late(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_exception(not_yet(self.job))

    def _listen(self) -> None:
        if not self._listens:
            self._listens = True
            self.job.add_done_callback(self._post)

    def _post(self, job: JobFuture[R]) -> None:
        self._source.post(self.wake)

    def wake(self, error: Exception | None = None) -> None:
        """Ends every wait: the job has ended, or the client cannot tell any more."""
        for waiter in self._waiters:
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)
        if error is None:
            callbacks, self._callbacks = self._callbacks, []
            loop = asyncio.get_running_loop()
            for fn in callbacks:
                loop.call_soon(fn, self)
