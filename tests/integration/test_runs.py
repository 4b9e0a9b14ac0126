"""Runs from the command line, and what is left when drivers, workers or the server are killed: every row once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Workers, private_server, run_cli, wait_until
from tests.workers.support import CODE, YAML, ForwardLog, WorkerProcess, alive
from torchrelay import Relay
from torchrelay.queues.registry import Registry

ROWS = 600


@pytest.fixture
def log(tmp_path: Path) -> ForwardLog:
    return ForwardLog(tmp_path / "forwards.txt")


@pytest.fixture
def obey(make_pipeline: Callable[..., Path], log: ForwardLog) -> Callable[..., Path]:
    def make(*options: str) -> Path:
        return make_pipeline(YAML.format(log=log.path, options="\n        ".join(options)), CODE)

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """600 rows that take 4 ms each."""
    return dataset(tmp_path / "data.parquet", ["sleep 0.004"] * ROWS)


def dataset(path: Path, do: list[str]) -> Path:
    pq.write_table(pa.table({"n": [str(i) for i in range(len(do))], "do": do}), path)
    return path


class Cli:
    """`torchrelay run` in a namespace where workers serve everything, as processes."""

    def __init__(self, url: str, namespace: str, folder: Path, data: Path) -> None:
        self.url, self.namespace, self.folder, self.data = url, namespace, folder, data
        self.out = folder / "out"
        self.processes: list[subprocess.Popen[str]] = []

    def arguments(self, *more: str) -> list[str]:
        where = ["--redis", self.url, "--namespace", self.namespace, "--json"]
        return ["run", "obey", "-i", str(self.data), "-o", str(self.out), "--chunk-rows", "20", *where, *more]

    def run(self, *more: str) -> tuple[int, dict[str, Any], str]:
        """(exit status, summary, what it said)."""
        done = run_cli(*self.arguments(*more), timeout_s=90.0)
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torchrelay.cli", *self.arguments(*more)]
        pipe = subprocess.PIPE
        self.processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
        return self.processes[-1]

    def parts(self) -> list[Path]:
        return sorted(self.out.glob("part-*.parquet"))

    def numbers(self) -> list[int]:
        """The rows that are there, in the order of the parts."""
        return [row for part in self.parts() for row in pq.read_table(part)["_row"].to_pylist()]


@pytest.fixture
def cli(
    server_url: str, namespace: str, tmp_path: Path, data: Path, workers: Workers, obey: Callable[..., Path]
) -> Iterator[Cli]:
    path = obey("batch: {max_rows: 4}", "retry: {attempts: 1}", "replicas: 2")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage, lease_ms=3000)
    made = Cli(server_url, namespace, tmp_path, data)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def children(registry: Registry, stage: str) -> list[int]:
    return [w.pid for w in registry.workers() if w.node.endswith(f"/{stage}") and w.state == "ready"]


def test_a_run_whose_driver_and_workers_are_killed_goes_on(cli: Cli, registry: Registry, log: ForwardLog) -> None:
    """Every row once, and what was done is not computed again."""
    driver = cli.start()
    wait_until(lambda: len(cli.parts()) >= 5, 30.0)
    driver.kill()
    driver.wait()
    done = set(cli.numbers())
    for stage in ("work", "@write", "@read"):
        os.kill(children(registry, stage)[0], signal.SIGKILL)
    status, summary, said = cli.run("--resume")
    assert (status, summary["status"], summary["rows"]) == (0, "done", ROWS), said
    assert cli.numbers() == list(range(ROWS))
    assert {log.runs()[str(n)] for n in done} == {1}
    # Once more finds nothing to do.
    before = sum(log.runs().values())
    assert cli.run("--resume")[1]["rows"] == ROWS
    assert sum(log.runs().values()) == before


def test_ctrl_c_leaves_a_run_that_goes_on(cli: Cli, registry: Registry) -> None:
    """Exit status 130 and the way to go on; nothing of it stays under way."""
    driver = cli.start()
    wait_until(lambda: len(cli.parts()) >= 3, 30.0)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert "--resume" in said
    assert json.loads((cli.out / "_run" / "run.json").read_text())["status"] == "cancelled"
    wait_until(lambda: not any(v for k, v in registry.loads().items() if k.endswith(("ready_rows", "held_rows"))))
    assert len(cli.numbers()) < ROWS
    assert pq.read_table(cli.out).num_rows == len(cli.numbers())
    assert cli.run("--resume")[0] == 0
    assert cli.numbers() == list(range(ROWS))


def test_a_folder_with_a_run_is_refused_but_to_go_on_with_the_same(cli: Cli, tmp_path: Path) -> None:
    """What differs is said, and nothing is touched."""
    assert cli.run("--limit", "40")[1]["rows"] == 40
    status, _, said = cli.run("--limit", "40")
    assert (status, "--resume" in said) == (2, True)
    status, _, said = cli.run("--resume", "--limit", "60")
    assert (status, "\n  limit was 40, and is 60 now" in said) == (2, True)
    dataset(cli.data, [""] * 10)
    status, _, said = cli.run("--resume", "--limit", "40")
    assert (status, "has changed since" in said) == (2, True)
    assert cli.numbers() == list(range(40))


def test_rows_that_failed_are_tried_again(cli: Cli, tmp_path: Path) -> None:
    """Alone, and their neighbours are not."""
    mended = tmp_path / "mended"
    dataset(cli.data, [f"raise-until {mended}" if n in (7, 45) else "" for n in range(60)])
    status, summary, _ = cli.run()
    assert (status, summary["rows"], summary["errors"]) == (1, 58, 2)
    mended.touch()
    status, summary, _ = cli.run("--retry-errors")
    assert (status, summary["rows"], summary["errors"]) == (0, 60, 0)
    assert Counter(cli.numbers()) == Counter(range(60))


def test_a_chunk_of_which_every_row_fails_costs_its_rows_and_no_more(cli: Cli, tmp_path: Path) -> None:
    """Nobody knows then which columns there would have been."""
    cli.data = dataset(tmp_path / "bad.parquet", ["raise"] * 40 + [""] * 20)
    status, summary, said = cli.run()
    assert (status, summary["rows"], summary["errors"], summary["failed_chunks"]) == (1, 20, 40, 0), said
    errors = pq.read_table(cli.out / "_run" / "errors.parquet")
    assert sorted(errors["_row"].to_pylist()) == list(range(40))
    assert cli.numbers() == list(range(40, 60))


def test_rows_that_kill_their_worker_cost_those_rows_alone(cli: Cli, log: ForwardLog, tmp_path: Path) -> None:
    """Each is charged; neighbours are in the chunk's one part, in order, and no row is tried without end."""
    fatal = {7: "die", 33: "die", 34: "die"}
    cli.data = dataset(tmp_path / "fatal.parquet", [fatal.get(n, "raise" if n == 8 else "") for n in range(60)])
    status, summary, said = cli.run("--merge", "--keep", "n")
    assert (status, summary["status"], summary["failed_chunks"]) == (1, "done", 0), said
    assert (summary["rows"], summary["errors"], summary["chunks_done"]) == (56, 4, 3)
    good = [n for n in range(60) if n not in (*fatal, 8)]
    assert cli.numbers() == good
    assert [p.name for p in cli.parts()] == [f"part-{n:08}.parquet" for n in range(3)]
    assert pq.read_table(f"{cli.out}.parquet")["out"].to_pylist() == [f"{n}!" for n in good]
    errors = pq.read_table(cli.out / "_run" / "errors.parquet").to_pylist()
    assert [(e["_row"], e["stage"], e["error"]) for e in errors if e["error"] != "ValueError"] == [
        (n, "work", "WorkerDied") for n in fatal
    ]
    assert {e["attempts"] for e in errors if e["error"] == "WorkerDied"} == {3}
    # Three strikes and once as a suspect, in the chunk and in each of five halves.
    assert max(log.runs()[str(n)] for n in fatal) <= 4 * 6
    # It has been done, until somebody asks for more.
    before = sum(log.runs().values())
    assert cli.run("--resume", "--keep", "n")[1]["errors"] == 4
    assert sum(log.runs().values()) == before


@pytest.mark.parametrize("forwards", [6, 13])
def test_a_driver_that_is_killed_while_it_searches_costs_no_row(
    cli: Cli, log: ForwardLog, tmp_path: Path, forwards: int
) -> None:
    """The run that goes on searches anew."""
    cli.data = dataset(tmp_path / "fatal.parquet", ["die" if n == 27 else "" for n in range(60)])
    driver = cli.start()
    wait_until(lambda: len(log.pids("27")) >= forwards, 60.0)
    driver.kill()
    driver.wait()
    assert not (cli.out / "part-00000001.parquet").exists()
    status, summary, said = cli.run("--resume")
    assert (status, summary["rows"], summary["errors"], summary["failed_chunks"]) == (1, 59, 1, 0), said
    assert cli.numbers() == [n for n in range(60) if n != 27]
    (error,) = pq.read_table(cli.out / "_run" / "errors.parquet").to_pylist()
    assert (error["_row"], error["error"]) == (27, "WorkerDied")


def test_a_row_that_hangs_costs_that_row_alone(
    server_url: str, namespace: str, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """Also of lines, whose number only reading tells; with the key of the row. Once mended, it is tried again."""
    path = obey("batch: {max_rows: 4}", "timeout_s: 0.5", "replicas: 2")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage, lease_ms=3000)
    mended, data = tmp_path / "mended", tmp_path / "d.jsonl"
    rows = [{"n": f"r{n}", "do": f"hang-until {mended}" if n == 5 else ""} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli = Cli(server_url, namespace, tmp_path, data)
    status, summary, said = cli.run("--key", "n")
    assert (status, summary["rows"], summary["errors"], summary["failed_chunks"]) == (1, 5, 1, 0), said
    (error,) = pq.read_table(cli.out / "_run" / "errors.parquet").to_pylist()
    assert (error["key"], error["stage"], error["error"]) == ("r5", "work", "WorkerDied")
    mended.touch()
    status, summary, said = cli.run("--key", "n", "--retry-errors")
    assert (status, summary["rows"], summary["errors"]) == (0, 6, 0), said


def test_too_many_errors_stop_it(cli: Cli) -> None:
    dataset(cli.data, ["raise"] * 40 + ["sleep 0.004"] * 400)
    status, summary, _ = cli.run("--max-errors", "10")
    assert (status, summary["status"]) == (1, "stopped")
    assert summary["errors"] > 10
    assert summary["rows"] < 400


def test_a_file_that_is_damaged_costs_its_chunks_and_no_others(cli: Cli, tmp_path: Path) -> None:
    """They are told of with their stage, and the exit status says it."""
    folder = tmp_path / "in"
    folder.mkdir()
    dataset(folder / "a.parquet", [""] * 20)
    raw = bytearray(dataset(folder / "b.parquet", [f"sleep 0.00{n}" for n in range(20)]).read_bytes())
    dataset(folder / "c.parquet", [""] * 20)
    raw[4:200] = b"\xff" * 196
    (folder / "b.parquet").write_bytes(raw)
    cli.data = folder
    status, summary, said = cli.run()
    assert (status, summary["status"], summary["rows"], summary["failed_chunks"]) == (1, "failed", 40, 1), said
    (line,) = pq.read_table(cli.out / "_run" / "errors.parquet").to_pylist()
    assert (line["_path"], line["stage"]) == (str(folder / "b.parquet"), "@read")


def test_a_writer_that_was_stopped_past_its_lease_harms_nothing(
    registry: Registry, server_url: str, namespace: str, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """Another one wrote its chunks meanwhile; woken, it writes nothing over them."""
    path = obey("batch: {max_rows: 4}")
    for stage in (None, "@read"):
        workers.start(path, stage=stage, lease_ms=1000)
    cli = Cli(server_url, namespace, tmp_path, dataset(tmp_path / "d.parquet", ["sleep 0.002"] * ROWS))
    writers = [WorkerProcess(registry, server_url, path, stage="@write", lease_ms="1000").ready() for _ in range(2)]
    try:
        driver = cli.start()
        wait_until(lambda: len(cli.parts()) >= 3, 30.0)
        pids = (writers[0].child, writers[0].pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        # It wakes while the run goes on, but not before its lease is over.
        threading.Timer(2.5, lambda: [os.kill(pid, signal.SIGCONT) for pid in reversed(pids)]).start()
        out, said = driver.communicate(timeout=60)
        assert driver.returncode == 0, said
        assert cli.numbers() == list(range(ROWS))
        assert json.loads(out)["rows"] == ROWS
        wait_until(lambda: alive(pids[0]), 5.0)
    finally:
        for writer in writers:
            writer.process.terminate()
            writer.process.wait(20)
            writer.end()
    assert cli.numbers() == list(range(ROWS))


def test_a_server_that_is_killed_in_mid_run_costs_nothing(
    obey: Callable[..., Path], tmp_path: Path, data: Path
) -> None:
    """The driver and the workers wait for it."""
    path = obey("batch: {max_rows: 4}")
    with private_server("--appendfsync", "always") as fresh:
        mine = Workers(fresh.url, "default")
        for stage in (None, "@read", "@write"):
            mine.start(path, stage=stage, lease_ms=3000)
        try:
            with Relay(fresh.url) as relay:
                out = tmp_path / "out"
                run = relay.run("obey", input=data, output=out, chunk_rows=20, wait=False)
                for parts in (4, 15):
                    wait_until(lambda n=parts: len(list(out.glob("part-*"))) >= n, 30.0)
                    fresh.kill()
                    fresh.start()
                assert run.wait(60).summary()["rows"] == ROWS
                assert [r["_row"] for r in run.rows(["_row"])] == list(range(ROWS))
        finally:
            mine.stop()


def test_a_file_is_run_with_workers_of_this_machine(obey: Callable[..., Path], tmp_path: Path) -> None:
    """Everything that is missing is started, the server included, and gone afterwards."""
    path = obey("batch: {max_rows: 4}")
    dataset(tmp_path / "d.parquet", [""] * 30)
    (tmp_path / ".torchrelay").mkdir(mode=0o700)
    done = run_cli("run", str(path), "-i", "d.parquet", "-o", "out", "--merge", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "done: 30 rows" in done.stdout
    assert pq.read_table(tmp_path / "out.parquet")["out"].to_pylist() == [f"{n}!" for n in range(30)]


def test_what_cannot_be_run_is_refused_before_anything_is_loaded(obey: Callable[..., Path], tmp_path: Path) -> None:
    """No worker is started for it. Where a stage does not load no folder is made, so that nothing is in the way of the
    next try."""
    path = obey()
    dataset(tmp_path / "d.parquet", [""] * 3)
    (tmp_path / ".torchrelay").mkdir(mode=0o700)
    arguments = ["run", str(path), "-o", "out"]
    done = run_cli(*arguments, "-i", "none/*.parquet", cwd=tmp_path)
    assert (done.returncode, "ready on" in done.stderr) == (2, False)
    done = run_cli(*arguments, "-i", "d.parquet", "--key", "id", cwd=tmp_path)
    assert (done.returncode, "ready on" in done.stderr, "'id'" in done.stderr) == (2, False, True)
    stages = tmp_path / "stages.py"
    good = stages.read_text()
    stages.write_text(good + "\nraise OSError('no weights')\n")
    done = run_cli(*arguments, "-i", "d.parquet", cwd=tmp_path)
    assert (done.returncode, "gave up" in done.stderr, "--resume" in done.stderr) == (1, True, False)
    assert not (tmp_path / "out").exists()
    stages.write_text(good + "\n# mended\n")
    done = run_cli(*arguments, "-i", "d.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_rows_that_failed_are_tried_again_by_a_stage_that_was_mended(obey: Callable[..., Path], tmp_path: Path) -> None:
    """Which is another version: refused with the way on, done where that is accepted, and the folder says so."""
    path = obey("batch: {max_rows: 4}", "retry: {attempts: 1}")
    dataset(tmp_path / "d.parquet", ["raise" if n == 7 else "" for n in range(20)])
    (tmp_path / ".torchrelay").mkdir(mode=0o700)
    arguments = ["run", str(path), "-o", "out", "-i", "d.parquet", "--json"]
    done = run_cli(*arguments, cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["errors"]) == (1, 1), done.stderr
    before = json.loads((tmp_path / "out/_run/manifest.json").read_text())["version"]
    stages = tmp_path / "stages.py"
    stages.write_text(stages.read_text().replace('verb == "raise"', 'verb == "never"'))
    done = run_cli(*arguments, "--retry-errors", cwd=tmp_path)
    assert (done.returncode, "--accept-version" in done.stderr) == (2, True), done.stderr
    done = run_cli(*arguments, "--accept-version", cwd=tmp_path)
    assert (done.returncode, "goes on" in done.stderr) == (2, True), done.stderr
    done = run_cli(*arguments, "--retry-errors", "--accept-version", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["rows"]) == (0, 20), done.stderr
    manifest = json.loads((tmp_path / "out/_run/manifest.json").read_text())
    assert [e["version"] for e in manifest["earlier_versions"]] == [before]
    assert manifest["version"] != before


def test_a_run_goes_on_a_moment_after_everything_of_it_was_killed(
    obey: Callable[..., Path], tmp_path: Path, server_url: str, namespace: str, data: Path
) -> None:
    """The dead workers still count as living then: theirs are started once the namespace has learnt of their end."""
    out = tmp_path / "out"
    more = ["-i", str(data), "-o", str(out), "--redis", server_url, "--namespace", namespace, "--chunk-rows", "20"]
    arguments = ["run", str(obey("batch: {max_rows: 4}")), *more, "--json"]
    silent = subprocess.DEVNULL
    driver = subprocess.Popen([sys.executable, "-m", "torchrelay.cli", *arguments], stdout=silent, stderr=silent)
    wait_until(lambda: len(list(out.glob("part-*"))) >= 3, 30.0)
    driver.kill()
    driver.wait()
    done = run_cli(*arguments, "--resume", timeout_s=60.0)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == ROWS


def test_a_name_that_nobody_serves_needs_workers(
    server_url: str, namespace: str, relay: Relay, obey: Callable[..., Path], tmp_path: Path, data: Path
) -> None:
    relay.register(obey())
    cli = Cli(server_url, namespace, tmp_path, data)
    status, _, said = cli.run()
    assert status == 4
    assert "no live worker serves work, @read, @write" in said
    assert not cli.out.exists()


def test_up_reads_and_writes_for_whoever_names_its_pipeline(
    server_url: str, namespace: str, registry: Registry, obey: Callable[..., Path], tmp_path: Path, data: Path
) -> None:
    """From the command line and from Python; before that nothing of it is there, and asking costs next to nothing."""
    path = obey("batch: {max_rows: 4}")
    where = ["--redis", server_url, "--namespace", namespace]
    with (tmp_path / "up.log").open("wb") as log:
        command = [sys.executable, "-m", "torchrelay.cli", "up", str(path), *where]
        up = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: children(registry, "work"), 30.0)
        assert [w.node.rpartition("/")[2] for w in registry.workers()] == ["work"]
        cli = Cli(server_url, namespace, tmp_path, dataset(tmp_path / "small.parquet", [""] * 60))
        status, summary, said = cli.run()
        assert (status, summary["rows"]) == (0, 60), said
        assert children(registry, "@read")
        assert children(registry, "@write")
    finally:
        up.terminate()
        assert up.wait(30) == 0, (tmp_path / "up.log").read_text()
    assert registry.workers() == []
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: children(registry, "work"), 30.0)
        with Relay(server_url, namespace=namespace) as relay:
            run = relay.run(
                "obey", input=tmp_path / "small.parquet", output=tmp_path / "python", chunk_rows=20, wait=False
            )
            assert run.wait(60).summary()["rows"] == 60
    finally:
        up.terminate()
        assert up.wait(30) == 0, (tmp_path / "up.log").read_text()
