"""`AsyncRelay`: the client for asyncio, with the names of `Relay`."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import JobError
from torchrelay.producer.async_core import AsyncCore
from torchrelay.producer.async_futures import AsyncJobFuture, result_of
from torchrelay.producer.async_mapping import map_rows_async
from torchrelay.producer.core import options_of, past_deadline
from torchrelay.producer.encoding import Draft, JobEncoder, Options, SubmitOptions, kept_rows
from torchrelay.producer.futures import JobFuture, Row, Table
from torchrelay.producer.mapping import Window, yields_errors

if TYPE_CHECKING:
    from torchrelay.producer.runs.options import RunKeywords
    from torchrelay.producer.runs.run import CheckedRun, Run

__all__ = ["AsyncRelay"]


class AsyncRelay:
    """A connection to a namespace for the tasks of one event loop: `async with AsyncRelay(url) as relay`.

    What thousands of tasks submit and cancel is gathered and sent together; the loop never waits for the server. URL,
    options and errors are those of `Relay`; nothing is opened before `start()`, `async with`, or the first call.
    """

    def __init__(self, url: str | None = None, *, namespace: str | None = None, lanes: int | None = None) -> None:
        self._core = AsyncCore(Settings.load(url=url, namespace=namespace, lanes=lanes))

    async def __aenter__(self) -> AsyncRelay:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> AsyncRelay:
        """Connects, checks the server and opens the namespace. Raises BrokerUnavailable or BrokerMisconfigured."""
        await self._core.ready()
        return self

    async def close(self) -> None:
        """Ends every wait with an error, sends the last acknowledgements, disconnects. Jobs go on."""
        await self._core.close()

    @property
    def url(self) -> str:
        """Where the server is, without a password."""
        self._core.check()
        return self._core.core.broker.url

    async def register(self, pipeline: str | os.PathLike[str] | Pipeline) -> str:
        """Makes a pipeline known and its version the one that new jobs take; returns `name@version`. Idempotent.

        `pipeline` is a YAML file, `module.py:name` or a Pipeline. Raises ConfigError with every problem of the file.
        """
        await self._core.ready()
        return await self._core.run(self._core.core.register, pipeline)

    async def submit(
        self, pipeline: str, row: Mapping[str, Any], *, key: str | None = None, **options: Unpack[Options]
    ) -> AsyncJobFuture[Row]:
        """Submits one row and returns its future; the job is durable then. Options and errors as for `Relay.submit`.

        `wait_s` holds up nobody else. A task that is cancelled here leaves no job behind.
        """
        job = await self._submit(pipeline, row, key, options_of(options))
        return AsyncJobFuture(self._core, job)

    async def _submit(
        self, pipeline: str, row: Mapping[str, Any], key: str | None, options: SubmitOptions
    ) -> JobFuture[Row]:
        def make() -> tuple[JobEncoder, list[Draft]]:
            encoder = self._core.core.encoder(pipeline)
            return encoder, [encoder.row(row, key)]

        return (await self._core.send(make, options))[0]

    async def submit_many(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]],
        keys: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> list[AsyncJobFuture[Row]]:
        """Submits many rows, each a job of its own; every row is checked before the first is sent."""
        jobs = await self._submit_rows(pipeline, list(kept_rows(rows)), keys, options_of(options))
        return [AsyncJobFuture(self._core, job) for job in jobs]

    async def _submit_rows(
        self,
        pipeline: str,
        rows: list[Mapping[str, Any]],
        keys: Sequence[str] | None,
        options: SubmitOptions,
        first: int = 0,
    ) -> list[JobFuture[Row]]:
        def make() -> tuple[JobEncoder, list[Draft]]:
            encoder = self._core.core.encoder(pipeline)
            return encoder, encoder.rows(rows, keys, first)

        return await self._core.send(make, options)

    async def submit_table(
        self,
        pipeline: str,
        table: Mapping[str, Any],
        *,
        on_error: Literal["raise", "keep"] = "raise",
        key: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncJobFuture[Table]:
        """Submits N rows as one job whose result is a table, as `Relay.submit_table` does.

        Once the result was awaited, the future has `errors` and `source_rows`.
        """

        def make() -> tuple[JobEncoder, list[Draft]]:
            encoder = self._core.core.encoder(pipeline)
            return encoder, [encoder.table(table, on_error, key)]

        return AsyncJobFuture(self._core, (await self._core.send(make, options_of(options)))[0])

    async def infer(
        self, pipeline: str, row: Mapping[str, Any], *, key: str | None = None, **options: Unpack[Options]
    ) -> Row:
        """Submits one row and waits for its result; the job ends when `deadline_s` passes first.

        Cancelling the task cancels the job. A job that was there before, by its key, is left alone.
        """
        parsed = options_of(options)
        future = AsyncJobFuture(self._core, await self._submit(pipeline, row, key, parsed))
        deadline_s = parsed.deadline_s
        try:
            # The server ends the job at its deadline; the second beyond it is for the news to arrive.
            return await future.result(None if deadline_s is None else deadline_s + 1.0)
        except JobError:
            raise
        except TimeoutError as late:
            if not future.job.joined:
                await future.cancel()
            unserved = await self._core.run(self._core.core.unserved, future.pipeline)
            raise past_deadline(future.job, unserved) from late
        except BaseException:
            if not future.done() and not future.job.joined:
                self._core.cancel_soon([future.id])
            raise

    @overload
    def map(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        in_flight: int = 256,
        ordered: bool = True,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[Options],
    ) -> AsyncGenerator[Row, None]: ...

    @overload
    def map(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        in_flight: int = 256,
        ordered: bool = True,
        on_error: Literal["return"],
        **options: Unpack[Options],
    ) -> AsyncGenerator[Row | JobError, None]: ...

    def map(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        in_flight: int = 256,
        ordered: bool = True,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[Options],
    ) -> AsyncGenerator[Any, None]:
        """Results of all rows, with at most `in_flight` jobs under way; options and order as for `Relay.map`.

        Rows are drawn in the loop as there is room. Leave it early by closing it (`contextlib.aclosing`): that cancels
        the jobs under way.
        """
        window: Window[JobFuture[Row]] = Window(in_flight, ordered)
        keep_errors = yields_errors(on_error)
        parsed = options_of(options, wait_s=math.inf)

        async def submit(part: list[Mapping[str, Any]], first: int) -> list[JobFuture[Row]]:
            return await self._submit_rows(pipeline, part, None, parsed, first)

        async def results() -> AsyncGenerator[Any, None]:
            async with aclosing(map_rows_async(self._core, rows, window, submit)) as jobs:
                async for job in jobs:
                    error = job.exception() if keep_errors else None
                    yield error if error is not None else await result_of(self._core, job)

        return results()

    async def run(
        self,
        pipeline: str | Pipeline,
        *,
        input: Any,
        output: str | os.PathLike[str],
        wait: bool = True,
        **options: Unpack[RunKeywords],
    ) -> Run:
        """Puts a dataset through a pipeline; arguments, options and errors as for `Relay.run`.

        A task that is cancelled while it waits cancels the run, which can go on later. The methods of `Run` block.
        """
        run = (await self.prepare_run(pipeline, input=input, output=output, **options)).start()
        if wait:
            try:
                await asyncio.to_thread(run.wait)
            except asyncio.CancelledError:
                await asyncio.shield(asyncio.to_thread(run.end))
                raise
        return run

    async def prepare_run(
        self, pipeline: str | Pipeline, *, input: Any, output: str | os.PathLike[str], **options: Unpack[RunKeywords]
    ) -> Run:
        """The same up to the first job, as for `Relay.prepare_run`."""
        checked = await self.check_run(pipeline, input=input, output=output, **options)
        return await asyncio.to_thread(checked.open)

    async def check_run(
        self, pipeline: str | Pipeline, *, input: Any, output: str | os.PathLike[str], **options: Unpack[RunKeywords]
    ) -> CheckedRun:
        """The same up to the folder, as for `Relay.check_run`."""
        # Only who runs datasets needs what reads and writes them.
        from torchrelay.producer.runs.options import RunOptions
        from torchrelay.producer.runs.run import check_run

        parsed = RunOptions.parse(output, options)
        await self._core.ready()
        # Not where submits wait for their turn: listing an input may take long.
        return await asyncio.to_thread(check_run, self._core.core, pipeline, input, parsed)

    def job(self, job_id: str) -> AsyncJobFuture[Any]:
        """The future of a job by its id, from any process. Raises InputError for what is no id of this namespace.

        Its `result()` raises ResultExpired when the result is not kept any more.
        """
        return AsyncJobFuture(self._core, self._core.core.job(job_id))

    async def cancel(self, job_ids: Sequence[str]) -> list[bool]:
        """Ends these jobs; for each whether this call ended it."""
        return await self._core.cancel_jobs([self._core.core.job(job_id).id for job_id in job_ids])
