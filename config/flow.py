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
        _check_pad(graph, node, stage, report)
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
    before = graph.ancestors(node)
    seen, complete = _makers(graph, before), _complete(graph, before)
    place: Place = ("stages", node.index - 1)
    wanted: Mapping[str, str] = {c: c for c in sorted(seen)} if node.inputs is None else node.inputs
    for j, (local, source) in enumerate(wanted.items()):
        key: Place = place
        if node.inputs is not None:
            key = (*place, "inputs", j if isinstance(stage.inputs, list) else local)
        maker, _, column = source.rpartition(".")
        if maker:
            _check_selected(graph, node, source, key, report)
        elif column not in seen and complete:
            text = f"stage {node.name!r} reads column {column!r}, which nothing before it provides; "
            report(key, text + _hint(column, seen))
        elif len(seen.get(column, ())) > 1:
            both = sorted(seen[column])
            text = f"stage {node.name!r} gets column {column!r} from {' and '.join(both)}; "
            report(key, text + f"choose one: inputs: {{{local}: {both[0]}.{column}}}")


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


def _check_pad(graph: Graph, node: Node, stage: StageConfig, report: Report) -> None:
    before = graph.ancestors(node)
    types = graph.types_of(node)
    if node.inputs is not None:
        readable, known = list(node.inputs), True
    else:
        readable, known = list(types), _complete(graph, before)
    for column in stage.batch.pad:
        key: Place = ("stages", node.index - 1, "batch", "pad", column)
        if column in types and (types[column].stacked or not types[column].is_numeric):
            report(key, f"column {column!r} is {types[column]}: only ragged numbers are padded; take it out of pad")
        elif known and column not in readable:
            report(
                key, f"stage {node.name!r} pads column {column!r}, which it does not read; {_hint(column, readable)}"
            )


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
