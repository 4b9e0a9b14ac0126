"""From a pipeline to what is placed: needs, what is presumed, neighbours, what must be apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrelay.config.fleet import Need
from torchrelay.config.pipeline import Pipeline
from torchrelay.coordinator.units import Unit, units_of
from torchrelay.errors import ConfigError

GIB = 1 << 30


@pytest.fixture
def units(tmp_path: Path):
    """Units of the stages of a text, and of so many workers."""
    (tmp_path / "s.py").write_text("def f(batch):\n    return {}\n")

    def run(stages: str, wanted: dict[str, int], fuse: str = "") -> list[Unit]:
        path = tmp_path / "p.yaml"
        path.write_text("pipeline: p\ninput: {x: int64}\noutput: [x]\nstages:\n" + stages + fuse)
        return units_of(Pipeline.load(path), wanted)

    return run


def stage(name: str, keys: str = "") -> str:
    return f"  - {{name: {name}, use: 's.py:f', outputs: {{x: int64}}{', ' if keys else ''}{keys}}}\n"


def test_what_is_not_said_is_presumed(units) -> None:
    """A whole GPU, or one processor; other needs are none."""
    a, b = units(stage("a") + stage("b", "device: gpu"), {"a": 1, "b": 1})
    assert (a.need, a.presumed, a.device) == (Need(cpus=1.0), True, "cpu")
    assert (b.need, b.presumed, b.device) == (Need(compute=1.0), True, "gpu")


def test_what_is_said_is_not_presumed(units) -> None:
    """The share of the device decides: memory alone leaves the GPU's compute presumed."""
    text = stage("a", "resources: {cpus: 0.5, host_memory: 1GiB}")
    text += stage("b", "device: gpu, resources: {memory: 2GiB}") + stage("c", "device: gpu, resources: {compute: 0.25}")
    a, b, c = units(text, {"a": 1, "b": 1, "c": 1})
    assert (a.need, a.presumed) == (Need(cpus=0.5, host_memory=GIB), False)
    assert (b.need, b.presumed) == (Need(compute=1.0, memory=2 * GIB), True)
    assert (c.need, c.presumed) == (Need(compute=0.25), False)


def test_only_the_workers_without_which_nothing_runs_make_do_with_less(units) -> None:
    """Of processors as many as `replicas.min`, of GPUs the first."""
    text = stage("a", "replicas: {min: 2, max: 9}") + stage("b", "device: gpu, replicas: {min: 2, max: 9}")
    found = units(text, {"a": 3, "b": 3})
    assert [(u.stage, u.replica, u.presumed) for u in found] == [
        ("a", 0, True), ("a", 1, True), ("a", 2, False), ("b", 0, True), ("b", 1, False), ("b", 2, False),
    ]  # fmt: skip


def test_neighbours_exchange_columns(units) -> None:
    """Those before and behind; the run's own nodes beside the first and the last."""
    found = units(stage("a") + stage("b") + stage("c"), {"a": 1, "b": 1, "c": 1, "@read": 1, "@write": 1})
    assert {u.stage: u.neighbours for u in found} == {
        "a": ("b",), "b": ("a", "c"), "c": ("b",), "@read": ("a",), "@write": ("c",),
    }  # fmt: skip


def test_apart_is_mutual(units) -> None:
    """Who is named keeps away as well."""
    text = stage("a", "hosts: {labels: [fast], apart: true}") + stage("b", "hosts: {apart: [c]}") + stage("c")
    found = {u.stage: u for u in units(text, {"a": 1, "b": 1, "c": 1})}
    assert {name: u.apart for name, u in found.items()} == {"a": ("a",), "b": ("c",), "c": ("b",)}
    assert found["a"].labels == ("fast",)


def test_fused_stages_are_one_worker(units) -> None:
    """They compute in turn and stay loaded together: the most of compute and processors, the sum of memory."""
    text = stage("a", "device: gpu, resources: {compute: 0.5, memory: 2GiB, cpus: 1}, hosts: [fast]")
    text += stage("b", "device: gpu, resources: {compute: 0.25, memory: 3GiB, cpus: 2}, hosts: [ssd]")
    text += stage("c", "hosts: {apart: [b]}")
    ab, c = units(text, {"a": 1, "c": 1}, "fuse: [[a, b]]\n")
    assert (ab.stage, ab.need, ab.presumed) == ("a", Need(0.5, 5 * GIB, 2.0), False)
    assert (ab.labels, ab.neighbours, ab.apart) == (("fast", "ssd"), ("c",), ("c",))
    assert (c.neighbours, c.apart) == (("a",), ("a",))


def test_a_name_that_has_no_worker_is_an_error(units) -> None:
    """Of fused stages only the first has one."""
    with pytest.raises(ConfigError, match="has no worker for 'b'; its workers are @read, @write, a"):
        units(stage("a") + stage("b"), {"b": 1}, "fuse: [[a, b]]\n")


GATHERED = stage("a") + (
    "  - {name: s, use: 's.py:f', outputs: {x: 'float32[8]'}, device: gpu, resources: {compute: 0.5}, "
    "shards: {count: 2, mode: gather}}\n"
)


def test_parts_of_a_cut_stage_belong_together(units) -> None:
    """Each is near all others, and those that own a part of the model look for room for all of these."""
    found = {u.stage: u for u in units(GATHERED, {"a": 1, "s.0": 2, "s.1": 2, "s.combine": 2})}
    assert (found["s.0"].neighbours, found["s.0"].kin) == (("a", "s.1", "s.combine"), ("s.1",))
    assert (found["s.combine"].neighbours, found["s.combine"].kin) == (("s.0", "s.1"), ())
    assert (found["s.1"].need.compute, found["s.combine"].need, found["s.combine"].device) == (
        0.5,
        Need(cpus=1.0),
        "cpu",
    )
    assert found["a"].neighbours == ("s.0", "s.1")


def test_a_replica_of_a_tensor_stage_is_a_group_of_ranks(units) -> None:
    """Each rank takes what the stage says; replicas count whole groups."""
    cut = stage("a", "shards: {count: 2, mode: tensor}, resources: {cpus: 3}")
    found = units(cut, {"a": 2})
    assert [(u.replica, u.shard, u.shards) for u in found] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    assert {u.need for u in found} == {Need(cpus=3.0)}
