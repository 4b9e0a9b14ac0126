"""`handoff: device`: who may have it, what stays for it, and that it changes no version."""

from __future__ import annotations

import pytest

from tests.config.conftest import Load, Problems
from torchrelay.config.stage_spec import StageSpec

HEAD = "pipeline: p\ninput: {t: str, u: int64}\noutput: [z]\nstages:\n"


def stage(name: str, **keys: str) -> str:
    options = "".join(f", {k}: {v}" for k, v in keys.items())
    return f"  - {{name: {name}, use: 's.py:Stage'{options}}}\n"


A = stage("a", inputs="[t]", outputs="{x: int64}", device="gpu")
B = stage("b", inputs="[x]", outputs="{y: int64}", device="gpu", handoff="device")
C = stage("c", inputs="[y]", outputs="{z: int64}", device="gpu")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"device": "cpu"}, "and runs on device: cpu; only a GPU's memory is handed over: write device: gpu"),
        ({"rows": "expand"}, "and changes the number of rows; only a stage with rows: same leaves them where they are"),
        ({"wire": "{dtype: float16}"}, "and wire.dtype: what stays on a device is not converted; convert it in "
         "forward, and take one of them out"),
    ],
)  # fmt: skip
def test_stages_that_cannot_hand_over_are_reported(problems: Problems, keys: dict[str, str], expected: str) -> None:
    mine = {"inputs": "[x]", "outputs": "{y: int64}", "device": "gpu", "handoff": "device"} | keys
    (problem,) = problems(HEAD + A + stage("b", **mine) + C)
    assert problem.endswith(f"stage 'b' has handoff: device, {expected}")


def test_the_last_stage_has_nobody_to_hand_over_to(problems: Problems) -> None:
    last = stage("c", inputs="[y]", outputs="{z: int64}", device="gpu", handoff="device")
    (problem,) = problems(HEAD + A + B + last)
    assert "no stage follows it" in problem


def test_of_fused_stages_the_last_one_hands_over(problems: Problems) -> None:
    (problem,) = problems(HEAD + A + B + C + "fuse: [[b, c]]\n")
    assert "is fused to the stage behind it" in problem


def test_an_unknown_way_is_reported(problems: Problems) -> None:
    (problem,) = problems(HEAD + A + stage("b", device="gpu", handoff="nvlink") + C)
    assert "handoff" in problem
    assert "'host' or 'device'" in problem


def test_what_is_read_stays_until_all_that_follow_are_done(load: Load) -> None:
    """x for b's sake until c is done; y, which b leaves on its device, for c alone."""
    graph = load(HEAD + A + B + C).graph
    a, b, c = graph.nodes
    assert (a.kept_for, b.kept_for, c.kept_for) == (0, c.bit, 0)
    assert graph.consumers("x", a.index) == b.bit
    assert graph.holders("x", a.index) == b.bit | c.bit
    assert graph.holders("y", b.index) == c.bit
    assert graph.holders("z", c.index) == 0


def test_what_fused_stages_read_stays_until_what_follows_the_last_is_done(load: Load) -> None:
    graph = load(HEAD + A + B + C + "fuse: [[a, b]]\n").graph
    a, b, c = graph.nodes
    assert (a.kept_for, b.kept_for) == (c.bit, c.bit)
    assert graph.holders("t", 0) == a.bit | c.bit


def test_it_is_tuning(load: Load) -> None:
    """The version stays, and a pipeline in Python says the same."""
    with_it = load(HEAD + A + B + C)
    assert with_it.version == load(HEAD + A + B.replace(", handoff: device", "") + C).version
    assert StageSpec("b", use="s.py:Stage", handoff="device").data() == {"handoff": "device"}


def test_parts_of_a_model_hand_over_between_them(load: Load) -> None:
    """The parts before the last leave what crosses on their device; the last one if its stage could without parts."""
    cut = {"device": "gpu", "handoff": "device", "shards": "{count: 3, mode: pipeline}"}
    whole = stage("m", inputs="[x]", outputs="{y: int64}", **cut)
    made = load(HEAD + A + whole + C)
    ways = {s.name: s.handoff for s in made.spec.stages}
    assert ways == {"a": "host", "m.0": "device", "m.1": "device", "m.2": "device", "c": "host"}
    a, first, second, third, c = made.graph.nodes
    assert [n.kept_for for n in (a, first, second, third, c)] == [0, second.bit, third.bit, c.bit, 0]
    # x goes when what is behind its readers, the first and the last part, is done: these may have to run again.
    assert made.graph.consumers("x", a.index) == first.bit | third.bit
    assert made.graph.holders("x", a.index) == first.bit | second.bit | third.bit | c.bit


@pytest.mark.parametrize("more", [{}, {"rows": "expand"}, {"wire": "{dtype: float16, compress: lz4}"}])
def test_the_last_part_hands_over_what_a_whole_stage_could(load: Load, more: dict[str, str]) -> None:
    """At the end, with more rows, or narrowed, its result goes by the host; between the parts nothing changes."""
    shards = "{count: 2, mode: pipeline}"
    mine = {"inputs": "[x]", "outputs": "{z: int64}", "device": "gpu", "handoff": "device", "shards": shards, **more}
    made = load(HEAD + A + stage("m", **mine) + (stage("c", inputs="[z]", outputs="{w: int64}") if more else ""))
    first, last = (s for s in made.spec.stages if s.name.startswith("m."))
    assert (first.handoff, last.handoff) == ("device", "host")
    assert (first.rows, first.wire.dtype) == ("same", None)
    assert first.wire.compress == last.wire.compress


def test_parts_on_a_cpu_have_no_device_memory(problems: Problems) -> None:
    keys = {"inputs": "[x]", "outputs": "{z: int64}", "handoff": "device", "shards": "{count: 2, mode: pipeline}"}
    (problem,) = problems(HEAD + A + stage("m", **keys))
    assert "stage 'm' has handoff: device, and runs on device: cpu" in problem
