"""The graph: order, joins, and where each column goes."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.conftest import Load, Problems
from torchrelay.config import Graph, Pipeline, PipelineSpec, StageConfig
from torchrelay.config.graph_build import build_graph

TEXT = "pipeline: p\ninput: {t: str}\n"


def stage(name: str, **keys: str) -> str:
    return f"  - {{name: {name}, use: 's.py:Stage'" + "".join(f", {k}: {v}" for k, v in keys.items()) + "}\n"


def text(*stages: str, output: str = "") -> str:
    return TEXT + (f"output: {output}\n" if output else "") + "stages:\n" + "".join(stages)


DIAMOND = (
    stage("a", after="input", inputs="[t]", outputs="{x: 'float32[2]'}"),
    stage("b", after="a", inputs="[x]", outputs="{y: int64}"),
    stage("c", after="a", inputs="[x, t]", outputs="{z: int64}"),
    stage("d", after="[b, c]", inputs="{left: b.y, right: z}", outputs="{r: str}"),
)


def graph(load: Load, *stages: str, output: str = "") -> Graph:
    pipeline: Pipeline = load(text(*stages, output=output))
    return pipeline.graph


def test_linear(load: Load) -> None:
    """Without `after`, each stage follows the one above."""
    g = graph(load, stage("a"), stage("b"), stage("c"))
    assert g.linear
    assert [(n.index, n.bit, n.preds, n.succs) for n in g.nodes] == [
        (1, 1, (0,), (2,)),
        (2, 2, (1,), (3,)),
        (3, 4, (2,), ()),
    ]
    assert [n.name for n in g.terminals] == ["c"]


def test_diamond(load: Load) -> None:
    """A join has several predecessors, and is not linear."""
    g = graph(load, *DIAMOND, output="[r]")
    assert not g.linear
    assert [n.preds for n in g.nodes] == [(0,), (1,), (1,), (2, 3)]
    assert g.ancestors(g.node("d"))[0].name == "a"
    assert {k: str(v) for k, v in g.types_of(g.node("d")).items()} == {"left": "int64", "right": "int64"}


def test_keeps(load: Load) -> None:
    """After a node stays what its descendants read or the result needs, and nothing else."""
    g = graph(load, *DIAMOND, output="[r, t]")
    assert [n.keeps for n in g.nodes] == [
        frozenset("xtyzr"),
        frozenset("yzrt"),
        frozenset("yzrt"),
        frozenset("rt"),
    ]
    undeclared = graph(load, stage("a"), stage("b"))
    assert [n.keeps for n in undeclared.nodes] == [None, None]


def test_consumers(load: Load) -> None:
    """A column's mask holds its readers; 0 means that it belongs to the result and is not freed."""
    g = graph(load, *DIAMOND, output="[r]")
    assert g.consumers("t", 0) == g.node("a").bit | g.node("c").bit
    assert g.consumers("x", 1) == g.node("b").bit | g.node("c").bit
    assert g.consumers("y", 2) == g.node("d").bit
    assert g.consumers("r", 4) == 0
    terminal = graph(load, stage("a"), stage("b"))
    assert terminal.consumers("anything", 2) == 0
    assert terminal.consumers("anything", 1) == 2


def test_selected_from_input(load: Load) -> None:
    """`input.t` is the pipeline's input, also where a stage beside it returned another `t`."""
    a, b = stage("a", after="input", outputs="{t: int64}"), stage("b", after="input", outputs="{u: str}")
    g = graph(load, a, b, stage("c", after="[a, b]", inputs="{first: input.t, now: t}"))
    assert {k: str(v) for k, v in g.types_of(g.node("c")).items()} == {"first": "str", "now": "int64"}


def test_file_order(load: Load) -> None:
    """The last maker on a path counts, however the file orders its stages."""
    g = graph(
        load,
        stage("late", after="early", outputs="{x: int64}"),
        stage("early", after="input", outputs="{x: str}"),
        stage("c", after="late", inputs="[x]"),
    )
    assert str(g.types_of(g.node("c"))["x"]) == "int64"
    assert [n.name for n in g.ordered] == ["early", "late", "c"]


A = stage("a", after="input", outputs="{x: str}")
B = stage("b", after="input", outputs="{x: str}")


@pytest.mark.parametrize(
    ("stages", "output", "says"),
    [
        ((A, B, stage("c", after="[a, b]")), "", "^6:5: stage 'c' gets column 'x' from a and b; .*{x: a.x}"),
        ((A, B, stage("c", after="[a, b]", inputs="[x]")), "", "choose one"),
        ((A, B, stage("c", after="[a, b]", inputs="{y: x}")), "", "choose one: inputs: {y: a.x}$"),
        ((A, B), "", "a and b both end the pipeline with column 'x'"),
        ((A, B, stage("c", after="[a, b]", inputs="[t]", outputs="{y: str}")), "[x]", "comes from a and b"),
        ((stage("a", after="b"), stage("b", after="a")), "", "circle: .*a.*b.*take one `after` out"),
        ((stage("a", after="a"),), "", "circle: a -> a"),
        ((stage("a", after="b"), stage("b", after="a"), stage("c", after="b")), "", "'c' is never reached"),
        ((A, stage("b")), "", "'b' has no `after` while others do"),
        ((stage("a", after="[]"),), "", "never reached"),
        ((stage("a", after="inputt"),), "", "did you mean 'input'"),
        ((stage("a"), stage("a")), "", "'a' stands twice"),
        ((stage("a", inputs="[tt]"),), "", "'tt', which nothing before it provides; did you mean 't'"),
        ((stage("a", outputs="{x: str}"), stage("b", inputs="[y]")), "", "'y', which nothing before it provides"),
        ((stage("a", outputs="{x: str}"), stage("b", inputs="{y: a.z}")), "", "a declares no such column"),
        ((stage("a"), stage("b", inputs="{y: c.z}"), stage("c")), "", "no stage 'c' comes before it"),
        ((stage("a", outputs="{x: str}"),), "[y]", "output column 'y' is made by no stage"),
        ((stage("a", batch="{pad: {tt: 0}}"),), "", "pads column 'tt', which it does not read; did you mean 't'"),
        ((stage("a", batch="{pad: {t: 0}}"),), "", "only ragged numbers are padded"),
        (
            (stage("a", batch="{max_cost: {column: tt, total: 9}}"),),
            "",
            "max_cost counts column 'tt', which it does not read; did you mean 't'",
        ),
        (
            (stage("a", outputs="{z: complex64}"), stage("b", batch="{max_cost: {column: z, total: 9}}")),
            "",
            "'z' is complex64, which has no length",
        ),
    ],
)
def test_refused(problems: Problems, stages: tuple[str, ...], output: str, says: str) -> None:
    """What a graph cannot be is reported with its place and a remedy."""
    found = problems(text(*stages, output=output))
    assert any(re.search(says, p) for p in found), found


def test_thirty_stages(load: Load, problems: Problems) -> None:
    """Thirty stages load, one more does not."""
    thirty = [stage(f"s{i}") for i in range(30)]
    assert graph(load, *thirty).nodes[-1].bit == 1 << 29
    assert "1 to 30 stages" in problems(text(*thirty, stage("more")))[0]


def test_join_resolved(problems: Problems) -> None:
    """A selecting join is accepted, and so is one whose maker stands later on the same path."""
    assert problems(text(A, B, stage("c", after="[a, b]", inputs="{x: a.x}", outputs="{y: str}"), output="[y]")) == []
    over = stage("c", after="a", outputs="{x: str}")
    join = stage("d", after="[c, e]", inputs="[x]", outputs="{y: str}")
    assert problems(text(A, over, stage("e", after="a", inputs="[t]", outputs="{z: str}"), join, output="[y]")) == []


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    """Of any graph: `ordered` respects it, edges agree both ways, and a kept column is exactly one that is needed."""
    count = data.draw(st.integers(1, 9))
    order = data.draw(st.permutations(range(count)))
    after: dict[int, list[str]] = {}
    for place, i in enumerate(order):
        before = [f"s{j}" for j in order[:place]]
        after[i] = data.draw(st.lists(st.sampled_from(["input", *before]), min_size=1, max_size=3))
    reads = {i: data.draw(st.lists(st.sampled_from("abc"), max_size=2, unique=True)) for i in range(count)}
    stages = [StageConfig(name=f"s{i}", use="s.py:S", after=after[i], inputs=reads[i]) for i in range(count)]
    seen: list[str] = []
    g = build_graph(
        PipelineSpec(pipeline="p", output=["c"], stages=stages), lambda place, message: seen.append(message)
    )
    assert g is not None, seen
    position = {n.index: k for k, n in enumerate(g.ordered)}
    for n in g.nodes:
        assert all(position[p] < position[n.index] for p in n.preds if p)
        assert all(n.index in g.nodes[s - 1].preds for s in n.succs)
        below = g.descendants(n.index)
        assert n.keeps == frozenset("c") | {c for d in below for c in reads[d.index - 1]}
        for column in "ab":
            readers = sum(d.bit for d in below if column in reads[d.index - 1])
            assert not readers or g.consumers(column, n.index) == readers
        assert g.consumers("c", n.index) == 0


def test_in_result(load: Load) -> None:
    """What the result may show: its own columns, and those whose older values rows keep that skip a last stage."""
    stages = """stages:
  - {name: a, use: "s.py:Stage", outputs: {label: str, sure: bool, x: float32}}
  - {name: b, use: "s.py:Stage", outputs: {label: str}, when: sure}
  - {name: c, use: "s.py:Stage", inputs: [x], outputs: {y: "str?"}, when: sure}
  - {name: d, use: "s.py:Stage", inputs: [x], outputs: {label: str, y: str}LAST}
"""
    head = "pipeline: p\ninput: {t: str}\n"
    skipped = load(head + stages.replace("LAST", ", when: sure")).graph
    assert [skipped.in_result(c, 1) for c in ("label", "sure", "x")] == [True, False, False]
    assert [skipped.in_result("label", 2), skipped.in_result("y", 3)] == [True, True]
    remade = load(head + stages.replace("LAST", "")).graph
    assert [remade.in_result("label", 1), remade.in_result("y", 3), remade.in_result("y", 4)] == [False, False, True]
    listed = load(head + "output: [x]\n" + stages.replace("LAST", "")).graph
    assert [listed.in_result(c, 1) for c in ("label", "sure", "x")] == [False, False, True]


def test_a_column_that_is_made_anew_is_read_no_further(load: Load) -> None:
    """Who comes behind a node that makes it reads the new one, and the result shows the new one."""
    g = graph(
        load,
        stage("a", inputs="[t]", outputs="{t: str}"),
        stage("b", inputs="[t]", outputs="{z: int64}"),
        stage("c", inputs="[t, z]", outputs="{t: str}"),
        output="[t]",
    )
    assert g.consumers("t", 0) == g.node("a").bit
    assert g.consumers("t", 1) == g.node("b").bit | g.node("c").bit
    assert g.consumers("t", 3) == 0


def test_a_column_that_one_branch_makes_anew_is_read_behind_the_other(load: Load) -> None:
    """The branch that does not make it carries the older one to where they meet."""
    g = graph(
        load,
        stage("a", after="input", inputs="[t]", outputs="{t: str}"),
        stage("b", after="input", inputs="[t]", outputs="{y: int64}"),
        stage("c", after="[a, b]", inputs="[t, y]", outputs="{z: int64}"),
    )
    assert g.consumers("t", 0) == g.node("a").bit | g.node("b").bit | g.node("c").bit
