"""Checks what stages do to rows: expansions that are open where they are undone, rows that skip, joins that line up."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torchrelay.config.flow import Report
from torchrelay.config.graph import Graph, Node
from torchrelay.config.spec import PipelineSpec, StageConfig


def check_rows(spec: PipelineSpec, graph: Graph, report: Report) -> bool:
    """Reports what is wrong with `rows`, `when` and a missing `use`; False when rows cannot be lined up at all."""
    ok = True
    for node, stage in zip(graph.nodes, spec.stages, strict=True):
        for key, text in (*_join(graph, node), *_collapse(graph, node, stage)):
            ok = False
            report(("stages", node.index - 1, *([key] if key else [])), f"stage {stage.name!r} {text}")
        for key, text in (*_without_use(node, stage), *_outputs(graph, node, stage)):
            report(("stages", node.index - 1, *([key] if key else [])), f"stage {stage.name!r}{text}")
    return ok


Problems = Iterator[tuple[str, str]]
"""The stage's key at which a problem stands, '' for the stage itself, and its text."""


def _names(graph: Graph, stack: tuple[int, ...]) -> str:
    return " and ".join(graph.nodes[n - 1].name for n in stack)


def _join(graph: Graph, node: Node) -> Problems:
    stacks = {p: graph.nodes[p - 1].stack if p else () for p in node.preds}
    one, other = node.preds[0], next((p for p in node.preds if stacks[p] != stacks[node.preds[0]]), None)
    if other is None:
        return
    sides = []
    for p in (one, other):
        name = graph.nodes[p - 1].name if p else "input"
        sides.append(f"{name} (" + (f"expanded by {_names(graph, stacks[p])}" if stacks[p] else "not expanded") + ")")
    deeper = max(stacks[one], stacks[other], key=len)
    remedy = f"add a stage with rows: {{collapse: {graph.nodes[deeper[-1] - 1].name}}} before it"
    yield "after", f"joins rows that do not line up: those of {' and '.join(sides)}; {remedy}"


def _collapse(graph: Graph, node: Node, stage: StageConfig) -> Problems:
    name = stage.collapses
    if name is None:
        return
    expanding = [n.name for n in graph.nodes if n.rows == "expand"]
    if name not in expanding:
        names = [n.name for n in graph.nodes]
        near = difflib.get_close_matches(name, expanding, 1)
        known = f"stages that expand: {', '.join(expanding)}" if expanding else "no stage has rows: expand"
        hint = f"did you mean {near[0]!r}?" if near else known
        what = f"{name!r}, which does not expand" if name in names else f"the unknown stage {name!r:.80}"
        yield "rows", f"collapses {what}; {hint}"
    elif graph.node(name).index not in node.before:
        now = f"only {_names(graph, node.before)} is expanded here" if node.before else "nothing is expanded here"
        yield "rows", f"collapses {name!r}, but {now}; move it behind {name}, or take its `rows` out"
    elif graph.node(name).index != node.before[-1]:
        inner = graph.nodes[node.before[-1] - 1].name
        yield "rows", f"collapses {name!r} inside the expansion of {inner!r}; collapse {inner} first"


_WITH_CODE = ("inputs", "outputs", "args", "weights", "torch", "when", "device")


def _without_use(node: Node, stage: StageConfig) -> Problems:
    if stage.use is not None:
        return
    if node.rows != "collapse":
        yield "", ": use is missing; add it"
        return
    for key in _WITH_CODE:
        if getattr(stage, key) != StageConfig.model_fields[key].get_default():
            yield key, f": {key} needs code; take it out, or add `use`: without it the stage only regroups rows"
    for key in ("pad", "buckets", "max_cost"):
        if getattr(stage.batch, key):
            text = "needs code; take it out, or add `use`: without it the stage only regroups rows"
            yield "batch", f": batch.{key} {text}"


def _outputs(graph: Graph, node: Node, stage: StageConfig) -> Problems:
    if node.outputs or stage.use is None:
        return
    if node.rows == "expand":
        yield "", " expands rows, so what it returns must be declared; add outputs: {COLUMN: TYPE}"
    elif node.before:
        inner = graph.nodes[node.before[-1] - 1].name
        what = "collapses" if node.rows == "collapse" else "is inside"
        yield (
            "",
            f" {what} the expansion of {inner}, so what it returns must be declared; add outputs: {{COLUMN: TYPE}}",
        )
