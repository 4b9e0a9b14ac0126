"""CUDA graphs of a model's calls: recorded once per shape, then replayed without Python or launches between kernels.

Promise: what a replay returns is the caller's own, and stays as it is through later replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["PLAIN", "Recording", "can_record", "record"]

Leaves = list[Any]
# What a call may take and return beside tensors.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded call. It reads and writes the same memory each time: `inputs` and `outputs`."""

    inputs: Leaves
    outputs: Leaves
    replay: Callable[[], None]

    def __call__(self, leaves: Sequence[Any]) -> Leaves:
        """The outputs for these inputs, copied: the next replay writes over its own, and over those of other shapes.

        A tensor may have fewer rows than were recorded; the outputs for the others mean nothing then.
        """
        for static, leaf in zip(self.inputs, leaves, strict=True):
            if isinstance(static, torch.Tensor):
                (static if static.shape == leaf.shape else static[: len(leaf)]).copy_(leaf)
        self.replay()
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.outputs]


def can_record(leaves: Sequence[Any]) -> bool:
    """Whether these are tensors of a GPU and plain values: anything else could change without the graph's knowing."""
    return all(leaf.is_cuda if isinstance(leaf, torch.Tensor) else isinstance(leaf, PLAIN) for leaf in leaves)


def record(run: Callable[[], Leaves], pool: Any) -> tuple[Leaves, Callable[[], None]]:
    """Records what `run` launches: (its outputs, what launches all of it again).

    `pool` is the memory that recordings share. They may, since replays follow each other on one stream, and outputs
    are copied before the next.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # its stubs lack types
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries choose algorithms and take workspaces in the first calls, which a recording must not hold.
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()
    return outputs, graph.replay
