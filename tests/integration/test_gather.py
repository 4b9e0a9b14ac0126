"""Gathered stages as operators meet them: the command line, and a fleet of two hosts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.conftest import MakePipeline, run_cli, wait_until
from tests.integration.fleet_support import READY_S, Processes
from torchrelay import Relay

CODE = """
    import numpy as np
    from torchrelay import Stage


    class Shares(Stage):
        def load(self, context):
            self.shard, self.shards = context.shard, context.shards

        def forward(self, batch):
            return {"y": np.array_split(np.asarray(batch["x"]), self.shards, axis=1)[self.shard] + 1}
"""
YAML = """
    pipeline: halves
    input: {x: "float32[4]"}
    stages:
      - name: s
        use: stages.py:Shares
        outputs: {y: "float32[4]"}
        batch: {max_rows: 2}
        replicas: {min: 1, max: 4}
        shards: {count: 2, mode: gather}
"""
PARTS = ("s.0", "s.1", "s.combine")


@pytest.fixture
def fleet(server_url: str, namespace: str, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(server_url, namespace, tmp_path)
    yield made
    made.end()


@pytest.fixture
def halves(make_pipeline: MakePipeline) -> Path:
    return make_pipeline(YAML, CODE)


def assert_works(relay: Relay, count: int = 20) -> None:
    rows = [{"x": [float(i)] * 4} for i in range(count)]
    assert [r["y"].tolist() for r in relay.map("halves", rows)] == [[i + 1.0] * 4 for i in range(count)]


def test_parts_stay_together_are_scaled_together_and_outlive_a_kill(
    fleet: Processes, halves: Path, relay: Relay
) -> None:
    """Of two hosts one has all parts; each of two whole groups is on a host; a part that is killed comes back."""
    # Shared memory of its own is what makes a host one of its own.
    with TemporaryDirectory(prefix="trs-arena-", dir="/dev/shm") as memory:
        fleet.agent("a", halves)
        fleet.agent("b", halves, TORCHRELAY_ARENA_DIR=memory)
        wait_until(lambda: len(fleet.view.hosts) == 2, READY_S)
        fleet.coordinator("c1")
        _grows_and_lives(fleet, relay)
        fleet.stop("b")


def _grows_and_lives(fleet: Processes, relay: Relay) -> None:
    for part in PARTS:
        fleet.await_serves(part, 1)
    assert len({host for host, _ in fleet.placed()}) == 1
    told = fleet.cli("status", "--why")
    whys = {one["node"].rpartition("/")[2]: one["why"] for one in told["allocation"]}
    assert "shares memory with" in whys["s.combine"]
    nodes = {n["node"].rpartition("/")[2]: n for n in told["nodes"]}
    ref = told["nodes"][0]["node"].rpartition("/")[0]
    assert {nodes[part]["part_of"] for part in PARTS} == {f"{ref}/s"}
    assert (nodes["s.0"]["mode"], nodes["s.0"]["shards"]) == ("gather", 2)
    assert_works(relay)
    assert fleet.cli("scale", "halves/s", "2") == {"node": "halves/s", "workers": 2}
    for part in PARTS:
        fleet.await_serves(part, 2)
    assert fleet.placed() == {(host, part): 1 for host in ("a", "b") for part in PARTS}
    assert "torchrelay scale halves/s 3" in fleet.cli("scale", "halves/s.1", "3", status=2)
    victim = next(w.pid for w in fleet.registry.workers() if w.node.endswith("/s.1"))
    os.kill(victim, signal.SIGKILL)
    assert_works(relay)


def served(fleet: Processes) -> list[str]:
    """What ready workers serve."""
    return sorted(w.node.rpartition("/")[2] for w in fleet.registry.workers() if w.state == "ready")


def test_commands_take_the_name_of_the_stage_for_all_its_parts(fleet: Processes, halves: Path, relay: Relay) -> None:
    """And the name of a part, or its number, for that one."""
    fleet.start("one", "worker", str(halves), "--stage", "s", "--shard", "1")
    wait_until(lambda: served(fleet) == ["s.1"], READY_S)
    fleet.stop("one")
    fleet.start("all", "worker", str(halves), "--stage", "s", "--set", "s.batch.max_rows=3")
    wait_until(lambda: served(fleet) == list(PARTS), READY_S)
    assert {w.max_rows for w in fleet.registry.workers()} == {3}
    assert_works(relay)
    ref = relay.registry.current()["halves"]
    nodes = [f"{ref}/{part}" for part in PARTS]
    assert fleet.cli("pause", "halves/s")["nodes"] == nodes
    future = relay.submit("halves", {"x": [1.0] * 4})
    assert {n["paused"] for n in fleet.cli("status")["nodes"]} == {True}
    assert fleet.cli("resume", "halves/s.0")["nodes"] == nodes[:1]
    wait_until(lambda: not relay.registry.loads().get(f"{ref}/s.0.ready_rows"))
    assert not future.done()
    assert fleet.cli("resume", "halves/s")["nodes"] == nodes
    assert future.result(10)["y"].tolist() == [2.0] * 4
    shown = run_cli("status", "--redis", fleet.url, "--namespace", fleet.namespace).stdout
    assert f"{ref}/s " in shown
    assert "2 shards, gather" in shown
    assert "\n  s.combine " in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stage", "s", "--shard", "2"], "stage 's' has no shard 2; its parts are s.0, s.1, s.combine"),
        (["--stage", "s.0", "--shard", "0"], "stage 's.0' has no shards; leave --shard out"),
        (["--stage", "t"], "no stage 't'; its stages are s, @read, @write"),
    ],
)
def test_a_shard_that_is_not_there_is_named(halves: Path, arguments: list[str], says: str) -> None:
    done = run_cli("worker", str(halves), *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_check_shows_the_parts_and_reports_a_problem_once(make_pipeline: Callable[..., Path]) -> None:
    """At the line of the stage as it is written; and where hosts have no room for all parts or ranks."""
    path = make_pipeline(YAML.replace("outputs:", "args: {size: 3}\n        outputs:"), CODE)
    done = run_cli("check", str(path))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "size" in line]
    assert ":7:" in line
    assert "stage 's'" in line
    text = YAML.replace("replicas: {min: 1, max: 4}", "device: gpu").replace("count: 2", "count: 4")
    good = make_pipeline(text, CODE)
    shown = run_cli("check", str(good), "--on", "2xH100:80GiB", "--on", "4xH100:80GiB").stdout
    assert "s is cut into 4 shards, s.0 to s.3; s.combine has y concatenated along dimension -1" in shown
    assert "host1" not in shown
    split = run_cli("check", str(good), "--on", "1xH100:80GiB", "--on", "3xH100:80GiB").stdout
    assert "not beside s.0, s.1, s.2 on host2, which lacks 1 of a GPU's compute" in split
    ranks = make_pipeline(text.replace("count: 4, mode: gather", "count: 3, mode: tensor"), CODE)
    together = run_cli("check", str(ranks), "--on", "1xH100:80GiB", "--on", "3xH100:80GiB").stdout
    assert together.count("shards on one host") == 3
    split = run_cli("check", str(ranks), "--on", "1xH100:80GiB", "--on", "2xH100:80GiB").stdout
    assert split.count("shards on 2 hosts, since none has room for all 3: host1 for 1, host2 for 2") == 3
