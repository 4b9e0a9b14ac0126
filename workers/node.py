"""Which nodes this worker owns, and how it is to treat them: everything that the loop's parts share. Values only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchrelay.config.fusing import Group
from torchrelay.config.graph import Node
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.spec import StageConfig
from torchrelay.queues.transitions import Transitions


@dataclass(frozen=True, slots=True)
class NodeContext:
    """One stage of one pipeline version, or several that are fused, as one worker serves them."""

    pipeline: Pipeline
    number: int
    group: Group
    lanes: tuple[Transitions, ...]
    incarnation: str
    worker: str
    lease_ms: int

    @property
    def node(self) -> Node:
        """The node at which its jobs are claimed."""
        return self.group.first

    @property
    def spec(self) -> StageConfig:
        """The entry of that node."""
        return self.group.stages[0]

    @property
    def nodes(self) -> tuple[int, int]:
        """The numbers of the first and the last node that it runs, as the transitions take them."""
        return self.group.first.index, self.group.last.index

    @property
    def keys(self) -> list[str]:
        """`pipeline@version/stage` of each node, as ready sets and load counters are named."""
        return [f"{self.pipeline.ref}/{name}" for name in self.group.names]

    def entrances(self) -> tuple[NodeContext, ...]:
        """This, and what is left of it for jobs that stand at one of its later nodes."""
        behind = (self.group.behind(passed) for passed in range(1, len(self.group.nodes)))
        return (self, *(replace(self, group=group) for group in behind))
