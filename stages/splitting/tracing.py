"""The graph of a model, traced by torch.export on the meta device, and where it can be cut.

Promise: nothing is computed, no weights are needed, and the same code, torch and call give the same graph everywhere.
Its batch size and all sizes that vary stay symbols; what would fix one of them is refused. A place is fit for a cut
where everything that later operations need is there for each row by itself, or can be computed again from sizes alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_unflatten

from torchrelay.errors import InputError
from torchrelay.stages.splitting.calls import Call

__all__ = ["Traced", "Untraceable", "trace"]

_ROOT = "root"
# They check what is known to be so, in terms of the meta device.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
_VIEWS = ("aten::to.", "aten::_to_copy", "aten::expand")


class Untraceable(Exception):
    """The model does not trace, or not with sizes that vary; its text says why."""


class _Called(nn.Module):
    """The model as a function of the tensors of a call alone."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.root = model
        self._call = call

    def forward(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self._call.rebuilt(tensors)
        return self.root(*args, **kwargs)


def trace(model: nn.Module, call: Call) -> Traced:
    """Traces a model that is on the meta device, as this call calls it. Raises Untraceable."""
    samples = tuple(torch.empty(a.shape, dtype=a.torch_dtype, device="meta") for a in call.arguments)
    varying = tuple(dict.fromkeys(a.varies, Dim.AUTO) for a in call.arguments)
    quiet = [(log, log.level) for log in map(logging.getLogger, ("torch.export", "torch.fx"))]
    for log, _ in quiet:
        log.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad():
            program = torch.export.export(_Called(model, call), samples, dynamic_shapes=(varying,), strict=False)
    except Exception as error:  # whatever the model's own code raises
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Untraceable(f"{type(error).__name__}: {text:.200}") from error
    finally:
        for log, level in quiet:
            log.setLevel(level)
    return Traced(program, call)


class Traced:
    """A traced model as operations in the order in which they run.

    `nodes` are these operations, `inputs` stand for the tensors of the call, `names` has for each node that stands for
    a tensor of the model that tensor's name, `constants` the values of those that the model's code made.
    """

    def __init__(self, program: ExportedProgram, call: Call) -> None:
        self.call = call
        self.out_spec = program.call_spec.out_spec
        self.names: dict[fx.Node, str] = {}
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.inputs: list[fx.Node] = []
        self._take_inputs(program)
        if any(o.kind is not OutputKind.USER_OUTPUT for o in program.graph_signature.output_specs):
            raise Untraceable("it changes its own buffers when it is called")
        graph = program.graph
        self.nodes = [n for n in graph.nodes if n.op in ("call_function", "get_attr") and not _is_check(n)]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.results: Sequence[Any] = graph.output_node().args[0]
        self.module = program.graph_module
        self._find_symbols()
        self._per_row = self._depending()
        self._last_use = self._uses()
        self._forbidden = self._in_place()

    def _take_inputs(self, program: ExportedProgram) -> None:
        placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            node = placeholders.get(getattr(spec.arg, "name", ""))
            if node is None:
                continue
            if spec.kind is InputKind.USER_INPUT:
                self.inputs.append(node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.names[node] = str(spec.target).removeprefix(f"{_ROOT}.")
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                value = program.constants[str(spec.target)]
                if value.is_meta:
                    self.names[node] = str(spec.target).removeprefix(f"{_ROOT}.")
                else:
                    self.constants[node] = value
            else:
                raise Untraceable(f"it holds a {spec.kind.name.lower()}")

    def _find_symbols(self) -> None:
        """The sizes that vary, and where they are read from."""
        self.sources: dict[Any, tuple[int, int]] = {}
        self.rows: Any = None
        for number, (node, argument) in enumerate(zip(self.inputs, self.call.arguments, strict=True)):
            shape = node.meta["val"].shape
            for dim in argument.varies:
                size = shape[dim]
                if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                    raise Untraceable(f"it fixes dimension {dim} of argument {number} to {size}")
                self.sources.setdefault(size.node.expr, (number, dim))
            if argument.rows and argument.varies and 0 in argument.varies:
                self.rows = shape[0].node.expr
        if self.rows is None:
            raise Untraceable("it fixes the number of rows")
        self.symbols = [s for s in self.sources if s != self.rows]
        for node in self.nodes:
            for value in _values(node):
                unknown = set().union(*(e.free_symbols for e in _sizes(value))) - set(self.sources)
                if unknown:
                    raise Untraceable(f"{node.name} has a size that depends on values")
        environment = next((_fake(n).shape_env for n in self.inputs if _fake(n) is not None), None)
        guards = [environment.replace(g.expr) for g in environment.guards] if environment is not None else []
        self._guards = [g for g in guards if g != True and g.free_symbols]  # noqa: E712  # of sympy

    def _depending(self) -> dict[fx.Node, bool]:
        """Of each node, whether it depends on values of the call, and not only on its sizes."""
        found = dict.fromkeys(self.inputs, True)
        for node in self.nodes:
            found[node] = not self.is_size(node) and any(found.get(n, False) for n in node.all_input_nodes)
        return found

    def _uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            for other in node.all_input_nodes:
                last[other] = i
        last.update((node, len(self.nodes)) for node in self.results if isinstance(node, fx.Node))
        return last

    @cached_property
    def digest(self) -> str:
        """Of the operations and what they take; the same wherever the same model was traced."""
        text = "\n".join(f"{n.name} {n.target} {n.args} {n.kwargs} {_values(n)}" for n in self.nodes)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_size(self, node: fx.Node) -> bool:
        """Whether it is a number, computed from sizes."""
        return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))

    def again(self, node: fx.Node) -> bool:
        """Whether a later part computes it again, since it does not depend on the rows."""
        return not self._per_row.get(node, False)

    def sizes_of(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """The values of `symbols` in a call with these tensors.

        Raises InputError where the model, as traced, is not for them.
        """
        values = {symbol: tensors[number].shape[dim] for symbol, (number, dim) in self.sources.items()}
        sizes = [values[s] for s in self.symbols]
        key = (values[self.rows], *sizes)
        if key not in self._fitting:
            # One row is computed like several.
            wrong = [g for g in self._guards if not g.xreplace({**values, self.rows: max(2, values[self.rows])})]
            if wrong:
                told = ", ".join(f"{s} = {v}" for s, v in values.items())
                raise InputError(f"the model was traced for sizes with {wrong[0]}, and here {told}")
            self._fitting.add(key)
        return sizes

    @cached_property
    def _fitting(self) -> set[tuple[int, ...]]:
        return set()

    def planned_sizes(self) -> list[int]:
        """The values of `symbols` in the sample that was traced."""
        return [self.call.arguments[number].shape[dim] for number, dim in map(self.sources.__getitem__, self.symbols)]

    def number(self, expression: Any, rows: int, sizes: Sequence[int]) -> int:
        """A size for so many rows and these values of `symbols`."""
        return int(expression.xreplace({self.rows: rows, **dict(zip(self.symbols, sizes, strict=True))}))

    def returned(self, rows: int, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """What the model returns for so many rows of the sample's sizes; `make` gives a tensor like one on meta."""
        sizes = self.planned_sizes()

        def concrete(size: Any) -> Any:
            return self.number(size.node.expr, rows, sizes) if isinstance(size, torch.SymInt) else size

        def one(result: Any) -> Any:
            value = result.meta["val"] if isinstance(result, fx.Node) else result
            if not isinstance(value, torch.Tensor):
                return concrete(value)
            return make(torch.empty([concrete(s) for s in value.shape], dtype=value.dtype, device="meta"))

        return tree_unflatten([one(result) for result in self.results], self.out_spec)

    def row_bytes(self, node: fx.Node, sizes: Sequence[int]) -> int:
        """How many bytes a row of it has."""
        value = node.meta["val"]
        count = value.element_size()
        for size in value.shape[1:]:
            count *= self.number(size.node.expr, 1, sizes) if isinstance(size, torch.SymInt) else size
        return int(count)

    def crossing(self, sizes: Sequence[int]) -> list[list[fx.Node] | None]:
        """For a cut before each operation: what crosses, in order; None where none can be. `sizes` of `symbols` say
        what is small."""
        found: list[list[fx.Node] | None] = [None]
        live = [n for n in self.inputs if n in self._last_use]
        for place in range(1, len(self.nodes)):
            made = self.nodes[place - 1]
            if self._per_row[made] and made in self._last_use:
                live.append(made)
            live = [n for n in live if self._last_use[n] >= place]
            bases = list(dict.fromkeys(self._base(n, sizes) for n in live))
            fit = bases and not self._forbidden[place] and all(map(self._fit, bases))
            found.append(sorted(bases, key=self._order) if fit else None)
        return found

    def base_of(self, node: fx.Node, sizes: Sequence[int]) -> fx.Node:
        """What crosses for it: itself, or what it is a view or another type of, where that is no larger."""
        return self._base(node, sizes)

    def _order(self, node: fx.Node) -> int:
        return self.place[node] if node in self.place else self.inputs.index(node) - len(self.inputs)

    def _base(self, node: fx.Node, sizes: Sequence[int]) -> fx.Node:
        while node in self.place and _is_view(node) and self._fit_type(node):
            source = next((n for n in node.all_input_nodes if self._per_row.get(n)), None)
            if source is None or not self._fit(source) or self.row_bytes(source, sizes) > self.row_bytes(node, sizes):
                break
            node = source
        return node

    def _fit_type(self, node: fx.Node) -> bool:
        return (
            isinstance(node.meta.get("val"), torch.Tensor)
            and len([n for n in node.all_input_nodes if self._per_row.get(n)]) == 1
        )

    def _fit(self, node: fx.Node) -> bool:
        """Whether its rows are the batch's, each by itself."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return False
        first, *others = value.shape
        if not isinstance(first, torch.SymInt) or first.node.expr != self.rows:
            return False
        return not any(isinstance(s, torch.SymInt) and self.rows in s.node.expr.free_symbols for s in others)

    def _in_place(self) -> list[bool]:
        """Before which operations a cut would come between a tensor and what changes it in place."""
        found = [False] * (len(self.nodes) + 1)
        for i, node in enumerate(self.nodes):
            for changed in _changes(node):
                root = changed
                while root in self.place and _is_view(root) and root.all_input_nodes:
                    root = root.all_input_nodes[0]
                if root in self.names or root in self.constants:
                    raise Untraceable(f"{node.name} changes a tensor of the model in place")
                for place in range(self.place.get(root, -1) + 1, i + 1):
                    found[place] = True
        return found


def _fake(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "fake_mode", None)


def _is_check(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name.removeprefix("aten::") in _CHECKS or getattr(node.target, "__name__", "") in _CHECKS


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _is_view(node: fx.Node) -> bool:
    schema = _schema(node)
    if schema is None or schema.is_mutable:
        return False
    if any(f"{schema.name}.".startswith(name) for name in _VIEWS):
        return True
    return any(r.alias_info is not None for r in schema.returns)


def _changes(node: fx.Node) -> Iterator[fx.Node]:
    schema = _schema(node)
    if schema is None or not schema.is_mutable:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            yield from (n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, fx.Node))


def _values(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value if isinstance(value, (list, tuple)) else [value]


def _sizes(value: Any) -> Iterator[Any]:
    for size in [*value.shape] if isinstance(value, torch.Tensor) else [value]:
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            yield size.node.expr
