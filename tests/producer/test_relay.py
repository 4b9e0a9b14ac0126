"""The synchronous client against a real server and real workers."""

from __future__ import annotations

import gc
import math
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Workers, private_server, wait_until
from tests.producer.conftest import write_pipeline
from torchrelay import Relay
from torchrelay.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputError,
    JobCancelled,
    JobFailed,
    PipelineNotFound,
    QueueFull,
    ResultExpired,
    RunConflict,
)
from torchrelay.producer import inbox
from torchrelay.queues.registry import run


def row(n: object = "a", do: str = "") -> dict[str, Any]:
    return {"n": str(n), "do": do}


def out(future: Any, timeout: float = 10.0) -> str:
    return future.result(timeout)["out"]


def test_a_submitted_row_comes_back_as_its_result(near: Relay) -> None:
    """result() returns the output columns of one row, again and again the same."""
    future = near.submit("echo", row("hi"))
    assert out(future) == "hi!"
    assert future.result() == {"out": "hi!", "x": pytest.approx([])}
    assert (future.done(), future.status(), future.exception()) == (True, "done", None)
    assert future.cancel() is False


def test_submit_many_keeps_the_order_of_its_rows(near: Relay) -> None:
    """Also over several calls to the server, each of at most 256 jobs."""
    futures = near.submit_many("echo", (row(i) for i in range(600)))
    assert len({f.id for f in futures}) == 600
    assert [out(f) for f in futures] == [f"{i}!" for i in range(600)]
    assert near.submit_many("echo", []) == []


def test_infer_returns_the_result_or_raises_how_the_job_ended(near: Relay) -> None:
    """One call for submit and result."""
    assert near.infer("echo", row("a"))["out"] == "a!"
    with pytest.raises(JobFailed, match="kaputt") as raised:
        near.infer("echo", row("a", "raise kaputt"))
    error = raised.value
    assert (error.stage, error.error_type, error.attempts) == ("echo", "ValueError", 1)
    assert "in forward" in error.traceback
    assert error.job_id in str(error)


def test_several_threads_may_ask_for_one_large_result(near: Relay) -> None:
    """Its bytes go when they were fetched; every thread gets the same row."""
    future = near.submit("echo", {"n": "a", "x": np.ones(1 << 20, np.float32)})
    rows: list[Any] = []
    threads = [threading.Thread(target=lambda: rows.append(future.result(30))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) == 8
    assert all(r is rows[0] for r in rows)


@pytest.mark.alone
def test_infer_past_its_deadline_leaves_no_job_behind(near: Relay) -> None:
    """Nobody serves the pipeline: the server ends the job, and the queue is empty again."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        near.infer("idle", row(), deadline_s=0.3)
    assert time.monotonic() - began < 3.0
    wait_until(lambda: not any(v for k, v in near.registry.loads().items() if "idle" in k and "ready" in k), 3.0)


def test_map_is_ordered_lazy_and_bounded(near: Relay) -> None:
    """Rows are drawn only as far as `in_flight` allows."""
    drawn = 0

    def rows() -> Any:
        nonlocal drawn
        for i in range(500):
            drawn += 1
            yield row(i)

    results = near.map("echo", rows(), in_flight=16)
    assert drawn == 0
    for i, result in enumerate(results):
        assert result["out"] == f"{i}!"
        assert drawn - i <= 16
    assert drawn == 500


def test_leaving_map_cancels_what_is_under_way(near: Relay, tmp_path: Path) -> None:
    """By closing the generator, and by the first job that fails."""
    gate = tmp_path / "gate"
    results = near.map("one", [row("a"), *(row(i, f"wait {gate}") for i in range(20))], in_flight=16)
    assert next(results)["out"] == "a!"
    results.close()
    key = f"{near.registry.current()['one']}/echo"
    assert near.registry.loads()[f"{key}.ready_rows"] == 0
    gate.touch()
    with pytest.raises(JobFailed, match="kaputt"):
        list(near.map("one", [row("a", "raise kaputt"), *(row(i, "sleep 0.1") for i in range(8))], in_flight=8))
    wait_until(lambda: near.registry.loads()[f"{key}.held_rows"] == 0)
    assert near.registry.loads()[f"{key}.ready_rows"] == 0


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "8"])
def test_map_refuses_a_senseless_bound(near: Relay, bad: Any) -> None:
    """Before any row is drawn."""
    with pytest.raises(InputError, match="in_flight"):
        near.map("echo", [], in_flight=bad)


def test_map_names_a_bad_row_by_its_place_among_all_rows(near: Relay) -> None:
    """Not by its place in the part that was being sent."""
    rows = [row(i) for i in range(40)]
    rows[33] = {"n": 33}
    with pytest.raises(InputError, match="row 33: column 'n'"):
        list(near.map("echo", rows, in_flight=8))


@pytest.mark.alone
def test_map_gives_results_while_rows_come_slowly(near: Relay) -> None:
    """The first result is there long before `in_flight` rows are."""

    def slowly() -> Any:
        for i in range(200):
            time.sleep(0.01)
            yield row(i)

    started = time.monotonic()
    with closing(near.map("echo", slowly(), in_flight=200)) as results:
        assert next(results)["out"] == "0!"
    assert time.monotonic() - started < 1.5


def test_map_that_finds_no_room_leaves_no_job_behind(relay: Relay, make_pipeline: Callable[..., Path]) -> None:
    """What went in of the part that was refused is cancelled too."""
    code = "from torchrelay import Stage\nclass Echo(Stage):\n    def forward(self, batch): return {}\n"
    stage = "{name: echo, use: 'stages.py:Echo', queue: {max_rows: 4}}"
    ref = relay.register(make_pipeline(f"pipeline: small\nstages: [{stage}]\n", code))
    with pytest.raises(QueueFull) as raised:
        list(relay.map("small", [{"n": 1}] * 300, in_flight=1200, wait_s=0))
    assert len(raised.value.accepted) == 256
    assert relay.registry.loads()[f"{ref}/echo.ready_rows"] == 0


def test_a_submit_that_waits_for_room_holds_up_nobody_else(relay: Relay, make_pipeline: Callable[..., Path]) -> None:
    """Another thread submits elsewhere and asks for states meanwhile; closing ends the wait."""
    code = "from torchrelay import Stage\nclass Echo(Stage):\n    def forward(self, batch): return {}\n"
    stage = "{name: echo, use: 'stages.py:Echo', queue: {max_rows: 4}}"
    relay.register(make_pipeline(f"pipeline: small\nstages: [{stage}]\n", code, "small.yaml"))
    relay.register(
        make_pipeline("pipeline: other\nstages: [{name: echo, use: 'stages.py:Echo'}]\n", code, "other.yaml")
    )
    relay.submit_many("small", [{"n": 1}] * 4)
    raised: list[BaseException] = []

    def wait_for_room() -> None:
        try:
            relay.submit("small", {"n": 1}, wait_s=60)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=wait_for_room)
    thread.start()
    started = time.monotonic()
    for _ in range(10):
        assert relay.submit("other", {"n": 1}).status() == "waiting"
    relay.close()
    thread.join(10)
    assert time.monotonic() - started < 8
    assert not thread.is_alive()
    assert isinstance(raised[0], InputError)


def test_infer_past_its_deadline_says_so_and_names_stages_without_workers(relay: Relay, tmp_path: Path) -> None:
    """Where nobody is there to end the job, it is cancelled, and the error is DeadlineExceeded all the same."""
    ref = relay.register(write_pipeline(tmp_path))
    with pytest.raises(DeadlineExceeded, match="no live worker serves echo"):
        relay.infer("echo", row(), deadline_s=0.05)
    assert relay.registry.loads()[f"{ref}/echo.ready_rows"] == 0


def test_another_relay_finds_a_job_by_its_id(near: Relay, server_url: str, served: str, tmp_path: Path) -> None:
    """Waiting for it, reading its result, and cancelling it; an id of nobody is expired."""
    gate = tmp_path / "gate"
    future = near.submit("one", row("a", f"wait {gate}"), keep_s=60)
    behind = near.submit("one", row("b"))
    with Relay(server_url, namespace=served) as other:
        found = other.job(future.id)
        wait_until(lambda: found.status() == "running")
        with pytest.raises(TimeoutError, match=future.id):
            found.result(0.1)
        assert other.job(behind.id).cancel() is True
        with pytest.raises(JobCancelled):
            behind.result(5)
        gate.touch()
        assert out(found) == out(future) == "a!"
        ghost = other.job(f"{future.id[:7]}0ffffffff")
        assert ghost.status() == "unknown"
        with pytest.raises(ResultExpired):
            ghost.result(5)


def test_a_future_tells_its_state(near: Relay, tmp_path: Path) -> None:
    """delayed, waiting, running, done, failed, cancelled, expired."""
    gate = tmp_path / "gate"
    waiting = near.submit("idle", row())
    delayed = near.submit("idle", row(), delay_s=60)
    running = near.submit("one", row("a", f"wait {gate}"))
    wait_until(lambda: running.status() == "running")
    assert (waiting.status(), delayed.status()) == ("waiting", "delayed")
    assert not waiting.done()
    assert "pending" in repr(waiting)
    assert waiting.cancel()
    assert delayed.cancel()
    with pytest.raises(JobCancelled):
        waiting.result(5)
    assert (waiting.status(), waiting.cancel()) == ("cancelled", False)
    late = near.submit("idle", row(), deadline_s=0.05)
    assert isinstance(late.exception(5), DeadlineExceeded)
    assert late.status() == "expired"
    gate.touch()
    assert out(running) == "a!"
    failed = near.submit("one", row("a", "raise x"))
    assert isinstance(failed.exception(5), JobFailed)
    assert failed.status() == "failed"


def test_done_callbacks_are_called_once_each_and_one_that_raises_harms_nobody(near: Relay, tmp_path: Path) -> None:
    """Before or after the end; in the receiving thread, where waiting for a pending job is refused."""
    gate = tmp_path / "gate"
    calls: list[Any] = []
    pending = near.submit("idle", row())

    def wait_inside(_: Any) -> None:
        try:
            pending.result()
        except InputError as error:
            calls.append(str(error))

    future = near.submit("one", row("a", f"wait {gate}"))
    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(calls.append)
    future.add_done_callback(wait_inside)
    gate.touch()
    assert out(future) == "a!"
    wait_until(lambda: len(calls) == 2)
    assert calls[0] is future
    assert "wait for itself" in calls[1]
    future.add_done_callback(calls.append)
    assert calls[2] is future
    pending.cancel()


def test_a_result_is_kept_as_keep_s_says(near: Relay, server_url: str, served: str) -> None:
    """Until delivered by default; so many seconds when given; not at all with 0."""
    default, kept, forgotten = (near.submit("echo", row(n), keep_s=k) for n, k in (("d", None), ("k", 1), ("f", 0)))
    assert (out(default), out(kept)) == ("d!", "k!")
    with pytest.raises(ResultExpired, match="keep_s=0"):
        forgotten.result()
    with Relay(server_url, namespace=served) as other:
        assert out(other.job(kept.id)) == "k!"
        wait_until(lambda: other.job(default.id).status() == "unknown", 3.0)
        wait_until(lambda: other.job(kept.id).status() == "unknown", 5.0)
        with pytest.raises(ResultExpired):
            other.job(kept.id).result(1)
    assert out(kept) == "k!"


def test_fire_and_forget_can_still_be_watched_and_cancelled(near: Relay) -> None:
    """keep_s=0 keeps no result; the job is a job."""
    future = near.submit("idle", row(), keep_s=0)
    assert future.status() == "waiting"
    assert future.cancel() is True
    assert future.status() == "unknown"


def test_the_same_key_and_row_is_the_same_job(near: Relay, server_url: str, served: str) -> None:
    """While it runs, after it ended, from another client, and within one call."""
    first = near.submit("echo", row("a"), key="doc-1")
    assert near.submit("echo", row("a"), key="doc-1").id == first.id
    assert out(first) == "a!"
    again = near.submit("echo", row("a"), key="doc-1")
    assert (again.id, out(again)) == (first.id, "a!")
    with Relay(server_url, namespace=served) as other:
        theirs = other.submit("echo", row("a"), key="doc-1")
        assert (theirs.id, out(theirs)) == (first.id, "a!")
        live = near.submit("idle", row("a"), key="doc-2")
        joined = other.submit("idle", row("a"), key="doc-2")
        assert joined.id == live.id
        assert live.cancel()
        with pytest.raises(JobCancelled):
            joined.result(5)
    twice = near.submit_many("echo", [row("x"), row("x"), row("y")], keys=["k", "k", "l"])
    assert twice[0].id == twice[1].id != twice[2].id
    assert [out(f) for f in twice] == ["x!", "x!", "y!"]


def test_a_key_with_other_content_is_a_conflict_that_tells_what_went_in(near: Relay) -> None:
    """Its neighbours of the same call are accepted, and the error holds their futures."""
    near.submit("echo", row("a"), key="taken")
    with pytest.raises(RunConflict, match="'taken'") as raised:
        near.submit_many("echo", [row("b"), row("c"), row("d")], keys=["free-1", "taken", "free-2"])
    assert [out(f) for f in raised.value.accepted] == ["b!", "d!"]  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 rows need 3 keys"):
        near.submit_many("echo", [row()] * 3, keys=["a"])


def test_a_job_past_its_deadline_is_never_started(near: Relay, tmp_path: Path) -> None:
    """It waits behind a long one of the same worker until its time is over."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    blocker = near.submit("one", row("a", f"wait {gate}"))
    late = near.submit("one", row("late", f"log {log}"), deadline_s=0.2)
    with pytest.raises(DeadlineExceeded) as raised:
        late.result(5)
    assert isinstance(raised.value, TimeoutError)
    gate.touch()
    assert out(blocker) == "a!"
    assert out(near.submit("one", row("b"))) == "b!"
    assert not log.exists()


def test_a_job_whose_deadline_passes_while_it_runs_ends_so(near: Relay) -> None:
    """Its output is not committed; the worker lives on."""
    future = near.submit("one", row("a", "sleep 0.6"), deadline_s=0.3)
    with pytest.raises(DeadlineExceeded):
        future.result(5)
    assert out(near.submit("one", row("b"))) == "b!"


@pytest.mark.alone
def test_a_delayed_job_starts_when_it_is_due(near: Relay) -> None:
    """Not sooner, and without waiting for the next poll."""
    began = time.monotonic()
    assert out(near.submit("echo", row("a"), delay_s=0.4)) == "a!"
    assert 0.39 <= time.monotonic() - began < 2.0


def test_higher_priority_overtakes(near: Relay, tmp_path: Path) -> None:
    """Names and numbers; first come first served within one priority."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    blocker = near.submit("one", row("a", f"wait {gate}"))
    wait_until(lambda: blocker.status() == "running")
    # What the worker holds already is not overtaken: one job may have been claimed ahead.
    ahead = near.submit("one", row("ahead", f"log {log}"), priority="high")
    wait_until(lambda: ahead.status() in ("running", "waiting"))
    order = [("low", "l1"), (10, "t"), ("high", "h1"), ("medium", "m"), ("low", "l2"), (100, "h2")]
    futures = [near.submit("one", row(n, f"log {log}"), priority=p) for p, n in order]
    gate.touch()
    for future in futures:
        future.result(10)
    assert log.read_text().split() == ["ahead", "h1", "h2", "m", "t", "l1", "l2"]


def test_meta_reaches_the_batch(near: Relay) -> None:
    """Each row's own, in its place; small values only."""
    futures = [near.submit("echo", row(i, "meta"), meta={"tag": i, "who": [1, {"a": b"x"}]}) for i in range(5)]
    assert [out(f) for f in futures] == [f"{i}{i}!" for i in range(5)]
    array = near.submit("echo", row("a", "meta"), meta={"tag": "t", "v": np.arange(3)})
    assert out(array) == "ta!"
    with pytest.raises(InputError, match="2048"):
        near.submit("echo", row(), meta={"big": "x" * 3000})


BAD_OPTIONS: list[tuple[str, Any]] = [
    *[("priority", v) for v in (math.nan, math.inf, True, 2**53 + 1, -1, 101, 1.0, "urgent", None, "", b"high")],
    *[("deadline_s", v) for v in (0, -1, math.nan, math.inf, True, "5", 1e300, 2**53 + 1)],
    *[("delay_s", v) for v in (-0.1, math.nan, math.inf, True, "5", None, 1e300)],
    *[("keep_s", v) for v in (-1, math.nan, math.inf, True, "5")],
    *[("wait_s", v) for v in (-1, math.nan, True, "5", None)],
    *[("key", v) for v in ("", "x" * 1025, 7, b"k", True)],
    *[("meta", v) for v in ("text", [1], 5, {1: 2}, {"f": object()})],
]


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS, ids=lambda v: repr(v)[:24])
def test_hostile_options_are_refused_before_anything_is_sent(near: Relay, option: str, value: Any) -> None:
    """The error is an InputError (also a ValueError) that names the option, and the queue is untouched."""
    loads = near.registry.loads()
    with pytest.raises(InputError) as raised:
        near.submit("idle", row(), **{option: value})
    assert option.removesuffix("_s") in str(raised.value) or option == "meta"
    assert len(str(raised.value)) < 400
    assert near.registry.loads() == loads


HOSTILE = ["\0", "}", "{}", ":", "*", "a\nb", "\u202eevil", "{tr:x:0}:done", "x" * 1024, "\ud800", "💥", " "]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_any_text_is_a_key_and_none_is_a_pipeline(near: Relay, name: str) -> None:
    """Keys are digested; pipeline names and job ids that cannot be are refused by name."""
    first = near.submit("echo", row("a"), key=name)
    assert near.submit("echo", row("a"), key=name).id == first.id
    assert out(first) == "a!"
    with pytest.raises(InputError, match="pipeline"):
        near.submit(name, row())
    with pytest.raises(InputError, match="job id"):
        near.job(name)


@pytest.mark.parametrize("bad", ["", "x" * 10**6, None, 5, "0" * 15, "0" * 17, "é" * 16, "0" * 16 + "~x"], ids=ascii)
def test_what_is_no_job_id_is_refused_by_name(near: Relay, bad: Any) -> None:
    """Also where several are cancelled: then none is."""
    waiting = near.submit("idle", row())
    for act in (near.job, lambda i: near.cancel([waiting.id, i])):
        with pytest.raises(InputError, match="job id") as raised:
            act(bad)
        assert len(str(raised.value)) < 300
    assert waiting.status() == "waiting"
    assert waiting.cancel()


BAD_ROWS: list[Any] = [
    {},
    {"n": 5},
    {"n": None},
    {"n": "a", "N": "b"},
    {"n": "a", "x": "text"},
    {"n": "a", "x": [[1.0], [2.0, 3.0]]},
    {"n": "\ud800"},
    [("n", "a")],
    "n",
    None,
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=repr)
def test_one_bad_row_stops_the_whole_call_before_anything_is_sent(near: Relay, bad: Any) -> None:
    """Every row is checked and encoded first; the error tells which one it was."""
    loads = near.registry.loads()
    with pytest.raises(InputError, match=r"row 300\b"):
        near.submit_many("idle", [*[row(i) for i in range(300)], bad])
    assert near.registry.loads() == loads


def test_a_pipeline_that_nobody_registered_is_not_found(near: Relay) -> None:
    """The message tells the namespace and what is known there."""
    for name in ("nobody", "echo@00000000"):
        with pytest.raises(PipelineNotFound, match="known: echo, idle, one"):
            near.submit(name, row())


def test_large_columns_travel_beside_the_job_and_are_freed(near: Relay) -> None:
    """Several MiB through the server in chunks, bit for bit; no blob is left once results are in hand."""
    arrays = [np.random.default_rng(i).random(2_000_000, dtype="float32") for i in range(3)]
    futures = [near.submit("echo", {"n": str(i), "x": array}) for i, array in enumerate(arrays)]
    for future, array in zip(futures, arrays, strict=True):
        np.testing.assert_array_equal(future.result(20)["x"], array)
    cancelled = near.submit("idle", {"n": "c", "x": arrays[0]})
    assert cancelled.cancel()
    client, tag = near.registry.client, near.registry.lanes[0].keys.tag
    wait_until(lambda: not list(client.scan_iter(f"{tag.replace('{', '[{]')}blob:*", 1000)), 5.0)


@pytest.mark.alone
def test_close_ends_waiting_threads_and_can_be_repeated(server_url: str, served: str) -> None:
    """A thread in result() hears of it at once; a closed Relay refuses by name; jobs go on without it."""
    relay = Relay(server_url, namespace=served)
    relay.close()
    relay = Relay(server_url, namespace=served).start()
    future = relay.submit("idle", row())
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            future.result()
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: relay._core.inbox.outstanding == 1)
    began = time.monotonic()
    relay.close()
    relay.close()
    thread.join(5)
    assert time.monotonic() - began < 0.9
    assert isinstance(seen[0], InputError)
    assert "closed" in str(seen[0])
    for act in (lambda: relay.submit("idle", row()), relay.start, lambda: relay.job(future.id), future.status):
        with pytest.raises(InputError, match="closed"):
            act()
    with Relay(server_url, namespace=served) as other:
        assert other.job(future.id).cancel()


def test_futures_that_nobody_holds_are_forgotten_once_they_end(near: Relay) -> None:
    """The client's memory is bounded by what is under way."""
    for future in near.submit_many("echo", [row(i) for i in range(300)]):
        future.result(10)
    gc.collect()
    assert near._core.inbox.outstanding == 0


@pytest.mark.alone
def test_a_full_queue_is_refused_or_waited_for(server_url: str, namespace: str, tmp_path: Path) -> None:
    """QueueFull holds what went in; with wait_s the rest follows as room comes, however long that takes."""
    path = write_pipeline(tmp_path)
    path.write_text(path.read_text().replace("batch: {", "queue: {max_rows: 400}, batch: {"))
    with Relay(server_url, namespace=namespace) as relay:
        relay.register(path)
        with pytest.raises(QueueFull, match="the mark is 400") as raised:
            relay.submit_many("echo", [row(i) for i in range(1000)])
        accepted: list[Any] = list(raised.value.accepted)
        assert 0 < len(accepted) <= 400
        assert relay.registry.loads()[f"{relay.registry.current()['echo']}/echo.ready_rows"] == len(accepted)
        began = time.monotonic()
        with pytest.raises(QueueFull):
            relay.submit_many("echo", [row(i) for i in range(400)], wait_s=0.3)
        assert 0.3 <= time.monotonic() - began < 2.0
        workers = Workers(server_url, namespace)
        workers.start(path)
        try:
            more = relay.submit_many("echo", [row(i) for i in range(1000)], wait_s=20)
            assert [out(f) for f in more] == [f"{i}!" for i in range(1000)]
            assert all(out(f).endswith("!") for f in accepted)
        finally:
            workers.stop()
        assert run(relay.registry.client, relay.registry.lanes[0].recount()) == []


def test_a_job_that_waits_for_room_is_not_taken_for_an_expired_one(
    server_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are compared with futures now and then: those not sent yet have no record, and are not lost."""
    monkeypatch.setattr(inbox, "RECONCILE_S", 0.1)
    path = write_pipeline(tmp_path)
    path.write_text(path.read_text().replace("batch: {", "queue: {max_rows: 1}, batch: {"))
    with Relay(server_url, namespace=namespace) as relay:
        relay.register(path)
        first = relay.submit("echo", row("a"))
        timer = threading.Timer(1.5, first.cancel)
        timer.start()
        second = relay.submit("echo", row("b"), wait_s=10)
        timer.join()
        assert not second.done()
        assert second.status() == "waiting"


def test_lanes_share_the_jobs_and_keys_choose_theirs(server_url: str, namespace: str, tmp_path: Path) -> None:
    """A namespace of two lanes: results, keys, cancels and another client's look-ups work across them."""
    path = write_pipeline(tmp_path)
    with Relay(server_url, namespace=namespace, lanes=2) as relay:
        relay.register(path)
        futures = [relay.submit("echo", row(i)) for i in range(8)]
        keyed = relay.submit_many("echo", [row(i) for i in range(20)], keys=[f"k{i}" for i in range(20)])
        assert {f.id[7] for f in futures} == {f.id[7] for f in keyed} == {"0", "1"}
        assert relay.cancel([f.id for f in futures[:4]]) == [True] * 4
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHRELAY_LANES", "2")
            workers = Workers(server_url, namespace)
            workers.start(path)
        try:
            assert [out(f) for f in futures[4:]] == [f"{i}!" for i in range(4, 8)]
            assert [out(f) for f in keyed] == [f"{i}!" for i in range(20)]
            same = relay.submit_many("echo", [row(i) for i in range(20)], keys=[f"k{i}" for i in range(20)])
            assert [f.id for f in same] == [f.id for f in keyed]
        finally:
            workers.stop()
        for lane in relay.registry.lanes:
            assert run(relay.registry.client, lane.recount()) == []


def test_after_five_seconds_without_a_worker_the_waiting_client_warns_once(near: Relay) -> None:
    """The warning names the node and the command that starts a worker."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        futures = near.submit_many("idle", [row(), row()])
        for future in futures:
            with pytest.raises(TimeoutError):
                future.result(5.4 if future is futures[0] else 0.1)
    texts = [str(w.message) for w in caught if "no live worker" in str(w.message)]
    assert len(texts) == 1
    assert "/echo" in texts[0]
    assert "torchrelay worker" in texts[0]
    assert near.cancel([f.id for f in futures]) == [True, True]


def test_a_client_outlives_a_restart_of_its_server(tmp_path: Path) -> None:
    """Futures, own and foreign, and submits wait through it; other calls raise BrokerUnavailable."""
    path = write_pipeline(tmp_path)
    with private_server("--appendfsync", "always") as fresh, Relay(fresh.url) as relay, Relay(fresh.url) as other:
        relay.register(path)
        futures = relay.submit_many("echo", [row(i) for i in range(50)], keep_s=60)
        foreign = other.job(futures[0].id)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(out(foreign, 30)))]
        threads[0].start()
        fresh.kill()
        for act in (futures[1].status, futures[1].cancel):
            with pytest.raises(BrokerUnavailable):
                act()
        ref = futures[0].pipeline
        threads.append(threading.Thread(target=lambda: found.append(out(relay.submit(ref, row("late")), 30))))
        threads[1].start()
        fresh.start()
        workers = Workers(fresh.url, "default")
        workers.start(path)
        try:
            assert [out(f, 20) for f in futures] == [f"{i}!" for i in range(50)]
            for thread in threads:
                thread.join(30)
            assert sorted(found) == ["0!", "late!"]
            assert relay.infer("echo", row("z"))["out"] == "z!"
        finally:
            workers.stop()


def test_garbage_among_the_replies_stops_nobody(near: Relay) -> None:
    """A forged reply, or a key of another type in its place: results still come, by the records."""
    key = near._core.inbox._reply_keys[0]
    near.submit("echo", row()).result(10)
    near.registry.client.rpush(key, b"\xff\xff\xff\xff\xff garbage")
    assert out(near.submit("echo", row("b"))) == "b!"
