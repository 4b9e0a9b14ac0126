"""Asks a server on a Unix socket whether and what it is, with two commands and no client library."""

from __future__ import annotations

import socket
from pathlib import Path

_PATIENCE_S = 2.0


def ping(path: Path) -> str:
    """`PONG`, `LOADING`, or nothing when nobody answers: a killed server's stale socket file does not."""
    try:
        said = _talk(path, b"PING\r\n")
    except (OSError, ValueError):
        return ""
    return said[1:].split()[0].decode(errors="replace") if len(said) > 1 else ""


def info(path: Path) -> dict[str, str]:
    """What INFO says, empty when nobody answers."""
    try:
        lines = _talk(path, b"INFO\r\n").decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return {}
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _talk(path: Path, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PATIENCE_S)
        connection.connect(str(path))
        connection.sendall(command)
        data = b""
        while not data.endswith(b"\r\n") or (data.startswith(b"$") and len(data) < int(data[1 : data.index(b"\r\n")])):
            piece = connection.recv(65536)
            if not piece:
                break
            data += piece
        return data
