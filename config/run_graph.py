"""The run graph of a pipeline: its twin, in which `@read` makes rows of a chunk and `@write` makes a file of them.

A run over a dataset puts chunks through this graph, so that online jobs, which go through the pipeline's own, pay
nothing for it. It is registered under a ref of its own, the pipeline's with a suffix; both nodes are outside the
version. Its user stages are those of the pipeline, with the same numbers, and run by the same workers.

Columns of the run's own begin with `@`: no stage of the user sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torchrelay.config.graph import TO_THE_END, Graph, Made, Node, is_runs, seen_at
from torchrelay.config.graph_build import placed_in
from torchrelay.config.shards import PartConfig
from torchrelay.config.spec import BatchSpec, CollapseSpec, LimitsSpec, PipelineSpec, StageConfig
from torchrelay.config.types import ColumnType, parse_type

__all__ = [
    "CHUNK",
    "READ",
    "RESULT",
    "ROWS",
    "RUN_SUFFIX",
    "WRITE",
    "RunGraph",
    "base_ref",
    "is_runs",
    "run_ref",
    "run_twin",
]

READ, WRITE = "@read", "@write"
CHUNK, ROWS, RESULT = "@chunk", "@rows", "@written"
"""The columns that a run's job is submitted with, the chunk's descriptor and, of an input that lies in memory, its
encoded rows; and the one that it ends with."""
RUN_SUFFIX = "+run"
# The mask of a job's nodes has 30 bits.
_MOST_STAGES = 28
_TIMEOUT_S = 600.0
# What a chunk grows to is bounded by its rows; what each of them may grow to is the pipeline's limit.
_ROWS_PER_CHUNK = 100_000_000


def run_ref(ref: str) -> str:
    """The ref of the run graph of `name@version`."""
    return ref + RUN_SUFFIX


def base_ref(ref: str) -> str:
    """The pipeline's own ref, of that of its run graph or its own."""
    return ref.removesuffix(RUN_SUFFIX)


@dataclass(frozen=True)
class RunGraph(Graph):
    """`base` is the graph of the pipeline's own, whose nodes are the first of this one's."""

    base: Graph

    @property
    def read(self) -> Node:
        return self.nodes[-2]

    @property
    def write(self) -> Node:
        return self.nodes[-1]

    @property
    def entry(self) -> tuple[int, ...]:
        """A row that fails is one of those that `@read` made, not the whole chunk."""
        return (self.read.index,)

    @property
    def input_rank(self) -> int:
        return self.read.rank

    def consumers(self, column: str, origin: int) -> int:
        """Of rejected rows too: they end in what `@write` writes, and not in the job's result."""
        if column[0] == "!":
            return TO_THE_END
        return super().consumers(column, origin)

    def in_result(self, column: str, origin: int) -> bool:
        """Whether the pipeline's own result would show it: what `@write` gets is exactly what clients get."""
        if is_runs(column) or origin > len(self.base.nodes):
            return True
        return self.base.in_result(column, origin)

    def _made_by(self, stage: str) -> Made:
        if stage == "input":
            return {column: (kind, self.entry) for column, kind in self.base.input.items()}
        return super()._made_by(stage)

    @cached_property
    def written(self) -> tuple[str, ...] | None:
        """The columns that `@write` writes, in order; None where they are only known when they are there."""
        return None if self.write.inputs is None else tuple(self.write.inputs)

    @cached_property
    def written_types(self) -> dict[str, ColumnType]:
        """Declared types of what is written, of each row."""
        visible = self._visible(self.write)
        return {c: seen_at(visible[c], self.write.before) for c in self.written or visible if c in visible}


def run_twin(spec: PipelineSpec, graph: Graph) -> tuple[PipelineSpec, RunGraph] | str:
    """Spec and graph of the run graph of a pipeline, or why it cannot have one."""
    if len(spec.stages) > _MOST_STAGES:
        parts = ", ".join(dict.fromkeys(s.of for s in spec.stages if isinstance(s, PartConfig)))
        has = f"{len(spec.stages)}" + (f" with the parts of {parts}" if parts else "")
        remedy = "lower shards.count, or join stages" if parts else "join some"
        return f"a run takes pipelines of at most {_MOST_STAGES} stages, this one has {has}; {remedy}"
    stacks = {n.name: n.stack for n in graph.terminals}
    if len(set(stacks.values())) > 1:
        names = " and ".join(stacks)
        return f"a run writes rows, and the last stages {names} end with different ones; add a stage that collapses"
    read, write = len(graph.nodes) + 1, len(graph.nodes) + 2
    inputs = _written(spec, graph)
    users = tuple(_user_node(n, read, write) for n in graph.nodes)
    first = tuple(n.index for n in graph.nodes if 0 in n.preds)
    last = tuple(n.index for n in graph.terminals)
    ending = frozenset(n.index for n in graph.nodes if graph.ends_with(n.index))
    result = parse_type("json")
    nodes = (
        *users,
        Node(read, READ, (0,), first, {CHUNK: CHUNK, ROWS: ROWS}, dict(graph.input), None, rows="expand"),
        Node(write, WRITE, last, (), inputs, {RESULT: result}, None, rows="collapse", gathers=ending),
    )
    chunk: dict[str, ColumnType] = {CHUNK: parse_type("str"), ROWS: parse_type("bytes?")}
    draft = RunGraph(nodes, frozenset((RESULT,)), chunk, graph)
    twin = replace(draft, nodes=placed_in(draft))
    stages = [*spec.stages, _stage(READ, "expand"), _stage(WRITE, CollapseSpec(collapse=READ))]
    limits = LimitsSpec(rows_per_job=_ROWS_PER_CHUNK)
    return spec.model_copy(update={"stages": stages, "output": [RESULT], "limits": limits}), twin


def _written(spec: PipelineSpec, graph: Graph) -> dict[str, str] | None:
    """What `@write` reads, by name: the pipeline's result, None where that is not declared."""
    if spec.output is not None:
        return {column: column for column in spec.output}
    ending = [n for n in graph.nodes if graph.ends_with(n.index) and not n.identity]
    if any(not n.outputs for n in ending):
        return None
    return {column: column for n in ending for column in n.outputs}


def _user_node(node: Node, read: int, write: int) -> Node:
    preds = tuple(sorted(p or read for p in node.preds))
    return replace(node, preds=preds, succs=node.succs or (write,), keeps=None)


def _stage(name: str, rows: Literal["expand"] | CollapseSpec) -> StageConfig:
    batch = BatchSpec(max_rows=1)
    made = StageConfig(name=name[1:], use="torchrelay:run", rows=rows, batch=batch, timeout_s=_TIMEOUT_S)
    # The name is none that a file could give.
    return made.model_copy(update={"name": name})
