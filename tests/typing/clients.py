"""Programs over both clients. They are never run: mypy (strict) and pyright read them, in test_typing.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, assert_type

import numpy as np

from torchrelay import AsyncJobFuture, AsyncRelay, JobFuture, Relay, errors
from torchrelay.producer import Options, Row, Table
from torchrelay.producer.runs.run import Run


def tables(relay: Relay, vectors: np.ndarray[Any, np.dtype[np.float32]]) -> dict[int, str]:
    """A table in, a table out, and the rows that failed."""
    future = relay.submit_table("embed", {"x": vectors, "lang": ["en"] * len(vectors)}, on_error="keep", key="t-1")
    assert_type(future, JobFuture[Table])
    table = future.result(timeout=60)
    assert_type(table, dict[str, Any])
    assert_type(future.errors, dict[int, errors.JobFailed])
    first = future.source_rows[0]
    print(table["vector"][first])
    return {row: error.message for row, error in future.errors.items()}


def streams(relay: Relay, rows: Iterator[Mapping[str, object]]) -> Iterator[str]:
    """map with and without errors among the results."""
    for row in relay.map("embed", rows, in_flight=64, ordered=False, priority="low"):
        assert_type(row, Row)
    for result in relay.map("embed", rows, on_error="return"):
        assert_type(result, Row | errors.JobError)
        if isinstance(result, errors.JobError):
            yield f"{result.stage}: {result.message}"
        else:
            yield result["label"]


def runs(relay: Relay) -> int:
    """A dataset, waited for or not."""
    run = relay.run("embed", input=["a.parquet"], output="out/", columns={"text": "body"}, keep=["url"], priority="low")
    assert_type(run, Run)
    for row in run.rows(["vector"]):
        assert_type(row, dict[str, Any])
    later = relay.run("embed", input=({"x": i} for i in range(9)), output="more/", wait=False, on_progress=print)
    return later.progress().rows


async def async_runs(relay: AsyncRelay) -> dict[str, Any]:
    """The same, in a task."""
    run = await relay.run("embed", input="docs/", output="out/", resume=True, limit=10, max_errors=3, merge=True)
    return run.summary()


def shared_options(relay: Relay) -> None:
    """Options kept in one place."""
    options: Options = {"priority": 80, "deadline_s": 2.0, "meta": {"user": 7}}
    assert_type(relay.infer("embed", {"text": "hi"}, key="doc-17", **options), Row)
    assert_type(relay.submit_many("embed", [{"text": "hi"}], **options), list[JobFuture[Row]])


def refused(relay: Relay, future: JobFuture[Row]) -> None:
    """What a checker must not let pass."""
    relay.submit("embed", {"text": "hi"}, prority="high")  # type: ignore[call-arg]
    relay.submit("embed", {"text": "hi"}, deadline_s="soon")  # type: ignore[arg-type]
    relay.submit_table("embed", {"text": ["hi"]}, on_error="return")  # type: ignore[arg-type]
    relay.map("embed", [{"text": "hi"}], on_error="keep")  # type: ignore[call-overload]
    number: int = future.result()  # type: ignore[assignment]
    print(number)


async def one(relay: AsyncRelay) -> Row:
    """Submit, look, await, cancel."""
    future = await relay.submit("embed", {"text": "hi"}, wait_s=1.0, keep_s=60)
    assert_type(future, AsyncJobFuture[Row])
    future.add_done_callback(lambda done: print(done.id, done.done()))
    assert_type(await future.status(), str)
    assert_type(await future.exception(), errors.JobError | None)
    try:
        async with asyncio.timeout(1.0):
            return await future
    except TimeoutError:
        assert_type(await future.cancel(), bool)
        return await relay.infer("embed", {"text": "hi"}, deadline_s=2.0)


async def many(relay: AsyncRelay, texts: list[str]) -> list[str]:
    """Thousands of calls in one loop."""
    rows = await asyncio.gather(*[relay.infer("embed", {"text": text}) for text in texts])
    assert_type(rows, list[Row])
    futures = await relay.submit_many("embed", [{"text": text} for text in texts])
    assert_type(futures, list[AsyncJobFuture[Row]])
    assert_type(await relay.cancel([f.id for f in futures]), list[bool])
    table = await relay.submit_table("embed", {"text": texts}, on_error="keep")
    assert_type(await table, Table)
    assert_type(table.errors, dict[int, errors.JobFailed])
    return [str(row["label"]) for row in rows]


async def drawn() -> AsyncIterator[dict[str, object]]:
    """Rows that come from elsewhere."""
    yield {"text": "hi"}


async def stream(relay: AsyncRelay) -> int:
    """map over rows of either kind."""
    failed = 0
    async with aclosing(relay.map("embed", drawn(), in_flight=64)) as results:
        async for row in results:
            assert_type(row, Row)
    async for result in relay.map("embed", [{"text": "hi"}], on_error="return", ordered=False):
        assert_type(result, Row | errors.JobError)
        failed += isinstance(result, errors.JobError)
    return failed


async def main() -> None:
    """The client's life."""
    async with AsyncRelay("redis://localhost:6379/0", namespace="prod") as relay:
        assert_type(relay, AsyncRelay)
        assert_type(await relay.register("pipeline.yaml"), str)
        row = await one(relay)
        found = relay.job("0" * 16)
        print(await found == row, await many(relay, ["a"]), await stream(relay))
