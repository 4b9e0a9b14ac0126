"""Works out a pipeline's graph from its spec, and reports every problem of its order with its place in the file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from torchrelay.config.flow import Report, check_columns
from torchrelay.config.fusing import check_fuse
from torchrelay.config.graph import Graph, Node
from torchrelay.config.handoff import check_handoff, kept_for
from torchrelay.config.resources import check_resources
from torchrelay.config.row_rules import check_rows
from torchrelay.config.shards import PartConfig, check_shards, spread, written_place
from torchrelay.config.spec import PipelineSpec, StageConfig
from torchrelay.config.types import parse_type


def build_spread(spec: PipelineSpec, report: Report, *, columns: bool = True) -> tuple[PipelineSpec, Graph] | None:
    """The pipeline as its workers see it, every cut stage as the stages that it becomes, and its graph; None after
    reporting what is wrong. Arguments as of `build_graph`."""
    problems = 0

    def counted(place: tuple[str | int, ...], text: str) -> None:
        nonlocal problems
        problems += 1
        report(place, text)

    graph = build_graph(spec, counted, columns=columns)
    check_shards(spec, counted)
    wide = spread(spec) if graph is not None and not problems else spec
    if wide is spec:
        return None if graph is None else (spec, graph)

    def placed(place: tuple[str | int, ...], text: str) -> None:
        at = (place[0], written_place(wide, int(place[1]))) if place[:1] == ("stages",) and len(place) > 1 else place
        report(at, text)

    # Its columns were checked where the user wrote them.
    graph = build_graph(wide, placed, columns=False)
    return None if graph is None else (wide, graph)


def build_graph(spec: PipelineSpec, report: Report, *, columns: bool = True) -> Graph | None:
    """The graph, or None after reporting what is wrong with it; `columns` False leaves the columns unchecked."""
    names = [s.name for s in spec.stages]
    ok = _check_names(names, report)
    _check_tuning(spec.stages, report)
    preds = _predecessors(spec, names, report)
    if preds is None or not ok or not _acyclic(spec, preds, report):
        return None
    graph = _with_columns(spec, preds)
    lined_up = check_rows(spec, graph, report)
    if columns:
        check_columns(spec, graph, report)
    check_fuse(spec, graph, report)
    check_handoff(spec, graph, report)
    check_resources(spec, report)
    return graph if lined_up else None


def _check_names(names: list[str], report: Report) -> bool:
    ok = True
    for i, name in enumerate(names):
        if name in names[:i]:
            report(("stages", i, "name"), f"stage {name!r} stands twice; rename one")
            ok = False
        if name == "input":
            report(
                ("stages", i, "name"), "a stage cannot be named 'input', which means the pipeline's input; rename it"
            )
            ok = False
    return ok


def _check_tuning(stages: Sequence[StageConfig], report: Report) -> None:
    for i, stage in enumerate(stages):
        low, high = stage.replicas.min, stage.replicas.max
        if high < low:
            report(
                ("stages", i, "replicas"),
                f"stage {stage.name!r}: replicas.max ({high}) is below replicas.min ({low}); raise max or lower min",
            )
        base, cap = stage.retry.backoff_s
        if cap < base:
            report(
                ("stages", i, "retry", "backoff_s"),
                f"stage {stage.name!r}: backoff_s has its cap ({cap}) below its base ({base}); write [base, cap]",
            )


def _predecessors(spec: PipelineSpec, names: list[str], report: Report) -> list[tuple[int, ...]] | None:
    explicit = any(s.after is not None for s in spec.stages)
    ok = True
    preds: list[tuple[int, ...]] = []
    for i, stage in enumerate(spec.stages):
        if not explicit:
            preds.append((i,))
        elif stage.after is None:
            text = f"stage {stage.name!r} has no `after` while others do; add `after: input` or a stage's name"
            report(("stages", i), text)
            ok = False
        elif not stage.after:
            text = f"stage {stage.name!r} comes after nothing, so it is never reached; write `after: input`"
            report(("stages", i, "after"), text)
            ok = False
        else:
            unknown = [o for o in stage.after if o != "input" and o not in names]
            for other in unknown:
                near = difflib.get_close_matches(other, [*names, "input"], 1)
                hint = f"did you mean {near[0]!r}?" if near else f"stages are {', '.join(names)}, and input"
                text = f"stage {stage.name!r} comes after the unknown stage {other!r:.80}; {hint}"
                report(("stages", i, "after", stage.after.index(other)), text)
                ok = False
            mine = {0 if o == "input" else names.index(o) + 1 for o in stage.after if o not in unknown}
            preds.append(tuple(sorted(mine)))
    return preds if ok else None


def _acyclic(spec: PipelineSpec, preds: list[tuple[int, ...]], report: Report) -> bool:
    done: set[int] = {0}
    left = set(range(1, len(preds) + 1))
    while ready := {i for i in left if all(p in done for p in preds[i - 1])}:
        done |= ready
        left -= ready
    if left:
        cycle = _one_cycle(left, preds)
        text = " -> ".join(spec.stages[i - 1].name for i in [*cycle, cycle[0]])
        report(("stages", cycle[0] - 1), f"stages wait for each other in a circle: {text}; take one `after` out")
        for i in sorted(left - set(cycle)):
            report(("stages", i - 1), f"stage {spec.stages[i - 1].name!r} is never reached: it waits for that circle")
    return not left


def _one_cycle(left: set[int], preds: list[tuple[int, ...]]) -> list[int]:
    path = [min(left)]
    while True:
        back = next(p for p in preds[path[-1] - 1] if p in left)
        if back in path:
            return path[path.index(back) :][::-1]
        path.append(back)


def _inputs(stage: StageConfig) -> dict[str, str] | None:
    if stage.use is None:
        return {}
    if stage.inputs is None or isinstance(stage.inputs, dict):
        return stage.inputs
    return {c: c for c in stage.inputs}


def _node(number: int, stage: StageConfig, preds: list[tuple[int, ...]]) -> Node:
    succs = tuple(j for j, before in enumerate(preds, 1) if number in before)
    outputs = {c: parse_type(t) for c, t in stage.outputs.items()}
    rows = stage.rows if isinstance(stage.rows, str) else "collapse"
    before = preds[number - 1]
    inputs, older = _inputs(stage), None
    if isinstance(stage, PartConfig) and stage.combines:
        # A row that skips every shard keeps in each what it had.
        older = {column: f"{stage.of}.0.{column}" for column in outputs}
    return Node(
        number, stage.name, before, succs, inputs, outputs, None, rows, stage.when, wire=stage.wire, older=older
    )


def _with_columns(spec: PipelineSpec, preds: list[tuple[int, ...]]) -> Graph:
    result = frozenset(spec.output) if spec.output is not None else None
    typed = {c: parse_type(t) for c, t in spec.input.items()}
    draft = Graph(tuple(_node(i, s, preds) for i, s in enumerate(spec.stages, 1)), result, typed)
    kept = kept_for(spec, draft)
    draft = replace(draft, nodes=tuple(replace(n, kept_for=kept.get(n.name, 0)) for n in draft.nodes))
    return Graph(placed_in(draft), result, typed)


def placed_in(draft: Graph) -> tuple[Node, ...]:
    """The nodes of a graph with what follows from their order: rank, stacks, and what must stay behind each."""
    placed: dict[int, Node] = {}
    for rank, n in enumerate(draft.ordered, 1):
        # Branches that meet with unequal stacks are reported elsewhere.
        before = placed[n.preds[0]].stack if n.preds[0] else ()
        at = () if n.gathers is not None else before[:-1] if n.rows == "collapse" else before
        stack = (*at, n.index) if n.rows == "expand" else at
        keeps = _keeps(draft, n, draft.result)
        placed[n.index] = replace(n, keeps=keeps, rank=rank, before=before, at=at, stack=stack)
    return tuple(placed[n.index] for n in draft.nodes)


def _keeps(graph: Graph, node: Node, result: frozenset[str] | None) -> frozenset[str] | None:
    """What must stay after a node: read by a descendant, or part of the result. A terminal node keeps its result."""
    if not node.succs and result is None:
        return None
    keeps = set(result or ())
    for later in graph.descendants(node.index):
        if later.needs is None:
            return None
        keeps |= later.needs
        if result is None and not later.succs and later.identity:
            # Its result is what it regroups, though it reads none of it.
            keeps |= {c for n in graph.ancestors(later) if graph.ends_with(n.index) for c in n.outputs}
    return frozenset(keeps)
