"""Stages that are cut: what they become, and what a file may not say of them."""

from __future__ import annotations

import pytest

from tests.config.conftest import Load, Problems
from torchrelay.config import Pipeline
from torchrelay.config.shards import PartConfig, parts_of, shard_of, written_names, written_place
from torchrelay.errors import ConfigError

CHAIN = """pipeline: p
input: {x: "float32[*]", go: bool}
output: [z]
stages:
  - {name: a, use: "s.py:Stage", outputs: {x: "float32[*]"}}
  - name: s
    use: s.py:Stage
    inputs: [x]
    outputs: {y: "float32[3, 8]", n: "int64[*]", t: "float16[4]"}
    shards: {count: 2, mode: gather, combine: {t: sum, n: {concat: 0}}}
    replicas: 3
    hosts: {labels: [fast], apart: [a, s]}
    wire: {dtype: float16, compress: lz4}
    batch: {max_rows: 4, pad: {x: 0}}
  - {name: b, use: "s.py:Stage", inputs: {y: s.y, x: a.x}, outputs: {z: str}, hosts: {apart: [s]}}
"""


def stage(text: str = "", shards: str = "count: 2, mode: gather", outputs: str = '{y: "float32[8]"}') -> str:
    return f"""pipeline: p
input: {{x: "float32[8]", go: bool}}
stages:
  - name: s
    use: s.py:Stage
    outputs: {outputs}
    shards: {{{shards}}}
    {text}
"""


def test_a_gathered_stage_becomes_its_shards_and_what_combines_them(load: Load) -> None:
    """They stand where it stood: the shards read what it read, who read it reads what is combined."""
    pipeline = load(CHAIN)
    assert [s.name for s in pipeline.written.stages] == ["a", "s", "b"]
    graph = pipeline.graph
    assert [n.name for n in graph.nodes] == ["a", "s.0", "s.1", "s.combine", "b"]
    assert [n.preds for n in graph.nodes] == [(0,), (1,), (1,), (2, 3), (4,)]
    assert graph.node("s.1").inputs == {"x": "x"}
    assert graph.node("s.combine").inputs == {f"{c}:{i}": f"s.{i}.{c}" for c in ("y", "n", "t") for i in range(2)}
    assert graph.node("b").inputs == {"y": "s.combine.y", "x": "a.x"}


def test_each_part_has_its_share_of_the_stage(load: Load) -> None:
    """Types are divided along the dimension that is concatenated; what is said of its device goes to the shards."""
    first, second, whole = (s for s in load(CHAIN).spec.stages if isinstance(s, PartConfig))
    assert first.outputs == second.outputs == {"y": "float32[3, 4]", "n": "int64[*]", "t": "float16[4]"}
    assert whole.outputs == {"y": "float32[3, 8]", "n": "int64[*]", "t": "float16[4]"}
    assert whole.args == {"stage": "s", "shards": 2, "rules": {"y": -1, "n": 0, "t": None}}
    assert [shard_of(s) for s in (first, second, whole)] == [(0, 2), (1, 2), (0, 1)]
    assert {s.replicas.min for s in (first, second, whole)} == {3}
    # What is added up is not narrowed before.
    assert (first.wire.dtype, first.wire.compress, whole.wire.dtype) == (None, "lz4", "float16")
    assert (first.batch.pad, whole.batch.pad, whole.batch.max_rows, whole.device) == ({"x": 0}, {}, 4, "cpu")


def test_who_is_apart_from_a_cut_stage_is_apart_from_all_its_parts(load: Load) -> None:
    """A stage that is apart from itself has the replicas of each part apart, and not its parts."""
    stages = {s.name: s for s in load(CHAIN).spec.stages}
    assert stages["b"].apart == {"s.0", "s.1", "s.combine"}
    assert stages["s.1"].apart == {"a", "s.1"}


def test_names_stand_for_parts_and_parts_for_places(load: Load) -> None:
    pipeline = load(CHAIN)
    spec = pipeline.spec
    assert parts_of(spec, "s") == pipeline.parts_of("s") == ["s.0", "s.1", "s.combine"]
    assert (parts_of(spec, "s.1"), parts_of(spec, "b"), parts_of(spec, "c")) == (["s.1"], ["b"], [])
    assert pipeline.parts_of("@read") == ["@read"]
    assert [written_place(spec, i) for i in range(5)] == [0, 1, 1, 1, 2]
    assert written_names(spec, ["a", "s.combine", "s.0", "b", "s.1"]) == ["a", "s", "b"]
    assert written_names(spec, ["s.0", "s.1", "b"]) == ["s.0", "s.1", "b"]


def test_the_record_of_a_cut_stage_gives_the_same_pipeline(load: Load) -> None:
    """A producer without the files sees the same graph, in runs too."""
    pipeline = load(CHAIN)
    read = Pipeline.from_record(pipeline.record())
    assert (read.ref, read.graph, read.twin is not None) == (pipeline.ref, pipeline.graph, True)
    assert Pipeline.from_record(pipeline.for_runs().record()).graph == pipeline.for_runs().graph


def test_what_changes_results_changes_the_version(load: Load) -> None:
    """How many shards, their mode and how they are combined; not how a cut is balanced."""
    versions = [
        load(stage(shards=text, outputs='{y: "float32[8, 4]"}')).version
        for text in (
            "count: 2, mode: gather",
            "count: 4, mode: gather",
            "count: 2, mode: tensor",
            "count: 2, mode: gather, combine: {y: sum}",
            "count: 2, mode: gather, combine: {y: {concat: 0}}",
        )
    ]
    assert len(set(versions)) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            stage(shards="count: 1, mode: gather"),
            "7:14: stage 's': shards.count: Input should be greater than or equal",
        ),
        (stage(shards="count: 3, mode: gather"), "7:5: stage 's': column 'y' is float32[8], whose dimension -1 of 8 "),
        (
            stage(shards="count: 2, mode: gather, combine: {y: {concat: 1}}"),
            "7:48: stage 's': column 'y' is float32[8], which has no dimension 1 along which the shards' could be",
        ),
        (stage(shards="count: 2, mode: gather, combine: {z: sum}"), "7:48: stage 's': shards.combine names 'z', which"),
        (
            stage(shards="count: 2, mode: gather, combine: {y: mean}"),
            "7:48: stage 's': shards.combine.y: write sum or {concat: DIMENSION}; 'mean' came",
        ),
        (stage(outputs="{y: str}"), "stage 's': column 'y' is str, and only numbers are combined; return it from a"),
        (stage(outputs="{y: int64}"), "stage 's': column 'y' is int64, which has no dimension -1 along which the"),
        (
            stage(outputs='{y: "bool[8]"}', shards="count: 2, mode: gather, combine: {y: sum}"),
            "stage 's': column 'y' is bool[8], which is not summed; return numbers",
        ),
        (stage(outputs="{}"), "7:5: stage 's': shards of mode gather are combined, so what they return must be decl"),
        (stage("rows: expand"), "stage 's': expands rows, and what shards make of one row cannot be combined"),
        (
            stage("when: go", "count: 2, mode: gather, combine: {go: sum}", '{y: "float32[8]?", go: int64}').replace(
                "go: bool", "go: int64"
            ),
            "8:5: stage 's': when reads 'go', which its shards make anew; return it under another name",
        ),
        (
            stage("device: gpu\n    handoff: device\n  - {name: b, use: 's.py:Stage'}"),
            "9:5: stage 's': has handoff: device, and what its shards make is combined on the host; take one of them",
        ),
        (
            stage("balance: time", shards="count: 2, mode: gather, balance: memory").replace("    balance: time\n", ""),
            "7:38: stage 's': shards.balance is for mode: pipeline, and the mode is gather; take it out",
        ),
        (
            stage(shards="count: 2, mode: gather, plan: llama"),
            "stage 's': shards.plan is for mode: tensor, and the mode is gather; take it out",
        ),
        (
            stage(shards="count: 2, mode: tensor, combine: {y: sum}"),
            "stage 's': shards.combine is for mode: gather, and the mode is tensor; take it out",
        ),
        (
            stage("\n  - {name: b, use: 's.py:Stage', outputs: {z: str}}\nfuse: [[s, b]]"),
            "7:5: stage 's': is fused, and one worker cannot own all shards; take it out of `fuse`, or its shards",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_at_its_place(problems: Problems, text: str, expected: str) -> None:
    """With what is wrong and what to write instead; once, however many shards there are."""
    found = problems(text)
    assert [line for line in found if expected in line] == found, found
    assert len(found) == 1


def test_too_many_parts_are_counted_with_the_stage_that_has_most(problems: Problems) -> None:
    many = "".join(
        f"  - {{name: s{i}, use: 's.py:Stage', outputs: {{y: 'float32[48]'}}, shards: {{count: {n}, mode: gather}}}}\n"
        for i, n in enumerate((8, 16, 8))
    )
    (line,) = problems(f"pipeline: p\nstages:\n{many}")
    assert line.startswith("4:")
    assert "stage 's1': with the parts of s0, s1, s2 the pipeline has 35 stages, over the limit of 30" in line


def test_a_run_says_that_the_parts_are_too_many(load: Load) -> None:
    """With the stages whose parts they are."""
    text = "pipeline: p\nstages:\n" + "".join(
        f"  - {{name: s{i}, use: 's.py:Stage', outputs: {{y: 'float32[48]'}}, shards: {{count: {n}, mode: gather}}}}\n"
        for i, n in enumerate((16, 12))
    ).replace("count: 16", "count: 16").replace("float32[48]", "float32[*]")
    pipeline = load(text)
    assert len(pipeline.graph.nodes) == 30
    with pytest.raises(ConfigError, match=r"at most 28 stages, this one has 30 with the parts of s0, s1; lower shards"):
        pipeline.for_runs()


def test_a_value_of_shards_can_be_set_from_outside(load: Load) -> None:
    """By the stage's own name."""
    pipeline = load(stage(), {"s.shards.count": "4", "s.batch.max_rows": "7"})
    assert [s.name for s in pipeline.spec.stages] == ["s.0", "s.1", "s.2", "s.3", "s.combine"]
    assert {s.batch.max_rows for s in pipeline.spec.stages} == {7}
