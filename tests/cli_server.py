"""The command line as real processes that need not import it each time: forks of a process that has.

`COMMANDS` does what `subprocess` does with `[sys.executable, "-m", "torchrelay.cli", ...]`: the imports take longer
than most commands, and there are hundreds of them here. Each is a process of its own, with its own arguments, folder,
streams and exit status. In another environment than that of the session's start it is a fresh interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
LARGEST = 65536
# No import reads these.
OWN = ("TORCHRELAY_", "PYTEST_")


def environments(given: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What a command may have of its own, and what it shares with the process that it is a fork of."""
    own = {name: value for name, value in given.items() if name.startswith(OWN)}
    return own, {name: value for name, value in given.items() if name not in own}


class Command:
    """A command that runs, as `subprocess.Popen` shows it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.returncode: int | None = None
        self.pid = int(channel.recv(32))

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._channel, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("torchrelay", timeout or 0.0)
            self.returncode = int(self._channel.recv(32))
            self._channel.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class CommandLine:
    """Any thread may run commands, also at the same time."""

    def __init__(self) -> None:
        self._environment = environments(dict(os.environ))[1]
        self._lock = threading.Lock()
        self._control: socket.socket | None = None

    def run(self, arguments: Sequence[str], cwd: Path | None, timeout_s: float) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(arguments, stdout=out, stderr=err, cwd=cwd)
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(list(arguments), status, out.read(), err.read())

    def start(
        self,
        arguments: Sequence[str],
        *,
        stdout: IO[Any] | None = None,
        stderr: IO[Any],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        session: bool = False,
    ) -> Command | subprocess.Popen[bytes]:
        """Starts one, in a session of its own if asked for."""
        given = dict(os.environ if env is None else env)
        own, shared = environments(given)
        packet = json.dumps([list(arguments), str(cwd or Path.cwd()), own, session]).encode()
        if shared != self._environment or len(packet) > LARGEST:
            command = [sys.executable, "-m", "torchrelay.cli", *arguments]
            return subprocess.Popen(
                command, stdout=stdout, stderr=stderr, cwd=cwd, env=given, start_new_session=session
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        streams = [0, 1 if stdout is None else stdout.fileno(), stderr.fileno()]
        with theirs, self._lock:
            socket.send_fds(self._server(), [packet], [theirs.fileno(), *streams])
        return Command(ours)

    def _server(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                # It ends when the last end of its socket closes, which this process keeps.
                subprocess.Popen(
                    [sys.executable, "-m", "tests.cli_server"], stdin=theirs, cwd=ROOT, env=self._environment
                )
        return self._control


COMMANDS = CommandLine()
"""Of this session."""


def serve(control: socket.socket) -> list[str] | None:
    """None at the end; in a forked process the command that it is to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of processes that wait for commands
    while True:
        packet, passed, _, _ = socket.recv_fds(control, LARGEST, 4)
        if not packet:
            return None
        if not os.fork():
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            channel = socket.socket(fileno=passed[0])
            if pid:
                channel.send(b"%d" % pid)
                channel.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os._exit(0)
            channel.close()
            return _become(packet, passed[1:])
        for descriptor in passed:
            os.close(descriptor)


def _become(packet: bytes, streams: list[int]) -> list[str]:
    arguments, cwd, own, session = json.loads(packet)
    if session:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.update(own)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[0] = cwd
    sys.modules["numpy"].random.seed()
    command: list[str] = arguments
    return command


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    cli = importlib.import_module("torchrelay.cli")
    arguments = serve(control)
    if arguments is not None:
        sys.argv = [str(cli.__file__), *arguments]
        cli.main()


if __name__ == "__main__":
    main()
