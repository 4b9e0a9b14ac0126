"""What the leader makes of what it sees, before it decides: slots set aside, hosts to be empty, limits, room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from tests.conftest import wait_until
from torchrelay.config import Pipeline
from torchrelay.config.fleet import Assignment, Desired, Gpu, HostReport, SlotTrouble, set_aside_s
from torchrelay.coordinator.leader import Leader
from torchrelay.coordinator.service import Coordinator, placeable, set_aside, stage_limits, standing
from torchrelay.coordinator.totals import room_for
from torchrelay.queues.fleet import Aside, FleetRecords, FleetView, Wishes
from torchrelay.queues.registry import Registry

REF = "p@12345678"
GIB = 2**30
HOST = HostReport("a", "x", 1, 4.0, 64 * GIB, 60 * GIB, refs=(REF,))
TROUBLE = SlotTrouble("cpu", REF, "s", 2, 100.0, "no")
WORKER = Assignment("w", "a", "cpu", REF, "s")


def test_a_slot_is_set_aside_for_longer_after_each_failure() -> None:
    """From its last failure on, as the agent says or as an earlier leader wrote; then it is used again."""
    until = 100.0 + set_aside_s(2)
    told = FleetView(until - 1.0, hosts=(replace(HOST, trouble=(TROUBLE,)),))
    (one,) = set_aside(told)
    assert (one.host, one.slot, one.stage, one.failures, one.until, one.reason) == ("a", "cpu", "s", 2, until, "no")
    assert set_aside(replace(told, now=until)) == []
    written = FleetView(until - 1.0, aside=(one,))
    assert set_aside(written) == [one]
    later = replace(TROUBLE, failures=3, since=until)
    (longer,) = set_aside(replace(written, hosts=(replace(HOST, trouble=(later,)),)))
    assert (longer.failures, longer.until) == (3, until + set_aside_s(3))
    assert [set_aside_s(n) for n in (1, 2, 3, 7, 1000)] == [10.0, 20.0, 40.0, 600.0, 600.0]


def test_what_runs_stays_but_on_slots_that_failed_and_hosts_that_are_to_be_empty() -> None:
    view = FleetView(1.0, hosts=(HOST,), desired={"a": Desired("a", 1, 1, (WORKER,))})
    aside = [Aside("a", "cpu", REF, "s", 1, 9.0, "no")]
    assert standing(view, [placeable(HOST, view, [])], []) == [WORKER]
    assert standing(view, [placeable(HOST, view, aside)], aside) == []
    assert placeable(HOST, view, aside).trouble[0].reason == "no"
    drained = replace(view, wishes=Wishes(drain=frozenset("a")))
    assert placeable(HOST, drained, []).draining
    assert standing(drained, [placeable(HOST, drained, [])], []) == []
    assert standing(view, [], []) == []


@pytest.fixture
def pipeline(make_pipeline: Callable[..., Path]) -> Pipeline:
    text = """
        pipeline: p
        stages:
          - {name: c, use: "stages.py:f", replicas: {min: 0, max: 4}}
          - {name: g, use: "stages.py:f", device: gpu, replicas: {min: 1, max: 8}}
    """
    return Pipeline.load(make_pipeline(text, "def f(batch): return {}"))


def test_wishes_go_before_the_files_limits(pipeline: Pipeline) -> None:
    """A version that takes no jobs yet, or no more, has a worker for each stage."""
    wishes = Wishes({"p/g": 5, f"{pipeline.ref}/g": 6, "q/c": 3})
    cpu, gpu = stage_limits(pipeline, wishes, current=True)
    assert ((cpu.least, cpu.most), (gpu.least, gpu.most)) == ((0, 4), (6, 6))
    assert [one.least for one in stage_limits(pipeline, Wishes(), current=False)] == [1, 1]


def test_room_is_what_hosts_that_may_be_used_have(pipeline: Pipeline) -> None:
    """GPUs for what wants them, processors for the rest; of a drained host nothing; what is wanted at least always."""
    gpus = tuple(Gpu(i, f"GPU-{i}", "H100", 80 * GIB, 80 * GIB) for i in range(2))
    limits = stage_limits(pipeline, Wishes(), current=True)
    cpu, gpu = (one.key for one in limits)
    fits = room_for(limits, {pipeline.ref: pipeline}, [replace(HOST, gpus=gpus), replace(HOST, draining=True)])
    assert fits({cpu: 4, gpu: 2})
    assert not fits({cpu: 5, gpu: 2})
    assert not fits({cpu: 4, gpu: 3})
    none = room_for(limits, {pipeline.ref: pipeline}, [])
    assert none({cpu: 0, gpu: 1})
    assert not none({cpu: 1, gpu: 1})


def test_a_leader_that_lost_its_lead_while_it_decided_writes_nothing(
    redis_client: redis.Redis, registry: Registry, pipeline: Pipeline
) -> None:
    """And says so; the next one goes on from what was written, and doubles nobody."""
    records = FleetRecords(redis_client, registry.control)
    registry.register(pipeline)
    records.beat(replace(HOST, refs=(pipeline.ref,), allow_cpu=True))
    first = Coordinator(registry, "one")
    assert first.step()
    before = records.view().desired
    assert [one.stage for one in before["a"].workers] == ["g"]
    sleeper = Leader(records, "sleeper", lease_s=0.05)
    assert not sleeper.renew()
    first.leader.give_up()
    assert sleeper.renew()
    second = Coordinator(registry, "two")
    wait_until(second.step, 2.0)
    assert not sleeper.decree({"a": None}, {}, {"by": "a ghost"})
    assert sleeper.epoch == 0
    assert records.view().desired == before
    assert records.view().leader == "two"
