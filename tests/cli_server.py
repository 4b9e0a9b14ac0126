"""The command line as real processes that need not import it each time: forks of a process that has.

`CommandLine.run` does what `subprocess.run([sys.executable, "-m", "torchrelay.cli", ...])` does; its imports take
longer than most commands, and there are hundreds of them here. Each is a process of its own, with its own arguments,
folder, streams and exit status. In another environment than that of the session's start it is a fresh interpreter.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 65536
# No import reads these.
OWN = ("TORCHRELAY_", "PYTEST_")


def environments(given: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What a command may have of its own, and what it shares with the process that it is a fork of."""
    own = {name: value for name, value in given.items() if name.startswith(OWN)}
    return own, {name: value for name, value in given.items() if name not in own}


class CommandLine:
    """Any thread may run commands, also at the same time."""

    def __init__(self) -> None:
        self._environment = environments(dict(os.environ))[1]
        self._lock = threading.Lock()
        self._control: socket.socket | None = None

    def run(self, arguments: list[str], cwd: Path | None, timeout_s: float) -> subprocess.CompletedProcess[str]:
        own, shared = environments(dict(os.environ))
        command = [sys.executable, "-m", "torchrelay.cli", *arguments]
        packet = json.dumps([arguments, str(cwd or Path.cwd()), own]).encode()
        if shared != self._environment or len(packet) > LARGEST:
            return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with theirs, self._lock:
                socket.send_fds(self._server(), [packet], [theirs.fileno(), 0, out.fileno(), err.fileno()])
            pid = int(ours.recv(32))
            poll = select.poll()
            poll.register(ours, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout_s)
            status = int(ours.recv(32))
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, status, out.read(), err.read())

    def _server(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                # It ends when the last end of its socket closes, which this process keeps.
                subprocess.Popen(
                    [sys.executable, "-m", "tests.cli_server"], stdin=theirs, cwd=ROOT, env=self._environment
                )
        return self._control


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
    arguments, cwd, own = json.loads(packet)
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
