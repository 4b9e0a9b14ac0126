"""One driver per run: who holds an output folder, and that nobody else starts on it meanwhile.

On a local folder the kernel keeps the lock and gives it back when the driver ends, whatever ends it. Where there are no
such locks (URLs, Windows) the holder writes down that it lives; a record that is a minute old is a dead driver's. Two
that come at the same moment may both begin; the one whose record was overwritten finds out at its next `renew`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from typing import Final, Protocol

from torchrelay.errors import RunConflict
from torchrelay.queues.arena.locks import keep, let_go, try_lock
from torchrelay.stages.writing.staging import NO_LOCKS
from torchrelay.stages.writing.stores import HIDDEN, LocalStore, Store, disk_trouble

__all__ = ["Held", "Hold", "take_hold"]

LOCK: Final = f"{HIDDEN}/lock"
DRIVER: Final = f"{HIDDEN}/driver.json"
RENEW_S: Final = 15.0
STALE_S: Final = 60.0


class Held(RunConflict):
    """Another driver works on the folder: later it may be free."""


class Hold(Protocol):
    """The right to drive the run of a folder."""

    def renew(self) -> None:
        """To be called every few seconds; costs something every 15 s. Raises RunConflict when another took over."""

    def release(self) -> None: ...


def take_hold(store: Store) -> Hold:
    """Raises Held, which names the driver that holds the folder."""
    if isinstance(store, LocalStore) and os.name != "nt":
        try:
            return _Lock(store)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return _Record(store)


def _who() -> dict[str, str | int | float]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}


def _refusal(store: Store, text: bytes) -> Held:
    try:
        found = json.loads(text)
        holder = f"process {int(found['pid'])} on {str(found['host'])[:80]}"
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    return Held(f"output {store.where}: {holder} drives a run there now; wait for it, or stop it and --resume")


class _Lock:
    def __init__(self, store: LocalStore) -> None:
        with disk_trouble(store.where):
            path = store.path(LOCK)
            path.parent.mkdir(parents=True, exist_ok=True)
            # The file stays for ever: of two drivers that met while it is removed, each would lock another one.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(descriptor):
                raise _refusal(store, os.pread(descriptor, 4096, 0))
            with disk_trouble(store.where):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_who()).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        keep(descriptor)
        self._descriptor = descriptor

    def renew(self) -> None:
        pass

    def release(self) -> None:
        let_go(self._descriptor)


class _Record:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._token = secrets.token_hex(8)
        found = self._read()
        if found and not _is_stale(found):
            raise _refusal(store, found)
        self._write()

    def renew(self) -> None:
        if time.monotonic() - self._renewed < RENEW_S:
            return
        found = self._read()
        if not self._is_ours(found):
            raise _refusal(self._store, found)
        self._write()

    def release(self) -> None:
        if self._is_ours(self._read()):
            self._store.remove(DRIVER)

    def _read(self) -> bytes:
        try:
            return self._store.read(DRIVER)
        except FileNotFoundError:
            return b""

    def _is_ours(self, found: bytes) -> bool:
        return self._token.encode() in found

    def _write(self) -> None:
        self._renewed = time.monotonic()
        self._store.write(DRIVER, json.dumps(_who() | {"token": self._token, "renewed": time.time()}).encode())


def _is_stale(text: bytes) -> bool:
    try:
        return abs(time.time() - float(json.loads(text)["renewed"])) > STALE_S
    except (ValueError, KeyError, TypeError):
        return True
