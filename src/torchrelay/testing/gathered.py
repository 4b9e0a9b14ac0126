"""A stage of `run_stage` as the shards that it is cut into, one after the other, and what combines them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from torchrelay.config.columns import Column
from torchrelay.config.ragged import take_rows
from torchrelay.config.shards import check_shards, shard_of, spread
from torchrelay.config.spec import PipelineSpec, ShardsSpec, StageConfig
from torchrelay.errors import ConfigError
from torchrelay.stages import Made, Stage, StageContext
from torchrelay.stages.combine import Combine

__all__ = ["cut", "run_gathered"]

Run = Callable[[Any, StageConfig, StageContext, Mapping[str, Column], int], Made]
"""Loads a stage as the spec says, and runs it on a table of so many rows."""


def cut(spec: StageConfig, outputs: Mapping[str, str], shards: Mapping[str, Any]) -> list[StageConfig]:
    """The shards of a stage, and last what combines them. Raises ConfigError for a stage that cannot be cut so."""
    try:
        how = ShardsSpec.model_validate(dict(shards))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(["shards", *(str(part) for part in problem["loc"])])
        raise ConfigError(f"{place}: {problem['msg'].removeprefix('Value error, ')}") from error
    if how.mode != "gather":
        raise ConfigError(f"shards.mode: run_stage runs shards of mode gather, not {how.mode}; run the pipeline")
    stage = spec.model_copy(update={"outputs": dict(outputs), "shards": how})
    whole = PipelineSpec.model_construct(pipeline="test", stages=[stage], fuse=[])
    problems: list[str] = []
    check_shards(whole, lambda place, text: problems.append(text))
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))
    return spread(whole).stages


def run_gathered(
    stage: Any, parts: list[StageConfig], told: StageContext, table: Mapping[str, Column], total: int, run: Run
) -> Made:
    """What the whole makes of a table. A row that one shard rejects is rejected; why, the first of them says."""
    made: list[Made] = []
    for part in parts[:-1]:
        shard, shards = shard_of(part)
        # Each is loaded anew: what the one keeps is not the other's.
        one = copy.deepcopy(stage) if isinstance(stage, Stage) else stage
        made.append(run(one, part, replace(told, shard=shard, shards=shards), table, total))
    refused = {row: why for one in reversed(made) for row, why in one.rejected.items()}
    kept = [row for row in range(total) if row not in refused]
    combiner = Combine(**parts[-1].args)
    columns = {
        f"{name}:{shard}": take_rows(column, _places(one, kept, total))
        for shard, one in enumerate(made)
        for name, column in one.columns.items()
    }
    whole = run(combiner, parts[-1], told, columns, len(kept))
    return Made(whole.columns, None, refused | {kept[row]: why for row, why in whole.rejected.items()})


def _places(made: Made, kept: list[int], total: int) -> Any:
    """Where these rows are among those that a shard did not reject."""
    numbers = np.array([row for row in range(total) if row not in made.rejected], np.int64)
    return np.searchsorted(numbers, np.array(kept, np.int64))
