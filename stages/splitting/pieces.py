"""A part of a traced model as a module that can be called: its operations, the tensors it owns, what goes in and out.

Whatever an earlier part made and this one needs comes across, is a size, or is computed here again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils._pytree import tree_unflatten

from torchrelay.errors import StageLoadError
from torchrelay.stages.splitting.crossing import Crossing
from torchrelay.stages.splitting.tracing import Traced

__all__ = ["Cut", "GraphPiece", "Reader", "build_piece"]


class Reader(Protocol):
    """Where the values of a model's tensors come from."""

    def read(self, name: str, device: torch.device) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Cut:
    """A traced model from operation `start` to before `stop`; `came` crosses to it, `goes` from it on. `came` is None
    for the first part, `goes` for the last."""

    start: int
    stop: int
    came: Sequence[fx.Node] | None
    goes: Sequence[fx.Node] | None


class GraphPiece:
    """One part. `module` takes the tensors that come, then the numbers of `expressions`."""

    def __init__(
        self, traced: Traced, module: fx.GraphModule, owned: Mapping[str, str], expressions: Sequence[Any]
    ) -> None:
        self._traced = traced
        self.module: Any = module
        self._graph_module = module
        self._owned = owned
        self.expressions = expressions
        self._takes = sum(n.op == "placeholder" for n in module.graph.nodes) - len(expressions)

    @property
    def names(self) -> set[str]:
        """Of the model's tensors that it owns."""
        return set(self._owned.values())

    def fill(self, reader: Reader, device: torch.device) -> None:
        """Puts the values in, on the device; of a name that stands twice once."""
        read: dict[str, torch.Tensor] = {}
        for attribute, name in self._owned.items():
            if name not in read:
                read[name] = reader.read(name, device)
            setattr(self._graph_module, attribute, read[name])
        for name, value in list(self._graph_module.named_buffers()):
            if value.device != device and name not in self._owned and not name.startswith("host_"):
                setattr(self._graph_module, name, value.to(device))

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Crossing:
        """What the first part makes of a call."""
        tensors = self._traced.call.tensors(args, kwargs)
        return self.middle(Crossing(tensors, self._traced.sizes_of(tensors)))

    def middle(self, came: Crossing) -> Crossing:
        """What it makes of what came."""
        return Crossing(self._run(came), came.numbers)

    def last(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], came: Crossing) -> Any:
        """What the model returns, as the last part makes it; it does not look at the call again."""
        del args, kwargs
        return tree_unflatten(self._run(came), self._traced.out_spec)

    def _run(self, came: Crossing) -> list[Any]:
        came.check(self._takes, len(self._traced.symbols))
        rows = len(came.tensors[0])
        numbers = [self._traced.number(e, rows, came.numbers) for e in self.expressions]
        return list(self.module(*came.tensors, *numbers))


def build_piece(traced: Traced, cut: Cut, device: torch.device, sizes: Sequence[int]) -> GraphPiece:
    """The part as a module whose tensors have no values yet.

    Args:
        device: where it will run; what the trace has on the meta device goes there.
        sizes: those that were told to `Traced.crossing`.
    """
    return _Builder(traced, cut, device, sizes).build()


class _Builder:
    def __init__(self, traced: Traced, cut: Cut, device: torch.device, sizes: Sequence[int]) -> None:
        self._traced, self._cut, self._device, self._sizes = traced, cut, device, sizes
        self._graph = fx.Graph()
        self._root = nn.Module()
        self._made: dict[fx.Node, fx.Node] = {}
        self._numbers: dict[Any, fx.Node] = {}
        self._owned: dict[str, str] = {}

    def build(self) -> GraphPiece:
        came = self._traced.inputs if self._cut.came is None else self._cut.came
        for i, node in enumerate(came):
            self._made[node] = self._graph.placeholder(f"came_{i}")
        self._rows = self._made[next(n for n in came if self._traced._fit(n))]
        mine = self._traced.nodes[self._cut.start : self._cut.stop]
        for node in mine:
            self._copy(node)
        goes = self._traced.results if self._cut.goes is None else self._cut.goes
        self._graph.output(tuple(self._get(n) if isinstance(n, fx.Node) else n for n in goes))
        self._graph.eliminate_dead_code()
        module = fx.GraphModule(self._root, self._graph)
        used = {n.target for n in self._graph.nodes if n.op == "get_attr"}
        owned = {attribute: name for attribute, name in self._owned.items() if attribute in used}
        return GraphPiece(self._traced, module.eval(), owned, list(self._numbers))

    def _get(self, node: fx.Node) -> fx.Node:
        made = self._made.get(node)
        if made is not None:
            return made
        traced = self._traced
        if node in traced.names:
            return self._tensor(node, f"w{len(self._owned)}", node.meta["val"], traced.names[node])
        if node in traced.constants:
            value = traced.constants[node]
            kind = "constant" if node.meta["val"].device.type == "meta" else "host"
            return self._tensor(node, f"{kind}_{len(self._made)}", value, None)
        if traced.is_size(node) and traced.place[node] < self._cut.start:
            return self._size(node)
        if traced.again(node):
            return self._copy(node)
        base = traced.base_of(node, self._sizes)
        if base is node or base not in self._made:
            raise StageLoadError(f"operation {node.name} is needed by a later part, and does not cross to it")
        return self._copy(node)

    def _size(self, node: fx.Node) -> fx.Node:
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            return self._copy(node)  # a float or truth value, computed of sizes
        expression = value.node.expr
        if expression == self._traced.rows:
            with self._graph.inserting_after(self._rows):
                made = self._graph.call_function(torch.ops.aten.sym_size.int, (self._rows, 0))
            self._made[node] = made
            return made
        if expression not in self._numbers:
            before = [n for n in self._graph.nodes if n.op == "placeholder"][-1]
            with self._graph.inserting_after(before):
                self._numbers[expression] = self._graph.placeholder(f"size_{len(self._numbers)}")
        self._made[node] = self._numbers[expression]
        return self._made[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._made:
            return self._made[node]
        if node.op == "get_attr":
            value = self._traced.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self._root.add_module(str(node.target), value)
            made = self._graph.get_attr(str(node.target))
        else:
            args = fx.map_arg(node.args, self._get)
            kwargs = fx.map_arg(node.kwargs, self._get)
            place = fx.node.map_aggregate
            target: Any = node.target
            made = self._graph.call_function(target, place(args, self._placed), place(kwargs, self._placed))
        self._made[node] = made
        return made

    def _placed(self, value: Any) -> Any:
        return self._device if isinstance(value, torch.device) and value.type == "meta" else value

    def _tensor(self, node: fx.Node, attribute: str, value: torch.Tensor, name: str | None) -> fx.Node:
        like = torch.empty(value.shape, dtype=value.dtype, device="meta") if name is not None else value
        self._root.register_buffer(attribute, like)
        if name is not None:
            self._owned[attribute] = name
        made = self._graph.get_attr(attribute)
        self._made[node] = made
        return made
