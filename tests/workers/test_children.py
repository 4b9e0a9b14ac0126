"""Children that are forked are as fresh ones: how they start and end, what they find, who outlives whom."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Workers, wait_until
from tests.workers.support import alive
from torchrelay import Relay
from torchrelay.config import Pipeline
from torchrelay.workers import child_server, supervisor
from torchrelay.workers import children as module
from torchrelay.workers.children import Child, Children, wants_torch

# `out` says in JSON what a stage finds in its process.
CODE = """
    import gc
    import json
    import os
    import random
    import signal
    import sys
    from contextlib import suppress

    import numpy as np

    from torchrelay import Stage


    class Tell(Stage):
        def forward(self, batch):
            files = []
            for number in os.listdir("/proc/self/fd"):
                with suppress(OSError):  # the listing's own
                    name = os.readlink(f"/proc/self/fd/{number}")
                    files.append(name.partition(":")[0].partition("progress-")[0])
            found = {
                "cwd": os.getcwd(),
                "path": sys.path,
                "environment": dict(os.environ),
                "files": sorted(files),
                "terminate": callable(signal.getsignal(signal.SIGTERM)),
                "gc": gc.isenabled(),
                "torch": "torch" in sys.modules,
            }
            own = {"pid": os.getpid(), "parent": os.getppid(), "random": [random.random(), np.random.rand()]}
            return {"out": [json.dumps([found, own])] * len(batch)}
"""
YAML = """
    pipeline: tell
    input: {n: str}
    output: [out]
    stages:
      - name: work
        use: stages.py:Tell
"""


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    """Of a process that has started none yet."""
    made = Children()
    monkeypatch.setattr(supervisor, "children", made)
    yield made
    made._close()
    wait_until(lambda: not made.server_pids)


def start(children: Children, *, torch: bool = False, stderr: bool = False, fork: bool = True) -> Child:
    return children.start(torch=torch, stderr=stderr, fork=fork, given_up=lambda: False)


def end(child: Child) -> int:
    child.kill()
    status = child.wait()
    for stream in (child.stdin, child.stderr):
        if stream is not None:
            stream.close()
    return status


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_all_but_the_first_are_forked_from_one_server(mine: Children) -> None:
    """Who has but one child needs no server."""
    first = start(mine)
    assert (parent(first.pid), mine.server_pids) == (os.getpid(), [])
    others = [start(mine) for _ in range(3)]
    (server,) = mine.server_pids
    assert [parent(child.pid) for child in others] == [server] * 3
    assert [end(child) for child in (first, *others)] == [-signal.SIGKILL] * 4


def test_torch_is_imported_ahead_from_the_second_who_wants_it(mine: Children) -> None:
    """A child without it comes from a server without it."""
    started = [start(mine), start(mine, torch=True)]
    assert len(mine.server_pids) == 1
    started.append(start(mine, torch=True))
    base, with_torch = mine.server_pids
    assert "torch" in Path(f"/proc/{with_torch}/cmdline").read_text().split("\0")
    started.append(start(mine))
    assert [parent(child.pid) for child in started[1:]] == [base, with_torch, base]
    assert "libtorch" not in Path(f"/proc/{started[-1].pid}/maps").read_text()
    assert [end(child) for child in started] == [-signal.SIGKILL] * 4


@pytest.mark.parametrize("fork", [False, True])
def test_children_end_as_those_of_popen(mine: Children, fork: bool) -> None:
    """By signals, by themselves, and when their standard input closes; what they say comes through the pipe."""
    end(start(mine, fork=fork))
    for number in (signal.SIGKILL, signal.SIGTERM):
        child = start(mine, fork=fork)
        assert child.poll() is None
        if number == signal.SIGTERM and not fork:
            time.sleep(0.2)  # an interpreter that begins
        child.send_signal(number)
        assert child.wait() == child.poll() == child.returncode == -number
        child.send_signal(number)  # comes too late, and does nothing
        end(child)
    child = start(mine, fork=fork)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait() == 1
    child = start(mine, stderr=True, fork=fork)
    assert child.stdin is not None
    assert child.stderr is not None
    child.stdin.write(b"no orders\n")
    child.stdin.flush()
    assert b"JSONDecodeError" in child.stderr.read()
    assert child.wait() == 1
    end(child)
    assert bool(mine.server_pids) is fork


def test_a_forked_stage_finds_what_a_fresh_one_does(
    mine: Children, workers: Workers, relay: Relay, make_pipeline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folder and environment of the moment, the same files, signals and paths, and random numbers of its own; also
    after the environment changed for which its server was started."""
    path = make_pipeline(YAML, CODE)
    monkeypatch.chdir(path.parent)
    found, own = [], []
    for changed in ({}, {}, {"TORCHRELAY_TOLD": "1"}, {"FOLDER": "1"}):
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        (work,) = workers.start(path)
        answer = json.loads(relay.submit("tell", {"n": "a"}).result(20)["out"])
        found.append(answer[0])
        own.append(answer[1])
        work.stop()
        wait_until(lambda work=work: work.state == "gone")
        work._child.wait()
    assert [one["parent"] == os.getpid() for one in own] == [True, False, False, False]
    assert len({one["parent"] for one in own}) == 3
    assert len({number for one in own for number in one["random"]}) == 8
    assert found[1] == found[0]
    assert not found[0]["torch"]
    environment = found[0]["environment"]
    assert found[2] == found[0] | {"environment": environment | {"TORCHRELAY_TOLD": "1"}}
    assert found[3] == found[0] | {"environment": environment | {"TORCHRELAY_TOLD": "1", "FOLDER": "1"}}


def test_a_server_that_is_killed_costs_no_child(mine: Children) -> None:
    """Those that run go on, their end is noticed, and a new server makes the next one."""
    end(start(mine))
    running = start(mine)
    (server,) = mine.server_pids
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not mine.server_pids)
    assert running.poll() is None
    other = start(mine)
    assert mine.server_pids not in ([], [server])
    assert end(running) == module.UNKNOWN
    assert end(other) == -signal.SIGKILL


def test_what_asks_a_whole_group_to_end_leaves_the_server(mine: Children) -> None:
    """Else nobody would learn how the children ended that drain meanwhile."""
    end(start(mine))
    end(start(mine))
    servers = mine.server_pids
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(servers[0], number)
    assert end(start(mine)) == -signal.SIGKILL
    assert mine.server_pids == servers


@pytest.mark.parametrize("why", ["is not there", "has threads"])
def test_a_server_that_cannot_serve_is_done_without(
    mine: Children, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """Children are fresh interpreters then, with a line in the log; after three in a row it is not tried again."""
    if why == "is not there":
        monkeypatch.setattr(module, "SERVER", "torchrelay.nowhere")
    else:
        code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        (tmp_path / "with_thread.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(module, "TORCH", ("with_thread",))
    with caplog.at_level(logging.WARNING, "torchrelay.supervisor"):
        started = [start(mine, torch=True) for _ in range(5)]
    assert [parent(child.pid) for child in started] == [os.getpid()] * 5
    assert [end(child) for child in started] == [-signal.SIGKILL] * 5
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert all("starts as a fresh interpreter" in line for line in lines)


def test_nobody_waits_for_a_server_longer_than_he_likes(mine: Children, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that is stopped meanwhile gets its child at once, and ends it. It is no failure of the server's."""
    end(start(mine))
    for _ in range(4):
        mine._close()
        child = mine.start(torch=False, stderr=False, fork=True, given_up=lambda: True)
        assert parent(child.pid) == os.getpid()
        assert end(child) == -signal.SIGKILL
    child = start(mine)
    assert parent(child.pid) in mine.server_pids
    assert end(child) == -signal.SIGKILL
    assert caplog.records == []


SCRIPT = """
    import sys, time
    from torchrelay.config import Pipeline
    from torchrelay.testing.serving import await_ready
    from torchrelay.up import Fleet
    from torchrelay.workers.children import children

    print("begun", flush=True)
    fleet = Fleet(sys.argv[1], sys.argv[2], allow_cpu=True)
    for _ in range(3):
        fleet.add(Pipeline.load(sys.argv[3]))
    with fleet:
        await_ready(fleet, 30)
        print(*children.server_pids, *[s.child_pid for s in fleet.supervisors], flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("nursery", ["1", "0"])
def test_all_end_with_the_process_that_started_them(
    server_url: str, namespace: str, make_pipeline: Callable[..., Path], nursery: str
) -> None:
    """Though it is killed; and it needs no `if __name__ == "__main__"`. TORCHRELAY_NURSERY=0 means no server."""
    path = make_pipeline(YAML, CODE)
    script = path.parent / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), server_url, namespace, str(path)]
    environment = os.environ | {"TORCHRELAY_NURSERY": nursery}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3 + int(nursery)
        process.kill()
        # Its standard output is theirs too: it ends when all have.
        assert process.stdout.read() == ""
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_server_without_work_ends() -> None:
    """Its memory is not kept for whoever may come."""
    code = "import os, sys; from torchrelay.workers import child_server as s; s._IDLE_S = 0.01; sys.exit(s.main(*ARGS))"
    code = code.replace("*ARGS", f"{os.getpid()}, ['json']")
    ours, theirs = module._socketpair()
    with ours, theirs:
        assert (
            subprocess.run([sys.executable, "-c", code], stdin=theirs.fileno(), timeout=30, check=False).returncode == 0
        )


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import torch\nclass A: ...", True),
        ("def f():\n    from transformers import AutoModel", True),
        ("from torchrelay import TorchStage", True),
        ("from torchrelay import Stage\n# import torch", False),
        ("import torchish", False),
    ],
)
def test_who_wants_torch_is_read_off_the_stages_file(
    make_pipeline: Callable[..., Path], code: str, wanted: bool
) -> None:
    """Its code is not run for that."""
    tell = Pipeline.load(make_pipeline(YAML, CODE))
    (tell.base_dir / "stages.py").write_text(code + "\nraise SystemExit")
    assert wants_torch(tell.spec.stages, tell.base_dir) is wanted
    (tell.base_dir / "stages.py").unlink()
    assert not wants_torch(tell.spec.stages, tell.base_dir)


def test_names_of_the_server_and_of_children_say_what_they_are() -> None:
    """Whoever looks for the processes that compute finds both by one name."""
    assert child_server.SERVER.startswith(child_server.CHILD)
    assert {child_server.SERVER, child_server.CHILD} == {child_server.__name__, supervisor.Orders.__module__}
