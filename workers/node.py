"""Which node this worker owns, and how it is to treat it: everything that the loop's parts share. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from torchrelay.config.graph import Node
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.spec import StageConfig
from torchrelay.queues.transitions import Transitions


@dataclass(frozen=True, slots=True)
class NodeContext:
    """One stage of one pipeline version, as one worker serves it."""

    pipeline: Pipeline
    number: int
    node: Node
    spec: StageConfig
    lanes: tuple[Transitions, ...]
    incarnation: str
    worker: str
    lease_ms: int

    @property
    def key(self) -> str:
        """`pipeline@version/stage`, as ready sets and load counters are named."""
        return f"{self.pipeline.ref}/{self.node.name}"
