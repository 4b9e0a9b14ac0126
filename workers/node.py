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
    """One stage of one pipeline version, or several that are fused, as one worker serves them.

    Its `entrances` are the places at which it claims jobs. `passed` is how many of the worker's stages the jobs of this
    one have behind them; `twin` is where the same stages stand in the graph of the pipeline's runs.
    """

    pipeline: Pipeline
    number: int
    group: Group
    lanes: tuple[Transitions, ...]
    incarnation: str
    worker: str
    lease_ms: int
    passed: int = 0
    twin: NodeContext | None = None

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
    def keeps_rows(self) -> bool:
        """Whether some of a job's rows can fail here and the others go on, where it was submitted so. Where a run reads
        and writes, a chunk is one thing: it is done, or tried again."""
        return len(self.node.at) >= len(self.pipeline.graph.entry)

    @property
    def key(self) -> str:
        """`pipeline@version/stage` of the first node, as ready sets and load counters are named."""
        return f"{self.pipeline.ref}/{self.group.first.name}"

    def entrances(self) -> tuple[NodeContext, ...]:
        """This, and what is left of it for jobs that stand at one of its later nodes; the same of its twin."""
        behind = (replace(self, group=self.group.behind(n), passed=n) for n in range(1, len(self.group.nodes)))
        return (self, *behind, *(self.twin.entrances() if self.twin is not None else ()))
