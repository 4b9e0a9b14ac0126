"""The stages of a pipeline as a graph, and where each column goes: who reads it, and how long it must stay."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torchrelay.config.spec import PipelineSpec, StageSpec
from torchrelay.config.types import ColumnType, parse_type

Report = Callable[[tuple[str | int, ...], str], None]
"""Takes a problem's place in the file (the path of keys) and its text."""


@dataclass(frozen=True)
class Node:
    """One stage. `preds` and `succs` are node numbers, from 1; 0 is the pipeline's input.

    `inputs` maps what the stage calls a column to where it comes from, None for all columns. `keeps` are the columns
    that must stay in the job after this node, None for all.
    """

    index: int
    name: str
    preds: tuple[int, ...]
    succs: tuple[int, ...]
    inputs: dict[str, str] | None
    outputs: dict[str, ColumnType]
    keeps: frozenset[str] | None

    @property
    def bit(self) -> int:
        return 1 << (self.index - 1)

    def reads(self, column: str) -> bool:
        return self.inputs is None or any(s.rpartition(".")[2] == column for s in self.inputs.values())


@dataclass(frozen=True)
class Graph:
    """All nodes in the order of the file. `result` are the output columns, None for what the terminal nodes return."""

    nodes: tuple[Node, ...]
    result: frozenset[str] | None
    input: dict[str, ColumnType]

    @cached_property
    def linear(self) -> bool:
        """Whether the nodes form one chain."""
        chain = all(len(n.succs) <= 1 and len(n.preds) == 1 for n in self.nodes)
        return chain and sum(n.preds == (0,) for n in self.nodes) == 1

    @cached_property
    def terminals(self) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if not n.succs)

    def node(self, name: str) -> Node:
        """The node of this name; KeyError when there is none."""
        for n in self.nodes:
            if n.name == name:
                return n
        raise KeyError(name)

    def descendants(self, origin: int) -> list[Node]:
        """Nodes after `origin`, in no particular order; all nodes for 0."""
        seen: set[int] = set()
        todo = [n.index for n in self.nodes if 0 in n.preds] if origin == 0 else list(self.nodes[origin - 1].succs)
        while todo:
            index = todo.pop()
            if index not in seen:
                seen.add(index)
                todo += self.nodes[index - 1].succs
        return [self.nodes[i - 1] for i in sorted(seen)]

    def consumers(self, column: str, origin: int) -> int:
        """Mask of the nodes after `origin` that read the column it made; 0 when the column belongs to the result."""
        terminal = origin > 0 and not self.nodes[origin - 1].succs
        if column in self.result if self.result is not None else terminal:
            return 0
        mask = 0
        for node in self.descendants(origin):
            if node.reads(column):
                mask |= node.bit
        # A column that nobody reads goes with the commit of the next node.
        return mask or sum(n.bit for n in self.descendants(origin)[:1]) or (1 << 30)

    def types_of(self, node: Node) -> dict[str, ColumnType]:
        """Declared types of the columns that a node reads, by its own names; undeclared ones are absent."""
        visible = dict(self.input)
        for other in self.nodes:
            if other.index != node.index and any(d.index == node.index for d in self.descendants(other.index)):
                visible.update(other.outputs)
        if node.inputs is None:
            return visible
        out: dict[str, ColumnType] = {}
        for local, source in node.inputs.items():
            stage, _, column = source.rpartition(".")
            known = self.node(stage).outputs if stage and stage != "input" else visible
            if column in known:
                out[local] = known[column]
        return out


def build_graph(spec: PipelineSpec, report: Report, *, columns: bool = True) -> Graph | None:
    """The graph, or None after reporting what is wrong with it; `columns` False leaves the columns unchecked."""
    names = [s.name for s in spec.stages]
    ok = True
    for i, name in enumerate(names):
        if name in names[:i]:
            report(("stages", i, "name"), f"stage {name!r} stands twice; rename one")
            ok = False
    for i, stage in enumerate(spec.stages):
        if stage.replicas.max < stage.replicas.min:
            low, high = stage.replicas.min, stage.replicas.max
            report(
                ("stages", i, "replicas"),
                f"stage {stage.name!r}: replicas.max ({high}) is below replicas.min ({low}); raise max or lower min",
            )
        if stage.retry.backoff_s[1] < stage.retry.backoff_s[0]:
            report(
                ("stages", i, "retry", "backoff_s"),
                f"stage {stage.name!r}: backoff_s [base, cap] has its cap below its base",
            )
    preds = _predecessors(spec, names, report)
    if preds is None or not ok or not _acyclic(spec, preds, report):
        return None
    graph = _with_columns(spec, preds)
    if columns:
        _check_columns(spec, graph, report)
    return graph


def _predecessors(spec: PipelineSpec, names: list[str], report: Report) -> list[tuple[int, ...]] | None:
    explicit = any(s.after is not None for s in spec.stages)
    ok = True
    preds: list[tuple[int, ...]] = []
    for i, stage in enumerate(spec.stages):
        if not explicit:
            preds.append((i,))
            continue
        if stage.after is None:
            report(
                ("stages", i),
                f"stage {stage.name!r} has no `after` while others do; add `after: input` or a stage's name",
            )
            ok = False
            continue
        mine: list[int] = []
        for j, other in enumerate(stage.after):
            if other == "input":
                mine.append(0)
            elif other in names:
                mine.append(names.index(other) + 1)
            else:
                near = difflib.get_close_matches(other, [*names, "input"], 1)
                hint = f"did you mean {near[0]!r}?" if near else f"stages are {', '.join(names)}, and input"
                report(
                    ("stages", i, "after", j), f"stage {stage.name!r} comes after the unknown stage {other!r}; {hint}"
                )
                ok = False
        if not stage.after:
            report(
                ("stages", i, "after"),
                f"stage {stage.name!r} comes after nothing, so it is never reached; write `after: input`",
            )
            ok = False
        preds.append(tuple(sorted(set(mine))))
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


def _inputs(stage: StageSpec) -> dict[str, str] | None:
    if stage.inputs is None or isinstance(stage.inputs, dict):
        return stage.inputs
    return {c: c for c in stage.inputs}


def _with_columns(spec: PipelineSpec, preds: list[tuple[int, ...]]) -> Graph:
    count = len(preds)
    succs = [tuple(j for j in range(1, count + 1) if i in preds[j - 1]) for i in range(1, count + 1)]
    inputs = [_inputs(s) for s in spec.stages]
    outputs = [{c: parse_type(t) for c, t in s.outputs.items()} for s in spec.stages]
    result = frozenset(spec.output) if spec.output is not None else None
    bare = [
        Node(i, spec.stages[i - 1].name, preds[i - 1], succs[i - 1], inputs[i - 1], outputs[i - 1], None)
        for i in range(1, count + 1)
    ]
    typed = {c: parse_type(t) for c, t in spec.input.items()}
    draft = Graph(tuple(bare), result, typed)
    nodes = tuple(
        Node(n.index, n.name, n.preds, n.succs, n.inputs, n.outputs, _keeps(draft, n, result)) for n in draft.nodes
    )
    return Graph(nodes, result, typed)


def _keeps(graph: Graph, node: Node, result: frozenset[str] | None) -> frozenset[str] | None:
    """What must stay after a node: read by a descendant, or part of the result. A terminal node keeps its result."""
    if not node.succs and result is None:
        return None
    keeps = set(result or ())
    for later in graph.descendants(node.index):
        if later.inputs is None:
            return None
        keeps |= {s.rpartition(".")[2] for s in later.inputs.values()}
    return frozenset(keeps)


def _visible(graph: Graph, node: Node) -> tuple[dict[str, set[str]], bool]:
    """Column -> stages that made it, as this node sees them; and whether that is all there can be."""
    seen: dict[str, set[str]] = {c: {"input"} for c in graph.input}
    complete = bool(graph.input)
    makers: list[Node] = [n for n in graph.nodes if node in graph.descendants(n.index)]
    for maker in makers:
        complete = complete and bool(maker.outputs)
        for column in maker.outputs:
            hidden = {m.name for m in makers if maker in graph.descendants(m.index)} | {"input"}
            seen[column] = (seen.get(column, set()) - hidden) | {maker.name}
    return seen, complete


def _check_columns(spec: PipelineSpec, graph: Graph, report: Report) -> None:
    for node, stage in zip(graph.nodes, spec.stages, strict=True):
        seen, complete = _visible(graph, node)
        place: tuple[str | int, ...] = ("stages", node.index - 1)
        wanted: Mapping[str, str] = {c: c for c in seen} if node.inputs is None else node.inputs
        for j, (local, source) in enumerate(wanted.items()):
            key = (
                (*place, "inputs", j if isinstance(stage.inputs, list) else local) if node.inputs is not None else place
            )
            maker, _, column = source.rpartition(".")
            if maker:
                _check_selected(graph, node, maker, column, key, report)
            elif column not in seen and complete:
                near = difflib.get_close_matches(column, list(seen), 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(seen))}"
                report(key, f"stage {node.name!r} reads column {column!r}, which nothing before it provides; {hint}")
            elif len(seen.get(column, ())) > 1:
                both = sorted(seen[column])
                report(
                    key,
                    f"stage {node.name!r} gets column {column!r} from {' and '.join(both)}; "
                    f"choose one: inputs: {{{column}: {both[0]}.{column}}}",
                )
        for column in stage.batch.pad:
            types = graph.types_of(node)
            if column in types and (types[column].stacked or not types[column].is_numeric):
                report(
                    (*place, "batch", "pad", column),
                    f"column {column!r} is {types[column]}: only ragged numbers are padded",
                )
    _check_result(spec, graph, report)


def _check_selected(
    graph: Graph, node: Node, maker: str, column: str, key: tuple[str | int, ...], report: Report
) -> None:
    names = {n.name: n for n in graph.nodes}
    if maker != "input" and (maker not in names or node not in graph.descendants(names[maker].index)):
        report(key, f"stage {node.name!r} reads {maker}.{column}, but no stage {maker!r} comes before it")
        return
    provided = graph.input if maker == "input" else names[maker].outputs
    if provided and column not in provided:
        report(key, f"stage {node.name!r} reads {maker}.{column}, but {maker} declares {', '.join(provided)}")


def _check_result(spec: PipelineSpec, graph: Graph, report: Report) -> None:
    known = set(graph.input).union(*[set(n.outputs) for n in graph.nodes])
    if not graph.input or not all(n.outputs for n in graph.nodes):
        return
    for i, column in enumerate(spec.output or ()):
        if column not in known:
            near = difflib.get_close_matches(column, sorted(known), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            report(("output", i), f"output column {column!r} is made by no stage; {hint}")
