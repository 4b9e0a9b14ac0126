"""Stages that leave what they made in a GPU's memory (`handoff: device`): which may, and what must stay meanwhile.

The bytes are gone when the process that made them ends. So what such a stage read is kept until all its successors are
done, and it can run again from there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchrelay.config.flow import Report
from torchrelay.config.graph import Graph, Node
from torchrelay.config.spec import PipelineSpec, StageConfig

__all__ = ["check_handoff", "kept_for"]


def kept_for(spec: PipelineSpec, graph: Graph) -> dict[str, int]:
    """Stage -> mask of the nodes for which what it read is kept; the stages that need none are left out.

    Stages that are fused leave their columns together, as the last of them made them.
    """
    found: dict[str, int] = {}
    groups = {names[-1]: names for names in spec.fuse if names}
    for node, stage in zip(graph.nodes, spec.stages, strict=True):
        if stage.handoff == "device":
            mask = sum(1 << (s - 1) for s in node.succs)
            found.update(dict.fromkeys(groups.get(node.name, [node.name]), mask))
    return found


def check_handoff(spec: PipelineSpec, graph: Graph, report: Report) -> None:
    """Reports every stage that cannot hand over what it made in device memory."""
    inside = {name for names in spec.fuse for name in names[:-1]}
    for i, (node, stage) in enumerate(zip(graph.nodes, spec.stages, strict=True)):
        for text in _problems(node, stage, inside) if stage.handoff == "device" else ():
            report(("stages", i, "handoff"), f"stage {node.name!r} has handoff: device, {text}")


def _problems(node: Node, stage: StageConfig, inside: set[str]) -> Iterator[str]:
    if stage.device != "gpu":
        yield f"and runs on device: {stage.device}; only a GPU's memory is handed over: write device: gpu"
    if stage.shards is not None and stage.shards.mode == "pipeline":
        return  # between its parts it can, whatever comes behind them
    if not node.succs:
        yield "and no stage follows it: a result goes to the client through Redis; take it out"
    if stage.rows != "same":
        yield "and changes the number of rows; only a stage with rows: same leaves them where they are"
    if stage.wire.dtype is not None:
        yield "and wire.dtype: what stays on a device is not converted; convert it in forward, and take one of them out"
    if node.name in inside:
        yield "and is fused to the stage behind it, so nothing of it leaves; write it at the last of the fused stages"
