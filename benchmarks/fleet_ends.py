"""What the benchmarks of the fleet share: its processes, workers without a coordinator, and somebody who wants much.

`python -m benchmarks.fleet_ends URL NAMESPACE FILE STAGE=N..` serves so many workers of each stage until SIGTERM.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from torchrelay import Pipeline, Relay
from torchrelay.up import Fleet, run_fleet

SLOTS, HOSTS = 10, 2
_READY_S = 120.0
YAML = """
pipeline: shift
input: {{n: int64}}
stages:
{stages}
"""
STAGE = (
    '  - {{name: {name}, use: "benchmarks.fleet_stages:Sleep", batch: {{max_rows: 1}}, outputs: {{n: int64}}, '
    "replicas: {{min: 1, max: {most}}}, args: {{before_s: {before_s}, after_s: {after_s}, flag: '{flag}'}}}}"
)


def write_pipeline(folder: Path, stages: Mapping[str, tuple[float, float]], flag: Path) -> Path:
    """A file with these stages in a row, each with its seconds per row before and after the flag is there."""
    lines = [
        STAGE.format(name=name, before_s=before, after_s=after, flag=flag, most=SLOTS)
        for name, (before, after) in stages.items()
    ]
    path = folder / "shift.yaml"
    path.write_text(YAML.format(stages="\n".join(lines)))
    return path


@contextmanager
def processes(folder: Path, commands: Mapping[str, list[str]]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """These modules of Python with their arguments, until the block ends; their logs lie in the folder."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                line = [sys.executable, "-m", *command]
                running[name] = subprocess.Popen(line, stdout=log, stderr=log, cwd=ROOT)
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait(60)


@contextmanager
def fixed(url: str, namespace: str, path: Path, workers: Mapping[str, int]) -> Iterator[None]:
    """So many workers of each stage, and nobody who decides."""
    counts = [f"{stage}={count}" for stage, count in workers.items()]
    with processes(path.parent, {"fixed": ["benchmarks.fleet_ends", url, namespace, str(path), *counts]}):
        yield


@contextmanager
def scaled(url: str, namespace: str, path: Path) -> Iterator[int]:
    """A coordinator and two agents, which have all the slots between them; the coordinator's process id."""
    where = ["--redis", url, "--namespace", namespace]
    commands = {f"host{i}": ["torchrelay.cli", "agent", str(path), "--name", f"host{i}"] for i in range(HOSTS)}
    for command in commands.values():
        command += ["--slots", f"cpu={SLOTS // HOSTS}", *where]
    commands["coordinator"] = ["torchrelay.cli", "coordinator", *where]
    with processes(path.parent, commands) as running:
        yield running["coordinator"].pid


@contextmanager
def coordinator(url: str, namespace: str, folder: Path) -> Iterator[int]:
    """A coordinator alone; its process id."""
    line = ["torchrelay.cli", "coordinator", "--redis", url, "--namespace", namespace]
    with processes(folder, {"coordinator": line}) as running:
        yield running["coordinator"].pid


class Demand(threading.Thread):
    """Keeps `in_flight` jobs under way, and notes when each is done."""

    def __init__(self, relay: Relay, in_flight: int) -> None:
        super().__init__(name="demand", daemon=True)
        self._relay = relay
        self._in_flight = in_flight
        self._over = threading.Event()
        self.done_at: list[float] = []

    def __enter__(self) -> Demand:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        results = self._relay.map("shift", self._rows(), in_flight=self._in_flight, ordered=False)
        for _ in results:
            self.done_at.append(time.monotonic())
            if self._over.is_set():
                break
        results.close()

    def _rows(self) -> Iterator[dict[str, int]]:
        number = 0
        while True:
            yield {"n": number}
            number += 1

    def rate(self, from_s: float, until_s: float) -> float:
        """Jobs per second that were done between these times."""
        return sum(from_s <= at < until_s for at in list(self.done_at)) / (until_s - from_s)


def serving(relay: Relay) -> Counter[str]:
    """Workers that are ready, by stage."""
    return Counter(w.node.rpartition("/")[2] for w in relay.registry.workers() if w.state == "ready")


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = _READY_S) -> None:
    """Ends the benchmark where it does not come true."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise SystemExit(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


def cpu_s(pid: int) -> float:
    """Seconds of processor that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trbench-", dir="/tmp") as name:
        yield Path(name)


def main() -> None:
    url, namespace, path, *counts = sys.argv[1:]
    fleet, pipeline = Fleet(url, namespace, make_current=False), Pipeline.load(path)
    for stage, count in (text.split("=") for text in counts):
        for _ in range(int(count)):
            fleet.add(pipeline, stage=stage)
    raise SystemExit(run_fleet(fleet, live=False))


if __name__ == "__main__":
    main()
