"""The command line as people and scripts use it: exit statuses, JSON, and text that steers no terminal."""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PrivateServer, Workers, run_cli, wait_until
from tests.producer.conftest import write_pipeline
from torchrelay import Relay

Cli = Callable[..., subprocess.CompletedProcess[str]]
EVIL = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202e [bold]loud[/bold] [link=http://evil]x[/link] \r\b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds echo.yaml and idle.yaml."""
    made = tmp_path_factory.mktemp("cli")
    write_pipeline(made)
    write_pipeline(made, "idle")
    return made


@pytest.fixture(scope="module")
def space(server: PrivateServer, folder: Path) -> Iterator[str]:
    """A namespace in which workers serve `echo` and nobody serves `idle`."""
    namespace = "c" + "".join(random.choices(string.ascii_lowercase, k=10))
    workers = Workers(server.url, namespace)
    workers.start(folder / "echo.yaml")
    with Relay(server.url, namespace=namespace) as relay:
        relay.register(folder / "idle.yaml")
    yield namespace
    workers.stop()


@pytest.fixture
def cli(server: PrivateServer, space: str, folder: Path) -> Cli:
    """Runs a command against that namespace."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_cli(*arguments, "--redis", server.url, "--namespace", space, cwd=folder)

    return run


@pytest.fixture
def near(server: PrivateServer, space: str) -> Iterator[Relay]:
    with Relay(server.url, namespace=space) as relay:
        yield relay


def lines_of_json(text: str) -> list[Any]:
    """JSON lines end at newlines alone."""
    return [json.loads(line) for line in text.split("\n") if line]


def lines(done: subprocess.CompletedProcess[str]) -> list[Any]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_tame(text: str) -> None:
    """Nothing in it moves a cursor, colours, titles, links or reverses."""
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


def test_check_tells_every_problem_with_its_place(folder: Path, tmp_path: Path) -> None:
    """0 and the graph for a good file; 2 and file:line:column for a bad one, in text and in JSON."""
    good = run_cli("check", "echo.yaml", cwd=folder)
    assert good.returncode == 0, good.stderr
    assert "echo" in good.stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text("pipeline: bad\nstages:\n  - {name: a, use: 'nowhere.py:X', replica: 2}\n  - {name: a}\n")
    refused = run_cli("check", str(bad))
    assert refused.returncode == 2
    assert "bad.yaml:3:" in refused.stderr
    assert "bad.yaml:4:" in refused.stderr
    both = run_cli("check", str(bad), "echo.yaml", "--json", cwd=folder)
    assert both.returncode == 2
    [[first, second]] = lines(both)
    assert (first["ok"], second["ok"]) == (False, True)
    assert len(first["problems"]) >= 2
    assert second["pipeline"].startswith("echo@")


def test_check_shows_where_workers_would_run(folder: Path, tmp_path: Path) -> None:
    """On this machine the small pipeline has a place; on hosts that are described, status 4 says that one has none."""
    here = run_cli("check", "echo.yaml", cwd=folder)
    assert (here.returncode, "this machine" in here.stdout) == (0, True), here.stderr
    (tmp_path / "large.yaml").write_text(
        "pipeline: large\nstages:\n  - {name: a, use: 'stages.py:Echo', device: gpu, resources: {memory: 40GiB}}\n"
    )
    (tmp_path / "stages.py").write_text("def Echo(batch):\n    return {}\n")
    fits = run_cli("check", "large.yaml", "--on", "2*2xL4:24GiB", "--on", "1xH100:80GiB,cpu=4", "--json", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr
    [[found]] = lines(fits)
    [placed] = found["allocation"]
    assert (placed["host"], placed["slot"], placed["need"]["memory"]) == ("host3", "cuda:0", 40 << 30)
    short = run_cli("check", "large.yaml", "--on", "2*2xL4:24GiB", cwd=tmp_path)
    assert short.returncode == 4
    text = " ".join(short.stdout.split())
    assert "needs 40 GiB of a GPU; the freest, host1 cuda:0, has 24 GiB: 16 GiB short" in text
    wrong = run_cli("check", "large.yaml", "--on", "8H100", cwd=tmp_path)
    assert (wrong.returncode, "write it like 4*8xH100:80GiB" in wrong.stderr) == (2, True)


def test_submit_prints_ids_or_with_wait_the_results(cli: Cli, near: Relay) -> None:
    """One row or JSON lines; a file becomes a registered pipeline."""
    one = cli("submit", "echo", '{"n": "a"}')
    assert one.returncode == 0, one.stderr
    assert near.job(one.stdout.strip()).result(10)["out"] == "a!"
    waited = cli("submit", "echo.yaml", '{"n": "a"}', "--wait", "--priority", "high", "--deadline", "30")
    assert (waited.returncode, lines(waited)) == (0, [{"out": "a!", "x": []}])
    [job] = lines(cli("job", one.stdout.strip(), "--json"))
    assert (job["status"], job["result"]["out"]) == ("done", "a!")


def test_submit_reads_json_lines_from_standard_input(server: PrivateServer, space: str) -> None:
    """Each line a row; empty lines are skipped; a line that is no object is named."""
    command = [sys.executable, "-m", "torchrelay.cli", "submit", "echo", "-", "--wait"]
    command += ["--redis", server.url, "--namespace", space]
    text = "".join(f'{{"n": "{i}"}}\n\n' for i in range(20))
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert [r["out"] for r in lines(done)] == [f"{i}!" for i in range(20)]
    text = '{"n": "a\u2028b\u0085c"}\n'
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert [r["out"] for r in lines_of_json(done.stdout)] == ["a\u2028b\u0085c!"]
    bad = subprocess.run(command, input='{"n": "1"}\n[1]\n', capture_output=True, text=True, timeout=60, check=False)
    assert bad.returncode == 2
    assert "line 2" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("submit", "nobody", '{"n": "a"}'), "nobody"),
        (("submit", "echo", "{"), "JSON"),
        (("submit", "echo"), "column 'n' is missing"),
        (("submit", "echo", '{"m": "a"}'), "column 'm'"),
        (("submit", "echo", '{"n": "a"}', "--priority", "urgent"), "urgent"),
        (("submit", "echo", '{"n": "a"}', "--deadline", "-1"), "deadline"),
        (("submit", "echo", '{"n": "a"}', "--file", "x=/nowhere"), "/nowhere"),
        (("submit", "missing.yaml", "{}"), "missing.yaml"),
        (("job", "not-an-id"), "not-an-id"),
        (("dead", "show", "0000000000000000"), "0000000000000000"),
        (("dead", "redrive"), "--all"),
        (("dead", "show", "aaaaaaaAaaaaaaaa"), "lane"),
        (("dead", "redrive", "aaaaaaaAaaaaaaaa"), "lane"),
        (("submit", "echo", '{"n": "a"}', "--priority", "²"), "²"),
        (("submit", "echo", '{"n": "a"}', "--key", ""), "key"),
        (("submit", "echo", '{"n": "a"}', "--keep", "0", "--wait"), "--keep 0"),
        (("worker", "echo.yaml", "--stage", "echo", "--device", "bananas"), "bananas"),
        (("up", "echo.yaml", "idle.yaml", "--set", "nobody.batch.max_rows=1"), "nobody"),
        (("worker", "echo.yaml", "--stage", "ecko"), "ecko"),
        (("worker", "echo.yaml", "--stage", "echo", "--set", "echo.batch.max_row=1"), "max_row"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else "",
)
def test_usage_errors_exit_with_2_and_name_what_is_wrong(cli: Cli, arguments: tuple[str, ...], names: str) -> None:
    """One line on standard error, no traceback."""
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert names in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_server_that_cannot_be_reached_is_exit_status_3(tmp_path: Path) -> None:
    """The message names the address and what to do; a password in the URL is not shown."""
    done = run_cli("status", "--redis", "redis://me:hunter2@127.0.0.1:1/0", cwd=tmp_path)
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr


def test_waiting_for_a_stage_that_nobody_serves_is_exit_status_4(cli: Cli, near: Relay) -> None:
    """After five seconds; the job waits on, and its id can still be cancelled."""
    done = cli("submit", "idle", '{"n": "a"}', "--wait", "--key", "k4")
    assert done.returncode == 4, done.stderr
    assert "torchrelay worker" in done.stderr
    waiting = near.submit("idle", {"n": "a"}, key="k4")
    assert cli("cancel", waiting.id).returncode == 0
    again = cli("cancel", waiting.id)
    assert again.returncode == 1
    assert "cancelled" in again.stdout


def test_a_failed_job_is_exit_status_1_and_its_text_steers_nothing(cli: Cli, near: Relay) -> None:
    """From submit to the dead letters, everything that jobs say is shown, not obeyed."""
    row = json.dumps({"n": EVIL, "do": f"raise {EVIL}"})
    done = cli("submit", "echo", row, "--wait")
    assert done.returncode == 1
    assert_tame(done.stdout + done.stderr)
    [shown] = lines(done)
    assert EVIL.strip() in shown["error"]
    job = shown["id"]
    views = [("job", job), ("dead", "list"), ("dead", "show", job)]
    for view in views:
        for extra in ((), ("--json",)):
            seen = cli(*view, *extra)
            assert seen.returncode == (1 if view[0] == "job" else 0), seen.stderr
            assert_tame(seen.stdout + seen.stderr)
            if extra:
                json.loads(seen.stdout)
            elif view != ("dead", "list"):
                assert "[bold]" in seen.stdout
    assert lines(cli("job", job, "--json"))[0]["error_type"] == "ValueError"
    good = cli("submit", "echo", json.dumps({"n": EVIL}), "--wait")
    assert_tame(good.stdout)
    assert lines(good)[0]["out"] == EVIL + "!"
    refused = cli("submit", "echo", json.dumps({EVIL: 1}))
    assert refused.returncode == 2
    assert_tame(refused.stderr)


def test_dead_letters_are_listed_shown_redriven_and_dropped(cli: Cli, near: Relay) -> None:
    """Exit status 1 for an id that is no dead letter."""
    futures = near.submit_many("echo", [{"n": str(i), "do": "raise x"} for i in range(3)])
    for future in futures:
        assert future.exception(10) is not None
    listed = {d["id"] for d in lines(cli("dead", "list", "echo", "--json"))[0]}
    assert {f.id for f in futures} <= listed
    [shown] = lines(cli("dead", "show", futures[0].id, "--json"))
    assert shown["columns"] == ["do", "n", "x"]
    assert "ValueError" in shown["history"][0]["traceback"]
    assert cli("dead", "redrive", futures[0].id).stdout.split()[-1] == f"{futures[0].id}~1"
    assert cli("dead", "drop", futures[1].id).stdout.split() == [futures[1].id, "dropped"]
    unknown = cli("dead", "drop", futures[1].id)
    assert (unknown.returncode, "no dead letter" in unknown.stdout) == (1, True)
    wait_until(lambda: near.job(f"{futures[0].id}~1").status() == "failed")
    assert cli("dead", "drop", "--all").returncode == 0
    assert lines(cli("dead", "list", "--json")) == [[]]


def test_status_and_pipelines_show_the_namespace(cli: Cli, near: Relay) -> None:
    """Who serves what, what waits, which version new jobs take."""
    waiting = near.submit("idle", {"n": "a"})
    [state] = lines(cli("status", "--json"))
    nodes = {n["node"].partition("@")[0]: n for n in state["nodes"]}
    assert (nodes["echo"]["workers"], nodes["echo"]["states"]) == (1, ["ready"])
    assert (nodes["idle"]["workers"], nodes["idle"]["waiting_rows"]) == (0, 1)
    assert "no worker" in cli("status").stdout
    [found] = lines(cli("pipelines", "--json"))
    assert {(p["pipeline"], p["current"]) for p in found} == {("echo", True), ("idle", True)}
    assert near.registry.current()["echo"].partition("@")[2] in cli("pipelines").stdout
    assert waiting.cancel()


def test_the_embedded_server_starts_shows_itself_and_stops(tmp_path: Path) -> None:
    """`server start` outlives its command; status is 3 when none runs."""
    (tmp_path / ".torchrelay").mkdir()
    assert run_cli("server", "status", cwd=tmp_path).returncode == 3
    started = run_cli("server", "start", "--json", cwd=tmp_path)
    try:
        assert started.returncode == 0, started.stderr
        [state] = lines(run_cli("server", "status", "--json", cwd=tmp_path))
        assert state["running"] is True
        assert "already runs" in run_cli("server", "start", cwd=tmp_path).stdout
        assert lines(run_cli("status", "--json", cwd=tmp_path))[0]["nodes"] == []
    finally:
        stopped = run_cli("server", "stop", cwd=tmp_path)
    assert stopped.stdout.strip() == "stopped"
    assert run_cli("server", "status", cwd=tmp_path).returncode == 3


def test_up_runs_everything_and_sigint_drains_with_exit_status_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole process group gets SIGINT, as from a terminal: jobs under way end, nothing is lost, no tracebacks."""
    monkeypatch.chdir(tmp_path)
    path = write_pipeline(tmp_path, rows=1)
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHRELAY_")}
    with (tmp_path / "err").open("wb") as err:
        up = subprocess.Popen(
            [sys.executable, "-m", "torchrelay.cli", "up", str(path), "--allow-cpu"],
            cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: "ready on" in (tmp_path / "err").read_text(), 30.0)
        with Relay() as relay:
            futures = relay.submit_many("echo", [{"n": str(i), "do": "sleep 0.05"} for i in range(60)], keep_s=60)
            futures[2].result(10)
            os.killpg(up.pid, signal.SIGINT)
            assert up.wait(20) == 0
            done = sum(f.status() == "done" for f in futures)
            assert 3 <= done < 60
            assert sum(f.status() == "waiting" for f in futures) == 60 - done
            assert relay.registry.workers() == []
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGKILL)
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_help_is_shown_for_every_command() -> None:
    """Plain --help exits with 0, and lists the commands with their summaries."""
    top = run_cli("--help")
    assert top.returncode == 0
    for command in ("check", "up", "worker", "submit", "job", "cancel", "status", "pipelines", "dead", "server"):
        assert command in top.stdout
    assert run_cli("nonsense").returncode == 2
