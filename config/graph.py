"""The stages of a pipeline as a graph, and where each column goes: who reads it, and how long it must stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torchrelay.config.spec import WireSpec
from torchrelay.config.types import ColumnType, grouped

Made = dict[str, tuple[ColumnType, tuple[int, ...]]]
"""Column -> its declared type, and the stack at which it was made."""
_AS_THEY_ARE = WireSpec()
TO_THE_END = 1 << 30  # in a mask of nodes, no node's bit: what carries it stays until the job ends


def is_runs(name: str) -> bool:
    """Whether a column or a node is one of a run's own, which a pipeline's stages know nothing of."""
    return name[:1] == "@"


@dataclass(frozen=True)
class Node:
    """One stage. `preds` and `succs` are node numbers, from 1; 0 is the pipeline's input.

    `inputs` maps what the stage calls a column to where it comes from, None for all columns. `keeps` are the columns
    that must stay in the job after this node, None for all. `rank` is its place in an order in which each node comes
    after its predecessors, from 1. `when` names the column that must be true for a row to enter. `wire` is
    how its columns travel to the nodes that read them. Where these may be lost with the process that made them, what it
    read stays until the nodes of the mask `kept_for` are done, so that it can run again from there; 0 elsewhere.

    `older` says of output columns where rows that skip find the value that they keep, as `stage.column`, where branches
    that meet each bring it.

    A stack lists the expanding nodes (by number) that rows came through and that no collapse has undone: `before` is
    that of the rows that come in, `at` that of the rows that `forward` sees, `stack` that of what it returns.

    `gathers` is None but for the node that ends a run (see `run_graph`): it takes all rows of a job as one, lined up at
    `before`. Where its `inputs` are None, it reads what the nodes of these numbers made.
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
    wire: WireSpec = _AS_THEY_ARE
    gathers: frozenset[int] | None = None
    kept_for: int = 0
    older: dict[str, str] | None = None

    @property
    def bit(self) -> int:
        return 1 << (self.index - 1)

    @property
    def identity(self) -> bool:
        """Whether it runs no code: a collapse that only regroups. One with code declares what it returns."""
        return self.rows == "collapse" and not self.outputs

    @property
    def keeps_older(self) -> bool:
        """Whether rows that skip it keep the values that its output columns had; of an expansion they make none."""
        return self.when is not None and self.rows != "expand"

    @cached_property
    def needs(self) -> frozenset[str] | None:
        """The columns that must come to it, None for all: where `when` lets a row skip, its older values count too."""
        if self.inputs is None:
            return None
        sources = [*self.inputs.values(), *([self.when] if self.when is not None else [])]
        if self.keeps_older:
            sources += self.outputs
        return frozenset(s.rpartition(".")[2] for s in sources)

    def reads(self, column: str) -> bool:
        if is_runs(column):
            return self.gathers is not None or (self.inputs is not None and column in self.inputs)
        return self.needs is None or column in self.needs


@dataclass(frozen=True)
class Graph:
    """All nodes in the order of the file. `result` are the output columns, None for what the terminal nodes return."""

    nodes: tuple[Node, ...]
    result: frozenset[str] | None
    input: dict[str, ColumnType]

    @property
    def entry(self) -> tuple[int, ...]:
        """The stack of the rows to which a failure is charged: those that were submitted."""
        return ()

    @property
    def input_rank(self) -> int:
        """The rank of what makes the pipeline's input: 0, which is no node's."""
        return 0

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
        """Mask of the nodes after `origin` that read the column it made; 0 when the column belongs to the result.

        Hidden columns too: rejected rows (`!n`) belong to the result, counts (`#n`) where the result may need them.
        """
        if column[0] in "#!":
            return 0 if column[0] == "!" or self._result_within(int(column[1:])) else TO_THE_END
        meets, ends = self._meets(column, origin)
        if (ends and column in self.result) if self.result is not None else self.ends_with(origin):
            return 0
        mask = sum(n.bit for n in meets if n.reads(column))
        # A column that nobody reads goes with the commit of the next node.
        return mask or sum(n.bit for n in meets[:1]) or TO_THE_END

    def holders(self, column: str, origin: int) -> int:
        """Mask of the nodes that must be done before the column goes: its consumers, and those that these run again
        for; 0 when it belongs to the result."""
        mask = self.consumers(column, origin)
        for n in self.nodes:
            if n.kept_for and mask & n.bit:
                mask |= n.kept_for
        return mask

    def _meets(self, column: str, origin: int) -> tuple[list[Node], bool]:
        """The nodes that the column comes to as `origin` made it, and whether it comes to the end as such: behind a
        node that makes it anew, there is only the new one."""
        found: dict[int, Node] = {}
        ends = origin > 0 and not self.nodes[origin - 1].succs
        todo = [n.index for n in self.nodes if 0 in n.preds] if origin == 0 else list(self.nodes[origin - 1].succs)
        while todo:
            node = self.nodes[todo.pop() - 1]
            if node.index not in found:
                found[node.index] = node
                if column not in node.outputs:
                    todo += node.succs
                    ends = ends or not node.succs
        return [found[i] for i in sorted(found)], ends

    def in_result(self, column: str, origin: int) -> bool:
        """Whether the result may show what this node made: as it is, or in rows that skip a later maker."""
        makers = [n for n in self.descendants(origin) if n.keeps_older and column in n.outputs]
        return any(self.consumers(column, index) == 0 for index in [origin, *(n.index for n in makers)])

    def ends_with(self, origin: int) -> bool:
        """Whether, without an `output` list, what this node made is in the result: it is a last node, or it is inside
        an expansion that a last node only regroups."""
        if origin == 0 or not self.nodes[origin - 1].succs:
            return origin > 0
        stack, later = self.nodes[origin - 1].stack, self.descendants(origin)
        return any(n.identity and n in later and stack[: len(n.before)] == n.before for n in self.terminals)

    def _result_within(self, expanding: int) -> bool:
        """Whether a column of the result may be made inside the expansion of this node."""
        inside = [n for n in self.nodes if expanding in n.stack]
        if self.result is None:
            return any(self.ends_with(n.index) for n in inside)
        return any(not n.succs or not self.result.isdisjoint(n.outputs) for n in inside)

    @cached_property
    def ordered(self) -> tuple[Node, ...]:
        """All nodes, each after its predecessors; a file may list them in another order."""
        return tuple(sorted(self.nodes, key=lambda n: -len(self.descendants(n.index))))

    def ancestors(self, node: Node) -> list[Node]:
        """Nodes before this one, each after its predecessors."""
        return [n for n in self.ordered if node in self.descendants(n.index)]

    def _made_by(self, stage: str) -> Made:
        if stage == "input":
            return {c: (t, ()) for c, t in self.input.items()}
        # A stage that is not there is reported elsewhere; until then it declares nothing.
        found = next((n for n in self.nodes if n.name == stage), None)
        return {} if found is None else _made(found, self._visible(found) if found.keeps_older else {})

    def _visible(self, node: Node) -> Made:
        """Declared columns that come to a node: the last maker on its way counts."""
        found = self._made_by("input")
        for other in self.ancestors(node):
            found |= _made(other, found)
        return found

    def types_of(self, node: Node) -> dict[str, ColumnType]:
        """Declared types of the columns that a node reads, by its own names; undeclared ones are absent.

        What was made inside expansions that the node's rows are not in comes grouped.
        """
        visible = self._visible(node)
        if node.inputs is None:
            return {c: seen_at(made, node.at) for c, made in visible.items()}
        return {local: kind for local, source in node.inputs.items() if (kind := self._type_of(source, node, visible))}

    def type_of(self, source: str, node: Node) -> ColumnType | None:
        """The declared type in which a node sees `column` or `stage.column`; None where none is declared."""
        return self._type_of(source, node, self._visible(node))

    def _type_of(self, source: str, node: Node, visible: Made) -> ColumnType | None:
        stage, _, column = source.rpartition(".")
        made = (self._made_by(stage) if stage else visible).get(column)
        return None if made is None else seen_at(made, node.at)


def _made(node: Node, visible: Made) -> Made:
    kinds = dict(node.outputs)
    for column in kinds.keys() & visible.keys() if node.keeps_older else ():
        # Rows that skip keep what they had.
        older = seen_at(visible[column], node.at)
        kinds[column] = replace(kinds[column], nullable=kinds[column].nullable or older.nullable)
    return {column: (kind, node.stack) for column, kind in kinds.items()}


def seen_at(made: tuple[ColumnType, tuple[int, ...]], at: tuple[int, ...]) -> ColumnType:
    """The type of a column of this type and stack, as a row at another stack sees it."""
    kind, stack = made
    shared = next((i for i, (a, b) in enumerate(zip(stack, at, strict=False)) if a != b), min(len(stack), len(at)))
    for _ in stack[shared:]:
        kind = grouped(kind)
    return kind
