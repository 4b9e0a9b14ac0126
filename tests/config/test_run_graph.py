"""The run graph of a pipeline: what reads, what writes, and the user's stages between them as they are."""

from __future__ import annotations

import pytest

from tests.config.conftest import Load
from torchrelay.config import Pipeline
from torchrelay.config.run_graph import CHUNK, RESULT, RunGraph, base_ref, run_ref
from torchrelay.errors import ConfigError

LINEAR = """
pipeline: p
input: {t: str, u: int64}
output: [y, u]
stages:
  - {name: a, use: 's.py:Stage', inputs: [t], outputs: {x: "int64[*]"}}
  - {name: b, use: 's.py:Stage', inputs: {v: x, u: input.u}, outputs: {y: float32}, queue: {max_rows: 7}}
fuse: [[a, b]]
"""
FORK = """
pipeline: p
input: {t: str}
stages:
  - {name: a, use: 's.py:Stage', after: input, outputs: {x: str}, rows: expand}
  - {name: b, use: 's.py:Stage', after: a, inputs: [x], outputs: {y: 'str?'}, when: x}
  - {name: c, use: 's.py:Stage', after: a, inputs: [x], outputs: {z: str}, wire: {dtype: float16}}
"""


def twin(load: Load, text: str) -> tuple[Pipeline, RunGraph]:
    made = load(text).for_runs()
    assert isinstance(made.graph, RunGraph)
    return made, made.graph


def test_a_chain_is_read_computed_and_written(load: Load) -> None:
    """Its stages keep their numbers, options and fusing; the run's nodes stand before and behind them."""
    base = load(LINEAR)
    made, graph = twin(load, LINEAR)
    assert [(n.name, n.preds, n.succs) for n in graph.nodes] == [
        ("a", (3,), (2,)),
        ("b", (1,), (4,)),
        ("@read", (0,), (1,)),
        ("@write", (2,), ()),
    ]
    assert graph.linear
    assert not graph.plain
    assert [(n.before, n.at, n.stack) for n in graph.nodes] == [
        ((3,),) * 3,
        ((3,),) * 3,
        ((), (), (3,)),
        ((3,), (), ()),
    ]
    assert [n.rank for n in graph.nodes] == [2, 3, 1, 4]
    assert [g.names for g in made.groups] == [["a", "b"], ["@read"], ["@write"]]
    assert made.group_of("b").stages == base.group_of("b").stages
    assert made.group_of("b").inputs == base.group_of("b").inputs
    assert made.group_of("b").types == base.group_of("b").types
    assert base.stage_names == ["a", "b", "@read", "@write"]
    assert [s.queue.max_rows for s in made.spec.stages] == [100_000, 7, 100_000, 100_000]


def test_its_ref_and_record_follow_from_the_pipeline(load: Load) -> None:
    """Whoever loads the same file, or reads the record, has the same graph under the same name."""
    base, made = load(LINEAR), load(LINEAR).for_runs()
    assert made.ref == run_ref(base.ref) == base.ref + "+run"
    assert base_ref(made.ref) == base_ref(base.ref) == base.ref
    read = Pipeline.from_record(made.record())
    assert (read.ref, read.graph, read.spec) == (made.ref, made.graph, made.spec)
    assert Pipeline.from_record(base.record()).of_runs is False
    assert (made.of_runs, made.twin) == (True, None)


def test_columns_go_where_the_run_needs_them_and_no_further(load: Load) -> None:
    """What is written stays to the end, the rest is freed behind its last reader; no stage reads the run's own."""
    _, graph = twin(load, LINEAR)
    a, b, read, write = graph.nodes
    assert graph.written == ("y", "u")
    assert graph.consumers("t", read.index) == a.bit
    assert graph.consumers("u", read.index) == b.bit | write.bit
    assert graph.consumers("x", a.index) == b.bit
    assert graph.consumers("y", b.index) == write.bit
    assert graph.consumers("@row", read.index) == write.bit
    assert graph.consumers(CHUNK, 0) == read.bit | write.bit
    assert graph.consumers(RESULT, write.index) == 0
    assert graph.types_of(a) == {"t": load(LINEAR).input["t"]}
    assert {n: str(t) for n, t in graph.written_types.items()} == {"y": "float32", "u": "int64"}


def test_what_clients_would_get_as_it_is_is_written_as_it_is(load: Load) -> None:
    """`wire` narrows what goes between stages, and neither results nor what the run carries."""
    _, graph = twin(load, FORK)
    assert [graph.in_result(c, n) for c, n in (("x", 1), ("z", 3), ("@row", 4))] == [False, True, True]


def test_branches_meet_where_they_are_written(load: Load) -> None:
    """Without an `output`, that is what the last stages return; failures are charged to rows that were read."""
    _, graph = twin(load, FORK)
    assert graph.write.preds == (2, 3)
    assert graph.write.inputs == {"y": "y", "z": "z"}
    assert graph.write.before == (4, 1)
    assert graph.entry == (4,)
    assert {str(t) for t in graph.written_types.values()} == {"str?", "str"}


def test_a_result_that_is_not_declared_is_what_the_last_stages_make(load: Load) -> None:
    """Which columns these are, the rows will tell."""
    _, graph = twin(load, "pipeline: p\nstages: [{name: a, use: 's.py:Stage'}, {name: b, use: 's.py:Stage'}]\n")
    assert (graph.written, graph.write.gathers) == (None, frozenset({2}))
    assert graph.nodes[0].keeps is None
    assert graph.types_of(graph.node("b")) == {}


def test_rows_that_end_apart_cannot_be_written(load: Load) -> None:
    """The error names both stages and the remedy."""
    text = FORK.replace("name: c, use: 's.py:Stage', after: a, inputs: [x]", "name: c, use: 's.py:Stage', after: input")
    pipeline = load(text)
    assert (pipeline.twin, pipeline.stage_names) == (None, ["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"the last stages b and c end with different ones; add a stage that collap"):
        pipeline.for_runs()


def test_a_job_has_room_for_so_many_stages(load: Load) -> None:
    stages = ", ".join(f"{{name: s{i}, use: 's.py:Stage'}}" for i in range(29))
    with pytest.raises(ConfigError, match="at most 28 stages, this one has 29"):
        load(f"pipeline: p\nstages: [{stages}]\n").for_runs()


def test_what_stays_on_a_device_can_be_made_again_in_a_run_too(load: Load) -> None:
    """What such a stage read is kept for the stages behind it; what is written never stays there."""
    text = """
pipeline: p
input: {t: "float32[8]"}
output: [y]
stages:
  - {name: a, use: 's.py:Stage', device: gpu, handoff: device, inputs: [t], outputs: {x: "float32[8]"}}
  - {name: b, use: 's.py:Stage', device: gpu, inputs: [x], outputs: {y: "float32[8]"}}
"""
    base, (_, graph) = load(text), twin(load, text)
    a, b, read, _ = graph.nodes
    assert (a.kept_for, b.kept_for) == (base.graph.nodes[0].kept_for, 0) == (b.bit, 0)
    assert graph.holders("t", read.index) == a.bit | b.bit
    assert base.group_of("b").follows_device()
    assert graph.consumers("y", b.index) & ~b.kept_for == graph.write.bit
