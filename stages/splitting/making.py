"""Makes the plan of a split: tries the stage, traces its model or looks at its modules, measures, and cuts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from torchrelay.config.shards import PartConfig
from torchrelay.config.types import ColumnType
from torchrelay.errors import InputError, StageLoadError, TorchrelayError
from torchrelay.stages.faults import is_out_of_memory
from torchrelay.stages.splitting.balance import cut_evenly
from torchrelay.stages.splitting.calls import Call
from torchrelay.stages.splitting.crossing import state_bytes
from torchrelay.stages.splitting.measuring import made_up, seconds_of
from torchrelay.stages.splitting.modules import Chain, find_chain
from torchrelay.stages.splitting.pieces import Cut, build_piece
from torchrelay.stages.splitting.plan import Part, SplitPlan
from torchrelay.stages.splitting.samples import FIRST_ROWS, Samples
from torchrelay.stages.splitting.source import Source
from torchrelay.stages.splitting.standing import stand_in_for
from torchrelay.stages.splitting.tracing import Traced, Untraceable, trace
from torchrelay.stages.splitting.trying import ModelCall, keeps_nothing, try_model
from torchrelay.stages.stage import StageContext
from torchrelay.stages.weights import set_tensor

if TYPE_CHECKING:
    from torchrelay.stages.torch_stage import TorchStage

__all__ = ["graph_cuts", "make_plan"]

log = logging.getLogger("torchrelay.stages")
_MOST_ROWS = {"cuda": 256, "cpu": 31}
# Of ragged rows on the CPU, so many values: more take memory, and tell no more.
_MOST_VALUES = 512
# Ragged sizes to measure with, the first that the model takes.
_LENGTHS = (128, 64, 32, 16, 8, 1)


def make_plan(stage: TorchStage, context: StageContext, spec: PartConfig, types: Mapping[str, ColumnType]) -> SplitPlan:
    """Works out where a stage's model is cut.

    Args:
        stage: the user's, not loaded; of no other use afterwards.
        context: where it is measured.
        spec: the first part.
        types: the declared types of the columns that the stage reads.

    Raises:
        StageLoadError: the stage cannot be split; the text names the stage, and says what to do.
    """
    try:
        source = stand_in_for(stage, context)
        try:
            return _Maker(stage, source, spec, types).make()
        finally:
            source.close()
            stage.close()
    except StageLoadError as error:
        if f"stage {spec.of!r}" in str(error):
            raise
        raise StageLoadError(f"stage {spec.of!r}: {error}") from error
    except TorchrelayError:
        raise
    except Exception as error:
        raise StageLoadError(f"stage {spec.of!r} cannot be split: {type(error).__name__}: {error}") from error


def graph_cuts(traced: Traced, cuts: Sequence[int]) -> list[Cut]:
    """The parts of a traced model that is cut before these operations."""
    crossing = traced.crossing(traced.planned_sizes())
    bounds = [0, *cuts, len(traced.nodes)]
    went = [None, *(crossing[c] if c < len(crossing) else None for c in cuts), None]
    if any(nodes is None for nodes in went[1:-1]):
        raise StageLoadError("its kept split plan cuts where this worker's torch cannot")
    return [Cut(bounds[i], bounds[i + 1], went[i], went[i + 1]) for i in range(len(bounds) - 1)]


class _Maker:
    def __init__(self, stage: TorchStage, source: Source, spec: PartConfig, types: Mapping[str, ColumnType]) -> None:
        self._stage, self._source, self._spec = stage, source, spec
        self._samples = Samples(stage, spec.of, types, spec.batch)
        self._device = stage.device
        self._by_memory = spec.shards is not None and spec.shards.balance == "memory"

    def make(self) -> SplitPlan:
        call = Call.of(self._samples.two())
        try:
            traced = trace(self._source.model, call)
        except Untraceable as error:
            log.info("stage %r is cut between modules, as its model does not trace: %s", self._spec.of, error)
            return self._by_modules(call, str(error))
        return self._by_graph(traced)

    def _by_graph(self, traced: Traced) -> SplitPlan:
        self._samples.end(FIRST_ROWS, 0, traced.returned(FIRST_ROWS, lambda like: made_up(like, self._device)))
        sizes = traced.planned_sizes()
        crossing = traced.crossing(sizes)
        tensors, seconds = self._measured(traced)
        measured = traced.sizes_of(tensors)
        nbytes = [
            np.inf if nodes is None else state_bytes([traced.row_bytes(n, measured) for n in nodes])
            for nodes in crossing
        ]
        costs = _weights_of(traced) if self._by_memory else seconds.tolist()
        cuts = cut_evenly(costs, nbytes, self._spec.count)
        if cuts is None:
            places = sum(np.isfinite(nbytes[1:]))
            raise StageLoadError(
                f"its model has {places} places where it can be cut, too few for {self._spec.count} parts; what "
                "crosses must have the batch's rows first. Lower shards.count, or use mode: gather or tensor"
            )
        parts = []
        for i, cut in enumerate(graph_cuts(traced, cuts)):
            piece = build_piece(traced, cut, self._device, sizes)
            parameters, weight_bytes = self._source.parameters(piece.names)
            names = [name for node in traced.nodes[cut.start : cut.stop] if (name := _module_of(traced, node))]
            time = float(seconds[cut.start : cut.stop].sum())
            crosses = 0 if cut.goes is None else int(nbytes[cuts[i]])
            parts.append(
                Part(names[0] if names else "", names[-1] if names else "", time, parameters, weight_bytes, crosses)
            )
        return SplitPlan("graph", "", traced.call, traced.digest, tuple(cuts), tuple(parts))

    def _measured(self, traced: Traced) -> tuple[list[torch.Tensor], np.ndarray]:
        """For the largest batch that the model and the device take."""
        most = self._rows()
        for length in _LENGTHS:
            ragged = traced.symbols and self._device.type == "cpu"
            rows = min(most, max(3, _MOST_VALUES // length)) if ragged else most
            while True:
                try:
                    tensors = traced.call.tensors(*self._samples.call(rows, length))
                    traced.sizes_of(tensors)
                    return tensors, seconds_of(traced, tensors, self._device)
                except InputError:
                    break  # so long a row is not for this model
                except RuntimeError as error:
                    if not is_out_of_memory(error) or rows == 1:
                        raise StageLoadError(f"its traced model does not run: {error}") from error
                rows = most = max(1, rows // 2)
        raise StageLoadError("its traced model takes no batch of any length that was tried")

    def _rows(self) -> int:
        return max(3, min(self._spec.batch.max_rows, _MOST_ROWS.get(self._device.type, _MOST_ROWS["cpu"])))

    def _by_modules(self, call: Call, why: str) -> SplitPlan:
        model, source, count = self._source.model, self._source, self._spec.count
        chain = find_chain(model, count)
        what = f"its model does not trace ({why})"
        if chain is None:
            raise StageLoadError(
                f"{what}, and it has no nn.Sequential or nn.ModuleList of {count} modules or more to cut between; "
                "write it so, or split the stage by hand"
            )
        if not all(argument.rows for argument in call.arguments):
            raise StageLoadError(f"{what}, and is called with a tensor that has not the batch's rows first")
        for name in source.others():
            set_tensor(model, name, source.read(name, self._device))
        rows, length = self._rows(), _LENGTHS[3]
        calls: list[ModelCall] = [(n, *self._samples.call(n, length)) for n in (rows, rows - 1)]
        tried = try_model(model, chain, calls, self._device)
        self._samples.end(rows, length, tried.returned)
        # Middle parts need the call's own arguments too.
        own = state_bytes([t[:1].numel() * t.element_size() for t in call.tensors(*calls[0][1:])])
        nbytes = [float(size + own) for size in tried.row_bytes]
        costs = self._module_bytes(chain) if self._by_memory else tried.seconds
        cuts = self._module_cuts(
            costs, nbytes, lambda cut: keeps_nothing(model, chain, tried.form, cut, calls[1], self._device)
        )
        if cuts is None:
            raise StageLoadError(
                f"{what}, and between too few modules of {chain.path or 'the model'} can it be cut for {count} parts: "
                "code around them takes what one of them returned to more than the next one's call. Write this in a "
                "module of the chain, or split the stage by hand"
            )
        return self._parts_of(chain, call, why, tried.seconds, nbytes, cuts, tried.form)

    def _module_cuts(
        self, costs: Sequence[float], nbytes: Sequence[float], fits: Callable[[int], bool]
    ) -> list[int] | None:
        """The best cuts that fit; a cut is looked at only where it would be made."""
        left, known = list(nbytes), set[int]()
        while (cuts := cut_evenly(costs, left, self._spec.count)) is not None:
            for cut in set(cuts) - known:
                known.add(cut)
                if not fits(cut):
                    left[cut] = np.inf
            if all(np.isfinite(left[cut]) for cut in cuts):
                return cuts
        return None

    def _parts_of(
        self, chain: Chain, call: Call, why: str, seconds: list[float], nbytes: list[float], cuts: list[int], form: Any
    ) -> SplitPlan:
        parts, bounds = [], [0, *cuts, len(chain.names)]
        for start, stop in pairwise(bounds):
            names = chain.owned(self._source.model, start, stop, form)
            parameters, weight_bytes = self._source.parameters(names)
            crosses = 0 if stop == len(chain.names) else int(nbytes[stop])
            took = sum(seconds[start:stop])
            parts.append(Part(chain.names[start], chain.names[stop - 1], took, parameters, weight_bytes, crosses))
        return SplitPlan("modules", why, call, chain.digest, tuple(cuts), tuple(parts), form)

    def _module_bytes(self, chain: Chain) -> list[float]:
        return [
            float(self._source.parameters({n for n in self._source.names() if n.startswith(f"{name}.")})[1])
            for name in chain.names
        ]


def _weights_of(traced: Traced) -> list[float]:
    """Of each operation, the bytes of what the model owns and it takes, where that is taken first and last: a tensor
    that two parts need is in both."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    for place, node in enumerate(traced.nodes):
        for other in node.all_input_nodes:
            name = traced.names.get(other)
            if name is not None:
                value = other.meta["val"]
                nbytes[name] = value.numel() * value.element_size()
                first.setdefault(name, place)
                last[name] = place
    found = [0.0] * len(traced.nodes)
    for name, size in nbytes.items():
        for place in {first[name], last[name]}:
            found[place] += size
    return found


def _module_of(traced: Traced, node: fx.Node) -> str:
    """The module that an operation belongs to, as far as that is known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = str(stack[-1][0]) if stack else ""
    if name.startswith("root."):
        return name.removeprefix("root.")
    return next((traced.names[o].rpartition(".")[0] for o in node.all_input_nodes if o in traced.names), "")
