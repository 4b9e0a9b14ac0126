"""The asynchronous client against a real server and real workers."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import Workers, private_server
from tests.producer.conftest import write_pipeline
from torchrelay import AsyncJobFuture, AsyncRelay, JobFuture, Relay
from torchrelay.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputError,
    JobCancelled,
    JobFailed,
    PipelineNotFound,
    QueueFull,
    RunConflict,
)
from torchrelay.producer.async_mapping import map_rows_async
from torchrelay.producer.mapping import Window
from torchrelay.producer.sender import Sender

Act = Callable[[AsyncRelay], Coroutine[Any, Any, None]]


def row(n: object = "a", do: str = "") -> dict[str, Any]:
    return {"n": str(n), "do": do}


@pytest.fixture
def with_relay(server_url: str, served: str) -> Callable[[Act], None]:
    """Runs a coroutine function with a client of the served namespace, in a loop of its own."""

    def run(act: Act) -> None:
        async def main() -> None:
            async with AsyncRelay(server_url, namespace=served) as relay:
                await asyncio.wait_for(act(relay), 60)

        asyncio.run(main())

    return run


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Waits in the loop for a condition, which may be awaitable."""
    deadline = time.monotonic() + timeout_s
    while True:
        met = condition()
        if await met if isinstance(met, Awaitable) else met:
            return
        assert time.monotonic() < deadline, "not true in time"
        await asyncio.sleep(0.01)


async def status_is(future: AsyncJobFuture[Any], status: str) -> bool:
    return await future.status() == status


def ready_rows(relay: Relay, pipeline: str) -> int:
    return relay.registry.loads().get(f"{relay.registry.current()[pipeline]}/echo.ready_rows", 0)


def test_both_clients_have_the_same_names() -> None:
    """With the same parameters; only the registry, whose methods block, is the synchronous client's alone."""

    def public(kind: type) -> dict[str, list[str]]:
        found = {n: getattr(kind, n) for n in dir(kind) if not n.startswith("_")}
        return {n: list(inspect.signature(f).parameters) if callable(f) else [] for n, f in found.items()}

    ours, theirs = public(AsyncRelay), public(Relay)
    del theirs["registry"]
    assert ours == theirs
    assert set(public(JobFuture)) - set(public(AsyncJobFuture)) <= {
        "foreign", "joined", "submitted_at", "settle", "state", "is_at_hand",
    }  # fmt: skip


def test_a_submitted_row_comes_back_as_its_result(with_relay: Callable[[Act], None]) -> None:
    """The future is awaited, again and again; it knows its state, and its callbacks run in the loop."""

    async def act(relay: AsyncRelay) -> None:
        loop = asyncio.get_running_loop()
        called: list[Any] = []
        future = await relay.submit("echo", row("hi"))
        future.add_done_callback(lambda f: called.append((f, asyncio.get_running_loop())))
        assert (await future)["out"] == "hi!"
        assert (await future.result(timeout=0)) is await future
        assert await future.exception() is None
        assert (future.done(), await future.status(), await future.cancel()) == (True, "done", False)
        future.add_done_callback(lambda f: called.append((f, asyncio.get_running_loop())))
        await until(lambda: len(called) == 2)
        assert called == [(future, loop)] * 2
        assert "done" in repr(future)
        failed = await relay.submit("one", row("a", "raise kaputt"))
        with pytest.raises(JobFailed, match="kaputt"):
            await failed
        assert isinstance(await failed.exception(), JobFailed)

    with_relay(act)


def test_thousands_of_infer_calls_share_few_round_trips(with_relay: Callable[[Act], None]) -> None:
    """5,000 at once, each with its own result; the server saw far fewer calls than jobs."""

    async def act(relay: AsyncRelay) -> None:
        await relay.infer("echo", row())
        client = relay._core.core.broker.client

        def calls() -> int:
            stats = client.info("commandstats")
            return sum(v["calls"] for k, v in stats.items() if k.startswith(("cmdstat_evalsha", "cmdstat_eval")))

        before = calls()
        rows = await asyncio.gather(*[relay.infer("echo", row(i)) for i in range(5000)])
        assert [r["out"] for r in rows] == [f"{i}!" for i in range(5000)]
        assert calls() - before < 2500  # workers' claims and commits among them
        assert relay._core.core.inbox.outstanding == 0

    with_relay(act)


def test_a_bad_row_fails_its_own_caller_alone(with_relay: Callable[[Act], None]) -> None:
    """As do a bad option, an unknown pipeline and a used key, among many submitted in the same moment."""

    async def act(relay: AsyncRelay) -> None:
        await relay.submit("echo", row("other"), key="async-taken")
        calls: list[Coroutine[Any, Any, Any]] = [relay.infer("echo", row(i)) for i in range(200)]
        calls[7:7] = [
            relay.infer("echo", {"n": 7}),
            relay.infer("nobody", row()),
            relay.infer("echo", row(), priority="urgent"),
            relay.infer("echo", row("a"), key="async-taken"),
            relay.infer(5, row()),  # type: ignore[arg-type]
            relay.infer("echo", {"n": "a", "x": object()}),
        ]
        got = await asyncio.gather(*calls, return_exceptions=True)
        errors = [InputError, PipelineNotFound, InputError, RunConflict, InputError, InputError]
        assert [type(e) for e in got[7:13]] == errors
        assert [r["out"] for r in got[:7] + got[13:]] == [f"{i}!" for i in range(200)]  # type: ignore[index]

    with_relay(act)


def test_submit_many_and_tables(with_relay: Callable[[Act], None]) -> None:
    """In order; a table's errors and source rows are there once it was awaited."""

    async def act(relay: AsyncRelay) -> None:
        futures = await relay.submit_many("echo", (row(i) for i in range(600)))
        assert [(await f)["out"] for f in futures] == [f"{i}!" for i in range(600)]
        assert await relay.submit_many("echo", []) == []
        with pytest.raises(InputError, match="row 2: column 'n'"):
            await relay.submit_many("echo", [row(), row(), {"n": 1}])
        table = {"n": ["a", "b", "c"], "do": ["", "raise kaputt", ""]}
        future = await relay.submit_table("one", table, on_error="keep")
        with pytest.raises(InputError, match="await the future first"):
            _ = future.errors
        assert (await future)["out"] == ["a!", "c!"]
        assert [e.message for e in future.errors.values()] == ["kaputt"]
        assert future.source_rows.tolist() == [0, 2]
        with pytest.raises(JobFailed):
            await (await relay.submit_table("one", table))

    with_relay(act)


def test_large_results_are_fetched_while_the_loop_goes_on(with_relay: Callable[[Act], None]) -> None:
    """Several tasks that wait for one result get the same row."""

    async def act(relay: AsyncRelay) -> None:
        array = np.random.default_rng(1).random(4 << 20, dtype="float32")
        future = await relay.submit("echo", {"n": "a", "x": array})
        rows = await asyncio.gather(*[future.result(30) for _ in range(8)])
        np.testing.assert_array_equal(rows[0]["x"], array)
        assert all(r is rows[0] for r in rows)

    with_relay(act)


def test_a_timeout_leaves_the_job_and_a_deadline_ends_it(with_relay: Callable[[Act], None], near: Relay) -> None:
    """result(timeout=) raises TimeoutError with the id; infer past its deadline raises DeadlineExceeded."""

    async def act(relay: AsyncRelay) -> None:
        future = await relay.submit("idle", row())
        with pytest.raises(TimeoutError, match=future.id):
            await future.result(0.05)
        assert await future.status() == "waiting"
        assert await future.cancel()
        with pytest.raises(JobCancelled):
            await future
        with pytest.raises(DeadlineExceeded):
            await relay.infer("idle", row(), deadline_s=0.05)
        assert ready_rows(near, "idle") == 0

    with_relay(act)


def test_infer_past_its_deadline_names_stages_without_workers(server_url: str, namespace: str, tmp_path: Path) -> None:
    """Where nobody is there to end the job, the client cancels it."""

    async def main() -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            await relay.register(write_pipeline(tmp_path))
            with pytest.raises(DeadlineExceeded, match="no live worker serves echo"):
                await relay.infer("echo", row(), deadline_s=0.05)

    asyncio.run(main())
    with Relay(server_url, namespace=namespace) as relay:
        assert ready_rows(relay, "echo") == 0


def test_cancelling_the_task_of_infer_cancels_its_job(with_relay: Callable[[Act], None], near: Relay) -> None:
    """Alone, by a time-out, and thousands together; a task that merely awaits a future leaves the job alone."""

    async def act(relay: AsyncRelay) -> None:
        tasks = [asyncio.create_task(relay.infer("idle", row(i))) for i in range(2000)]
        await until(lambda: ready_rows(near, "idle") == 2000)
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        await until(lambda: ready_rows(near, "idle") == 0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await relay.infer("idle", row())
        await until(lambda: ready_rows(near, "idle") == 0)
        future = await relay.submit("idle", row())
        waiting = asyncio.ensure_future(future)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await future.status() == "waiting"
        assert await relay.cancel([future.id]) == [True]

    with_relay(act)


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 20, 100])
def test_cancelling_a_task_inside_submit_leaves_no_job(
    with_relay: Callable[[Act], None], near: Relay, turns: int
) -> None:
    """At whatever moment: before it is sent, on its way, or as the answer arrives. A job joined by key stays."""

    async def act(relay: AsyncRelay) -> None:
        shared = await relay.submit("idle", row("s"), key=f"async-shared-{turns}", keep_s=60)
        calls = [relay.submit("idle", row(i)) for i in range(50)]
        joins = [relay.submit("idle", row("s"), key=f"async-shared-{turns}", keep_s=60) for _ in range(5)]
        tasks = [asyncio.create_task(c) for c in (*calls, *joins)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for future in done:
            if isinstance(future, AsyncJobFuture) and future.id != shared.id:
                await future.cancel()
        # The sender works in order: what it was told before is done.
        await relay.cancel([])
        await until(lambda: ready_rows(near, "idle") == 1)
        assert await status_is(shared, "waiting")
        assert await shared.cancel()

    with_relay(act)


def test_who_waits_for_room_holds_up_nobody(server_url: str, namespace: str, tmp_path: Path) -> None:
    """QueueFull reaches those who do not wait; others submit elsewhere meanwhile; room goes to the first in line."""
    path = write_pipeline(tmp_path)
    path.write_text(path.read_text().replace("batch: {", "queue: {max_rows: 1}, batch: {"))
    other = write_pipeline(tmp_path, "other")

    async def main() -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            await relay.register(path)
            await relay.register(other)
            first = await relay.submit("echo", row())
            waiting = [asyncio.create_task(relay.submit("echo", row(i), wait_s=30)) for i in range(3)]
            late = asyncio.create_task(relay.submit("echo", row("late"), wait_s=0.2))
            gone = asyncio.create_task(relay.submit("echo", row("gone"), wait_s=30))
            with pytest.raises(QueueFull):
                await relay.submit("echo", row("now"))
            for i in range(20):
                assert (await relay.submit("other", row(i))).pipeline.startswith("other@")
            with pytest.raises(QueueFull, match="the mark is 1"):
                await late
            assert not any(task.done() for task in waiting)
            gone.cancel()
            assert await first.cancel()
            futures = await asyncio.gather(*waiting)
            assert [await f.status() for f in futures] == ["waiting"] * 3
            stuck = asyncio.create_task(relay.submit("echo", row("stuck"), wait_s=60))
            await until(lambda: len(relay._core._sender._lines) == 1)
        with pytest.raises(InputError, match="closed while a submit waited"):
            await stuck

    asyncio.run(main())
    with Relay(server_url, namespace=namespace) as relay:
        assert ready_rows(relay, "echo") == 3


@pytest.mark.parametrize("closing", ["no", "at once", "as room is looked for"])
def test_what_went_in_of_an_abandoned_submit_is_cancelled(
    server_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closing: str
) -> None:
    """A part of it waits for room when its task is cancelled, and perhaps the client closed at once."""
    end = Sender.close

    def close(sender: Sender) -> None:
        if closing == "as room is looked for":
            for line in sender._lines.values():
                line.look_at = 0.0
        end(sender)

    monkeypatch.setattr(Sender, "close", close)
    path = write_pipeline(tmp_path)
    path.write_text(path.read_text().replace("batch: {", "queue: {max_rows: 300}, batch: {"))

    async def main() -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            await relay.register(path)
            task = asyncio.create_task(relay.submit_many("echo", map(row, range(1000)), wait_s=60))
            await until(lambda: ready_rows(looking, "echo") >= 256 and relay._core._sender._lines)
            alone = asyncio.create_task(relay.infer("echo", row(), wait_s=60))
            await asyncio.sleep(0)
            task.cancel()
            alone.cancel()
            if closing == "no":
                await until(lambda: ready_rows(looking, "echo") == 0)
        assert ready_rows(looking, "echo") == 0
        assert task.cancelled()
        assert alone.cancelled()

    with Relay(server_url, namespace=namespace) as looking:
        looking.register(path)
        asyncio.run(main())


def test_closing_right_after_cancelling_leaves_no_job(server_url: str, namespace: str, tmp_path: Path) -> None:
    """However far each submit had come."""

    async def main(turns: int) -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            tasks = [asyncio.create_task(relay.infer("echo", row(i))) for i in range(500)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    with Relay(server_url, namespace=namespace) as looking:
        looking.register(write_pipeline(tmp_path))
        for turns in (1, 2, 5, 10, 50):
            asyncio.run(main(turns))
            assert ready_rows(looking, "echo") == 0


def test_queue_full_tells_each_caller_what_of_its_own_went_in(server_url: str, namespace: str, tmp_path: Path) -> None:
    """Two callers of submit_many at once: each error's `accepted` are that caller's jobs."""
    path = write_pipeline(tmp_path)
    path.write_text(path.read_text().replace("batch: {", "queue: {max_rows: 300}, batch: {"))

    async def main() -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            ref = await relay.register(path)
            many = [relay.submit_many(ref, [row(i) for i in range(400)]) for _ in range(2)]
            errors: list[Any] = await asyncio.gather(*many, return_exceptions=True)
            assert [type(e) for e in errors] == [QueueFull, QueueFull]
            ids = [{f.id for f in e.accepted} for e in errors]
            assert not ids[0] & ids[1]
            with Relay(server_url, namespace=namespace) as looking:
                assert ready_rows(looking, "echo") == len(ids[0] | ids[1]) > 0

    asyncio.run(main())


@pytest.mark.parametrize("is_async", [False, True])
def test_map_is_ordered_lazy_and_bounded(with_relay: Callable[[Act], None], is_async: bool) -> None:
    """Rows of a generator of either kind are drawn only as far as `in_flight` allows."""

    async def act(relay: AsyncRelay) -> None:
        drawn = 0

        def rows() -> Any:
            nonlocal drawn
            for i in range(500):
                drawn += 1
                yield row(i)

        async def async_rows() -> AsyncIterator[dict[str, Any]]:
            for each in rows():
                yield each

        results = relay.map("echo", async_rows() if is_async else rows(), in_flight=16)
        assert drawn == 0
        i = 0
        async for result in results:
            assert result["out"] == f"{i}!"
            assert drawn - i <= 16
            i += 1
        assert i == drawn == 500

    with_relay(act)


def test_map_gives_results_while_rows_come_slowly(with_relay: Callable[[Act], None]) -> None:
    """The first result is there while the second row is not."""

    async def act(relay: AsyncRelay) -> None:
        gate = asyncio.Event()

        async def slowly() -> AsyncIterator[dict[str, Any]]:
            yield row(0)
            await gate.wait()
            yield row(1)

        results = relay.map("echo", slowly(), in_flight=200)
        assert (await anext(results))["out"] == "0!"
        gate.set()
        assert [r["out"] async for r in results] == ["1!"]

    with_relay(act)


def test_map_yields_errors_and_results_as_they_come(
    server_url: str, namespace: str, workers: Workers, tmp_path: Path
) -> None:
    """on_error="return", and unordered: the first row's job ends when all others' results came."""
    workers.start(write_pipeline(tmp_path, "patient", 1, attempts=100))
    gate = tmp_path / "gate"

    async def main() -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            got: list[str] = []
            rows = [row("slow", f"later {gate}"), *map(row, range(40))]
            async for result in relay.map("patient", rows, in_flight=8, ordered=False):
                got.append(result["out"])
                if len(got) == 40:
                    gate.touch()
            assert got[-1] == "slow!"
            assert sorted(got[:-1]) == sorted(f"{i}!" for i in range(40))

    asyncio.run(main())


def test_map_puts_errors_in_their_places(with_relay: Callable[[Act], None]) -> None:
    """With on_error="return"; else the first that fails ends it."""

    async def act(relay: AsyncRelay) -> None:
        rows = [row(i, "raise kaputt" if i % 3 == 0 else "") for i in range(12)]
        got = [r async for r in relay.map("one", rows, in_flight=8, on_error="return")]
        assert [isinstance(r, JobFailed) for r in got] == [i % 3 == 0 for i in range(12)]
        with pytest.raises(JobFailed, match="kaputt"):
            async for _ in relay.map("one", rows):
                pass
        with pytest.raises(InputError, match="row 33: column 'n'"):
            async for _ in relay.map("echo", [*map(row, range(33)), {"n": 33}, row()], in_flight=8):
                pass
        with pytest.raises(ZeroDivisionError):
            async for _ in relay.map("echo", (row(1 // (5 - i)) for i in range(10))):
                pass
        with pytest.raises(InputError, match="in_flight"):
            relay.map("echo", [], in_flight=0)

    with_relay(act)


def test_an_error_of_the_rows_is_not_taken_for_their_end() -> None:
    """It comes while the taker lets others run, and not while it waits for a result."""

    async def at_once(*_: object) -> None:
        pass

    def ignore(*_: object) -> None:
        pass

    async def main() -> None:
        core: Any = SimpleNamespace(
            ready=at_once, wait_changed=at_once, map_begins=ignore, map_ends=ignore, cancel_soon=ignore
        )
        submit: Any = at_once
        rows = (row(1 // i) for i in range(1))
        with pytest.raises(ZeroDivisionError):
            async for _ in map_rows_async(core, rows, Window(1), submit):
                pass

    asyncio.run(asyncio.wait_for(main(), 10))


def test_leaving_map_cancels_what_is_under_way(with_relay: Callable[[Act], None], near: Relay, tmp_path: Path) -> None:
    """By closing it, by an error, and by cancelling its task."""
    gate = tmp_path / "gate"

    async def act(relay: AsyncRelay) -> None:
        seen = asyncio.Event()

        def under_way() -> int:
            return relay._core.core.inbox.outstanding

        async def rows() -> AsyncIterator[dict[str, Any]]:
            yield row("a")
            await seen.wait()
            for i in range(40):
                yield row(i, f"wait {gate}")

        async with contextlib.aclosing(relay.map("one", rows(), in_flight=16)) as results:
            assert (await anext(results))["out"] == "a!"
            seen.set()
            await until(lambda: under_way() >= 12)
        await until(lambda: under_way() == 0)
        task = asyncio.create_task(anext(relay.map("idle", map(row, range(1000)), in_flight=100)))  # type: ignore[arg-type]
        await until(lambda: ready_rows(near, "idle") >= 75)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: ready_rows(near, "idle") == 0)
        gate.touch()
        with pytest.raises(JobFailed, match="kaputt"):
            async for _ in relay.map("one", [row("a", "raise kaputt"), *map(row, range(200))], in_flight=64):
                pass
        await until(lambda: ready_rows(near, "one") == 0)

    with_relay(act)


def test_maps_at_the_same_time_do_not_mix(with_relay: Callable[[Act], None]) -> None:
    async def act(relay: AsyncRelay) -> None:
        async def one(name: str) -> list[str]:
            return [r["out"] async for r in relay.map("echo", (row(f"{name}{i}") for i in range(300)), in_flight=32)]

        got = await asyncio.gather(*map(one, "abcdefgh"))
        assert got == [[f"{name}{i}!" for i in range(300)] for name in "abcdefgh"]

    with_relay(act)


def test_jobs_of_others_are_found_by_their_id(with_relay: Callable[[Act], None], near: Relay, tmp_path: Path) -> None:
    """Many are waited for at once; what is no id is refused."""
    gate = tmp_path / "gate"
    futures = near.submit_many("echo", [row("a", f"wait {gate}"), *map(row, range(300))], keep_s=60)

    async def act(relay: AsyncRelay) -> None:
        tasks = [asyncio.ensure_future(relay.job(f.id)) for f in futures]
        await asyncio.sleep(0.05)
        assert not tasks[0].done()
        gate.touch()
        rows = await asyncio.gather(*tasks)
        assert [r["out"] for r in rows] == ["a!", *(f"{i}!" for i in range(300))]
        idle = near.submit("idle", row())
        with pytest.raises(TimeoutError):
            await relay.job(idle.id).result(0.05)
        assert await relay.job(idle.id).cancel()
        with pytest.raises(InputError, match="job id"):
            relay.job("x")
        with pytest.raises(InputError, match="job id"):
            await relay.cancel(["x"])

    with_relay(act)


def test_it_belongs_to_one_loop_and_says_when_it_is_closed(server_url: str, served: str) -> None:
    """From another loop, after close, and before start where nothing can be awaited: a clear InputError."""
    relay = AsyncRelay(server_url, namespace=served)

    async def before() -> None:
        with pytest.raises(InputError, match="not started"):
            relay.job("0" * 16).add_done_callback(print)
        assert (await relay.infer("echo", row()))["out"] == "a!"

    async def elsewhere() -> None:
        for act in (
            relay.start,
            relay.close,
            lambda: relay.submit("echo", row()),
            lambda: relay.job("0" * 16).status(),
        ):
            with pytest.raises(InputError, match="event loop in which it was started"):
                await act()

    async def main() -> None:
        await before()
        await asyncio.to_thread(asyncio.run, elsewhere())
        future = await relay.submit("idle", row())
        waiting = asyncio.ensure_future(future)
        mapping = asyncio.create_task(anext(relay.map("idle", [row()])))  # type: ignore[arg-type]
        await until(lambda: relay._core.core.inbox.outstanding == 2)
        await relay.close()
        await relay.close()
        for task in (waiting, mapping):
            with pytest.raises(InputError, match="closed"):
                await task
        for act in (relay.start, lambda: relay.submit("echo", row()), future.status, future.result):
            with pytest.raises(InputError, match="closed"):
                await act()
        with pytest.raises(InputError, match="closed"):
            relay.job(future.id)
        with Relay(server_url, namespace=served) as other:
            assert other.job(future.id).cancel()

    asyncio.run(main())
    assert not [t for t in threading.enumerate() if t.name.startswith(("torchrelay-sender", "torchrelay-inbox"))]


def test_tasks_that_start_it_together_share_one_start(server_url: str, served: str, tmp_path: Path) -> None:
    """Also where one is cancelled; a start that failed can be tried again, and an unused client can be closed."""

    async def main() -> None:
        relay = AsyncRelay(server_url, namespace=served)
        tasks = [asyncio.create_task(relay.infer("echo", row(i))) for i in range(10)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError)
        assert [r["out"] for r in got[1:]] == [f"{i}!" for i in range(1, 10)]  # type: ignore[index]
        await relay.close()
        nowhere = AsyncRelay(f"unix://{tmp_path}/none.sock")
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match=r"none\.sock"):
                await nowhere.start()
        await nowhere.close()
        await AsyncRelay(server_url).close()

    asyncio.run(main())


def test_a_loop_that_ends_without_close_ends_well(server_url: str, served: str) -> None:
    """Results that arrive later find nobody, and disturb nothing."""
    held: list[Any] = []

    async def main() -> None:
        relay = await AsyncRelay(server_url, namespace=served).start()
        future = await relay.submit("one", row("a", "sleep 0.3"))
        future.add_done_callback(held.append)
        held.append(relay)
        held.append(future)

    asyncio.run(main())
    core = held[0]._core.core
    deadline = time.monotonic() + 10
    while core.inbox.outstanding:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(held) == 2
    held[0]._core._sender.close()
    core.close()


def test_after_five_seconds_without_a_worker_the_waiting_client_warns_once(with_relay: Callable[[Act], None]) -> None:
    """However many tasks wait."""

    async def act(relay: AsyncRelay) -> None:
        futures = await relay.submit_many("idle", [row(), row()])
        await asyncio.gather(*[f.exception(5.6) for f in futures], return_exceptions=True)
        assert await relay.cancel([f.id for f in futures]) == [True, True]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_relay(act)
    texts = [str(w.message) for w in caught if "no live worker" in str(w.message)]
    assert len(texts) == 1
    assert "/echo" in texts[0]
    assert "torchrelay worker" in texts[0]


@pytest.mark.alone
def test_the_loop_goes_on_while_the_server_is_away(tmp_path: Path) -> None:
    """Submits and results wait through a restart; the loop's other tasks do not."""
    path = write_pipeline(tmp_path)

    async def main(fresh: Any) -> None:
        async with AsyncRelay(fresh.url) as relay:
            await relay.register(path)
            futures = await relay.submit_many("echo", map(row, range(50)), keep_s=60)
            ref = futures[0].pipeline
            fresh.kill()
            late = asyncio.create_task(relay.infer(ref, row("late")))
            with pytest.raises(BrokerUnavailable):
                await futures[1].status()
            longest, last = 0.0, time.monotonic()
            for _ in range(50):
                await asyncio.sleep(0.01)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert longest < 0.5
            await asyncio.to_thread(fresh.start)
            workers = Workers(fresh.url, "default")
            await asyncio.to_thread(workers.start, path)
            try:
                assert [(await f.result(30))["out"] for f in futures] == [f"{i}!" for i in range(50)]
                assert (await late)["out"] == "late!"
            finally:
                await asyncio.to_thread(workers.stop)

    with private_server("--appendfsync", "always") as fresh:
        asyncio.run(main(fresh))


def test_futures_are_sent_by_their_id(with_relay: Callable[[Act], None]) -> None:
    """Pickling one says so."""

    async def act(relay: AsyncRelay) -> None:
        future = await relay.submit("echo", row())
        with pytest.raises(InputError, match=rf"relay\.job\('{future.id}'\)"):
            pickle.dumps(future)

    with_relay(act)


def test_the_synchronous_client_works_inside_a_running_loop(near: Relay) -> None:
    """As in a notebook: it blocks the loop, and comes to its end; done callbacks too."""

    async def main() -> None:
        assert near.infer("echo", row("a"))["out"] == "a!"
        assert [r["out"] for r in near.map("echo", map(row, range(50)), in_flight=8)] == [f"{i}!" for i in range(50)]
        called = threading.Event()
        future = near.submit("echo", row("b"))
        future.add_done_callback(lambda f: called.set())
        assert future.result(10)["out"] == "b!"
        assert called.wait(10)
        loop = asyncio.get_running_loop()
        in_loop: asyncio.Future[str] = loop.create_future()
        later = near.submit("echo", row("c"))
        later.add_done_callback(lambda f: loop.call_soon_threadsafe(in_loop.set_result, f.result()["out"]))
        assert await asyncio.wait_for(in_loop, 10) == "c!"

    asyncio.run(main())
