"""The line between rank 0 of a group and the others: TCP connections over which batches are announced and reported.

A follower waits in a blocking read, which costs nothing and has no time-out: a group may be idle for days, or its
rank 0 stopped for a while, and no collective runs into its own. Messages are a length and bytes; what they mean is the
caller's. Who connects shows the epoch's token first, so that nobody of another epoch or group is let in.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Sequence

from torchrelay.errors import WorkerError

__all__ = ["Line", "LineClosed", "Switchboard"]

_LENGTH = struct.Struct("<Q")
_HELLO = struct.Struct("<64sI")
_MOST_BYTES = 1 << 40
_HELLO_S = 5.0


class LineClosed(WorkerError):
    """The other rank is gone."""


class Line:
    """One connection. One thread reads, one writes."""

    def __init__(self, link: socket.socket, rank: int) -> None:
        self.rank = rank
        self._link = link
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: bytes) -> None:
        """Raises LineClosed."""
        try:
            self._link.sendall(_LENGTH.pack(len(message)))
            self._link.sendall(message)
        except OSError as error:
            raise LineClosed(f"rank {self.rank} is gone: {error}") from error

    def receive(self) -> bytearray:
        """The next message, whenever it comes. Raises LineClosed."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _MOST_BYTES:
            raise LineClosed(f"rank {self.rank} announced {length} bytes, which is none of ours")
        return self._read(length)

    def _read(self, length: int) -> bytearray:
        found = bytearray(length)
        view, at = memoryview(found), 0
        while at < length:
            try:
                got = self._link.recv_into(view[at:])
            except OSError as error:
                raise LineClosed(f"rank {self.rank} is gone: {error}") from error
            if not got:
                raise LineClosed(f"rank {self.rank} is gone")
            at += got
        return found

    def close(self) -> None:
        self._link.close()

    @classmethod
    def to(cls, host: str, port: int, token: str, rank: int, within_s: float) -> Line:
        """From rank `rank` to rank 0. Raises LineClosed."""
        try:
            link = socket.create_connection((host, port), timeout=within_s)
            link.sendall(_HELLO.pack(token.encode(), rank))
        except OSError as error:
            raise LineClosed(f"rank 0 is not reached at {host}:{port}: {error}") from error
        return cls(link, 0)


class Switchboard:
    """Rank 0's end: where the others of this epoch connect."""

    def __init__(self, host: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self._token = _HELLO.pack(token.encode(), 0)[:64]
        self.port: int = self._server.getsockname()[1]

    def lines(self, size: int, within_s: float) -> Sequence[Line]:
        """The lines to ranks 1 to `size` - 1, once all are there; strangers are refused. Raises LineClosed."""
        found: dict[int, Line] = {}
        deadline = time.monotonic() + within_s
        while len(found) < size - 1:
            self._server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                link, _ = self._server.accept()
            except TimeoutError as error:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in found)
                raise LineClosed(f"rank {missing} did not come within {within_s:g} s") from error
            rank = self._greet(link)
            if 0 < rank < size and rank not in found:
                found[rank] = Line(link, rank)
            else:
                link.close()
        self._server.close()
        return [found[rank] for rank in range(1, size)]

    def _greet(self, link: socket.socket) -> int:
        """The rank of who connected; 0 for who is none of this epoch."""
        link.settimeout(_HELLO_S)
        try:
            hello = link.recv(_HELLO.size, socket.MSG_WAITALL)
        except OSError:
            return 0
        if len(hello) != _HELLO.size or not hmac.compare_digest(hello[:64], self._token):
            return 0
        return int(_HELLO.unpack(hello)[1])

    def close(self) -> None:
        self._server.close()
