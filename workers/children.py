"""Starts workers' children: the first as a fresh interpreter, those behind it, and restarts, as forks of a server that
has imported what they need. Either way a child has the part of `subprocess.Popen` that a supervisor uses.

A server that dies costs no child: those that run go on, and the next one comes from a new server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from torchrelay.config.imports import module_origin, resolve_inside, split_use
from torchrelay.config.spec import StageConfig
from torchrelay.errors import ConfigError
from torchrelay.workers.child_server import CHILD, LARGEST, OWN, SERVER, TORCH

__all__ = ["Child", "Children", "children", "wants_torch"]

log = logging.getLogger("torchrelay.supervisor")
UNKNOWN = 1
"""The exit status of a child whose server died before it: as of any other failure."""
_PATIENCE_S, _STATUS_S, _LOOK_S = 120.0, 5.0, 0.05
_MOST_FAILURES = 3
_WITH_TORCH = rb"torch|torchvision|torchaudio|transformers|sentence_transformers|timm|diffusers"
_IMPORTS_TORCH = re.compile(rb"^[ \t]*(?:import|from)[ \t]+(?:" + _WITH_TORCH + rb")\b|\bTorchStage\b", re.MULTILINE)


def wants_torch(stages: Sequence[StageConfig], base_dir: Path) -> bool:
    """Whether children with these stages import torch, as far as their files tell; their code is not run."""
    for stage in stages:
        try:
            where = split_use(stage.use)[0] if stage.use else ""
            file = resolve_inside(where, base_dir, "use") if where.endswith(".py") else where and module_origin(where)
            if stage.device == "gpu" or (file and _IMPORTS_TORCH.search(Path(file).read_bytes())):
                return True
        except (ConfigError, OSError):
            continue  # the child will say so
    return False


class Children:
    """Starts the children of this process, whichever thread asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._controls: dict[bool, socket.socket] = {}
        self._environment: dict[str, str] = {}
        self._servers: list[subprocess.Popen[bytes]] = []
        self._asked = {False: 0, True: 0}
        self._failures = 0

    @property
    def server_pids(self) -> list[int]:
        """Of the servers that live."""
        return [server.pid for server in self._servers if server.poll() is None]

    def start(self, *, torch: bool, stderr: bool, fork: bool, given_up: Callable[[], object]) -> Child:
        """Starts a child in this process's folder and environment, as they are now.

        Args:
            torch: whether it will import torch.
            stderr: whether its standard error is a pipe, else it is this process's.
            fork: whether it may come from a server.
            given_up: asked while a server makes itself ready; if true, no longer waited for.
        """
        with self._lock:
            # What is wanted once need not be imported by a server as well.
            first, with_torch = not any(self._asked.values()), torch and self._asked[True] > 0
            self._asked[torch] += 1
        if fork and not first and hasattr(os, "pidfd_open") and self._failures < _MOST_FAILURES:
            try:
                child = ForkedChild(lambda descriptors: self._ask(with_torch, descriptors), stderr, given_up)
                self._failures = 0
                return child
            except _GivenUp:
                pass
            except OSError as error:
                self._failures += 1
                log.warning("a worker starts as a fresh interpreter, for it could not be forked: %s", error)
        pipe = subprocess.PIPE if stderr else None
        return subprocess.Popen([sys.executable, "-m", CHILD], stdin=subprocess.PIPE, stderr=pipe, cwd=Path.cwd())

    def _ask(self, torch: bool, descriptors: Sequence[int]) -> None:
        own = {name: value for name, value in os.environ.items() if name.startswith(OWN)}
        packet = json.dumps({"cwd": str(Path.cwd()), "own": own}).encode()
        if len(packet) > LARGEST:
            raise OSError(f"its environment has {len(packet)} bytes")
        with self._lock:
            environment = {name: value for name, value in os.environ.items() if name not in own}
            if environment != self._environment:
                self._close()
                self._environment = environment
            try:
                socket.send_fds(self._control(torch), [packet], descriptors)
            except OSError:
                self._close()  # it died, or ended because nothing was to do
                socket.send_fds(self._control(torch), [packet], descriptors)

    def _control(self, torch: bool) -> socket.socket:
        if torch not in self._controls:
            self._servers = [server for server in self._servers if server.poll() is None]
            ours, theirs = _socketpair()
            command = [sys.executable, "-m", SERVER, str(os.getpid()), *(TORCH if torch else ())]
            with theirs:
                self._servers.append(subprocess.Popen(command, stdin=theirs.fileno()))
            self._controls[torch] = ours
        return self._controls[torch]

    def _close(self) -> None:
        for control in self._controls.values():
            control.close()
        self._controls.clear()


def _socketpair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_STATUS_S)
    return ours, theirs


class _GivenUp(OSError):
    """Nobody waits for the child any more."""


class ForkedChild:
    """A child of a server's. Raises OSError when there is none to be had; any thread may call any method."""

    def __init__(self, ask: Callable[[Sequence[int]], None], stderr: bool, given_up: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._channel, theirs = _socketpair()
        self.returncode: int | None = None
        read, write = os.pipe()
        self.stdin: IO[bytes] | None = os.fdopen(write, "wb")
        self.stderr: IO[bytes] | None = None
        streams = [read, 1, 2]
        if stderr:
            read_error, streams[2] = os.pipe()
            self.stderr = os.fdopen(read_error, "rb")
        try:
            with theirs:
                ask([theirs.fileno(), *streams])
            self.pid, self._pidfd = self._answer(given_up)
        except OSError:
            self._channel.close()
            self.stdin.close()
            if self.stderr is not None:
                self.stderr.close()
            raise
        finally:
            os.close(read)
            if stderr:
                os.close(streams[2])
        # Whoever waits in another thread must not find the number of another file.
        weakref.finalize(self, os.close, self._pidfd).atexit = False

    def _answer(self, given_up: Callable[[], object]) -> tuple[int, int]:
        deadline = time.monotonic() + _PATIENCE_S
        while not _readable(self._channel.fileno(), _LOOK_S):
            if given_up():
                raise _GivenUp
            if time.monotonic() > deadline:
                raise OSError(f"the server did not answer within {_PATIENCE_S:g} s")
        packet, descriptors, _, _ = socket.recv_fds(self._channel, 32, 1)
        if not descriptors:
            raise OSError("the server ended, or may not fork; what it said stands above")
        return int(packet), descriptors[0]

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and _readable(self._pidfd, 0):
                try:
                    self.returncode = int(self._channel.recv(32) or UNKNOWN)
                except OSError:
                    self.returncode = UNKNOWN
                self._channel.close()
            return self.returncode

    def wait(self) -> int:
        while (status := self.poll()) is None:
            _readable(self._pidfd, None)
        return status

    def send_signal(self, sig: int) -> None:
        with self._lock:
            if self.returncode is None:
                with contextlib.suppress(ProcessLookupError):  # it ended, and `poll` will tell
                    signal.pidfd_send_signal(self._pidfd, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _readable(descriptor: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


Child = subprocess.Popen[bytes] | ForkedChild
children = Children()
"""Of this process."""
if hasattr(os, "register_at_fork"):
    # The copies that a fork of this process has are not its own: not the lock's state, and not the servers.
    os.register_at_fork(after_in_child=children.__init__)  # type: ignore[misc]
