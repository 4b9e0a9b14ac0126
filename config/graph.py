"""The stages of a pipeline as a graph, and where each column goes: who reads it, and how long it must stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torchrelay.config.types import ColumnType


@dataclass(frozen=True)
class Node:
    """One stage. `preds` and `succs` are node numbers, from 1; 0 is the pipeline's input.

    `inputs` maps what the stage calls a column to where it comes from, None for all columns. `keeps` are the columns
    that must stay in the job after this node, None for all. `rank` is its place in an order in which each node comes
    after its predecessors, from 1. `when` names the column that must be true for a row to enter.

    A stack lists the expanding nodes (by number) that rows came through and that no collapse has undone: `before` is
    that of the rows that come in, `at` that of the rows that `forward` sees, `stack` that of what it returns.
    """

    index: int
    name: str
    preds: tuple[int, ...]
    succs: tuple[int, ...]
    inputs: dict[str, str] | None
    outputs: dict[str, ColumnType]
    keeps: frozenset[str] | None
    rows: Literal["same", "expand", "collapse"] = "same"
    when: str | None = None
    rank: int = 0
    before: tuple[int, ...] = ()
    at: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

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
    def plain(self) -> bool:
        """Whether a job's columns need no notes on who made them: one chain, on which rows stay as many as they are."""
        return self.linear and all(n.rows == "same" for n in self.nodes)

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

    @cached_property
    def ordered(self) -> tuple[Node, ...]:
        """All nodes, each after its predecessors; a file may list them in another order."""
        return tuple(sorted(self.nodes, key=lambda n: -len(self.descendants(n.index))))

    def ancestors(self, node: Node) -> list[Node]:
        """Nodes before this one, each after its predecessors."""
        return [n for n in self.ordered if node in self.descendants(n.index)]

    def _outputs_of(self, stage: str) -> dict[str, ColumnType]:
        # A stage that is not there is reported elsewhere; until then it declares nothing.
        return next((n.outputs for n in self.nodes if n.name == stage), {})

    def types_of(self, node: Node) -> dict[str, ColumnType]:
        """Declared types of the columns that a node reads, by its own names; undeclared ones are absent."""
        visible = dict(self.input)
        for other in self.ancestors(node):
            visible.update(other.outputs)
        if node.inputs is None:
            return visible
        out: dict[str, ColumnType] = {}
        for local, source in node.inputs.items():
            stage, _, column = source.rpartition(".")
            known = visible if not stage else self.input if stage == "input" else self._outputs_of(stage)
            if column in known:
                out[local] = known[column]
        return out
