"""Totals say yes to all that could be placed: what they refuse, nobody asks for again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coordinator.strategies import host, hosts
from torchrelay.config import Pipeline
from torchrelay.config.fleet import HostReport
from torchrelay.coordinator.allocate import allocate
from torchrelay.coordinator.bounds import Bounds, agree
from torchrelay.coordinator.scale import Plan
from torchrelay.coordinator.service import stage_limits, units_for
from torchrelay.coordinator.sharing import Wish, share
from torchrelay.coordinator.totals import room_for
from torchrelay.queues.fleet import Wishes

NAMES = ("whole", "part", "cpu", "two")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("totals")
    (folder / "stages.py").write_text("def f(batch): return {}\n")
    path = folder / "pipeline.yaml"
    path.write_text(
        """
        pipeline: p
        stages:
          - {name: whole, use: "stages.py:f", device: gpu, replicas: {min: 1, max: 9}, resources: {cpus: 1}}
          - name: part
            use: "stages.py:f"
            device: gpu
            replicas: {min: 1, max: 9}
            resources: {compute: 0.5, cpus: 3}
          - {name: cpu, use: "stages.py:f", replicas: {min: 1, max: 9}}
          - {name: two, use: "stages.py:f", replicas: {min: 1, max: 9}, resources: {cpus: 2}}
        """
    )
    return Pipeline.load(path)


def fits(pipeline: Pipeline, fleet: list[HostReport], **counts: int) -> bool:
    """Beside at least one of each."""
    limits = stage_limits(pipeline, Wishes(), current=True)
    there = room_for(limits, {pipeline.ref: pipeline}, fleet)
    return there({(pipeline.ref, name): counts.get(name, 1) for name in NAMES})


def test_processors_that_may_stand_in_for_gpus_are_room_beside_them(pipeline: Pipeline) -> None:
    """Of hosts without GPUs that allow it alone, and each processor once."""
    gpu, cpus = host("gpu", 2), host("cpus", allow_cpu=True)
    assert not fits(pipeline, [gpu, replace(cpus, allow_cpu=False)], whole=3)
    assert not fits(pipeline, [replace(gpu, allow_cpu=True)], whole=3)
    # 1.5 GPUs for `whole` and the half that `part` takes; then 8 processors.
    assert fits(pipeline, [gpu, cpus], whole=9)
    assert not fits(pipeline, [gpu, cpus], whole=9, part=3)
    # The GPU host's processors are for the others: 3 there, 5 of `cpu`.
    assert fits(pipeline, [gpu, cpus], whole=9, cpu=6)
    assert not fits(pipeline, [gpu, cpus], whole=9, cpu=7)
    assert not fits(pipeline, [gpu, replace(cpus, draining=True)], whole=3)


def test_a_stage_grows_onto_processors_that_stand_in(pipeline: Pipeline) -> None:
    """A host with a GPU and one without: what is wanted is placed on both, and no more is planned than has a place."""
    fleet = [host("gpu", 1, refs=(pipeline.ref,)), host("cpus", refs=(pipeline.ref,), allow_cpu=True)]
    limits = [one for one in stage_limits(pipeline, Wishes(), current=True) if one.stage == "whole"]

    def propose(most: Mapping[tuple[str, str], int]) -> Plan:
        wishes = [Wish(one.key, one.least, 12, 1) for one in limits]
        return Plan(share(wishes, room_for(limits, {pipeline.ref: pipeline}, fleet, most)))

    def place(plan: Plan) -> object:
        return allocate(fleet, units_for({pipeline.ref: pipeline}, plan), [])

    _, allocation, _ = agree(propose, place, Bounds(), 0.0)
    assert allocation.refused == ()
    assert Counter(f"{one.host} {one.slot}" for one in allocation.assignments) == {"gpu cuda:0": 1, "cpus cpu": 8}


@given(fleet=hosts(), counts=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_what_has_a_place_is_never_refused(pipeline: Pipeline, fleet: list[HostReport], counts: list[int]) -> None:
    """Whatever of these gets all that it asks for has room; and so has less of it."""
    fleet = [replace(one, refs=(pipeline.ref,)) for one in fleet]
    plan = Plan({(pipeline.ref, name): count for name, count in zip(NAMES, counts, strict=True)})
    units = [replace(unit, presumed=False) for unit in units_for({pipeline.ref: pipeline}, plan)]
    placed = allocate(fleet, units, []).assignments
    found = Counter(one.stage for one in placed)
    assert fits(pipeline, fleet, **{name: found[name] for name in NAMES})
    for name in NAMES:
        if found[name]:
            assert fits(pipeline, fleet, **{other: found[other] - (other == name) for other in NAMES})
