"""The runner of a group of stages: of one as it is, of several as `Fused`, with a way in at each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchrelay.config.fusing import Group
from torchrelay.config.spec import StageConfig
from torchrelay.stages.fused import Fused, Member
from torchrelay.stages.runner import Runner, make_runner
from torchrelay.stages.stage import StageContext

__all__ = ["FusedRunner", "make_group_runner"]


class FusedRunner(Runner):
    """Several stages that run one behind the other on each batch; used as a Runner is.

    Args:
        members: a runner of each stage, which loads, warms up and closes it.
        group: where each finds its columns.
    """

    def __init__(self, members: Sequence[Runner], group: Group) -> None:
        parts = [
            Member(member.stage, stage, group.graph.types_of(node), node.outputs)
            for member, stage, node in zip(members, group.stages, group.nodes, strict=True)
        ]
        # What is wrong with what leaves it is the last one's fault: of the others, it was checked before.
        self._fused = Fused(parts, group)
        super().__init__(self._fused, group.last.name, group.types, group.outputs, group.batch)
        self._members = tuple(members)
        self._behind = [self._from(i, group.behind(i)) for i in range(1, len(members))]

    def _from(self, passed: int, group: Group) -> Runner:
        left = self._members[passed:]
        return left[0] if len(left) == 1 else FusedRunner(left, group)

    @property
    def members(self) -> Sequence[Runner]:
        return self._members

    def behind(self, passed: int) -> Runner:
        return self._behind[passed - 1] if passed else self

    def load(self, context: StageContext) -> None:
        """Load each stage; errors as of Runner."""
        for member in self._members:
            member.load(context)
        self._settle(context.device)

    def _settle(self, device: str) -> None:
        self._device = self._fused.device = device
        for runner in self._behind:
            if isinstance(runner, FusedRunner):
                runner._settle(device)

    def overlap(self) -> None:
        super().overlap()
        for runner in self._behind:
            runner.overlap()

    def close(self) -> None:
        """Close each stage that was loaded."""
        for member in self._members:
            member.close()


def make_group_runner(found: Callable[[StageConfig], object], group: Group) -> Runner:
    """The runner of the stages that one worker serves.

    Args:
        found: gives what a stage's `use` names, '' or None for a stage without.
        group: the stages.

    Raises ConfigError and StageLoadError as `make_runner` does.
    """
    members = [
        make_runner(found(stage), stage, types=group.graph.types_of(node), outputs=node.outputs)
        for stage, node in zip(group.stages, group.nodes, strict=True)
    ]
    return members[0] if len(members) == 1 else FusedRunner(members, group)
