"""The embedded server: a Valkey (or a redis-server on PATH) on a Unix socket, shared by the processes of a folder.

A folder's server lives in its `.torchrelay`: data, log and locks. Its locks, which the kernel drops when their
holders end, however they end, so that none is ever stale:

- `start.lock`: one process at a time looks for, starts or stops the server.
- `users.lock`, shared: held by each user. A small watcher process (`watcher.py`) waits for it to be free of users,
  then shuts the server down, unless `keep` says that it stays. So it ends with its last user, and never before.
- `server.lock`: held by watcher and server together. While it is held nobody starts a second server on the same data.
  `watcher.lock` is the watcher's alone: a server that lost its watcher is going down, and is not joined.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrelay.errors import BrokerUnavailable, ConfigError
from torchrelay.queues.server_probe import info, ping
from torchrelay.queues.server_setup import server_command, server_program, socket_path_of

try:
    import fcntl
except ImportError:  # not POSIX: producers there name a server by URL
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "EmbeddedServer",
    "ServerStatus",
    "find_or_start",
    "find_state_dir",
    "server_command",
    "server_program",
    "start",
    "status",
    "stop",
]

FOLDER = ".torchrelay"
PATIENCE_S = 20.0


@dataclass
class EmbeddedServer:
    """A running server and this process's share in it. `close()` gives the share back."""

    url: str
    state_dir: Path
    pid: int
    started: bool
    _lock: int = field(default=-1, repr=False)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@dataclass(frozen=True)
class ServerStatus:
    """What `torchrelay server status` shows. Sizes in bytes, times in seconds."""

    running: bool
    state_dir: Path | None
    url: str | None = None
    pid: int | None = None
    version: str | None = None
    uptime_s: int | None = None
    used_memory_bytes: int | None = None
    stays: bool = False


def find_state_dir(start_dir: Path | None = None) -> Path | None:
    """The nearest `.torchrelay` folder of this user upwards, or None.

    Others' folders are passed over: who owns the folder of a parent like /tmp would name the server that is talked to.
    """
    here = (start_dir or Path.cwd()).resolve()
    return next((f / FOLDER for f in (here, *here.parents) if _is_own(f / FOLDER)), None)


def find_or_start(start_dir: Path | None = None) -> EmbeddedServer:
    """Joins the nearest folder's server, starting it if it does not run; it ends with its last user.

    Raises ConfigError when there is no server program or the folder cannot be written, BrokerUnavailable when the
    server does not start.
    """
    return _join(_state_dir(start_dir), keep=False)


def start(start_dir: Path, outlive: bool = True) -> EmbeddedServer:
    """As `find_or_start`, and with `outlive` the server stays until `stop`."""
    server = _join(_state_dir(start_dir), keep=outlive)
    if outlive:
        server.close()
    return server


def stop(start_dir: Path) -> bool:
    """Shuts the server down cleanly, its users notwithstanding; its data stays. False when none runs."""
    state_dir = find_state_dir(start_dir)
    if state_dir is None:
        return False
    with _StartLock(state_dir):
        (state_dir / "keep").unlink(missing_ok=True)
        signalled = 0
        deadline = time.monotonic() + PATIENCE_S
        while _is_held(state_dir):
            known = _read_state(state_dir)
            if known and not signalled and _terminate(state_dir, known["pid"]):
                signalled = known["pid"]
            if time.monotonic() > deadline:
                who = f"pid {signalled}" if signalled else "its process is not to be seen from here"
                raise BrokerUnavailable(f"the server ({who}) does not stop; see {state_dir / 'server.log'}")
            time.sleep(0.01)
    return signalled > 0


def status(start_dir: Path) -> ServerStatus:
    """Whether the nearest folder's server answers, and what it is."""
    state_dir = find_state_dir(start_dir)
    known = _read_state(state_dir) if state_dir else None
    said = info(Path(known["socket"])) if known else {}
    if known is None or state_dir is None or not said:
        return ServerStatus(False, state_dir)
    return ServerStatus(
        running=True,
        state_dir=state_dir,
        url=f"unix://{known['socket']}",
        pid=known["pid"],
        version=said.get("valkey_version") or said.get("redis_version"),
        uptime_s=int(said.get("uptime_in_seconds", 0)),
        used_memory_bytes=int(said.get("used_memory", 0)),
        stays=(state_dir / "keep").exists(),
    )


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and (fcntl is None or folder.stat().st_uid == os.getuid())


def _state_dir(start_dir: Path | None) -> Path:
    if fcntl is None:
        raise ConfigError("the embedded server needs Linux or macOS; name a server: --redis redis://host:6379/0")
    found = find_state_dir(start_dir)
    if found is None:
        found = (start_dir or Path.cwd()).resolve() / FOLDER
        try:
            found.mkdir(mode=0o700, exist_ok=True)
            if _is_own(found):
                (found / ".gitignore").write_text("*\n")
        except OSError as error:
            raise ConfigError(f"{found} cannot be made: {error.strerror}; name a server: --redis URL") from error
        if not _is_own(found):
            raise ConfigError(f"{found} belongs to another user; name a server: --redis URL, or work in another folder")
    return found


def _open_lock(state_dir: Path, name: str) -> int:
    try:
        return os.open(state_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{state_dir / name} cannot be opened: {error.strerror}; name a server: --redis URL"
        ) from error


def _lock_soon(lock: int, kind: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _StartLock:
    """Held while a process looks for, starts or stops the folder's server."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def __enter__(self) -> None:
        self._lock = _open_lock(self._state_dir, "start.lock")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)


def _join(state_dir: Path, *, keep: bool) -> EmbeddedServer:
    with _StartLock(state_dir):
        lock = _become_user(state_dir)
        try:
            known = _await_server(state_dir)
            started = known is None
            if known is None:
                # A `keep` that a reboot left behind was meant for a server that is no more.
                (state_dir / "keep").unlink(missing_ok=True)
                _start_watcher(state_dir)
                known = _await_server(state_dir)
            if known is None:
                raise BrokerUnavailable(_why_not_started(state_dir))
            if keep:
                (state_dir / "keep").touch()
        except BaseException:
            os.close(lock)
            raise
    return EmbeddedServer(f"unix://{known['socket']}", state_dir, known["pid"], started, lock)


def _become_user(state_dir: Path) -> int:
    """Takes the shared lock; while a watcher holds it alone, its server is going down and is waited for."""
    lock = _open_lock(state_dir, "users.lock")
    deadline = time.monotonic() + PATIENCE_S
    while not _lock_soon(lock, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            os.close(lock)
            log = state_dir / "server.log"
            raise BrokerUnavailable(f"the server of {state_dir} is stuck while it stops; see {log}")
        time.sleep(0.01)
    return lock


def _is_held(state_dir: Path, name: str = "server.lock") -> bool:
    """Whether a server, or its watcher, lives. To be asked under the start lock."""
    lock = _open_lock(state_dir, name)
    try:
        return not _lock_soon(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)


def _await_server(state_dir: Path) -> dict[str, Any] | None:
    """Waits until the living server answers, however long it loads its data; None when none lives."""
    deadline = time.monotonic() + PATIENCE_S
    orphaned = False
    while _is_held(state_dir):
        known = _read_state(state_dir)
        if not orphaned and known and not _is_held(state_dir, "watcher.lock"):
            orphaned = True
            _terminate(state_dir, known["pid"])  # Linux did so already, other systems do not
        said = ping(Path(known["socket"])) if known and not orphaned else ""
        if said == "PONG":
            return known
        if said == "LOADING":
            deadline = time.monotonic() + PATIENCE_S
        if time.monotonic() > deadline:
            who = f"pid {known['pid']} at {known['socket']}" if known else "no pid known"
            raise BrokerUnavailable(
                f"a server lives in {state_dir} ({who}) and does not answer; "
                f"see {state_dir / 'server.log'}, or end it: torchrelay server stop"
            )
        time.sleep(0.01)
    return None


def _start_watcher(state_dir: Path) -> None:
    """Starts the watcher, which starts the server. They inherit their locks, so there is no moment without."""
    socket_path = socket_path_of(state_dir)
    command = server_command(server_program(), socket_path, state_dir)
    (state_dir / "server.json").unlink(missing_ok=True)
    locks = [_open_lock(state_dir, name) for name in ("server.lock", "watcher.lock")]
    try:
        if not all(_lock_soon(lock, fcntl.LOCK_EX) for lock in locks):
            raise BrokerUnavailable(f"{state_dir / 'server.lock'} was taken by another program; try again")
        # By path and isolated, the watcher starts in a few ms and depends on no folder or variable of its starter's.
        program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watcher.py"))]
        with (state_dir / "server.log").open("ab") as log:
            subprocess.Popen(
                [*program, str(state_dir), str(socket_path), str(locks[0]), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=locks,
                start_new_session=True,
                cwd=state_dir,
            )
    finally:
        for lock in locks:
            os.close(lock)


def _why_not_started(state_dir: Path) -> str:
    log = state_dir / "server.log"
    tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
    return f"the embedded server did not start; see {log}" + "".join(f"\n  {line}" for line in tail)


def _terminate(state_dir: Path, pid: int) -> bool:
    """Asks the server to end; False when that process is not the server, or is no more."""
    if not _holds_lock(state_dir, pid):
        return False
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:  # it ended first
        return False
    return True


def _holds_lock(state_dir: Path, pid: int) -> bool:
    """Whether this pid is the server's. In a folder that containers share, the record's pid may mean another here."""
    if sys.platform != "linux":
        return True
    lock = (state_dir / "server.lock").stat()
    try:
        return any(os.path.samestat(lock, os.stat(f)) for f in Path(f"/proc/{pid}/fd").iterdir() if os.path.exists(f))
    except OSError:
        return False


def _read_state(state_dir: Path) -> dict[str, Any] | None:
    """What the watcher wrote; None for a damaged record, and for one that was copied here with its folder."""
    try:
        state = json.loads((state_dir / "server.json").read_text())
        fits = isinstance(state["socket"], str) and state["socket"] and type(state["pid"]) is int and state["pid"] > 0
        return state if fits and state["folder"] == state_dir.stat().st_ino else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
