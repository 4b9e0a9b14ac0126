"""Hosts as network namespaces: each has an agent and a link of its own to one server, and shares no memory with others.

The namespaces and links are made and removed by the test. Killing a host and cutting its link are real.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import PrivateServer, private_server, wait_until
from tests.integration.fleet_support import READY_S, Processes
from tests.workers.support import assert_settled
from torchrelay import Relay
from torchrelay.queues.fleet import HOST_TTL_S
from torchrelay.queues.keys import new_token

YAML = """
    pipeline: cross
    input: {n: int64}
    output: [total]
    stages:
      - {name: make, use: "stages.py:make", outputs: {x: "float32[40000]"}, resources: {cpus: 1}, batch: {max_rows: 4}}
      - {name: twice, use: "stages.py:twice", outputs: {x: "float32[*]"}, resources: {cpus: 1}, batch: {max_rows: 4}}
      - {name: total, use: "stages.py:total", outputs: {total: float64}, resources: {cpus: 1}, batch: {max_rows: 4}}
"""
CODE = """
    import time

    import numpy as np


    def make(batch):
        return {"x": np.stack([np.arange(40000, dtype=np.float32) + float(n) for n in batch["n"]])}


    def twice(batch):
        time.sleep(0.05)
        return {"x": batch["x"] * 2}


    def total(batch):
        return {"total": np.asarray(batch["x"], dtype=np.float64).sum(axis=1)}
"""
STAGES = ("make", "twice", "total")


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


class Net:
    """A bridge with the server's address, and one namespace per host with a link to it."""

    def __init__(self) -> None:
        self.id = new_token(5).lower()
        number = int.from_bytes(os.urandom(1), "big")
        self.subnet = f"10.213.{number}"
        self.bridge = f"trb{self.id}"
        self.hosts: list[str] = []

    def open(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.subnet}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")

    def space(self, host: str) -> str:
        return f"tr-{self.id}-{host}"

    def link(self, host: str) -> str:
        return f"tr{self.id}{host}"

    def add(self, host: str) -> None:
        self.hosts.append(host)
        space, outer, inner = self.space(host), self.link(host), f"i{self.link(host)}"
        ip("netns", "add", space)
        ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        ip("link", "set", outer, "master", self.bridge, "up")
        ip("link", "set", inner, "netns", space)
        ip("-n", space, "addr", "add", f"{self.subnet}.{len(self.hosts) + 1}/24", "dev", inner)
        ip("-n", space, "link", "set", inner, "up")
        ip("-n", space, "link", "set", "lo", "up")

    def cut(self, host: str, *, back: bool = False) -> None:
        ip("link", "set", self.link(host), "up" if back else "down")

    def close(self) -> None:
        for host in self.hosts:
            ip("netns", "del", self.space(host), check=False)
            ip("link", "del", self.link(host), check=False)
        ip("link", "del", self.bridge, check=False)


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net()
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip of iproute2")
    try:
        made.open()
        made.add("probe")
        ip("netns", "exec", made.space("probe"), "true")
    except subprocess.CalledProcessError as refused:
        made.close()
        pytest.skip(f"network namespaces are not permitted here: {refused.stderr.strip()}")
    yield made
    made.close()


@pytest.fixture
def served(net: Net) -> Iterator[tuple[PrivateServer, str]]:
    """A server at the bridge's address, and its URL for the hosts."""
    with socket.socket() as probe:
        probe.bind((f"{net.subnet}.1", 0))
        port = probe.getsockname()[1]
    with private_server("--port", str(port), "--bind", f"{net.subnet}.1", "--protected-mode", "no") as server:
        yield server, f"redis://{net.subnet}.1:{port}/0"


class Hosts(Processes):
    """Agents in namespaces of their own, with shared memory of their own."""

    def __init__(self, server: PrivateServer, far_url: str, net: Net, folder: Path) -> None:
        super().__init__(server.url, "h" + new_token(8), folder)
        self.far_url, self.net = far_url, net
        self.memory: list[Path] = []

    def host(self, name: str, path: Path, cpus: int) -> None:
        self.net.add(name)
        memory = Path("/dev/shm") / f"trs-{self.net.id}-{name}"
        memory.mkdir(mode=0o700)
        self.memory.append(memory)
        prefix = ("ip", "netns", "exec", self.net.space(name))
        settings = {"TORCHRELAY_ARENA_DIR": str(memory), "TORCHRELAY_LEASE_MS": "4000"}
        self.agent(name, path, slots=f"cpu={cpus}", prefix=prefix, url=self.far_url, **settings)

    def kill_host(self, name: str) -> None:
        """All its processes at once, as when the power fails."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        try:
            self.end()
        finally:
            for memory in self.memory:
                shutil.rmtree(memory, ignore_errors=True)

    def where(self) -> dict[str, str]:
        return {one.stage: one.host for one in self.assignments()}


@pytest.fixture
def hosts(served: tuple[PrivateServer, str], net: Net, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(*served, net, tmp_path)
    yield made
    made.close()


def all_serve(hosts: Hosts) -> bool:
    return all(hosts.serves(stage, 1) for stage in STAGES)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cpus", [(2, 1), (1, 1, 1)])
@pytest.mark.parametrize("fault", ["none", "kill", "cut"])
def test_a_pipeline_over_hosts_completes_every_job_once(
    hosts: Hosts, net: Net, make_pipeline: Callable[..., Path], cpus: tuple[int, ...], fault: str
) -> None:
    """Tensors cross from host to host; a host that dies or is cut off is replaced by a spare one, and one that comes
    back drains what it should no longer run. Each stage commits each job once."""
    path = make_pipeline(YAML, CODE)
    names = ("a", "b", "c")[: len(cpus)]
    for name, count in zip(names, cpus, strict=True):
        hosts.host(name, path, count)
    wait_until(lambda: len(hosts.view.hosts) == len(names), READY_S)
    hosts.coordinator("k1")
    wait_until(lambda: all_serve(hosts), READY_S)
    assert set(hosts.where().values()) == set(names)
    hosts.host("d", path, 2)
    wait_until(lambda: "d" in {host.name for host in hosts.view.hosts}, READY_S)
    with Relay(hosts.url, namespace=hosts.namespace) as relay:
        count = 400
        futures = relay.submit_many("cross", [{"n": i} for i in range(count)])
        wait_until(lambda: sum(f.done() for f in futures[:40]) >= 20, READY_S)
        lost = {stage for stage, host in hosts.where().items() if host == "b"}
        if fault == "kill":
            hosts.kill_host("b")
        if fault == "cut":
            net.cut("b")
        if fault != "none":
            wait_until(lambda: {hosts.where().get(stage) for stage in lost} == {"d"}, HOST_TTL_S + 5.0)
        if fault == "cut":
            back_at = time.monotonic() + 3.0
            wait_until(lambda: time.monotonic() > back_at)
            net.cut("b", back=True)
        base = 2 * float(np.arange(40000, dtype=np.float64).sum())
        results = [float(f.result(120)["total"]) for f in futures]
        assert results == pytest.approx([base + 2 * 40000 * i for i in range(count)], rel=1e-6)
        moved = sum((w.moved.get("remote", 0) for w in hosts.registry.workers()), 0)
        assert moved > 0
        if fault == "cut":
            wait_until(lambda: "b" in {host.name for host in hosts.view.hosts}, 30)
            wait_until(lambda: all_serve(hosts), 60)
    wait_until(lambda: not any(hosts.registry.loads().get(f"{node}.held_rows") for node in hosts.registry.loads()), 30)
    assert_settled(hosts.registry, dict.fromkeys(STAGES, count))
