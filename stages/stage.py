"""The class that users derive their stages from, and what a stage is told when it loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrelay.stages.batch import Batch
    from torchrelay.stages.outputs import Expand

__all__ = ["Stage", "StageContext"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """Where a stage runs.

    `device` is a torch device name ("cpu", "cuda:0"); `shard` of `shards` is the part of the stage's model that this
    worker owns; `rank` of `world_size` is its place in a process group; `version` is the pipeline's; `base_dir` is
    the directory of the pipeline's YAML file.
    """

    device: str = "cpu"
    shard: int = 0
    shards: int = 1
    rank: int = 0
    world_size: int = 1
    version: str = ""
    base_dir: Path = field(default_factory=Path)

    def path(self, p: str | Path) -> Path:
        """A path given beside the YAML file, as one that can be opened from anywhere."""
        return self.base_dir / p


class Stage:
    """One step of a pipeline.

    `__init__` takes the stage's YAML `args`; it is cheap and touches no device. `load` is called once, in the
    process and thread that then calls `forward`.
    """

    # Whether its batches hold tensors on its device, and `infer` calls it: see TorchStage.
    _takes_tensors: bool = False

    def load(self, context: StageContext) -> None:
        """Get ready: read models and tables. Whatever it raises becomes a StageLoadError; no job is charged."""

    def forward(self, batch: Batch) -> Mapping[str, Any] | Expand:
        """Compute one batch.

        Args:
            batch: N rows of one or several jobs. Arrays are read-only.

        Returns: column -> N values: an ndarray or tensor `[N, ...]`, or a list of N. With `rows: expand`, an
            `Expand` of such columns and the number of rows made of each row.

        Raises: anything; the jobs of the batch are then tried again, each at last alone. `errors.RetryLater(after_s)`
            puts all of them off.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give back what `load` took. Called once, also when `load` failed half-way."""
