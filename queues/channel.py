"""One connection that carries transitions: several in flight, answers in order, replays after a lost connection.

An operation that was sent and not answered is sent again with the same number; the server's replay ring (rule 11 of the
transport) answers as the first time, so a dropped reply does nothing twice. Not thread-safe: one owner.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from typing import Any, Generic, Protocol, TypeVar

import redis
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from torchrelay.errors import BrokerUnavailable
from torchrelay.queues.scripts import Arg, Call, explain

T = TypeVar("T")
LOST = (RedisConnectionError, RedisTimeoutError, OSError)


def _passes(refusal: ResponseError) -> bool:
    """Whether the server will answer soon: it fails over, or runs a long script. (One that loads counts as lost.)"""
    if isinstance(refusal, ReadOnlyError | MasterDownError | ClusterDownError | TryAgainError):
        return True
    return str(refusal).startswith("BUSY ") or "-READONLY " in str(refusal)


class Ending(Protocol):
    """Something whose descriptor becomes readable when waits are to end."""

    def fileno(self) -> int: ...


class Pending(Generic[T]):
    """The answer to come of one call; `result()` waits for it and for those sent before it."""

    __slots__ = ("_channel", "_value", "call", "done")

    def __init__(self, channel: Channel, call: Call[T]) -> None:
        self._channel = channel
        self.call = call
        self.done = False
        self._value: Any = None

    def settle(self, value: Any) -> None:
        self._value = value
        self.done = True

    def result(self) -> T:
        """The call's answer; raises what the refusal means, BrokerUnavailable when the server stayed away."""
        while not self.done:
            self._channel.receive()
        if isinstance(self._value, BrokerUnavailable):
            raise self._value
        if isinstance(self._value, ResponseError):
            raise explain(self.call.script.name, str(self._value)) from self._value
        return self.call.read(self._value)


class Channel:
    """Sends calls over one connection of `client`'s pool. `patience_s` bounds how long a lost server is waited for;
    `until` ends `block_pop` early."""

    def __init__(self, client: redis.Redis, *, patience_s: float = 30.0, until: Ending | None = None) -> None:
        self._pool = client.connection_pool
        self._patience_s = patience_s
        self._until = until
        self._connection: Any = None
        self._flight: deque[Pending[Any]] = deque()
        self.reconnects = 0

    def send(self, call: Call[T]) -> Pending[T]:
        """Sends without waiting. The caller keeps at most 16 operations of a session in flight."""
        pending = Pending(self, call)
        self._flight.append(pending)
        try:
            self._write(call.command())
        except LOST as error:
            self._recover(error)
        return pending

    def run(self, call: Call[T]) -> T:
        """Sends and waits."""
        return self.send(call).result()

    @property
    def in_flight(self) -> int:
        return len(self._flight)

    def poll(self) -> None:
        """Takes the answers that are here already."""
        try:
            while self._flight and self._connected().can_read(timeout=0):
                self.receive()
        except LOST as error:
            self._recover(error)

    def drain(self) -> None:
        """Waits for every answer; refusals stay with their Pending."""
        while self._flight:
            self.receive()

    def receive(self) -> None:
        """Takes the next answer in order."""
        try:
            value = self._read()
        except LOST as error:
            self._recover(error)
            return
        if isinstance(value, NoScriptError):
            # The calls behind it may run before it does: they are independent, and each is answered for itself.
            self._resend(self._flight.popleft())
            return
        if isinstance(value, ResponseError) and _passes(value):
            self._recover(value)
            return
        self._flight.popleft().settle(value)

    def block_pop(self, keys: list[str], timeout_s: float) -> list[bytes] | None:
        """BLPOP on an idle channel: [key, value], or None after `timeout_s` (at least 1 ms) without one or when `until`
        ends it: a token that comes at that moment is lost, as with a worker that dies."""
        self.drain()
        try:
            connection = self._connected()
            connection.send_command("BLPOP", *keys, f"{max(timeout_s, 0.001):.3f}")
            if self._ends(connection, timeout_s):
                connection.disconnect()
                return None
            value: list[bytes] | None = connection.read_response(timeout=timeout_s + 10.0)
            return value
        except LOST as error:
            self._recover(error)
            return None
        except ResponseError as refusal:
            if not _passes(refusal):
                raise explain("wait", str(refusal)) from refusal
            self._recover(refusal)
            return None

    def give_up(self) -> None:
        """Waits no longer for a lost server; may be called from another thread."""
        self._patience_s = 0.0

    def close(self) -> None:
        """Gives the connection back, closed: an answer in flight must not meet another owner."""
        if self._connection is not None:
            self._connection.disconnect()
            self._pool.release(self._connection)
            self._connection = None

    def _connected(self) -> Any:
        if self._connection is None:
            self._connection = self._pool.get_connection()
        return self._connection

    def _ends(self, connection: Any, timeout_s: float) -> bool:
        """Waits so long for the answer or for `until`; True when that came first."""
        if self._until is None or connection.can_read(timeout=0):
            return False
        with selectors.DefaultSelector() as selector:
            # redis-py offers no other way to wait for a connection and something else.
            selector.register(connection._sock, selectors.EVENT_READ, False)
            selector.register(self._until, selectors.EVENT_READ, True)
            ready = selector.select(timeout_s)
        return bool(ready) and all(key.data for key, _ in ready)

    def _write(self, command: list[Arg]) -> None:
        connection = self._connected()
        connection.send_packed_command(connection.pack_command(*command), check_health=False)

    def _read(self) -> Any:
        try:
            return self._connected().read_response()
        except ResponseError as refusal:
            # Its traceback would hold all callers' frames in a circle with this value, and what they have in hand.
            return refusal.with_traceback(None)

    def _resend(self, pending: Pending[Any]) -> None:
        self._flight.append(pending)
        try:
            self._write(pending.call.command(with_source=True))
        except LOST as error:
            self._recover(error)

    def _recover(self, cause: Exception) -> None:
        started, pause = time.monotonic(), 0.02
        while True:
            if self._connection is not None:
                self._connection.disconnect()
            try:
                connection = self._connected()
                connection.connect()
                connection.send_command("PING")
                connection.read_response()
                for pending in self._flight:
                    self._write(pending.call.command(with_source=True))
                self.reconnects += 1
                return
            except (*LOST, ResponseError) as error:
                if time.monotonic() > started + self._patience_s:
                    gone = BrokerUnavailable(
                        f"no answer from the server for {self._patience_s:.0f} s ({cause or error}); is it running?"
                    )
                    while self._flight:
                        self._flight.popleft().settle(gone)
                    raise gone from error
                time.sleep(pause)
                pause = min(pause * 2, 0.5)
