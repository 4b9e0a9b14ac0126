"""Coordinators and agents as real processes: each agent is a host of its own, by its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import redis

from tests.cli_server import COMMANDS, Command
from tests.conftest import run_cli, wait_until
from torchrelay.config.fleet import Assignment
from torchrelay.queues.fleet import FleetRecords, FleetView
from torchrelay.queues.registry import Registry, WorkerReport

READY_S = 60.0


class Processes:
    """`torchrelay coordinator` and `torchrelay agent`, with their logs in files; `prefix` runs them elsewhere."""

    def __init__(self, url: str, namespace: str, folder: Path) -> None:
        self.url, self.namespace, self.folder = url, namespace, folder
        self.client = redis.Redis.from_url(url)
        self.registry = Registry(self.client, namespace, 1)
        self.registry.open()
        self.records = FleetRecords(self.client, self.registry.control)
        self.running: dict[str, Command | subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str, prefix: tuple[str, ...] = (), url: str = "", **environment: str) -> None:
        where = ["--redis", url or self.url, "--namespace", self.namespace]
        env = os.environ | environment
        # A session of its own: what is done to it is not done to the tests.
        with self.log_path(name).open("ab") as log:
            if prefix:
                line = [*prefix, sys.executable, "-m", "torchrelay.cli", *command, *where]
                self.running[name] = subprocess.Popen(line, stdout=log, stderr=log, env=env, start_new_session=True)
            else:
                self.running[name] = COMMANDS.start([*command, *where], stdout=log, stderr=log, env=env, session=True)

    def coordinator(self, name: str, **options: Any) -> None:
        self.start(name, "coordinator", "--name", name, **options)

    def agent(self, name: str, *files: Path, slots: str = "cpu=4", more: tuple[str, ...] = (), **options: Any) -> None:
        self.start(name, "agent", *map(str, files), "--name", name, "--slots", slots, *more, **options)

    def two_hosts(self, path: Path) -> None:
        """Hosts `a` and `b`, there before anybody decides what runs on them; then coordinator `c1`."""
        self.agent("a", path)
        self.agent("b", path)
        wait_until(lambda: len(self.view.hosts) == 2, READY_S)
        self.coordinator("c1")

    def log_path(self, name: str) -> Path:
        return self.folder / f"process-{name}.log"

    def log(self, name: str) -> str:
        return self.log_path(name).read_text()

    def signal(self, name: str, number: int) -> None:
        self.running[name].send_signal(number)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> int:
        process = self.running.pop(name)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        return process.wait(60)

    def end(self) -> None:
        statuses = {name: self.stop(name) for name in list(self.running)}
        self.client.close()
        assert set(statuses.values()) <= {0}, {name: (status, self.log(name)) for name, status in statuses.items()}

    def cli(self, *command: str, status: int = 0) -> Any:
        done = run_cli(*command, "--redis", self.url, "--namespace", self.namespace, "--json")
        assert done.returncode == status, (done.returncode, done.stderr)
        return json.loads(done.stdout) if done.stdout else done.stderr

    @property
    def view(self) -> FleetView:
        return self.records.view()

    def placed(self) -> Counter[tuple[str, str]]:
        """Workers that are to run, by host and stage."""
        return Counter((one.host, one.stage) for one in self.assignments())

    def assignments(self) -> list[Assignment]:
        return [one for state in self.view.desired.values() for one in state.workers]

    def ready(self) -> list[WorkerReport]:
        return [w for w in self.registry.workers() if w.state == "ready" and w.assignment]

    def serves(self, stage: str, count: int, ref: str = "") -> bool:
        """Whether exactly so many workers of a stage are ready, and all that runs is what is to run."""
        workers = [w for w in self.registry.workers() if w.assignment]
        ready = [w for w in workers if w.state == "ready" and w.node.endswith(f"/{stage}") and w.node.startswith(ref)]
        return len(ready) == count and {w.assignment for w in workers} == {one.id for one in self.assignments()}

    def await_serves(self, stage: str, count: int, ref: str = "", timeout_s: float = READY_S) -> None:
        wait_until(lambda: self.serves(stage, count, ref), timeout_s)

    def led_by(self) -> str:
        return self.view.leader
