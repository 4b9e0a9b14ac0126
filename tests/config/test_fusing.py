"""`fuse`: what may be fused, which columns stay inside, and what that leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import Load, Problems
from torchrelay.config import Pipeline
from torchrelay.config.fusing import Group, Source
from torchrelay.config.stage_spec import StageSpec
from torchrelay.errors import ConfigError

HEAD = "pipeline: p\ninput: {t: str, u: int64}\n"


def stage(name: str, **keys: str) -> str:
    options = "".join(f", {k}: {v}" for k, v in keys.items())
    return f"  - {{name: {name}, use: 's.py:Stage'{options}}}\n"


def text(*stages: str, fuse: str = "[[a, b]]", output: str = "[y]") -> str:
    return f"{HEAD}output: {output}\nstages:\n{''.join(stages)}fuse: {fuse}\n"


A = stage("a", inputs="[t]", outputs="{x: int64}")
B = stage("b", inputs="{v: x, u: u}", outputs="{y: int64}")
C = stage("c", inputs="[x, y]", outputs="{z: int64}")


def group(load: Load, *stages: str, output: str = "[y]", fuse: str = "[[a, b]]") -> Group:
    return load(text(*stages, output=output, fuse=fuse)).group_of("b")


def test_groups(load: Load) -> None:
    """Stages that are fused are one group, every other is one by itself."""
    pipeline = load(text(A, B, C))
    assert [g.names for g in pipeline.groups] == [["a", "b"], ["c"]]
    assert pipeline.group_of("a") == pipeline.group_of("b")
    assert [g.names for g in load(text(A, B, C, fuse="[]")).groups] == [["a"], ["b"], ["c"]]


def test_columns_between_stages_of_a_group_stay_inside(load: Load) -> None:
    """What the group reads of others is asked for once; what nobody else reads does not leave."""
    found = group(load, A, B)
    assert found.reads == ({"t": Source(None, "t")}, {"v": Source(0, "x"), "u": Source(None, "1.u")})
    assert found.inputs == {"t": "t", "1.u": "u"}
    assert {name: str(kind) for name, kind in found.types.items()} == {"t": "str", "1.u": "int64"}
    assert (found.leaving, list(found.outputs)) == ({}, ["y"])


@pytest.mark.parametrize(("stages", "output"), [((A, B, C), "[z]"), ((A, B), "[x, y]")])
def test_a_column_that_others_want_leaves(load: Load, stages: tuple[str, ...], output: str) -> None:
    """One that a later stage reads, or that is in the result."""
    found = group(load, *stages, output=output)
    assert found.leaving == {"x": 0}
    assert [found.maker_of(c).name for c in ("x", "y")] == ["a", "b"]


def test_a_column_that_is_made_anew_is_the_newest(load: Load) -> None:
    """Each stage reads what the last one before it made; only that can leave."""
    again = stage("b", inputs="[x]", outputs="{x: int64}")
    third = stage("c", inputs="[x, t]", outputs="{y: int64}")
    found = group(load, A, again, third, fuse="[[a, b, c]]", output="[x, y]")
    assert found.reads[2] == {"x": Source(1, "x"), "t": Source(None, "t")}
    assert found.leaving == {"x": 1}
    assert found.behind(1).reads == ({"x": Source(None, "x")}, {"x": Source(0, "x"), "t": Source(None, "1.t")})


def test_stages_without_inputs(load: Load) -> None:
    """The first reads what comes, a later one all that is declared."""
    found = group(load, stage("a", outputs="{x: int64}"), stage("b", outputs="{y: int64}"))
    assert found.reads_all
    assert found.reads[1] == {"t": Source(None, "t"), "u": Source(None, "u"), "x": Source(0, "x")}


def test_a_padded_column_is_not_shared(load: Load) -> None:
    """Two stages that read one column, of which one has it padded, each get it as they declared it."""
    head = 'pipeline: p\ninput: {t: "int64[*]"}\nstages:\n'
    first = stage("a", inputs="[t]", outputs="{x: int64}", batch="{max_rows: 4}")
    padded = stage("b", inputs="[t, x]", outputs="{y: int64}", batch="{pad: {t: 0}, buckets: {t: [8, 16]}}")
    found = load(f"{head}{first}{padded}fuse: [[a, b]]\n").group_of("a")
    assert found.inputs == {"t": "t", "1.t": "t"}
    assert (found.batch.max_rows, found.batch.pad, found.batch.buckets) == (4, {"1.t": 0}, {"1.t": [8, 16]})


def test_fusing_is_tuning(load: Load) -> None:
    """It is no part of the version, and a registry's record keeps it."""
    fused, apart = load(text(A, B)), load(text(A, B, fuse="[]"))
    assert fused.version == apart.version
    assert [g.names for g in Pipeline.from_record(fused.record()).groups] == [["a", "b"]]


def test_time_and_workers_of_a_group(load: Load) -> None:
    """A run may take as long as all the forwards that it needs; the stage that wants most workers counts."""
    first = stage("a", inputs="[t]", outputs="{x: int64}", timeout_s="10.0", batch="{max_rows: 64}")
    second = stage("b", inputs="[x]", outputs="{y: int64}", timeout_s="2.0", batch="{max_rows: 10}", replicas="3")
    found = group(load, first, second)
    assert (found.timeout_s, found.replicas) == (10.0 + 7 * 2.0, 3)


def test_in_python(folder: Path) -> None:
    """`Pipeline(..., fuse=...)` means the same, and its problems carry the pipeline's name."""
    stages = [
        StageSpec("a", use="s.py:Stage", inputs=["t"], outputs={"x": "int64"}),
        StageSpec("b", use="s.py:Stage", inputs=["x"], outputs={"y": "int64"}),
    ]
    made = Pipeline("p", stages=stages, input={"t": "str"}, fuse=[("a", "b")], base_dir=folder)
    assert [g.names for g in made.groups] == [["a", "b"]]
    with pytest.raises(ConfigError, match=r"pipeline 'p': .*unknown stage 'bb'; did you mean 'b'"):
        Pipeline("p", stages=stages, input={"t": "str"}, fuse=[["a", "bb"]], base_dir=folder)


@pytest.mark.parametrize(
    ("stages", "fuse", "says"),
    [
        ((A, B), "[[a]]", "7:8: fuse joins two stages or more"),
        ((A, B), "[[a, bb]]", "7:12: fuse names the unknown stage 'bb'; did you mean 'b'?"),
        ((A, B), "[[a, a]]", "7:12: stage 'a' stands in fuse twice"),
        ((A, B, C), "[[a, b], [b, c]]", "8:17: stage 'b' stands in fuse twice"),
        ((A, B, C), "[[b, a]]", "8:12: stage 'a' is fused to 'b', and follows input"),
        ((A, B, C), "[[a, c]]", "8:12: stage 'c' is fused to 'a', and follows b"),
        ((A, stage("b", outputs="{y: int64}", device="gpu")), "[[a, b]]", "wants device gpu, 'a' cpu"),
        ((A, stage("b", outputs="{y: int64}", rows="expand")), "[[a, b]]", "has rows: expand; only stages that keep"),
        ((A, stage("b", inputs="[x]", outputs="{y: 'int64?'}", when="x")), "[[a, b]]", "has `when`"),
        ((A, stage("b", inputs="[x]")), "[[a, b]]", "what it returns must be declared; add outputs"),
        ((stage("a", outputs="{x: float32}", wire="{dtype: float16}"), B), "[[a, b]]", "has wire.dtype float16, which"),
        (
            (A, stage("b", inputs="[x]", outputs="{y: int64}", batch="{max_cost: {column: x, total: 9}}")),
            "[[a, b]]",
            "has batch.max_cost, which only the first",
        ),
        (
            (
                stage("a", after="input", outputs="{x: int64}"),
                stage("b", after="a", inputs="[x]", outputs="{y: int64}"),
                stage("c", after="a", inputs="[x]", outputs="{z: int64}"),
            ),
            "[[a, b]]",
            "8:12: stage 'b' is fused to 'a', and c also follows 'a'; fuse stages of one chain",
        ),
        (
            (
                stage("a", after="input", inputs="[t]", outputs="{x: int64}"),
                stage("b", after="[a, c]", inputs="[x]", outputs="{y: int64}"),
                stage("c", after="input", inputs="[t]", outputs="{z: int64}"),
            ),
            "[[a, b]]",
            "8:12: stage 'b' is fused to 'a', and also follows c",
        ),
    ],
)
def test_refused(problems: Problems, stages: tuple[str, ...], fuse: str, says: str) -> None:
    """What one worker could not run with the same results is refused at its place in the file."""
    found = problems(text(*stages, fuse=fuse))
    assert any(says in line for line in found), found


def test_all_columns_must_be_declared_for_a_later_stage(problems: Problems) -> None:
    """Which columns a stage without inputs reads cannot be told where the input is not declared."""
    stages = stage("a", outputs="{x: int64}") + stage("b", outputs="{y: int64}")
    found = problems(f"pipeline: p\nstages:\n{stages}fuse: [[a, b]]\n")
    assert any("reads all columns, and which there are is not declared; add its inputs" in line for line in found)
