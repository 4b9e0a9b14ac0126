"""Batches made up for a stage whose model is to be split: they show how its forward calls it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchrelay.config.spec import BatchSpec
from torchrelay.config.types import ColumnType
from torchrelay.errors import StageLoadError
from torchrelay.stages.batch import Batch, assemble
from torchrelay.stages.splitting.calls import Reached, StandIn

if TYPE_CHECKING:
    from torchrelay.stages.torch_stage import TorchStage

__all__ = ["FIRST_ROWS", "Samples"]

log = logging.getLogger("torchrelay.stages")
# So long are ragged sizes in the two batches that show which of them vary: no two are alike, nor like a usual width.
_FIRST = (7, 13, 19, 29, 37, 43)
_SECOND = (11, 17, 23, 31, 41, 47)
FIRST_ROWS = 5
_ROWS = (FIRST_ROWS, 3)


class Samples:
    """Made-up batches for one stage, and the calls that its forward makes of them.

    Args:
        stage: the user's stage, loaded, with a stand-in as its model.
        name: the stage's, for errors.
        types: the declared types of the columns that it reads.
        rules: how its batches are padded.
    """

    def __init__(self, stage: TorchStage, name: str, types: Mapping[str, ColumnType], rules: BatchSpec) -> None:
        self._stage, self._name, self._types, self._rules = stage, name, types, rules
        if not types:
            raise StageLoadError(
                f"stage {name!r}: what it reads is not declared, so its model cannot be tried; add inputs, and types "
                "of the pipeline's input and of all outputs"
            )

    def two(self) -> list[tuple[int, tuple[Any, ...], Mapping[str, Any]]]:
        """The calls for two batches that differ in all that can: their rows, arguments and keyword arguments."""
        return [(rows, *self.call(rows, n)) for n, rows in enumerate(_ROWS)]

    def call(self, rows: int, lengths: int) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The call of a batch of so many rows. `lengths`: of ragged sizes; 0 or 1 are those of `two`.

        Raises StageLoadError where forward raises before it calls the model.
        """
        stand_in: StandIn = self._stage.model
        stage = f"stage {self._name!r}"

        def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if torch.is_autocast_enabled(self._stage.device.type):
                raise StageLoadError(
                    "its forward calls the model under torch.autocast, of which parts know nothing; call it outside, "
                    "with torch: {dtype}, or use autocast in the model's own forward"
                )
            raise Reached((args, kwargs))

        try:
            batch = self._batch(rows, lengths)
            _, call = stand_in.during(answer, lambda: self._stage.infer(batch))
        except StageLoadError as error:
            raise StageLoadError(f"{stage}: {error}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise StageLoadError(
                f"{stage}: its forward raised {what:.200} for a made-up batch (zeros, of the declared "
                "types), before it called the model; parts need a forward that takes any such batch"
            ) from error
        found: tuple[tuple[Any, ...], Mapping[str, Any]] = call
        return found

    def end(self, rows: int, lengths: int, returned: Any) -> None:
        """Has the forward of such a batch go on from the model's call, with a made-up `returned`.

        Raises StageLoadError where it calls the model again. What else it raises may be due to what is made up.
        """
        stand_in: StandIn = self._stage.model
        batch = self._batch(rows, lengths)
        try:
            stand_in.during(lambda args, kwargs: returned, lambda: self._stage.infer(batch))
        except StageLoadError as error:
            raise StageLoadError(f"stage {self._name!r}: {error}") from error
        except Exception as error:
            log.debug("forward of stage %r raised for a made-up result of its model", self._name, exc_info=error)

    def _batch(self, rows: int, lengths: int) -> Batch:
        table, number = {}, 0
        for name, kind in self._types.items():
            shape = []
            for size in kind.shape if kind.is_numeric else (None,):
                shape.append(size if isinstance(size, int) else self._length(name, lengths, number))
                number += not isinstance(size, int)
            table[name] = _column(kind, rows, shape)
        batch = assemble([table], [rows], self._types, self._rules.pad, [{}], self._rules.buckets)
        return self._stage.tensors(batch, str(self._stage.device))

    def _length(self, name: str, lengths: int, number: int) -> int:
        buckets = self._rules.buckets.get(name)
        if lengths > 1:
            return next((b for b in buckets if b >= lengths), buckets[-1]) if buckets else lengths
        if buckets:
            return buckets[min(lengths, len(buckets) - 1)]
        return (_FIRST, _SECOND)[lengths][number % len(_FIRST)]


def _column(kind: ColumnType, rows: int, shape: list[int]) -> Any:
    if kind.is_numeric:
        zeros = np.zeros((rows, *shape), kind.np_dtype)
        return zeros if kind.stacked else list(zeros)
    if str(kind).startswith("str"):
        return [" ".join(["word"] * shape[0])] * rows
    return [bytes(shape[0])] * rows
