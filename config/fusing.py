"""Stages that one worker runs one behind the other (`fuse`): what may be fused, and where each finds its columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torchrelay.config.flow import Report, columns_of
from torchrelay.config.graph import Graph, Node
from torchrelay.config.spec import BatchSpec, PipelineSpec, StageConfig
from torchrelay.config.types import ColumnType

__all__ = ["Group", "Source", "check_fuse"]


class Source(NamedTuple):
    """Where a stage finds a column: `column` of stage number `maker` of its group, or under the name `column` among
    what comes from outside (`maker` None)."""

    maker: int | None
    column: str


@dataclass(frozen=True)
class Group:
    """The stages that one worker serves: one, or several that each follow the one before and nothing else."""

    graph: Graph
    nodes: tuple[Node, ...]
    stages: tuple[StageConfig, ...]

    @classmethod
    def of(cls, spec: PipelineSpec, graph: Graph, names: Sequence[str]) -> Group:
        """The group of these stages, which `check_fuse` passed."""
        nodes = tuple(graph.node(name) for name in names)
        return cls(graph, nodes, tuple(spec.stages[n.index - 1] for n in nodes))

    def behind(self, passed: int) -> Group:
        """What is left of it for jobs that passed so many of its stages."""
        return Group(self.graph, self.nodes[passed:], self.stages[passed:])

    @property
    def first(self) -> Node:
        return self.nodes[0]

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    @property
    def names(self) -> list[str]:
        return [n.name for n in self.nodes]

    @cached_property
    def reads(self) -> tuple[Mapping[str, Source] | None, ...]:
        """Per stage, its own name of each column that it reads -> where that is; None for all that comes from outside,
        which only the first may read."""
        keys: dict[str, str] = {}
        found: list[Mapping[str, Source] | None] = []
        for number, (node, stage) in enumerate(zip(self.nodes, self.stages, strict=True)):
            if node.inputs is None and number == 0:
                found.append(None)
                continue
            inputs = node.inputs
            if inputs is None:
                inputs = {c: c for c in columns_of(self.graph, node) or ()}
            mine: dict[str, Source] = {}
            for local, text in inputs.items():
                mine[local] = self._inside(number, text) or Source(None, self._key(number, stage, local, text, keys))
            found.append(mine)
        return tuple(found)

    def _inside(self, number: int, text: str) -> Source | None:
        stage, _, column = text.rpartition(".")
        for maker in range(number - 1, -1, -1):
            if column in self.nodes[maker].outputs and stage in ("", self.nodes[maker].name):
                return Source(maker, column)
        return None

    def _key(self, number: int, stage: StageConfig, local: str, text: str, keys: dict[str, str]) -> str:
        """Stages that read the same column share it, unless one of them has it padded."""
        if number == 0:
            if local not in stage.batch.pad:
                keys.setdefault(text, local)
            return local
        if local in stage.batch.pad:
            return f"{number}.{local}"
        if text not in keys and self.nodes[0].inputs is None and "." not in text:
            keys[text] = text if text not in self.stages[0].batch.pad else f"{number}.{local}"
        return keys.setdefault(text, f"{number}.{local}")

    def _outside(self) -> Iterator[tuple[int, str, str, str]]:
        """Stage number, its own name, name outside, and what is meant, of each column that comes from outside."""
        for number, (node, reads) in enumerate(zip(self.nodes, self.reads, strict=True)):
            for local, source in (reads or {}).items():
                if source.maker is None:
                    yield number, local, source.column, (node.inputs or {}).get(local, local)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The columns that come from outside, by the names of `reads` -> `column` or `stage.column`; those that a first
        stage reads which reads all are not listed."""
        return {key: text for _, _, key, text in self._outside()}

    @property
    def reads_all(self) -> bool:
        """Whether all columns come from outside, beside `inputs`."""
        return self.first.inputs is None

    @cached_property
    def types(self) -> dict[str, ColumnType]:
        """Declared types of what comes from outside, by the names of `reads`."""
        types = [self.graph.types_of(node) for node in self.nodes]
        found = dict(types[0])
        found.update((key, types[number][local]) for number, local, key, _ in self._outside() if local in types[number])
        return found

    @cached_property
    def batch(self) -> BatchSpec:
        """How its batches are put together: as the first stage says, and padded for each that reads from outside."""
        pad, buckets = dict(self.stages[0].batch.pad), dict(self.stages[0].batch.buckets)
        for number, local, key, _ in self._outside():
            rules = self.stages[number].batch
            if number and local in rules.pad:
                pad[key] = rules.pad[local]
                if local in rules.buckets:
                    buckets[key] = rules.buckets[local]
        return self.stages[0].batch.model_copy(update={"pad": pad, "buckets": buckets})

    @cached_property
    def leaving(self) -> dict[str, int]:
        """Column -> number of the stage before the last that made it, of those that are wanted behind the group."""
        last, found = self.last, dict[str, int]()
        if not last.succs and self.graph.result is None:
            return {}
        for number, node in enumerate(self.nodes):
            for column in node.outputs:
                if number < len(self.nodes) - 1 and (last.keeps is None or column in last.keeps):
                    found[column] = number
                elif column in found:
                    del found[column]
        return found

    @cached_property
    def outputs(self) -> dict[str, ColumnType]:
        """Declared types of all that leaves it."""
        inner = {column: self.nodes[number].outputs[column] for column, number in self.leaving.items()}
        return inner | self.last.outputs

    def follows_device(self) -> bool:
        """Whether columns may come to it in another device's memory."""
        return any(n.kept_for & m.bit for n in self.graph.nodes for m in self.nodes)

    def maker_of(self, column: str) -> Node:
        """Which of its stages made a column that leaves it."""
        return self.nodes[self.leaving.get(column, -1)]

    @property
    def timeout_s(self) -> float:
        """Seconds that one run of all its stages may take: of each, as many forwards as the first one's rows need."""
        rows = self.stages[0].batch.max_rows
        return sum(s.timeout_s * -(-rows // s.batch.max_rows) for s in self.stages)

    @property
    def replicas(self) -> int:
        """How many workers serve it: as many as the stage that wants most."""
        return max(1, *(s.replicas.min for s in self.stages))


def check_fuse(spec: PipelineSpec, graph: Graph, report: Report) -> None:
    """Reports every group of `fuse` that one worker could not run with the same results."""
    seen: set[str] = set()
    known = [s.name for s in spec.stages]
    for i, names in enumerate(spec.fuse):
        if len(names) < 2:
            report(("fuse", i), "fuse joins two stages or more; name another, or take the list out")
        ok = True
        for j, name in enumerate(names):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"stages are {', '.join(known)}"
                report(("fuse", i, j), f"fuse names the unknown stage {name!r:.80}; {hint}")
                ok = False
            elif name in seen:
                report(("fuse", i, j), f"stage {name!r} stands in fuse twice; leave it in one place")
                ok = False
            seen.add(name)
        for j, text in _problems(spec, graph, names) if ok else ():
            report(("fuse", i, j), text)


def _problems(spec: PipelineSpec, graph: Graph, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    nodes = [graph.node(name) for name in names]
    stages = [spec.stages[n.index - 1] for n in nodes]
    for j, (node, stage) in enumerate(zip(nodes, stages, strict=True)):
        who = f"stage {node.name!r}"
        if j and (node.preds != (nodes[j - 1].index,) or nodes[j - 1].succs != (node.index,)):
            before = nodes[j - 1].name
            yield j, f"{who} is fused to {before!r}, and {_order(graph, nodes[j - 1], node)}; fuse stages of one chain"
            return
        if stage.device != stages[0].device:
            text = f"{who} wants device {stage.device}, {names[0]!r} {stages[0].device}; fuse stages of one device"
            yield j, text
        yield from ((j, f"{who} {text}") for text in _unfit(stage, last=node is nodes[-1]))
        if j and stage.batch.max_cost is not None:
            yield j, f"{who} has batch.max_cost, which only the first of fused stages may have; give it max_rows"
        if j and node.inputs is None and columns_of(graph, node) is None:
            text = "reads all columns, and which there are is not declared; add its inputs, or the pipeline's input"
            yield j, f"{who} {text}"


def _order(graph: Graph, one: Node, other: Node) -> str:
    """What else stands before or behind."""
    names = {n.index: n.name for n in graph.nodes} | {0: "input"}
    if one.index not in other.preds:
        return f"follows {', '.join(names[p] for p in other.preds)}"
    if len(other.preds) > 1:
        return f"also follows {', '.join(names[p] for p in other.preds if p != one.index)}"
    return f"{', '.join(names[s] for s in one.succs if s != other.index)} also follows {one.name!r}"


def _unfit(stage: StageConfig, *, last: bool) -> Iterator[str]:
    if stage.rows != "same":
        change = stage.rows if isinstance(stage.rows, str) else "collapse"
        yield f"has rows: {change}; only stages that keep their rows are fused"
    if stage.when is not None:
        yield "has `when`; only stages that every row enters are fused"
    if not stage.outputs and stage.use is not None:
        yield "is fused, so what it returns must be declared; add outputs: {COLUMN: TYPE}"
    if stage.wire.dtype is not None and not last:
        yield f"has wire.dtype {stage.wire.dtype}, which fusing would leave out and so change results; take one out"
