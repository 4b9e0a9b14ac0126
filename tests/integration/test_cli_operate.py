"""pause, resume, purge, deploy, rollback and what `status` shows of versions, with real workers and real processes."""

from __future__ import annotations

import json
import os
import pty
import shlex
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PrivateServer, run_cli, wait_until
from tests.workers.support import WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobCancelled

# A row's `do` may be "wait PATH" (until the file is there) or "sleep SECONDS". A path makes `seen` files.
CODE = """
    import time
    from pathlib import Path

    from torchrelay import Stage


    class Tell(Stage):
        def __init__(self, tag: str = "") -> None:
            self.tag = tag

        def load(self, context):
            self.version = context.version

        def forward(self, batch):
            for n, do in zip(batch["n"], batch["do"]):
                verb, _, rest = do.partition(" ")
                if verb == "sleep":
                    time.sleep(float(rest))
                if verb == "wait":
                    Path(rest + ".seen").touch()
                while verb == "wait" and not Path(rest).exists():
                    time.sleep(0.005)
            return {"ran_on": [self.version] * len(batch["n"])}


    class Pass(Stage):
        def forward(self, batch):
            return {"out": batch["n"]}
"""
YAML = """
    pipeline: tell
    input: {{n: str, do: str = ""}}
    output: [ran_on, out]
    stages:
      - {{name: work, use: "stages.py:Tell", args: {{tag: "{tag}"}}, batch: {{max_rows: {rows}}}}}
      - {{name: end, use: "stages.py:Pass"}}
"""
Cli = Callable[..., subprocess.CompletedProcess[str]]


def write(folder: Path, tag: str = "one", rows: int = 1) -> Path:
    """A pipeline file in a folder of its own; each tag is another version."""
    home = folder / tag
    home.mkdir(exist_ok=True)
    (home / "stages.py").write_text(textwrap.dedent(CODE))
    path = home / "tell.yaml"
    path.write_text(textwrap.dedent(YAML.format(tag=tag, rows=rows)))
    return path


@pytest.fixture
def cli(server: PrivateServer, namespace: str, tmp_path: Path) -> Cli:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_cli(*arguments, "--redis", server.url, "--namespace", namespace, cwd=tmp_path)

    return call


@pytest.fixture
def serve(server: PrivateServer, relay: Relay) -> Iterator[Callable[..., list[WorkerProcess]]]:
    """Starts `torchrelay worker` for stages of a file, and waits until they are ready."""
    started: list[WorkerProcess] = []

    def start(path: Path, *stages: str) -> list[WorkerProcess]:
        made = [WorkerProcess(relay.registry, server.url, path, stage=s) for s in stages or ("work", "end")]
        started.extend(made)
        return [w.ready() for w in made]

    yield start
    for worker in started:
        worker.end()


def only(done: subprocess.CompletedProcess[str]) -> Any:
    """The one line of JSON that a command printed."""
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    return json.loads(line)


def stop(workers: list[WorkerProcess]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        assert worker.process.wait(20) == 0


def nodes(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {n["node"].rpartition("/")[2]: n for n in status["nodes"]}


def test_a_pause_in_mid_run_holds_what_waits_and_a_resume_finishes_all(
    cli: Cli, serve: Any, relay: Relay, tmp_path: Path
) -> None:
    """What the worker held is committed; nothing starts until the resume, which needs no poll to be heard of."""
    serve(write(tmp_path))
    gate = tmp_path / "gate"
    held = relay.submit("tell", {"n": "held", "do": f"wait {gate}"})
    wait_until(lambda: Path(f"{gate}.seen").exists())
    done = cli("pause", "tell/work")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/work paused")
    waiting = relay.submit_many("tell", [{"n": str(i)} for i in range(20)])
    gate.touch()
    assert held.result(10)["out"] == "held"
    assert only(cli("pause", "tell/work", "--json"))["nodes"] == [f"{held.pipeline}/work"]
    status = only(cli("status", "--json"))
    assert (nodes(status)["work"]["paused"], nodes(status)["end"]["paused"]) == (True, False)
    # Those that the worker had claimed beside the held one before the pause are none: its window was one job.
    assert nodes(status)["work"]["waiting_rows"] == 20
    assert "paused, ready" in cli("status").stdout
    assert not any(f.done() for f in waiting)
    assert cli("resume", "tell").returncode == 0
    assert [f.result(10)["out"] for f in waiting] == [str(i) for i in range(20)]
    status = only(cli("status", "--json"))
    assert not any(n["paused"] for n in status["nodes"])
    assert only(cli("resume", "tell", "--json"))["paused"] is False
    assert_settled(relay.registry, {"work": 21, "end": 21})


def test_a_pause_of_the_name_holds_a_version_that_comes_later(
    cli: Cli, serve: Any, relay: Relay, tmp_path: Path
) -> None:
    """And one of name@version only that."""
    first = relay.register(write(tmp_path))
    assert cli("pause", "tell").returncode == 0
    assert cli("resume", first).returncode == 0
    serve(write(tmp_path, "two"))
    second = relay.register(write(tmp_path, "two"))
    job = relay.submit("tell", {"n": "a"})
    paused = {n["node"]: n["paused"] for n in only(cli("status", "--json"))["nodes"]}
    assert paused == {f"{second}/work": True, f"{second}/end": True}
    assert not job.done()
    assert cli("resume", f"{second}/work").returncode == 0
    wait_until(lambda: relay.registry.loads().get(f"{second}/end.ready_rows") == 1)
    assert cli("resume", "tell").returncode == 0
    assert job.result(10)["ran_on"] == second.partition("@")[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("pause", "tel"), "did you mean 'tell'"),
        (("resume", "tell/wrok"), "did you mean 'work'"),
        (("purge", "tell@00000000", "--yes"), "has no version"),
        (("pause", "tell/work/x"), "PIPELINE/STAGE"),
        (("purge", "tell"), "--yes"),
        (("rollback", "tel"), "did you mean 'tell'"),
        (("rollback", "tell"), "no other current version"),
        (("rollback", "tell", "00000000"), "has no version"),
        (("deploy", "missing.yaml"), "missing.yaml"),
        (("deploy", "one/tell.yaml", "one/tell.yaml"), "deploy one of them"),
        (("deploy", "bad.yaml"), "stages.py"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_usage_errors_exit_with_2_and_name_what_is_wrong(
    cli: Cli, relay: Relay, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    """One line on standard error, no traceback; nothing is done."""
    relay.register(write(tmp_path))
    (tmp_path / "stages.py").write_text("x = 1\n")
    (tmp_path / "bad.yaml").write_text("pipeline: tell\nstages: [{name: s, use: 'stages.py:Nothing'}]\n")
    waiting = relay.submit("tell", {"n": "a"})
    before = relay.registry.current()
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert (waiting.status(), relay.registry.current()) == ("waiting", before)


def test_a_purge_under_load_ends_what_waits_and_spares_what_runs(
    cli: Cli, serve: Any, relay: Relay, tmp_path: Path
) -> None:
    """Every job ends once, done or cancelled; the count agrees; later jobs run."""
    serve(write(tmp_path, rows=4))
    gate = tmp_path / "gate"
    held = relay.submit("tell", {"n": "held", "do": f"wait {gate}"})
    wait_until(lambda: Path(f"{gate}.seen").exists())
    jobs = relay.submit_many("tell", [{"n": str(i), "do": "sleep 0.001"} for i in range(3_000)])
    delayed = relay.submit_many("tell", [{"n": "d"}] * 3, delay_s=3600)
    gate.touch()
    held.result(10)
    purged = only(cli("purge", "tell", "--yes", "--json"))
    after = relay.submit("tell", {"n": "after"})
    errors = [f.exception(30) for f in [*jobs, *delayed]]
    assert after.result(10)["out"] == "after"
    cancelled = [e for e in errors if isinstance(e, JobCancelled)]
    assert len(cancelled) == purged["cancelled"] > 3
    assert [e for e in errors if e is not None] == cancelled
    assert all(isinstance(e, JobCancelled) for e in errors[-3:])
    ended = len(jobs) + len(delayed) - len(cancelled) + 2
    loads = relay.registry.loads()
    assert loads[f"{held.pipeline}/end.committed"] == ended
    assert only(cli("purge", "tell", "--yes", "--json"))["cancelled"] == 0


@pytest.mark.parametrize(("answer", "status"), [("n", "waiting"), ("y", "cancelled")])
def test_a_purge_asks_on_a_terminal(
    server: PrivateServer, namespace: str, relay: Relay, tmp_path: Path, answer: str, status: str
) -> None:
    """The question says about how many; only a yes cancels them."""
    relay.register(write(tmp_path))
    waiting = relay.submit_many("tell", [{"n": "a"}, {"n": "b"}])
    later = relay.submit("tell", {"n": "c"}, delay_s=3600)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "torchrelay.cli", "purge", "tell", "--redis", server.url, "--namespace", namespace]
    asking = subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, cwd=tmp_path)
    os.close(theirs)
    seen = b""
    while b"?" not in seen:
        seen += os.read(ours, 1000)
    assert b"about 3 jobs" in seen
    os.write(ours, answer.encode() + b"\n")
    stdout, _ = asking.communicate(timeout=30)
    os.close(ours)
    assert asking.returncode == (0 if answer == "y" else 1)
    assert (b"3 jobs cancelled" in stdout) == (answer == "y")
    assert [f.status() for f in waiting] == [status] * 2
    assert later.status() == ("cancelled" if answer == "y" else "delayed")


def test_a_deploy_lets_old_jobs_finish_on_the_old_version(
    cli: Cli, serve: Any, server: PrivateServer, namespace: str, relay: Relay, tmp_path: Path
) -> None:
    """Refused without workers; workers alone switch nothing; the switch, --wait, and rollbacks back and forth."""
    first_path, second_path = write(tmp_path, "one"), write(tmp_path, "two")
    old_workers = serve(first_path)
    first = relay.registry.current()["tell"]
    gate = tmp_path / "gate"
    held = relay.submit("tell", {"n": "held", "do": f"wait {gate}"})
    wait_until(lambda: Path(f"{gate}.seen").exists())
    old = [held, *relay.submit_many("tell", [{"n": str(i)} for i in range(5)])]

    refused = cli("deploy", str(second_path))
    assert refused.returncode == 4, refused.stderr
    assert f"torchrelay worker {second_path} --stage work" in refused.stderr
    assert relay.registry.current() == {"tell": first}
    assert list(relay.registry.versions()) == [first]

    serve(second_path)
    assert relay.registry.current() == {"tell": first}
    second = next(ref for ref in relay.registry.versions() if ref != first)

    common = ["--redis", server.url, "--namespace", namespace]
    command = [sys.executable, "-m", "torchrelay.cli", "deploy", str(second_path), "--wait", "--json", *common]
    with (tmp_path / "out").open("wb") as out:
        waiting = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: relay.registry.current() == {"tell": second}, 30.0)
        wait_until(lambda: relay.registry.find("tell").pipeline.ref == second)
        new = relay.submit("tell", {"n": "new"})
        assert new.result(10) == {"ran_on": second.partition("@")[2], "out": "new"}
        [draining] = only(cli("status", "--json"))["draining"]
        assert draining["pipeline"] == first
        assert draining["waiting_jobs"] + draining["running_jobs"] == 6
        assert f"draining: {first}" in cli("status").stdout
        assert waiting.poll() is None
        gate.touch()
        assert {f.result(10)["ran_on"] for f in old} == {first.partition("@")[2]}
        assert waiting.wait(20) == 0
    finally:
        waiting.kill()
        waiting.wait()
    [told] = json.loads((tmp_path / "out").read_text())
    assert (told["version"], told["previous"]) == (second.partition("@")[2], first.partition("@")[2])
    assert {o["node"]: (o["waiting_rows"], o["running_rows"]) for o in told["old"]} == {f"{first}/work": (5, 1)}
    assert (told["drained"], told["unserved"]) == (True, [])

    assert first in cli("rollback", "tell").stdout
    assert relay.registry.current() == {"tell": first}
    assert cli("rollback", "tell").returncode == 0
    assert relay.registry.current() == {"tell": second}
    assert "as before" in cli("rollback", second).stdout
    rows = {r["version"]: r for r in only(cli("pipelines", "--json"))}
    assert rows[second.partition("@")[2]]["current"]
    assert rows[second.partition("@")[2]]["since"] > rows[first.partition("@")[2]]["since"] > 0

    stop(old_workers)
    back = cli("rollback", "tell", first.partition("@")[2])
    assert back.returncode == 4, back.stderr
    assert f"torchrelay worker {first_path} --stage" in back.stderr
    assert relay.registry.current() == {"tell": second}
    forced = cli("rollback", "tell", first.partition("@")[2], "--force")
    assert forced.returncode == 0, forced.stderr
    assert "no worker serves work, end" in forced.stderr
    assert relay.registry.current() == {"tell": first}


def test_a_deploy_that_waits_for_a_stranded_version_says_what_would_run_it(
    server: PrivateServer, namespace: str, relay: Relay, tmp_path: Path
) -> None:
    """It waits on, and ends when the last old job has, whatever ended it."""
    relay.register(write(tmp_path))
    job = relay.submit("tell", {"n": "a"}, delay_s=3600)
    command = [sys.executable, "-m", "torchrelay.cli", "deploy", str(write(tmp_path, "two")), "--force", "--wait"]
    with (tmp_path / "err").open("wb") as err:
        waiting = subprocess.Popen(
            [*command, "--redis", server.url, "--namespace", namespace], stdout=subprocess.PIPE, stderr=err
        )
    try:
        says = f"{job.pipeline} needs: torchrelay worker {tmp_path}/one/tell.yaml --stage work"
        wait_until(lambda: says in (tmp_path / "err").read_text(), 30.0)
        assert waiting.poll() is None
        assert job.cancel()
        stdout, _ = waiting.communicate(timeout=20)
        assert waiting.returncode == 0
        assert b"1 jobs delayed" in stdout
    finally:
        waiting.kill()
        waiting.wait()


def test_a_worker_of_another_version_says_how_to_switch(serve: Any, relay: Relay, tmp_path: Path) -> None:
    """The first worker's version is taken as it is."""
    [first] = serve(write(tmp_path), "work")
    [second] = serve(write(tmp_path, "two"), "work")
    assert "torchrelay deploy" not in first.log
    assert "torchrelay deploy" in second.log


def test_a_stranded_version_is_shown_with_what_would_run_it(cli: Cli, serve: Any, relay: Relay, tmp_path: Path) -> None:
    """The command names the file that the version came from, and running it does what it says."""
    odd = tmp_path / "odd; name"
    odd.mkdir()
    first = relay.register(write(odd))
    job = relay.submit("tell", {"n": "a"})
    later = relay.submit("tell", {"n": "b"}, delay_s=3600)
    relay.register(write(tmp_path, "two"))
    serve(write(tmp_path, "two"))
    status = only(cli("status", "--json"))
    [stranded] = status["stranded"]
    assert (stranded["pipeline"], stranded["stages"], stranded["current"]) == (first, ["work", "end"], False)
    assert (stranded["waiting_jobs"], stranded["delayed_jobs"]) == (1, 1)
    assert stranded["registered_from"] == f"{socket.gethostname()}:{odd / 'one' / 'tell.yaml'}"
    assert status["draining"] == []
    shown = cli("status").stdout.splitlines()
    for stage, command in zip(("work", "end"), stranded["commands"], strict=True):
        assert f"  {command}" in shown
        _, _, path, option, name = shlex.split(command)
        assert (option, name) == ("--stage", stage)
        serve(Path(path), stage)
    assert job.result(10)["ran_on"] == first.partition("@")[2]
    status = only(cli("status", "--json"))
    assert (status["stranded"], [d["pipeline"] for d in status["draining"]]) == ([], [first])
    assert later.cancel()
    assert only(cli("status", "--json"))["draining"] == []


def test_text_from_the_server_steers_no_terminal(cli: Cli, relay: Relay, tmp_path: Path) -> None:
    """Where a version was registered from is whatever somebody wrote there."""
    first = relay.register(write(tmp_path))
    relay.submit("tell", {"n": "a"})
    evil = "h\x1b[31m:/x\x1b]0;t\x07 [bold]y[/bold]\u202e"
    relay.registry.client.hset(relay.registry.control.sources, first, evil)
    for command in ("status", "pipelines", "rollback"):
        arguments = ["tell", first.partition("@")[2]] if command == "rollback" else []
        done = cli(command, *arguments)
        text = done.stdout + done.stderr
        assert "[bold]" in text, text
        assert [c for c in text if not c.isprintable() and c != "\n"] == []


@pytest.mark.parametrize("command", ["pause", "resume", "purge", "deploy", "rollback", "pipelines", "status"])
def test_help_has_an_example(command: str) -> None:
    """The shortest way to see how it is meant."""
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert f"Example: torchrelay {command}" in done.stdout
