"""The process from which workers' children are forked, so that each has imported what it needs from its first moment.

`workers.children` starts it as `python -m torchrelay.workers.child_server`, with a socket for requests as its standard
input. It has one thread, opens no device and imports none of the users' code. A request is one packet: JSON, and beside
it a channel and the child's standard streams. Over the channel go the pid with a pidfd, and when the child ended its
exit status. The server ends with the process that started it, however that ends, or when idle for a minute.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["CHILD", "LARGEST", "OWN", "SERVER", "TORCH"]

SERVER, CHILD = "torchrelay.workers.child_server", "torchrelay.workers.child"
TORCH = ("torch", "torchrelay.stages.torch_stage")
"""What a server may be told to import beside what all children need."""
OWN = ("TORCHRELAY_", "PYTEST_")
"""How the variables begin in which children of one server may differ: no import reads them."""
LARGEST = 65536
_ALL_NEED = (CHILD, "numpy.random", "torchrelay.workers.run_reading", "torchrelay.workers.run_writing")
_HELD = (signal.SIGTERM, signal.SIGINT)
_IDLE_S = 60.0


class _Server:
    """Forks children until its starter is gone, or nobody wants one."""

    def __init__(self, control: socket.socket, starter: int) -> None:
        self._control, self._starter = control, starter
        self._born: dict[int, tuple[int, socket.socket]] = {}
        self._poll = select.poll()
        self._poll.register(starter, select.POLLIN)
        self._poll.register(control, select.POLLIN)

    def serve(self) -> bool:
        """False at the end, True in a forked child."""
        asked = True
        while asked or self._born:
            ready = [descriptor for descriptor, _ in self._poll.poll(None if self._born else _IDLE_S * 1000)]
            if self._starter in ready or not ready:
                return False
            for pidfd in self._born.keys() & set(ready):
                self._bury(pidfd)
            if self._control.fileno() in ready:
                packet, descriptors, _, _ = socket.recv_fds(self._control, LARGEST, 4)
                if packet and self._fork(packet, descriptors):
                    return True
                for descriptor in descriptors:
                    os.close(descriptor)
                if not packet:
                    asked = False
                    self._poll.unregister(self._control)
        return False

    def _fork(self, packet: bytes, descriptors: list[int]) -> bool:
        """Whether this process is the child now."""
        try:
            pid = os.fork()
        except OSError:
            return False  # whoever asked sees the channel close
        if not pid:
            self._close()
            _become(json.loads(packet), descriptors)
            return True
        pidfd = os.pidfd_open(pid)
        channel = socket.socket(fileno=os.dup(descriptors[0]))
        self._born[pidfd] = pid, channel
        self._poll.register(pidfd, select.POLLIN)
        try:
            socket.send_fds(channel, [b"%d" % pid], [pidfd])
        except OSError:
            os.kill(pid, signal.SIGKILL)  # nobody waits for it any more
        return False

    def _bury(self, pidfd: int) -> None:
        pid, channel = self._born.pop(pidfd)
        self._poll.unregister(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        with channel, contextlib.suppress(OSError):  # nobody may wait for it any more
            channel.send(b"%d" % os.waitstatus_to_exitcode(status))

    def _close(self) -> None:
        self._control.close()
        os.close(self._starter)
        for pidfd, (_, channel) in self._born.items():
            os.close(pidfd)
            channel.close()


def _become(words: dict[str, Any], descriptors: list[int]) -> None:
    """Makes this process as a fresh interpreter's would be."""
    for number, descriptor in enumerate(descriptors[1:]):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    for name in list(os.environ):
        if name.startswith(OWN):
            del os.environ[name]
    os.environ.update(words["own"])
    os.chdir(words["cwd"])
    if not sys.flags.safe_path:
        sys.path.insert(0, words["cwd"])
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()  # that of `random` is new after each fork, and torch's the same in each process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    gc.enable()


def _may_fork() -> bool:
    """Whether no import started a thread that outlives a fork, or opened a device. BLAS stops its threads for a fork,
    so they are counted behind one."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return len(os.listdir("/proc/self/task")) == 1 and not any(path.startswith("/dev/nvidia") for path in opened)


def main(starter: int, modules: Sequence[str]) -> int:
    """Runs a server for the process `starter`, or the child that was forked from it; returns the exit status of it."""
    # What is sent to a whole group of processes is the supervisors' to judge. A child gets what came before it looked.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    watched = os.pidfd_open(starter)
    if os.getppid() != starter:
        return 0
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if not sys.flags.safe_path:
        del sys.path[0]  # where somebody stood; each child looks there again
    gc.disable()
    for name in (*_ALL_NEED, *modules):
        with contextlib.suppress(ImportError):  # the child will meet the same, and say so
            importlib.import_module(name)
    os.chdir("/")
    # What is there stays: its pages are shared for as long as no collector writes to them.
    gc.freeze()
    if not _may_fork():
        print("workers are not forked: an import started a thread, or opened a device", file=sys.stderr)
        return 1
    if not _Server(control, watched).serve():
        return 0
    status: int = sys.modules[CHILD].main()
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
