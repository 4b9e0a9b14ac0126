"""A fleet of real processes: agents with names of their own act as hosts, and coordinators decide for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.integration.fleet_support import Processes
from tests.workers.support import CODE, YAML, ForwardLog
from torchrelay import Relay


@pytest.fixture
def log(tmp_path: Path) -> ForwardLog:
    return ForwardLog(tmp_path / "forwards.txt")


@pytest.fixture
def fleet(server_url: str, namespace: str, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(server_url, namespace, tmp_path)
    yield made
    made.end()


@pytest.fixture
def make_obey(make_pipeline: Callable[..., Path], log: ForwardLog) -> Callable[..., Path]:
    """A pipeline of one stage that obeys its rows; another name of the file may be another version."""

    def make(name: str = "obey.yaml", replicas: str = "2", more: str = "") -> Path:
        options = f"replicas: {replicas}{more}"
        return make_pipeline(YAML.format(log=log.path, options=options), CODE, name)

    return make


def test_workers_are_spread_over_the_hosts_and_do_the_work(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """Two agents and a coordinator, nothing else: the stages have their workers, and everybody sees where and why."""
    path = make_obey()
    fleet.agent("a", path)
    fleet.agent("b", path)
    fleet.coordinator("c1")
    fleet.await_serves("work", 2)
    assert fleet.placed() == {("a", "work"): 1, ("b", "work"): 1}
    futures = relay.submit_many("obey", [{"n": str(i)} for i in range(50)])
    assert [f.result(30)["out"] for f in futures] == [f"{i}!" for i in range(50)]
    told = fleet.cli("status", "--why")
    assert told["leader"] == "c1"
    assert [(h["name"], h["workers"]) for h in told["hosts"]] == [("a", 1), ("b", 1)]
    wait_until(lambda: all(h["applied"] for h in fleet.cli("status")["hosts"]))
    assert {(one["host"], one["state"]) for one in told["allocation"]} == {("a", "ready"), ("b", "ready")}
    assert all(one["why"] for one in told["allocation"])
    assert "new jobs take it" in told["why"]["versions"].values()
