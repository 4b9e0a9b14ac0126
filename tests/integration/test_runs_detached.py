"""Detached runs: agents are real processes, queues hold what anybody may have put there, and kills are real."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from tests.cli_server import COMMANDS, Command
from tests.conftest import Workers, private_server, run_cli, wait_until
from tests.workers.support import CODE, YAML, ForwardLog
from torchrelay.producer.runs.detached import queue_of, runs_queues
from torchrelay.producer.runs.timetable import Timetable
from torchrelay.queues.control import ControlQueue
from torchrelay.queues.keys import ControlKeys

ROWS = 400


class Agents:
    """`torchrelay agent` processes, and the commands of whoever asks for runs."""

    def __init__(self, url: str, namespace: str, folder: Path, path: Path) -> None:
        self.url, self.namespace, self.folder, self.path = url, namespace, folder, path
        self.out = folder / "out"
        self.where = ["--redis", url, "--namespace", namespace]
        self.processes: list[Command | subprocess.Popen[bytes]] = []
        self.client = redis.Redis.from_url(url)

    def start(self, path: Path | None = None, *more: str, **environment: str) -> Command | subprocess.Popen[bytes]:
        command = ["agent", str(path or self.path), *self.where, *more]
        with self.log_path(len(self.processes)).open("wb") as log:
            process = COMMANDS.start(command, stderr=log, stdout=log, env=os.environ | environment)
        self.processes.append(process)
        wait_until(lambda: "agent torchrelay-" in self.log(-1), 30.0)
        return process

    def log_path(self, number: int) -> Path:
        return self.folder / f"agent-{number}.log"

    def log(self, number: int = 0) -> str:
        return self.log_path(number % len(self.processes)).read_text()

    def detach(self, data: Path, *more: str, output: str | None = None) -> dict[str, Any]:
        paths = ["-i", str(data), "-o", output or str(self.out)]
        done = run_cli("run", str(self.path), *paths, "--chunk-rows", "20", "--detach", "--json", *self.where, *more)
        assert done.returncode == 0, done.stderr
        asked: dict[str, Any] = json.loads(done.stdout)
        return asked

    def runs(self, *command: str) -> Any:
        done = run_cli("runs", *command, "--json", *self.where)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def state(self, run: str) -> str:
        return str(self.runs("show", run)["state"])

    def job(self, run: str) -> Job:
        return Job.fetch(run, connection=self.client, serializer=JSONSerializer)

    def status(self, run: str) -> JobStatus:
        return self.job(run).get_status()

    def queue(self, level: str = "low") -> ControlQueue:
        return ControlQueue(queue_of(self.namespace, level), self.client)

    def parts(self) -> list[Path]:
        return sorted(self.out.glob("part-*.parquet"))

    def numbers(self) -> list[int]:
        return [row for part in self.parts() for row in pq.read_table(part)["_row"].to_pylist()]


@pytest.fixture
def log(tmp_path: Path) -> ForwardLog:
    return ForwardLog(tmp_path / "forwards.txt")


@pytest.fixture
def agents(
    server_url: str, namespace: str, tmp_path: Path, make_pipeline: Callable[..., Path], log: ForwardLog
) -> Iterator[Agents]:
    options = "\n        ".join(["batch: {max_rows: 4}", "retry: {attempts: 1}"])
    path = make_pipeline(YAML.format(log=log.path, options=options), CODE)
    made = Agents(server_url, namespace, tmp_path, path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.terminate()
        assert process.wait(30) in (0, -signal.SIGKILL), made.log(-1)
    made.client.close()


def dataset(path: Path, do: list[str]) -> Path:
    pq.write_table(pa.table({"n": [str(i) for i in range(len(do))], "do": do}), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """400 rows that take 5 ms each."""
    return dataset(tmp_path / "data.parquet", ["sleep 0.005"] * ROWS)


def test_an_agent_drives_a_run_and_everybody_sees_it(agents: Agents, data: Path) -> None:
    """`runs` and RQ's own command show it; the job has its progress, and its summary in the end."""
    dataset(data, ["sleep 0.015"] * ROWS)  # long enough to be looked at while it goes on
    asked = agents.detach(data)
    run = asked["id"]
    assert (asked["state"], asked["queue"]) == ("queued", f"{agents.namespace}:runs-low")
    rq = [sys.executable, "-m", "rq.cli", "info", "--url", agents.url, "--raw", "-Q", asked["queue"]]
    shown = subprocess.run(rq, capture_output=True, text=True, check=True).stdout
    assert f"queue {asked['queue']} 1, 0 executing, 0 finished, 0 failed" in shown
    agents.start()
    wait_until(lambda: agents.job(run).meta.get("progress", {}).get("rows", 0) > 0, 30.0)
    view = agents.runs("show", run)
    assert (view["state"], view["total_rows"], view["output"]) == ("running", ROWS, str(agents.out))
    assert "1 executing" in subprocess.run(rq, capture_output=True, text=True, check=True).stdout
    wait_until(lambda: agents.status(run) == JobStatus.FINISHED, 30.0)
    assert agents.numbers() == list(range(ROWS))
    job = agents.job(run)
    assert job.return_value()["rows"] == ROWS
    assert job.meta["progress"]["rows"] == ROWS
    assert json.loads(job.data)[0] == "torchrelay.run"
    (listed,) = agents.runs("list")
    assert (listed["id"], listed["state"], listed["rows"], listed["errors"]) == (run, "done", ROWS, 0)
    assert listed["driver"].endswith(f":{agents.processes[0].pid}")
    assert json.loads((agents.out / "_run" / "manifest.json").read_text())["run"] == run


def test_a_run_whose_agent_was_killed_is_taken_up_by_another(agents: Agents, data: Path, log: ForwardLog) -> None:
    """RQ tries the abandoned job again, which goes on: every row once, and what was done is not computed again."""
    first = agents.start()
    run = agents.detach(data, "--retries", "2")["id"]
    wait_until(lambda: len(agents.parts()) >= 4, 30.0)
    first.kill()
    first.wait()
    done = set(agents.numbers())
    agents.start()
    wait_until(lambda: agents.status(run) == JobStatus.FINISHED, 60.0)
    assert agents.numbers() == list(range(ROWS))
    assert {log.runs()[str(n)] for n in done} == {1}
    assert agents.job(run).retries_left == 1


def test_a_run_without_retries_whose_agent_was_killed_goes_on_by_hand(agents: Agents, data: Path) -> None:
    """RQ says that it failed, and `--resume` does the rest."""
    first = agents.start()
    run = agents.detach(data, "--retries", "0")["id"]
    wait_until(lambda: len(agents.parts()) >= 2, 30.0)
    first.kill()
    first.wait()
    wait_until(lambda: agents.state(run) == "lost", 30.0)
    agents.start()
    wait_until(lambda: agents.status(run) == JobStatus.FAILED, 40.0)
    assert agents.state(run) == "failed"
    wait_until(lambda: agents.state(agents.detach(data, "--resume")["id"]) in ("queued", "running", "done"))
    wait_until(lambda: agents.numbers() == list(range(ROWS)), 60.0)


def test_sigterm_gives_the_run_back(agents: Agents, data: Path, log: ForwardLog) -> None:
    """Free of charge, with nothing under way; the next agent goes on."""
    first = agents.start()
    run = agents.detach(data, "--retries", "1")["id"]
    wait_until(lambda: len(agents.parts()) >= 3, 30.0)
    first.terminate()
    assert first.wait(30) == 0
    assert agents.state(run) == "queued"
    assert agents.job(run).retries_left == 1
    done = set(agents.numbers())
    assert len(done) < ROWS
    agents.start()
    wait_until(lambda: agents.status(run) == JobStatus.FINISHED, 40.0)
    assert agents.numbers() == list(range(ROWS))
    assert {log.runs()[str(n)] for n in done} == {1}


@pytest.mark.parametrize("how", ["runs cancel", "rq stop"])
def test_a_run_is_cancelled_and_the_agent_goes_on(agents: Agents, data: Path, tmp_path: Path, how: str) -> None:
    """Also one that waits; neither is tried again."""
    dataset(data, ["sleep 0.005"] * 2000)
    agents.start()
    run = agents.detach(data)["id"]
    waits = agents.detach(data, output=str(tmp_path / "waits"))["id"]
    wait_until(lambda: len(agents.parts()) >= 2, 30.0)
    assert agents.runs("cancel", waits)["outcome"] == "cancelled"
    if how == "rq stop":
        send_stop_job_command(agents.client, run, serializer=JSONSerializer)
    else:
        assert agents.runs("cancel", run)["outcome"] == "asked"
    wait_until(lambda: agents.status(run) == JobStatus.STOPPED, 15.0)
    assert (agents.state(run), agents.state(waits)) == ("cancelled", "cancelled")
    assert run_cli("runs", "cancel", run, *agents.where).returncode == 2
    assert 0 < len(agents.numbers()) < 2000
    small = dataset(tmp_path / "small.parquet", [""] * 30)
    third = agents.detach(small, output=str(tmp_path / "third"))["id"]
    wait_until(lambda: agents.status(third) == JobStatus.FINISHED, 30.0)
    assert not (tmp_path / "waits").exists()


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def put(queue: ControlQueue, run: str, data: bytes, **more: Any) -> str:
    """A job as anybody who reaches the server can write one."""
    fields = {"created_at": "2026-01-01T00:00:00.000000Z", "status": "queued", "origin": queue.name, "data": data}
    queue.connection.hset(f"rq:job:{run}", mapping=fields | more)
    queue.connection.rpush(queue.key, run)
    return run


def test_what_else_lies_in_a_queue_is_refused_and_called_by_nobody(agents: Agents, tmp_path: Path) -> None:
    """Pickles, foreign functions, callbacks, bombs, junk: each fails by itself, and the run behind them is done."""
    touched = tmp_path / "touched"
    queue, client = agents.queue(), agents.client
    call = [str(tmp_path), str(agents.out)]
    touch = f"touch {touched}"
    good = {"pipeline": "obey@00000000", "input": call[:1], "output": call[1], "options": {}}

    def run_with(**more: Any) -> bytes:
        return json.dumps(["torchrelay.run", None, [], good | more]).encode()

    reasons = {
        put(queue, "pickle", pickle.dumps(("os.system", None, (touch,), {}))): "no call in JSON",
        put(queue, "pickle-bomb", zlib.compress(pickle.dumps(Bomb(touched)))): "no call in JSON",
        put(queue, "system", json.dumps(["os.system", None, [], {"command": touch}]).encode()): "may be called",
        put(queue, "method", json.dumps(["system", "os", [touch], {}]).encode()): "keyword arguments alone",
        put(queue, "args", json.dumps(["torchrelay.run", None, [touch], {}]).encode()): "keyword arguments alone",
        put(queue, "nested", b"[" * 100_000): "no call in JSON",
        put(queue, "zeros", zlib.compress(bytes(64 << 20))): "more than",
        put(queue, "twice", zlib.compress(zlib.compress(bytes(64 << 20)))): "no call in JSON",
        put(queue, "long", b"[" + b"1," * 600_000 + b"1]"): "are read",
        put(queue, "no-arguments", json.dumps(["torchrelay.run", None, [], {}]).encode()): "a run has pipeline",
        put(queue, "input", run_with(input=[1])): "a run's input",
        put(queue, "options", run_with(options={"on_progress": "os.system"})): "a run's options",
        put(queue, "kinds", run_with(options={"columns": 5})): "a run's options",
        put(queue, "status", run_with(), status="\udcff".encode("utf-8", "surrogateescape")): "malformed",
        put(queue, "retries", run_with(), retries_left=10**9): "times more",
        put(
            queue,
            "callbacks",
            run_with(input=[]),
            success_callback_name="os.system",
            failure_callback_name="os.system",
            stopped_callback_name="os.system",
            webhooks=json.dumps([{"url": "http://127.0.0.1:1/", "job_status": "failed"}]),
            meta=pickle.dumps(Bomb(touched)),
        ): "a run's input",
    }
    client.rpush(queue.key, b"\xff\xfe", "a/b", "x" * 5000, "not-there")
    client.set("rq:job:a-string", "no hash")
    client.rpush(queue.key, "a-string")
    client.rpush(queue.intermediate_queue_key, b"\xff")
    client.set(f"rq:queue:{queue_of(agents.namespace, 'medium')}", "no list")
    unknown = put(queue, "unknown", run_with())
    agents.start()
    wait_until(lambda: client.smembers("rq:workers"))
    client.publish(f"rq:pubsub:{next(iter(client.smembers('rq:workers'))).decode().partition('worker:')[2]}", b"junk")
    run = agents.detach(dataset(tmp_path / "small.parquet", [""] * 30))["id"]
    wait_until(lambda: agents.status(run) == JobStatus.FINISHED, 60.0)
    assert not touched.exists()
    assert agents.processes[0].poll() is None
    for job_id, reason in reasons.items():
        job = agents.queue().find(job_id)
        assert job is not None, job_id
        assert (job_id, job.get_status()) == (job_id, JobStatus.FAILED)
        assert reason in job.meta["error"], (job_id, job.meta)
    assert sorted(agents.numbers()) == list(range(30))
    assert agents.state(run) == "done"
    assert agents.status(unknown) == JobStatus.QUEUED


def test_runs_that_fail_are_taken_up_again_and_those_that_were_stopped_are_not(agents: Agents, tmp_path: Path) -> None:
    """A chunk without a part may have one at the next try; too many errors are too many."""
    bad = tmp_path / "bad.parquet"
    raw = bytearray(dataset(bad, [""] * 20).read_bytes())
    raw[4:200] = b"\xff" * 196
    bad.write_bytes(raw)
    agents.start()
    failing = agents.detach(bad, "--retries", "1")["id"]
    raising = dataset(tmp_path / "raising.parquet", ["raise"] * 40)
    stopped = agents.detach(raising, "--max-errors", "0", "--retries", "1", output=str(tmp_path / "stopped"))["id"]
    wait_until(lambda: agents.status(stopped) == JobStatus.STOPPED, 30.0)
    assert agents.state(stopped) == "stopped"
    assert agents.job(stopped).retries_left == 1
    wait_until(lambda: agents.status(failing) == JobStatus.FAILED, 40.0)
    view = agents.runs("show", failing)
    assert (view["state"], view["retries_left"], view["errors"]) == ("failed", 0, 1)
    assert "1 chunks have no part" in view["error"]


def test_an_agent_waits_for_a_server_that_is_away(
    tmp_path: Path, make_pipeline: Callable[..., Path], data: Path
) -> None:
    """Killed while the agent idles, and in mid-run: nothing is lost, and nothing is charged."""
    log = ForwardLog(tmp_path / "forwards.txt")
    path = make_pipeline(YAML.format(log=log.path, options="batch: {max_rows: 4}"), CODE)
    with private_server("--appendfsync", "always", "--appendonly", "yes") as fresh:
        agents = Agents(fresh.url, "default", tmp_path, path)
        agent = agents.start()
        try:
            fresh.kill()
            fresh.start()
            run = agents.detach(data, "--retries", "1")["id"]
            wait_until(lambda: len(agents.parts()) >= 3, 40.0)
            fresh.kill()
            fresh.start()
            wait_until(lambda: agents.status(run) == JobStatus.FINISHED, 60.0)
            assert agents.numbers() == list(range(ROWS))
            assert agents.job(run).retries_left == 1
        finally:
            agent.terminate()
            assert agent.wait(30) == 0, agents.log()


def test_what_can_be_told_at_once_is_refused_before_anything_is_queued(agents: Agents, tmp_path: Path) -> None:
    """With the words of a run in the foreground; what only the agent's host has can be asked for all the same."""
    data = dataset(tmp_path / "small.parquet", [""] * 10)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    out = ["-o", str(agents.out)]
    wrong = [
        (["-i", str(tmp_path / "none"), *out], "none"),
        (["-i", str(data), *out, "--key", "id"], "'id'"),
        (["-i", str(data), *out, "--keep", "url"], "'url'"),
        (["-i", str(data), *out, "--columns", "n=body"], "'body'"),
        (["-i", str(data), *out, "--format", "xml"], "none of parquet, jsonl, npy"),
        (["-i", str(data), "-o", str(taken)], "notes.txt"),
        (["-i", str(data), "-o", str(data)], "is a file where a folder is needed"),
    ]
    for arguments, says in wrong:
        told = []
        for how in (["--detach"], []):
            done = run_cli("run", str(agents.path), *arguments, *how, *agents.where)
            assert (done.returncode, says in done.stderr) == (2, True), (arguments, done.stderr)
            told.append([line for line in done.stderr.splitlines() if "--no-check" not in line])
        assert told[0] == told[1]
    assert agents.runs("list") == []
    assert not agents.out.exists()
    elsewhere = agents.detach(tmp_path / "there" / "d.parquet", "--no-check")
    assert elsewhere["state"] == "queued"


def test_a_run_waits_for_an_agent_that_has_its_version(agents: Agents, tmp_path: Path, data: Path) -> None:
    """Who asks is told; an agent without it takes what lies behind, asks the server seldom, and charges nothing."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "stages.py").write_text((tmp_path / "stages.py").read_text() + "\n# changed\n")
    path = other / "pipeline.yaml"
    path.write_text(agents.path.read_text().replace("[out]", "[out, n]"))
    agents.start(path)
    # One that an agent waits for when it comes, and one that lies there before.
    small = dataset(tmp_path / "small.parquet", [""] * 30)
    run, first = agents.detach(small, "--priority", "high"), agents.detach(small, output=str(tmp_path / "first"))
    lacks = f"no agent that takes high runs has {run['pipeline']}; start one with its files: torchrelay agent FILE"
    assert (run["state"], run["waits_for"]) == ("queued", lacks)
    paths = ["-i", str(small), "-o", str(tmp_path / "behind"), "--priority", "high"]
    done = run_cli("run", str(path), *paths, "--detach", "--json", *agents.where)
    assert done.returncode == 0, done.stderr
    behind = json.loads(done.stdout)["id"]
    wait_until(lambda: agents.status(behind) == JobStatus.FINISHED, 60.0)
    assert (agents.state(run["id"]), agents.job(run["id"]).retries_left) == ("queued", 3)
    assert (agents.runs("show", first["id"])["state"], agents.out.exists()) == ("queued", False)
    shown = run_cli("runs", "list", *agents.where).stdout
    assert shown.count("no agent") == 2
    began, before = time.monotonic(), agents.client.info("stats")["total_commands_processed"]
    wait_until(lambda: time.monotonic() - began > 3.0)
    spent = agents.client.info("stats")["total_commands_processed"] - before
    # Its timetable, its record, and a look at four queues, once a second; its host's report every two.
    assert spent / 3.0 < 60.0
    agents.start()
    wait_until(lambda: agents.status(run["id"]) == agents.status(first["id"]) == JobStatus.FINISHED, 60.0)
    assert agents.numbers() == list(range(30))
    assert agents.job(run["id"]).retries_left == 3
    assert agents.runs("show", run["id"])["waits_for"] == ""


def test_runs_are_repeated_each_into_a_folder_of_its_own(agents: Agents, tmp_path: Path) -> None:
    """Until the schedule is cancelled."""
    small = dataset(tmp_path / "small.parquet", [""] * 30)
    asked = agents.detach(small, "--every", "3", "--priority", "high")
    assert (asked["state"], asked["every"], asked["queue"]) == ("repeating", 3, f"{agents.namespace}:runs-high")
    agents.start()

    def ended() -> list[dict[str, Any]]:
        return [v for v in agents.runs("list") if v["state"] == "done"]

    wait_until(lambda: len(ended()) >= 2, 60.0)
    outputs = {v["output"] for v in ended()}
    assert len(outputs) >= 2
    for output in outputs:
        assert pq.read_table(output).num_rows == 30
    assert agents.runs("cancel", asked["id"])["outcome"] == "cancelled"

    def under_way() -> list[dict[str, Any]]:
        return [v for v in agents.runs("list") if v["state"] in ("repeating", "scheduled", "queued", "running")]

    wait_until(lambda: not under_way(), 20.0)


def test_a_run_waits_for_its_time(agents: Agents, tmp_path: Path) -> None:
    """And a time that has passed, or is none, is refused."""
    small = dataset(tmp_path / "small.parquet", [""] * 10)
    asked = agents.detach(small, "--at", "2099-01-01T00:00Z")
    assert (asked["state"], asked["due"]) == ("scheduled", 4070908800.0)
    assert agents.runs("cancel", asked["id"])["outcome"] == "cancelled"
    assert not [q for q in runs_queues(agents.client, agents.namespace) if q.count]
    repeating = agents.detach(small, "--every", "3600")
    keeper = Timetable(agents.client, ControlKeys(agents.namespace), "a test")
    wait_until(lambda: (keeper.tick(), any(q.count for q in runs_queues(agents.client, agents.namespace)))[1])
    keeper.release()
    assert agents.runs("cancel", repeating["id"])["outcome"] == "cancelled"
    assert not [q for q in runs_queues(agents.client, agents.namespace) if q.count]
    done = run_cli("run", str(agents.path), "-i", str(small), "-o", "out", "--every", "3600", *agents.where)
    assert (done.returncode, "add --detach" in done.stderr) == (2, True), done.stderr
    for wrong in (
        ["--at", "2001-01-01"],
        ["--at", "soon"],
        ["--every", "x y"],
        ["--retries", "-1"],
        ["--set", "a.b=1"],
    ):
        paths = ["-i", str(small), "-o", str(agents.out)]
        done = run_cli("run", str(agents.path), *paths, "--detach", *wrong, *agents.where)
        assert (done.returncode, wrong[0] in done.stderr) == (2, True), done.stderr


def test_runs_in_the_foreground_are_listed_and_cancelled(
    agents: Agents, data: Path, workers: Workers, tmp_path: Path
) -> None:
    """And a driver that was killed is told of as lost."""
    dataset(data, ["sleep 0.04"] * ROWS)  # neither ends by itself before it was looked at
    for stage in (None, "@read", "@write"):
        workers.start(agents.path, stage=stage)
    drivers = []
    for name in ("one", "two"):
        paths = ["-i", str(data), "-o", str(tmp_path / name), "--chunk-rows", "20"]
        command = [sys.executable, "-m", "torchrelay.cli", "run", "obey", *paths, *agents.where]
        drivers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    try:
        wait_until(lambda: Counter(v["state"] for v in agents.runs("list"))["running"] == 2, 30.0)
        by_folder = {Path(v["output"]).name: v for v in agents.runs("list")}
        assert {v["detached"] for v in by_folder.values()} == {False}
        one, two = by_folder["one"]["id"], by_folder["two"]["id"]
        drivers[1].kill()
        assert agents.runs("cancel", one)["outcome"] == "asked"
        assert drivers[0].wait(20) == 1
        assert agents.state(one) == "cancelled"
        assert json.loads((tmp_path / "one" / "_run" / "run.json").read_text())["status"] == "cancelled"
        wait_until(lambda: agents.state(two) == "lost", 30.0)
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
