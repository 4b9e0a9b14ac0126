"""The worker's columns in Redis: reads those that a batch needs, and finds a place for those that it made.

It also tells which jobs of a batch have ended meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import redis

from torchrelay.queues.blobs import fetch_blobs, write_blobs
from torchrelay.queues.channel import LOST
from torchrelay.queues.job import Packed, Ref, encode_payload, split_inline
from torchrelay.queues.keys import job_field
from torchrelay.queues.transitions import Output
from torchrelay.workers.assemble import in_order
from torchrelay.workers.claimer import Held
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import patiently
from torchrelay.workers.work import Closed

_ENDED_EVERY_S = 0.5


class Storage:
    """Blobs and liveness of the jobs of one node."""

    def __init__(self, context: NodeContext, client: redis.Redis) -> None:
        self._context = context
        self._client = client
        self._ended_at = 0.0
        self._ended: set[bytes] = set()

    def fetch(self, wanted: Sequence[tuple[Held, Ref]]) -> list[bytes | None]:
        """The bytes behind every ref, None where they are gone; a round trip per lane."""
        found: dict[Ref, bytes | None] = {}
        for number, lane in enumerate(self._context.lanes):
            refs = [ref for held, ref in wanted if held.lane == number]
            if refs:
                found.update(zip(refs, patiently(partial(fetch_blobs, self._client, lane, refs)), strict=True))
        return [found[ref] for _, ref in wanted]

    def place(self, held: Held, closed: Closed, meta: bytes) -> tuple[Output, dict[str, bytes]]:
        """What is committed for one job, and the blobs to write first.

        Raises InputError for a large column whose name no ref can hold.
        """
        node, graph = self._context.node, self._context.pipeline.graph
        inline, large = split_inline(closed.made)
        columns: dict[str, Packed] = {**closed.riding, **inline}
        refs = ""
        blobs: dict[str, bytes] = {}
        for name, data in large.items():
            ref = Ref.of(f"{held.entry.job_id}.{node.index}.{held.fence}.{name}", len(data))
            blobs[ref.name] = data
            columns[name] = ref
            refs += ref.text(graph.consumers(name, node.index))
        if not node.succs:
            columns = in_order(columns, self._context.pipeline.output)
        rows = None if closed.rows == held.entry.rows else closed.rows
        return Output(held.entry.packed, encode_payload(columns, meta, closed.origins), rows, refs), blobs

    def write(self, blobs: dict[int, dict[str, bytes]]) -> None:
        """Writes output columns that are too large to travel inline, by lane and name."""
        for number, named in blobs.items():
            lane = self._context.lanes[number]
            patiently(partial(write_blobs, self._client, lane, named, must_pass=True))

    def ended(self, batch: Sequence[Held]) -> list[bool]:
        """Per job, whether its record is gone; asks at most twice a second, and takes silence for no."""
        if time.monotonic() - self._ended_at >= _ENDED_EVERY_S:
            self._ended_at = time.monotonic()
            try:
                self._ended = self._gone(batch)
            except LOST:
                pass  # the stage is not to fail because the server is away for a moment
        return [h.entry.packed in self._ended for h in batch]

    def _gone(self, batch: Sequence[Held]) -> set[bytes]:
        gone: set[bytes] = set()
        for number, lane in enumerate(self._context.lanes):
            mine = [h for h in batch if h.lane == number]
            pipe = self._client.pipeline(transaction=False)
            for held in mine:
                pipe.hexists(lane.keys.bucket(held.entry.job_id), job_field(held.entry.job_id))
            if mine:
                gone.update(h.entry.packed for h, alive in zip(mine, pipe.execute(), strict=True) if not alive)
        return gone
