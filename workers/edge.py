"""How the columns that one node makes travel to the nodes that read them: what its `wire` says. No I/O."""

from __future__ import annotations

from functools import lru_cache, partial

from torchrelay.config.columns import Column
from torchrelay.config.graph import Graph, Node
from torchrelay.queues import wire
from torchrelay.queues.codec import HostMessage, join
from torchrelay.queues.job import is_hidden


class Edge:
    """Narrows and compresses the columns of one node, but for hidden ones and those that the result may show.

    Clients so read results exactly, and need no compression library.
    """

    def __init__(self, graph: Graph, node: Node) -> None:
        self._wire = node.wire
        self._in_result = lru_cache(1024)(partial(graph.in_result, origin=node.index))

    @classmethod
    def of(cls, graph: Graph, node: Node) -> Edge | None:
        """The node's edge, None where columns travel as they are."""
        return cls(graph, node) if node.wire.dtype or node.wire.compress else None

    def narrowed(self, name: str, column: Column) -> object:
        """What is encoded for this column."""
        dtype = self._wire.dtype
        return column if dtype is None or self._in_result(name) else wire.narrow(column, dtype)

    def compressed(self, name: str, message: HostMessage) -> HostMessage:
        """What is written to Redis for this column; shared memory is faster than any compression."""
        if self._wire.compress is None or is_hidden(name) or self._in_result(name):
            return message
        return wire.compress(join(message), self._wire.compress)


def check_codecs(graph: Graph, node: Node) -> None:
    """Raises ConfigError where a library is missing for what this node or one before it compresses."""
    for other in (node, *graph.ancestors(node)):
        if other.wire.compress is not None:
            wire.check_installed(other.name, other.wire.compress)
