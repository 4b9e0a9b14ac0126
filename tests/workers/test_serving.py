"""What a worker does with the jobs it holds: batches, retries, bisection, dead letters, waiting."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redis

from tests.conftest import Workers, private_server, run_cli, wait_until
from tests.workers.support import ForwardLog, WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobFailed
from torchrelay.queues import dead
from torchrelay.queues.histogram import service_quantile
from torchrelay.queues.registry import Registry

Obey = Callable[..., Path]
Spawn = Callable[..., WorkerProcess]


def test_only_the_jobs_that_raise_fail(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """A batch that raises is halved until the guilty stand alone; its neighbours commit, and are charged nothing."""
    path = obey("batch: {max_rows: 8}", "retry: {attempts: 1}")
    relay.register(path)
    futures = relay.submit_many("obey", [{"n": str(i), "do": "raise" if i in (2, 7) else ""} for i in range(8)])
    workers.start(path)
    for i, future in enumerate(futures):
        if i in (2, 7):
            error = future.exception(10)
            assert isinstance(error, JobFailed)
            assert (error.stage, error.error_type, error.attempts) == ("work", "ValueError", 1)
            assert "in forward" in error.traceback
        else:
            assert future.result(10) == {"out": f"{i}!"}
    sizes = [len(names) for _, names in forward_log.forwards()]
    assert sizes == [8, 4, 2, 2, 1, 1, 4, 2, 2, 1, 1]
    assert_settled(registry, {"work": 6})


def test_a_failing_job_is_tried_again_then_dies_and_runs_to_its_end_once_redriven(
    relay: Relay,
    registry: Registry,
    workers: Workers,
    obey: Obey,
    forward_log: ForwardLog,
    tmp_path: Path,
    server_url: str,
) -> None:
    """Three attempts, the history of each, and a redrive by the command line, which repeated makes no second job."""
    path = obey("retry: {attempts: 3, backoff_s: [0.01, 0.05]}")
    workers.start(path)
    future = relay.submit("obey", {"n": "a", "do": f"raise-until {tmp_path / 'mended'}"})
    error = future.exception(10)
    assert isinstance(error, JobFailed)
    assert error.attempts == 3
    assert forward_log.runs() == {"a": 3}
    [letter] = dead.scan(registry)
    assert [why.error_type for why in letter.history] == ["ValueError"] * 3
    (tmp_path / "mended").touch()
    where = ("--redis", server_url, "--namespace", registry.control.namespace)
    for _ in range(2):
        done = run_cli("dead", "redrive", future.id, *where)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [future.id, "redriven", "as", f"{future.id}~1"]
    assert relay.job(f"{future.id}~1").result(10) == {"out": "a!"}
    assert forward_log.runs() == {"a": 4}
    assert_settled(registry, {"work": 1})


@pytest.mark.parametrize("order", ["exit 0", "return-junk"])
def test_a_stage_that_exits_or_returns_what_cannot_travel_fails_its_job_not_its_worker(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog, order: str
) -> None:
    """The process lives on and serves the next job."""
    path = obey("batch: {max_rows: 4}", "retry: {attempts: 1}")
    workers.start(path)
    error = relay.submit("obey", {"n": "a", "do": order}).exception(10)
    assert isinstance(error, JobFailed)
    assert error.error_type == {"exit 0": "SystemExit", "return-junk": "InputError"}[order]
    assert relay.infer("obey", {"n": "b"}) == {"out": "b!"}
    assert len({pid for pid, _ in forward_log.forwards()}) == 1
    assert_settled(registry, {"work": 1})


def test_a_stage_that_ends_its_process_with_status_0_is_a_death_not_a_drain(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """Its job is struck and its worker replaced."""
    path = obey()
    [supervisor] = workers.start(path)
    error = relay.submit("obey", {"n": "a", "do": "die 0"}).exception(15)
    assert isinstance(error, JobFailed)
    assert error.error_type == "WorkerDied"
    assert relay.infer("obey", {"n": "b"}) == {"out": "b!"}
    assert supervisor.error is None
    assert_settled(registry, {"work": 1})


@pytest.mark.alone
def test_batches_fill_to_max_rows_and_a_partial_one_waits_max_wait_ms(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """Four rows go at once, without the wait; one alone waits for company and gets it."""
    path = obey("batch: {max_rows: 4, max_wait_ms: 700}")
    workers.start(path)
    began = time.monotonic()
    for future in relay.submit_many("obey", [{"n": str(i)} for i in range(8)]):
        future.result(10)
    assert time.monotonic() - began < 0.6
    assert [len(names) for _, names in forward_log.forwards()] == [4, 4]
    began = time.monotonic()
    first = relay.submit("obey", {"n": "x"})
    wait_until(lambda: first.status() == "running")
    second = relay.submit("obey", {"n": "y"})
    assert (first.result(10), second.result(10)) == ({"out": "x!"}, {"out": "y!"})
    assert 0.6 < time.monotonic() - began < 1.5
    assert forward_log.forwards()[-1][1] == ["x", "y"]
    assert_settled(registry, {"work": 10})


def test_finished_jobs_do_not_wait_for_a_long_forward_behind_them(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, tmp_path: Path
) -> None:
    """Commits are joined and pipelined, but sent and answered before the next forward that takes long."""
    with private_server() as fresh, Relay(fresh.url) as near:
        # A fresh server knows no script yet: the first commit is refused once, and must be sent again at once.
        path = obey("batch: {max_rows: 1}")
        near.register(path)
        first = near.submit("obey", {"n": "a"})
        second = near.submit("obey", {"n": "b", "do": f"wait {tmp_path / 'gate'}"})
        mine = Workers(fresh.url, "default")
        mine.start(path)
        try:
            assert first.result(5) == {"out": "a!"}
            assert not second.done()
            (tmp_path / "gate").touch()
            assert second.result(5) == {"out": "b!"}
        finally:
            mine.stop()


def test_a_stage_that_does_not_load_opens_the_breaker_and_charges_no_job(
    relay: Relay, registry: Registry, spawn: Spawn, make_pipeline: Callable[..., Path]
) -> None:
    """Three tries with a growing pause, then the worker ends with status 1; the job still waits, unharmed."""
    code = """
        from torchrelay import Stage

        class Broken(Stage):
            def load(self, context):
                raise OSError("no weights here")

            def forward(self, batch):
                return {}
    """
    path = make_pipeline("pipeline: broken\nstages: [{name: work, use: 'stages.py:Broken'}]\n", code)
    relay.register(path)
    future = relay.submit("broken", {"n": "a"})
    worker = spawn(path)
    assert worker.process.wait(15.0) == 1
    assert worker.log.count("no weights here") >= 3
    assert "does not start" in worker.log
    assert future.status() == "waiting"
    assert future.cancel()
    assert_settled(registry, {})


def test_a_missing_gpu_ends_the_worker_at_once(relay: Relay, spawn: Spawn, obey: Obey) -> None:
    """Trying again cannot help: the message says what would."""
    path = obey("device: gpu")
    worker = spawn(path, cuda_visible_devices="")
    status = worker.process.wait(15.0)
    if status == 0:
        pytest.skip("there is a GPU here")
    assert status == 1
    assert worker.log.count("--allow-cpu") == 1


def sent_commands(client: redis.Redis) -> int:
    """Commands that clients sent since the server started: those that scripts ran inside are not counted."""
    stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval", "blpop", "ping"))


@pytest.mark.alone
def test_an_idle_worker_sends_at_most_five_commands_a_second(obey: Obey) -> None:
    """It blocks on its wake list with a poll of a second behind it; its supervisor beats and keeps the lane."""
    path = obey()
    with private_server() as fresh:
        mine = Workers(fresh.url, "default")
        mine.start(path)
        client = redis.Redis.from_url(fresh.url)
        try:
            before, began = sent_commands(client), time.monotonic()
            # Whole periods of what is sent every second and every two.
            wait_until(lambda: time.monotonic() - began > 6.0)
            rate = (sent_commands(client) - before) / (time.monotonic() - began)
            assert 1.0 < rate <= 5.0
        finally:
            client.close()
            mine.stop()


def test_work_goes_on_when_the_server_restarts_in_mid_run(
    make_pipeline: Callable[..., Path], forward_log: ForwardLog
) -> None:
    """With every write on disk nothing acknowledged is lost: large columns too, and no job is struck or charged."""
    code = """
        import time
        from torchrelay import Stage

        class Add(Stage):
            def forward(self, batch):
                time.sleep(0.005)
                return {"x": batch["x"] + 1}
    """
    yaml = """
        pipeline: add
        input: {x: "float32[20000]"}
        stages:
          - {name: one, use: "stages.py:Add", batch: {max_rows: 4}}
          - {name: two, use: "stages.py:Add", batch: {max_rows: 4}}
    """
    path = make_pipeline(yaml, code)
    with private_server("--appendfsync", "always") as fresh, Relay(fresh.url) as relay:
        mine = Workers(fresh.url, "default")
        mine.start(path)
        try:
            futures = relay.submit_many("add", [{"x": np.full(20000, i, "float32")} for i in range(120)])
            for at in (20, 60):
                wait_until(lambda at=at: sum(f.done() for f in futures) >= at)
                fresh.kill()
                fresh.start()
            for i, future in enumerate(futures):
                assert future.result(30)["x"][0] == i + 2
            assert not list(dead.scan(relay.registry))
            assert_settled(relay.registry, {"one": 120, "two": 120})
        finally:
            mine.stop()


def test_a_server_that_lost_its_data_is_served_again(obey: Obey) -> None:
    """The namespace is opened anew; what was lost is the server's, the worker goes on."""
    path = obey()
    with private_server() as fresh:
        mine = Workers(fresh.url, "default")
        [supervisor] = mine.start(path)
        try:
            fresh.kill()
            shutil.rmtree(fresh.folder / "appendonlydir")
            fresh.start()
            with Relay(fresh.url) as relay:
                wait_until(lambda: [w.state for w in relay.registry.workers()] == ["ready"])
                relay.register(path)
                assert relay.submit("obey", {"n": "a"}).result(15) == {"out": "a!"}
            assert supervisor.error is None
        finally:
            mine.stop()


def test_logs_are_lines_of_json_with_worker_and_stage(
    relay: Relay, spawn: Spawn, obey: Obey, registry: Registry
) -> None:
    """Every line that the processes write parses, and a failed job's line names the job."""
    path = obey("retry: {attempts: 1}")
    relay.register(path)
    worker = spawn(path, log="json").ready()
    future = relay.submit("obey", {"n": "a", "do": "raise"})
    assert future.exception(10) is not None
    worker.process.terminate()
    assert worker.process.wait(10) == 0
    lines = [json.loads(line) for line in worker.log.splitlines() if not line.startswith("workers on ")]
    ours = [line for line in lines if line.get("stage") == "work"]
    assert len({line["worker"] for line in ours}) == 1
    assert all(line["time"] > 0 and line["level"] for line in lines)
    [failed] = [line for line in ours if line["message"].startswith("job failed")]
    assert (failed["job"], failed["attempt"], failed["error"]) == (future.id, 1, "ValueError")


def test_a_worker_reports_how_long_forwards_took_and_how_full_they_were(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey
) -> None:
    """What the child counts stands in the supervisor's heartbeats: forwards by time, batches by fill, time to load."""
    path = obey("batch: {max_rows: 4}")
    relay.register(path)
    futures = relay.submit_many("obey", [{"n": str(i), "do": "sleep 0.05" if i == 0 else ""} for i in range(4)])
    workers.start(path)
    for future in futures:
        future.result(10)
    wait_until(lambda: any(r.batches for r in registry.workers()))
    (report,) = registry.workers()
    assert report.fills == [0] * 9 + [1]
    median_s = service_quantile(report.service, 0.5)
    assert median_s is not None
    assert 0.05 / 1.42 <= median_s <= report.busy_s * 1.42
    assert 0.0 < report.load_s < 60.0
    assert report.sent_at > report.started_at
    assert (report.memory, report.assignment) == ([0, 0, 0], "")
