"""The process beside an embedded server: starts it, ends it after its last user, cleans up. See `server.py`.

Run as `python -I -S watcher.py STATE_DIR SOCKET LOCK_FD COMMAND...`; uses the standard library alone. It and the
server hold the inherited `server.lock` for as long as they live, and it alone the inherited `watcher.lock`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """A server without its watcher would stay for ever; Linux ends it, and the append-only file keeps its data."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _write_state(state_dir: Path, state: dict[str, object]) -> None:
    """In one step, so that no reader sees half of it."""
    temporary = state_dir / f"server.json.{os.getpid()}"
    temporary.write_text(json.dumps(state))
    temporary.replace(state_dir / "server.json")


def _clear_state(state_dir: Path) -> None:
    """Removes what this watcher wrote; a folder deleted and made anew may hold another's."""
    path = state_dir / "server.json"
    try:
        if json.loads(path.read_text())["watcher"] == os.getpid():
            path.unlink()
    except (OSError, ValueError, KeyError):
        pass  # gone already


def _await_users_gone(state_dir: Path, users: int, server: subprocess.Popen[bytes]) -> None:
    """Blocks until no process uses the server and nothing keeps it; the lock of its users is held alone then."""
    while server.poll() is None:
        fcntl.flock(users, fcntl.LOCK_EX)
        if not (state_dir / "keep").exists():
            return
        fcntl.flock(users, fcntl.LOCK_UN)
        time.sleep(0.5)


def main() -> int:
    """Watches one server from start to end; returns its exit status."""
    state_dir, socket_path, lock = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    socket_path.unlink(missing_ok=True)
    # Before anybody can learn of the server: the folder may be deleted at any time from then on.
    users = os.open(state_dir / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    server = subprocess.Popen(sys.argv[4:], stdin=subprocess.DEVNULL, pass_fds=(lock,), preexec_fn=_die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    _write_state(
        state_dir,
        {"pid": server.pid, "watcher": os.getpid(), "socket": str(socket_path), "folder": state_dir.stat().st_ino},
    )

    def end_with_users() -> None:
        _await_users_gone(state_dir, users, server)
        if server.poll() is None:
            server.terminate()

    threading.Thread(target=end_with_users, daemon=True).start()
    status = server.wait()
    socket_path.unlink(missing_ok=True)
    _clear_state(state_dir)
    return status


if __name__ == "__main__":
    sys.exit(main())
