"""Checks where columns come from: each is provided, no join has to guess, and the result is clear."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from torchrelay.config.graph import Graph, Node
from torchrelay.config.spec import PipelineSpec, StageConfig

Place = tuple[str | int, ...]
Report = Callable[[Place, str], None]
"""Takes a problem's place in the file (the path of keys) and its text."""


def check_columns(spec: PipelineSpec, graph: Graph, report: Report) -> None:
    """Reports every column that is read and not provided, or that two branches provide."""
    for node, stage in zip(graph.nodes, spec.stages, strict=True):
        _check_inputs(graph, node, stage, report)
        _check_when(graph, node, stage, report)
        _check_batch(graph, node, stage, report)
    _check_result(spec, graph, report)


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known)) or 'none'}"


def _makers(graph: Graph, among: Iterable[Node]) -> dict[str, list[str]]:
    """Column -> who provides it after these nodes: the later of two on one path hides the earlier."""
    nodes = list(among)
    found = {c: ["input"] for c in graph.input}
    for column in {c for n in nodes for c in n.outputs}:
        mine = [n for n in nodes if column in n.outputs]
        found[column] = [m.name for m in mine if not any(o in graph.descendants(m.index) for o in mine)]
    return found


def _complete(graph: Graph, among: Iterable[Node]) -> bool:
    """Whether what is declared is all there can be."""
    return bool(graph.input) and all(n.outputs or n.identity for n in among)


def _check_inputs(graph: Graph, node: Node, stage: StageConfig, report: Report) -> None:
    place: Place = ("stages", node.index - 1)
    wanted: Mapping[str, str] = node.inputs or {}
    if node.inputs is None:
        wanted = {c: c for c in sorted(_makers(graph, graph.ancestors(node)))}
    for j, (local, source) in enumerate(wanted.items()):
        key: Place = place
        if node.inputs is not None:
            key = (*place, "inputs", j if isinstance(stage.inputs, list) else local)
        _check_source(graph, node, source, (key, f"inputs: {{{local}: %s}}"), report)


def _check_source(graph: Graph, node: Node, source: str, at: tuple[Place, str], report: Report) -> None:
    """`at`: where it stands in the file, and how another choice would be written there."""
    key, writing = at
    before = graph.ancestors(node)
    seen = _makers(graph, before)
    maker, _, column = source.rpartition(".")
    if maker:
        _check_selected(graph, node, source, key, report)
    elif column not in seen and _complete(graph, before):
        text = f"stage {node.name!r} reads column {column!r}, which nothing before it provides; "
        report(key, text + _hint(column, seen))
    elif len(seen.get(column, ())) > 1:
        both = sorted(seen[column])
        text = f"stage {node.name!r} gets column {column!r} from {' and '.join(both)}; "
        report(key, text + "choose one: " + writing % f"{both[0]}.{column}")


def _check_selected(graph: Graph, node: Node, source: str, key: Place, report: Report) -> None:
    maker, _, column = source.rpartition(".")
    before = {n.name: n for n in graph.ancestors(node)}
    if maker != "input" and maker not in before:
        text = f"stage {node.name!r} reads {source}, but no stage {maker!r} comes before it; "
        report(key, text + _hint(maker, [*before, "input"]))
        return
    provided = graph.input if maker == "input" else before[maker].outputs
    if provided and column not in provided:
        report(
            key, f"stage {node.name!r} reads {source}, but {maker} declares no such column; {_hint(column, provided)}"
        )
        return
    wanted = before[maker].index if maker in before else 0
    found = _carried_to(graph, node, column, wanted)
    if wanted not in found:
        newest = graph.nodes[found[-1] - 1].name
        text = f"stage {node.name!r} reads {source}, but only {newest}.{column} comes this far: the newest goes on; "
        report(key, text + f"give it another name in {newest}, or read {newest}.{column}")


def _carried_to(graph: Graph, node: Node, column: str, maker: int) -> list[int]:
    """Whose column of this name comes to a node, the newest last: each stage passes on the newest that came to it.

    `maker` counts as one that makes it, declared or not; 0 is the input.
    """
    carried = {0: 0}
    ranks = {0: 0} | {n.index: n.rank for n in graph.nodes}
    for n in graph.ordered:
        mine = column in n.outputs or n.index == maker
        carried[n.index] = n.index if mine else max((carried[p] for p in n.preds), key=ranks.__getitem__)
    return sorted({carried[p] for p in node.preds}, key=ranks.__getitem__)


def _check_when(graph: Graph, node: Node, stage: StageConfig, report: Report) -> None:
    if node.when is None or stage.use is None:
        return
    place: Place = ("stages", node.index - 1)
    _check_source(graph, node, node.when, ((*place, "when"), "when: %s"), report)
    kind = graph.type_of(node.when, node)
    if kind is not None and (kind.shape or kind.dtype.startswith("complex")):
        text = f"stage {node.name!r}: when reads {node.when}, which is {kind} in each row; "
        report((*place, "when"), text + "name a column of one value per row, best a bool")
    if not node.keeps_older:
        return
    if not node.outputs:
        text = f"stage {node.name!r}: when needs outputs: rows that skip keep a column's older value, or get null; "
        report((*place, "when"), text + "add outputs: {COLUMN: TYPE}")
    seen = _makers(graph, graph.ancestors(node))
    for column, made in node.outputs.items():
        key: Place = (*place, "outputs", column)
        older = graph.type_of(column, node)
        if len(seen.get(column, ())) > 1:
            both = " and ".join(sorted(seen[column]))
            text = f"stage {node.name!r}: rows that skip it keep {column!r}, which comes from {both}; "
            report(key, text + "rename it in one of them")
        elif older is None and not made.nullable:
            text = f"stage {node.name!r}: rows that skip it have no {column!r}, as no stage before makes it; "
            report(key, text + "write ? behind its type, for null")
        elif older is not None and (older.dtype, older.shape) != (made.dtype, made.shape):
            text = f"stage {node.name!r}: rows that skip it keep {column!r} as {older}, the others have {made}; "
            report(key, text + "give both one type, or another name here")


def _check_batch(graph: Graph, node: Node, stage: StageConfig, report: Report) -> None:
    types = graph.types_of(node)
    names = columns_of(graph, node)
    readable, known = list(types) if names is None else names, names is not None
    place: Place = ("stages", node.index - 1, "batch")
    for column in stage.batch.pad:
        key: Place = (*place, "pad", column)
        if column in types and (types[column].stacked or not types[column].is_numeric):
            report(key, f"column {column!r} is {types[column]}: only ragged numbers are padded; take it out of pad")
        elif known and column not in readable:
            report(
                key, f"stage {node.name!r} pads column {column!r}, which it does not read; {_hint(column, readable)}"
            )
    for column in stage.batch.buckets:
        if column not in stage.batch.pad:
            text = f"stage {node.name!r}: column {column!r} has buckets and is not padded; "
            report((*place, "buckets", column), text + f"add pad: {{{column}: 0}}")
    cost = stage.batch.max_cost
    if cost is not None and cost.column in types and types[cost.column].dtype.startswith("complex"):
        text = f"column {cost.column!r} is {types[cost.column]}, which has no length; name another in max_cost"
        report((*place, "max_cost", "column"), text)
    elif cost is not None and known and cost.column not in readable:
        text = f"stage {node.name!r}: max_cost counts column {cost.column!r}, which it does not read; "
        report((*place, "max_cost", "column"), text + _hint(cost.column, readable))


def columns_of(graph: Graph, node: Node) -> list[str] | None:
    """The columns that a node reads, by its own names; None where not all are known."""
    if node.inputs is not None:
        return list(node.inputs)
    return list(graph.types_of(node)) if _complete(graph, graph.ancestors(node)) else None


def _check_result(spec: PipelineSpec, graph: Graph, report: Report) -> None:
    seen = _makers(graph, graph.nodes)
    complete = _complete(graph, graph.nodes)
    if spec.output is None:
        returned = [c for n in graph.terminals for c in n.outputs]
        for column in sorted({c for c in returned if returned.count(c) > 1}):
            both = [n.name for n in graph.terminals if column in n.outputs]
            place: Place = ("stages", graph.node(both[-1]).index - 1)
            report(
                place, f"{' and '.join(both)} both end the pipeline with column {column!r}; rename it in one of them"
            )
        return
    for i, column in enumerate(spec.output):
        if complete and column not in seen:
            report(("output", i), f"output column {column!r} is made by no stage; {_hint(column, seen)}")
        elif len(seen.get(column, ())) > 1:
            both = sorted(seen[column])
            text = f"output column {column!r} comes from {' and '.join(both)}, which run side by side; "
            report(("output", i), text + "rename it in one of them")
