"""Stages that change the number of rows, or skip some: stacks, types, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.conftest import Load, Problems
from torchrelay.config import Graph, Pipeline, PipelineSpec, StageConfig, parse_type
from torchrelay.config.graph_build import build_graph
from torchrelay.config.types import grouped

HEAD = "pipeline: p\ninput: {t: str, n: int64}\n"


def stage(name: str, **keys: str) -> str:
    """One line of a file; `use` is s.py:Stage unless it is given."""
    keys = {"use": "'s.py:Stage'"} | keys
    return f"  - {{name: {name}" + "".join(f", {k}: {v}" for k, v in keys.items() if v) + "}\n"


def text(*stages: str, output: str = "[t]") -> str:
    return HEAD + f"output: {output}\nstages:\n" + "".join(stages)


PAGES = stage("pages", inputs="[t]", outputs="{page: 'float32[3]', num: int64}", rows="expand")
CROPS = stage("crops", inputs="[page]", outputs="{crop: 'uint8[*, 3]', box: 'int32[4]'}", rows="expand")
READ = stage("read", inputs="[crop, page, n]", outputs="{word: str}")
UNCROP = stage("uncrop", use="", rows="{collapse: crops}")
UNPAGE = stage("unpage", inputs="[page, box, word, n]", outputs="{size: int64}", rows="{collapse: pages}")
LAST = stage("last", inputs="{p: page, b: crops.box, s: size}", outputs="{r: str}")


@pytest.fixture
def nested(load: Load) -> Graph:
    """Pages of a text, crops of a page, and back."""
    return load(text(PAGES, CROPS, READ, UNCROP, UNPAGE, LAST, output="[r, word]")).graph


def test_stacks(nested: Graph) -> None:
    """Each expansion puts its node on the stack, each collapse takes the innermost off, before its own code sees it."""
    assert [(n.rank, n.before, n.at, n.stack) for n in nested.nodes] == [
        (1, (), (), (1,)),
        (2, (1,), (1,), (1, 2)),
        (3, (1, 2), (1, 2), (1, 2)),
        (4, (1, 2), (1,), (1,)),
        (5, (1,), (), ()),
        (6, (), (), ()),
    ]
    assert nested.linear
    assert not nested.plain
    assert [n.identity for n in nested.nodes] == [False, False, False, True, False, False]


def test_types(nested: Graph) -> None:
    """A column of an inner level comes grouped: an array of stacked values, else a list; an outer one as it is."""
    types = {n.name: {k: str(v) for k, v in nested.types_of(n).items()} for n in nested.nodes}
    assert types["read"] == {"crop": "uint8[*, 3]", "page": "float32[3]", "n": "int64"}
    assert types["uncrop"] == {}
    assert types["unpage"] == {"page": "float32[*, 3]", "box": "json", "word": "json", "n": "int64"}
    assert types["last"] == {"p": "float32[*, 3]", "b": "json", "s": "int64"}


def test_types_of_all(load: Load) -> None:
    """Without `inputs`, a stage behind a collapse sees the grouped types of everything."""
    graph = load(text(PAGES, stage("un", use="", rows="{collapse: pages}"), stage("all", outputs="{r: str}"))).graph
    seen = {k: str(v) for k, v in graph.types_of(graph.node("all")).items()}
    assert seen == {"t": "str", "n": "int64", "page": "float32[*, 3]", "num": "int64[*]"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("int64", "int64[*]"),
        ("bool", "bool[*]"),
        ("float32[2, 3] = 0", "float32[*, 2, 3]"),
        ("float32[*]", "json"),
        ("uint8[H, W]", "json"),
        ("int64?", "json"),
        ("str", "json"),
        ("bytes?", "json"),
        ("json", "json"),
    ],
)
def test_grouped(kind: str, expected: str) -> None:
    """Only values of one shape become an array of them, and what is grouped is never null."""
    assert grouped(parse_type(kind) if "=" not in kind else parse_type(kind.partition("=")[0])) == parse_type(expected)


def test_hidden_columns(load: Load, nested: Graph) -> None:
    """Counts stay to the end, and in the result where something of it was made in there; rejected rows belong to it."""
    assert [nested.consumers(f"#{n}", n) for n in (1, 2)] == [0, 0]
    assert nested.consumers("!3", 3) == 0
    outside = load(text(PAGES, CROPS, READ, UNCROP, UNPAGE, LAST, output="[r, num]")).graph
    assert [outside.consumers(f"#{n}", n) for n in (1, 2)] == [0, 1 << 30]
    open_end = load(text(PAGES, CROPS, READ, output="[t]")).graph
    assert [open_end.consumers(f"#{n}", n) for n in (1, 2)] == [0, 0]
    undeclared = load(HEAD + "stages:\n" + PAGES + UNPAGE.replace("box, word, ", "")).graph
    assert undeclared.consumers("#1", 1) == 1 << 30


def test_when_reads(load: Load) -> None:
    """The column of `when`, and the older values of what the stage makes, stay until it and count as read by it."""
    first = stage("first", inputs="[t]", outputs="{sure: bool, label: str, w: float32}")
    second = stage("second", inputs="[t]", outputs="{label: str}", when="first.sure")
    graph = load(text(first, second, output="[label]")).graph
    assert graph.nodes[0].keeps == frozenset({"t", "sure", "label"})
    assert graph.consumers("sure", 1) == 2
    assert [graph.nodes[1].reads(c) for c in ("t", "sure", "label", "w")] == [True, True, True, False]
    assert graph.plain


def test_when_types(load: Load) -> None:
    """What rows that skip may leave null is nullable behind it, whoever of the two makers allows null."""
    first = stage("first", inputs="[t]", outputs="{sure: 'bool?', label: 'str?', size: int64}")
    second = stage("second", inputs="[t]", outputs="{label: str, size: int64, more: 'float32[2]?'}", when="sure")
    graph = load(text(first, second, stage("c", inputs="{a: label, s: second.label, size: size, more: more}"))).graph
    seen = {k: str(v) for k, v in graph.types_of(graph.node("c")).items()}
    assert seen == {"a": "str?", "s": "str?", "size": "int64", "more": "float32[2]?"}


@pytest.mark.parametrize("kind", ["bool", "int64", "'float32?'", "str", "bytes", "json", "'str?'"])
def test_when_kinds(problems: Problems, kind: str) -> None:
    """Anything with a truth of its own decides."""
    first = stage("a", inputs="[t]", outputs=f"{{x: {kind}}}")
    assert problems(text(first, stage("b", inputs="[t]", outputs="{y: 'str?'}", when="x"))) == []


def whens(**keys: str) -> tuple[str, ...]:
    return (
        stage("a", inputs="[t]", outputs="{x: bool, v: 'float32[2]', z: 'complex64'}"),
        stage("b", inputs="[t]", **keys),
    )


def expanding(*later: str) -> tuple[str, ...]:
    return (stage("a", after="input", inputs="[t]", outputs="{x: str}", rows="expand"), *later)


SIDE = stage("side", after="input", inputs="[t]", outputs="{y: str}")


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (
            (stage("a", rows="expanded"),),
            r"^5:34: stage 'a': rows: write same, expand or {collapse: STAGE}; 'expanded'",
        ),
        ((stage("a", rows="{colapse: a}"),), r"write same, expand or {collapse: STAGE}"),
        ((stage("a", rows="{collapse: 5}"),), r"write same, expand or {collapse: STAGE}"),
        ((stage("a", rows="5"),), r"write same, expand or {collapse: STAGE}"),
        ((stage("a", when="'a b'"),), r"^5:\d+: stage 'a': when: 'a b' is no allowed name"),
        (
            (stage("a", inputs="[t]", rows="expand"),),
            r"^5:5: stage 'a' expands rows, so .* add outputs: {COLUMN: TYPE}",
        ),
        ((PAGES, stage("b", inputs="[t]")), r"^6:5: stage 'b' is inside the expansion of pages, so .* add outputs"),
        (
            (PAGES, stage("b", inputs="[t]", rows="{collapse: pages}")),
            r"stage 'b' collapses the expansion of pages, so",
        ),
        (
            (PAGES, stage("b", use="", rows="{collapse: page}")),
            r"collapses the unknown stage 'page'; did you mean 'pages'",
        ),
        ((stage("b", use="", rows="{collapse: x}"),), r"the unknown stage 'x'; no stage has rows: expand"),
        ((stage("a", outputs="{x: str}"), stage("b", use="", rows="{collapse: a}")), r"'a', which does not expand; no"),
        (
            (stage("b", use="", rows="{collapse: pages}"), PAGES),
            r"collapses 'pages', but nothing is expanded here; move",
        ),
        (
            (PAGES, stage("b", use="", rows="{collapse: pages}"), stage("c", use="", rows="{collapse: pages}")),
            r"^7:\d+: stage 'c' collapses 'pages', but nothing is expanded here",
        ),
        (
            (PAGES, CROPS, stage("b", use="", rows="{collapse: pages}")),
            r"^7:\d+: stage 'b' collapses 'pages' inside the expansion of 'crops'; collapse crops first",
        ),
        (
            expanding(SIDE, stage("j", after="[a, side]", inputs="[t]", outputs="{z: str}")),
            r"^7:\d+: stage 'j' joins rows that do not line up: .* a \(expanded by a\) and side \(not expanded\); "
            r"add a stage with rows: {collapse: a} before it",
        ),
        (
            expanding(
                stage("b", after="input", inputs="[t]", outputs="{y: str}", rows="expand"),
                stage("j", after="[a, b]", inputs="[t]", outputs="{z: str}"),
            ),
            r"a \(expanded by a\) and b \(expanded by b\); add a stage with rows: {collapse: a} before it",
        ),
        (
            expanding(stage("j", after="[input, a]", inputs="[t]", outputs="{z: str}")),
            r"those of input \(not expanded\)",
        ),
        ((stage("a", use=""),), r"^5:5: stage 'a': use is missing; add it"),
        ((stage("a", use="", rows="expand"),), r"^5:5: stage 'a': use is missing; add it"),
        *(
            ((PAGES, stage("b", use="", rows="{collapse: pages}", **{key: value})), rf"^6:\d+: stage 'b': {says} needs")
            for key, value, says in [
                ("inputs", "[t]", "inputs"),
                ("inputs", "[]", "inputs"),
                ("outputs", "{y: str}", "outputs"),
                ("args", "{size: 1}", "args"),
                ("weights", "s.py", "weights"),
                ("torch", "{compile: true}", "torch"),
                ("when", "t", "when"),
                ("device", "gpu", "device"),
                ("batch", "{pad: {n: 0}}", "batch.pad"),
                ("batch", "{max_cost: {column: n, total: 5}}", "batch.max_cost"),
            ]
        ),
        (whens(when="x"), r"stage 'b': when needs outputs: .* add outputs: {COLUMN: TYPE}"),
        (whens(outputs="{y: 'str?'}", when="xx"), r"'xx', which nothing before it provides; did you mean 'x'"),
        (whens(outputs="{y: 'str?'}", when="c.x"), r"no stage 'c' comes before it"),
        (whens(outputs="{y: 'str?'}", when="v"), r"^6:\d+: stage 'b': when reads v, which is float32\[2\] in each row"),
        (whens(outputs="{y: 'str?'}", when="z"), r"when reads z, which is complex64"),
        (whens(outputs="{y: str}", when="x"), r"^6:\d+: stage 'b': rows that skip it have no 'y'.* write \? behind"),
        (
            whens(outputs="{n: float32}", when="x"),
            r"rows that skip it keep 'n' as int64, the others have float32; give",
        ),
        (whens(outputs="{v: 'float32[3]'}", when="x"), r"keep 'v' as float32\[2\], the others have float32\[3\]"),
        (
            (
                stage("a", after="input", inputs="[t]", outputs="{x: str}"),
                stage("b", after="input", inputs="[t]", outputs="{x: str}"),
                stage("c", after="[a, b]", inputs="[t]", outputs="{x: str}", when="a.x"),
            ),
            r"^7:\d+: stage 'c': rows that skip it keep 'x', which comes from a and b; rename it in one of them",
        ),
        (
            (
                stage("a", after="input", inputs="[t]", outputs="{x: str}"),
                stage("b", after="input", inputs="[t]", outputs="{x: str}"),
                stage("c", after="[a, b]", inputs="[t]", outputs="{y: 'str?'}", when="x"),
            ),
            r"stage 'c' gets column 'x' from a and b; choose one: when: a.x$",
        ),
    ],
)
def test_refused(problems: Problems, stages: tuple[str, ...], says: str) -> None:
    """What rows cannot do is reported with its place and a remedy."""
    found = problems(text(*stages))
    assert any(re.search(says, p) for p in found), found


@pytest.mark.parametrize("limit", ["0", "-1", "true", "1.5", "many"])
def test_limits(load: Load, problems: Problems, limit: str) -> None:
    """`rows_per_job` is a whole number from 1; a million unless it is given."""
    pipeline = text(stage("a"))
    assert load(pipeline).spec.limits.rows_per_job == 1_000_000
    assert load(pipeline + "limits: {rows_per_job: 5}\n").spec.limits.rows_per_job == 5
    assert "limits.rows_per_job" in problems(pipeline + f"limits: {{rows_per_job: {limit}}}\n")[0]
    assert "did you mean 'rows_per_job'" in problems(pipeline + "limits: {rows_per_jobs: 5}\n")[0]


def test_older_column(problems: Problems) -> None:
    """`stage.column` is refused where only a newer column of that name arrives, and taken where its own does."""
    a = stage("a", after="input", inputs="[t]", outputs="{x: str}")
    b = stage("b", after="a", inputs="[x]", outputs="{x: str}")
    read = stage("c", after="b", inputs="{x: a.x}", outputs="{y: str}")
    assert problems(text(a, b, read)) == [
        "7:53: stage 'c' reads a.x, but only b.x comes this far: the newest goes on; "
        "give it another name in b, or read b.x"
    ]
    beside = stage("side", after="a", inputs="[t]", outputs="{z: str}")
    both = stage("c", after="[b, side]", inputs="{old: a.x, new: b.x, x: x}", outputs="{y: str}")
    assert problems(text(a, b, beside, both)) == []
    # Behind the join only the newest goes on, whether or not it is of the same branch.
    late = stage("d", after="c", inputs="{x: a.x}", outputs="{w: str}")
    assert "only b.x comes this far" in problems(text(a, b, beside, both, late))[0]


def test_record(load: Load, folder: Path) -> None:
    """A record gives the same graph back without the files."""
    pipeline = load(text(PAGES, CROPS, READ, UNCROP, UNPAGE, LAST))
    (folder / "s.py").unlink()
    assert Pipeline.from_record(pipeline.record()).graph == pipeline.graph


@given(st.data())
def test_random_chains(data: st.DataObject) -> None:
    """In any chain, stacks follow the rules of a stack, and misplaced collapses are reported, never raised."""
    names = [f"s{i}" for i in range(data.draw(st.integers(1, 8)))]
    forms = st.sampled_from(["same", "expand", *({"collapse": n} for n in names)])
    rows = [data.draw(forms) for _ in names]
    stages = [
        StageConfig.model_validate({"name": n, "use": "s.py:S", "outputs": {n: "str"}, "inputs": [], "rows": r})
        for n, r in zip(names, rows, strict=True)
    ]
    reported: list[str] = []
    spec = PipelineSpec(pipeline="p", input={"t": "str"}, stages=stages)
    graph = build_graph(spec, lambda place, message: reported.append(message))
    stack: list[str] = []
    right = True
    for name, form in zip(names, rows, strict=True):
        if isinstance(form, dict):
            right = right and bool(stack) and stack.pop() == form["collapse"]
        elif form == "expand":
            stack.append(name)
    assert (graph is not None) == right == (not reported)
    if graph is not None:
        assert [names[i - 1] for i in graph.nodes[-1].stack] == stack
