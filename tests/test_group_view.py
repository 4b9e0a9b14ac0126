"""What people see of groups of ranks: where each rank is, and why a group does not form."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import MakePipeline
from torchrelay import Relay
from torchrelay.queues.groups import GroupRecord, Member
from torchrelay.queues.registry import Registry, WorkerReport
from torchrelay.terminal import status_of, status_view

YAML = """
    pipeline: p
    input: {x: "float32[4]"}
    output: [y]
    stages:
      - {name: s, use: "stages.py:f", outputs: {y: "float32[4]"}, shards: {count: 2, mode: tensor}}
"""


@pytest.fixture
def node(relay: Relay, make_pipeline: MakePipeline) -> str:
    path: Path = make_pipeline(YAML, "def f(batch):\n    return {'y': batch['x']}\n")
    return f"{relay.register(path)}/s"


class Ranks:
    """Stands for the supervisors of a group."""

    def __init__(self, registry: Registry, node: str) -> None:
        self.registry, self.node = registry, node

    def tends(self, rank: int, state: str, epoch: int = 0, assignment: str = "") -> GroupRecord:
        record = GroupRecord(self.registry.client, self.registry.control, Member("g", rank, 2), f"w{rank}")
        record.tend(epoch or record.tend(0).epoch)
        place: dict[str, Any] = {"node": self.node, "device": f"cuda:{rank}", "host": f"gpu-{rank}"}
        group: dict[str, Any] = {"group": "g", "rank": rank, "ranks": 2, "assignment": assignment}
        pid = 70 + rank
        self.registry.beat(
            WorkerReport(f"w{rank}", pid=pid, state=state, started_at=0.0, sent_at=time.time(), **place, **group)
        )
        return record

    def group(self) -> Any:
        (row,) = status_of(self.registry)["nodes"]
        assert row["node"] == self.node
        (group,) = row["groups"]
        return group

    def text(self) -> str:
        out = StringIO()
        console = Console(file=out, width=300)
        for part in status_view(self.registry).renderables:
            console.print(part)
        return out.getvalue()


def test_each_rank_is_shown_with_its_place(registry: Registry, node: str) -> None:
    ranks = Ranks(registry, node)
    for rank in (0, 1):
        ranks.tends(rank, "ready")
    found = ranks.group()
    assert [tuple(one.values()) for one in found["ranks"]] == [
        (0, "gpu-0", 70, "cuda:0", "ready"),
        (1, "gpu-1", 71, "cuda:1", "ready"),
    ]
    assert (found["group"], found["epoch"], found["formed"], found["why"]) == ("g", 1, True, None)
    (line,) = (line for line in ranks.text().splitlines() if "gpu-1" in line)
    assert line.split() == [node, "g", "1", "gpu-1", "71", "cuda:1", "ready", "1"]


def test_a_group_that_lacks_a_rank_says_which_and_how_it_is_started(registry: Registry, node: str) -> None:
    """Also where it is rank 0, by which the group counts as a worker."""
    ranks = Ranks(registry, node)
    ranks.tends(1, "loading")
    found = ranks.group()
    assert [one["state"] for one in found["ranks"]] == ["missing", "waits"]
    start = "torchrelay worker FILE --stage s --shard 0 --group g"
    assert found["why"] == f"nothing is heard of rank 0; start it again: {start}"
    assert f"group g does not form: {found['why']}" in ranks.text()
    ranks.tends(1, "loading", assignment="a1")
    assert ranks.group()["why"] == "nothing is heard of rank 0; its coordinator starts it anew"


def test_a_group_whose_epoch_is_over_says_why_it_ended_and_for_whom_it_waits(registry: Registry, node: str) -> None:
    """What a rank raised does not steer the terminal."""
    ranks = Ranks(registry, node)
    record = ranks.tends(0, "ready")
    ranks.tends(1, "ready")
    record.end(1, "room", "rank 1 ran out of \x1b[31mmemory", 4)
    ranks.tends(0, "loading", 2)
    found = ranks.group()
    assert [one["state"] for one in found["ranks"]] == ["waits", "ready"]
    assert (found["epoch"], found["max_rows"], found["ended"]) == (2, 4, "rank 1 ran out of \x1b[31mmemory")
    assert found["why"] == "a process of an epoch before 2 is still to end: of rank 1"
    assert "(the epoch before ended: rank 1 ran out of \\x1b[31mmemory)" in ranks.text()
