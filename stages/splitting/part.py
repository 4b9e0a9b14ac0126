"""One part of a split model as a stage: takes what came from the part before, runs its piece, and sends on.

The first part runs the user's `forward` up to its call of the model, the last one runs it from there on; parts between
run their piece alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from torchrelay.config.shards import PADDED, SIZES, STATE, PartConfig
from torchrelay.config.types import ColumnType
from torchrelay.errors import StageLoadError
from torchrelay.stages.batch import Batch
from torchrelay.stages.outputs import Expand
from torchrelay.stages.shapes import ShapedModel
from torchrelay.stages.splitting.calls import Reached
from torchrelay.stages.splitting.crossing import Crossing, groups_of, pack, unpack
from torchrelay.stages.splitting.joining import joined, rows_of
from torchrelay.stages.splitting.making import graph_cuts
from torchrelay.stages.splitting.modules import ModulePiece, find_chain
from torchrelay.stages.splitting.pieces import GraphPiece, build_piece
from torchrelay.stages.splitting.plan import SplitPlan
from torchrelay.stages.splitting.source import Source
from torchrelay.stages.splitting.standing import stand_in_for
from torchrelay.stages.splitting.tracing import Untraceable, trace
from torchrelay.stages.stage import StageContext
from torchrelay.stages.torch_stage import TorchStage

__all__ = ["PartStage"]


class PartStage(TorchStage):
    """A part of a stage's model, made by its plan.

    Args:
        stage: the user's stage, not loaded; it belongs to the part.
        plan: where the model is cut.
        part: which part it is.
        types: the declared types of the columns that the part reads.
    """

    # What is to be known before the device is asked.
    on_host = frozenset({SIZES, PADDED})

    def __init__(self, stage: TorchStage, plan: SplitPlan, part: PartConfig, types: Mapping[str, ColumnType]) -> None:
        self._stage, self._split, self._part, self._types = stage, plan, part, types
        self.share = stage.share
        self.dtype = stage.dtype
        self._options = stage.options
        self._piece: GraphPiece | ModulePiece | None = None
        self.model = None

    def load(self, context: StageContext) -> None:
        """Builds the model without values, finds the part in it, and reads that part's weights alone.

        Raises StageLoadError where the plan is not of this model.
        """
        source = stand_in_for(self._stage, context)
        self.device = self._stage.device
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._piece = self._graph_piece(source) if self._split.how == "graph" else self._module_piece(source)
                self._piece.fill(source, self.device)
        finally:
            source.close()
        if isinstance(self._piece, GraphPiece):
            module = self._piece.module
            if self._options.channels_last:
                module = module.to(memory_format=torch.channels_last)
            self._piece.module = self._shaped(module)
            self.model = self._piece.module
            if self.shaped is not None and self._piece.expressions:
                raise StageLoadError(
                    "torch: {compile, cuda_graphs} pad a part's rows, and it takes sizes that depend on them; take "
                    "these options out"
                )

    def _graph_piece(self, source: Source) -> GraphPiece:
        try:
            traced = trace(source.model, self._split.call)
        except Untraceable as error:
            raise StageLoadError(f"its model does not trace here, and did where it was split: {error}") from error
        if traced.digest != self._split.digest:
            raise StageLoadError(_other("graph"))
        cut = graph_cuts(traced, self._split.cuts)[self._part.shard]
        return build_piece(traced, cut, self.device, traced.planned_sizes())

    def _module_piece(self, source: Source) -> ModulePiece:
        if self._options.compile or self._options.cuda_graphs:
            raise StageLoadError(
                f"torch: {{compile, cuda_graphs}} need a model that traces, and this one does not ({self._split.why}); "
                "take these options out"
            )
        chain = find_chain(source.model, self._split.count)
        if chain is None or chain.digest != self._split.digest or self._split.form is None:
            raise StageLoadError(_other("chain of modules"))
        if self._split.cuts[-1] >= len(chain.names):
            raise StageLoadError("its kept split plan cuts where its chain of modules has ended")
        bounds = [0, *self._split.cuts, len(chain.names)]
        start, stop = bounds[self._part.shard], bounds[self._part.shard + 1]
        return ModulePiece(source.model, chain, start, stop, self._split.call, self._split.form)

    def close(self) -> None:
        """Drops the part, and closes the user's stage."""
        self._piece = None
        super().close()
        self._stage.close()

    def tensors(self, batch: Batch, device: str) -> Batch:
        """As of TorchStage, but what says which rows belong together stays on the host."""
        kept = {name: batch.columns[name] for name in self.on_host if name in batch.columns}
        moved = super().tensors(batch, device)
        return replace(moved, columns={**moved.columns, **kept})

    def forward(self, batch: Batch) -> Mapping[str, Any] | Expand:
        """Computes a batch: from the rows, or what came of them, to what goes on, or what the stage returns."""
        if self._part.shard == 0:
            return self._first(batch)
        sizes = np.asarray(batch.columns[SIZES])
        if self._part.shard < self._part.count - 1:
            return self._between(batch, sizes)
        return self._last(batch, sizes)

    def _first(self, batch: Batch) -> dict[str, Any]:
        piece, inner, rows = self._loaded, self._stage, len(batch)

        def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise Reached(piece.first(args, kwargs))

        _, crossing = inner.model.during(answer, lambda: inner.forward(batch))
        padded = _padded_to(batch)
        told = np.broadcast_to(np.array(padded or [0], np.int64), (rows, len(padded) or 1))
        return {**pack(crossing, rows), PADDED: told}

    def _between(self, batch: Batch, sizes: np.ndarray) -> dict[str, Any]:
        groups = groups_of(sizes)
        made = []
        for rows in groups:
            with self._of(len(rows)):
                made.append(pack(self._loaded.middle(self._came(batch, rows, sizes)), len(rows)))
        together: dict[str, Any] = joined(made, groups, len(batch), self._part.name)
        return together

    def _last(self, batch: Batch, sizes: np.ndarray) -> Mapping[str, Any] | Expand:
        padded = np.asarray(batch.columns[PADDED])
        groups = groups_of(sizes, padded)
        made = [self._end(batch, rows, sizes, padded[rows[0]].tolist()) for rows in groups]
        together: Mapping[str, Any] | Expand = joined(made, groups, len(batch), self._part.name, batch.rejected)
        return together

    def _end(self, batch: Batch, rows: np.ndarray, sizes: np.ndarray, padded: Sequence[int]) -> Any:
        piece, inner = self._loaded, self._stage
        came = self._came(batch, rows, sizes)
        part = rows_of(batch, rows, padded, self._part.batch.pad)

        def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return piece.last(args, kwargs, came)

        with self._of(len(rows)):
            returned, _ = inner.model.during(answer, lambda: inner.forward(part))
        for row, why in part.rejected.items():
            batch.reject(int(rows[row]), why)
        return returned

    def _came(self, batch: Batch, rows: np.ndarray, sizes: np.ndarray) -> Crossing:
        state = batch[STATE]
        mine = state if len(rows) == len(batch) else state[torch.from_numpy(rows).to(state.device)]
        return unpack(mine, sizes[rows[0]].tolist())

    def _of(self, rows: int) -> Any:
        """A compiled piece is told of how many rows a group has."""
        if isinstance(self.model, ShapedModel):
            self.model.batch_rows = rows
        return torch.inference_mode()

    @property
    def _loaded(self) -> GraphPiece | ModulePiece:
        assert self._piece is not None  # `load` came before
        return self._piece


def _other(what: str) -> str:
    return (
        f"the {what} of its model is another than when it was split: other code, or another version of torch; start "
        "all workers of a pipeline's version with the same"
    )


def _padded_to(batch: Batch) -> list[int]:
    """To which sizes the columns were padded, column by column, of each ragged axis."""
    return [
        int(batch.columns[name].shape[1 + axis])
        for name, padded in sorted((batch.padded or {}).items())
        for axis in padded.axes
    ]
