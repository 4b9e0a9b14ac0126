"""The worker's columns: reads those that a batch needs, where they are, and finds a place for those that it made.

It also tells which jobs of a batch have ended meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import redis

from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.settings import Settings
from torchrelay.errors import DecodeError
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.blobs import fetch_blobs, write_blobs
from torchrelay.queues.channel import LOST
from torchrelay.queues.codec import HostMessage, Message, on_host
from torchrelay.queues.job import (
    INLINE_MAX_BYTES,
    INLINE_RESULT_MAX_BYTES,
    Packed,
    Ref,
    encode_payload,
    split_inline,
)
from torchrelay.queues.keys import job_field
from torchrelay.queues.placement import MOVED, Placer, edge_of, open_home, open_writer, readers_of
from torchrelay.queues.registry import Registry
from torchrelay.queues.tickets import DeviceMessage, Ticket, is_ticket
from torchrelay.queues.transitions import Output
from torchrelay.workers.assemble import in_order
from torchrelay.workers.claimer import Held
from torchrelay.workers.custody import Custody, Read
from torchrelay.workers.device_exporter import DeviceExporter
from torchrelay.workers.device_importer import DeviceImporter
from torchrelay.workers.edge import Edge
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import Every, patiently
from torchrelay.workers.pins import cuda_memory, pins_for
from torchrelay.workers.work import Closed

_ENDED_EVERY_S = 0.5
_TEND_EVERY_S = 1.0
_LOOK_S = 0.02

# How long a full arena is waited for before a column goes to Redis.
_PATIENCE_S = 1.0


log = logging.getLogger("torchrelay.arena")


class Ends(NamedTuple):
    """Whether a worker reads columns from other devices, and leaves its own on its device."""

    reads: bool = False
    writes: bool = False


_NO_ENDS = Ends()


@dataclass(slots=True)
class SharedMemory:
    """This process's part in the arenas of its host; `reader` is None where there are none. `exporter` and `importer`
    hand columns over between GPUs, where stages of the pipeline do."""

    placer: Placer
    reader: ArenaReader | None = None
    exporter: DeviceExporter | None = None
    importer: DeviceImporter | None = None
    _write_every: Every = field(default_factory=lambda: Every(_TEND_EVERY_S))
    _read_every: Every = field(default_factory=lambda: Every(_TEND_EVERY_S))

    @classmethod
    def open(cls, registry: Registry, settings: Settings, pinned_for: str = "", ends: Ends = _NO_ENDS) -> SharedMemory:
        """As the settings say; no memory is taken yet.

        For the worker of a GPU, `pinned_for` names the device: the memory of others that it maps is pinned for it, what
        is there already before this returns. `ends` says whether it hands columns over on the device.
        """
        home = open_home(registry, settings)
        placer = Placer(registry, open_writer(registry, settings))
        if home is None:
            return cls(placer)
        on_gpu = pinned_for.startswith("cuda")
        reader = ArenaReader(home, pins_for(pinned_for) if on_gpu else None)
        reader.map_all()
        memory = cls(placer, reader)
        if on_gpu and settings.device_arena_bytes and any(ends):
            memory._open_device(pinned_for, home.folder, settings.device_arena_bytes, ends)
        return memory

    def _open_device(self, device: str, folder: Path, max_bytes: int, ends: Ends) -> None:
        try:
            memory = cuda_memory(device)
            self.importer = DeviceImporter(memory, folder) if ends.reads else None
            self.exporter = DeviceExporter(memory, folder, max_bytes) if ends.writes else None
        except (RuntimeError, OSError) as error:
            log.warning("nothing is handed over on %s: %s; columns go through the host", device, error)

    def gpus(self) -> tuple[int, ...]:
        """The devices from which this worker copies."""
        return () if self.importer is None else self.importer.gpus

    def moved(self) -> tuple[int, ...]:
        """Bytes of columns by where they went, in the order of MOVED."""
        return tuple(self.placer.counts[where] for where in MOVED)

    def tend_written(self) -> None:
        """What a worker does about once a second, busy or idle, for what it wrote; call it as often as you like."""
        if self.placer.writer is None:
            return
        if self._write_every.due():
            self.placer.writer.tend()
            if self.exporter is not None:
                self.exporter.tend()
                self.placer.look()
        elif self.exporter is not None:
            # What was read for columns on the device is given back only with these.
            self.placer.writer.collect()

    def tend_read(self) -> None:
        """The same for what it maps, on the thread that reads."""
        if self.reader is not None and self._read_every.due():
            self.reader.tend()
            if self.importer is not None:
                self.importer.tend()

    def hand_over(self, patience_s: float) -> None:
        """Waits until readers have what lies on this worker's device: it is gone with the process, and would have to be
        made again."""
        writer, deadline = self.placer.writer, time.monotonic() + patience_s
        while self.exporter is not None and writer is not None and writer.keeping and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            writer.tend()

    def close(self) -> None:
        """Says that what lies on the device is gone."""
        if self.exporter is not None:
            self.exporter.close()
        if self.importer is not None:
            self.importer.close()


class Storage:
    """Columns and liveness of the jobs of one worker. `custody` knows which shared memory each job in hand uses."""

    def __init__(self, context: NodeContext, client: redis.Redis, memory: SharedMemory, custody: Custody) -> None:
        self._context = context
        self._client = client
        self._memory = memory
        self._placer = memory.placer
        self._reader = memory.reader
        self._custody = custody
        self._entrances = context.entrances()
        self._wires = [Edge.of(e.pipeline.graph, e.group.last) for e in self._entrances]
        self._edges: dict[tuple[str, int, int], tuple[int, ...]] = {}
        self._readers: dict[tuple[str, int], list[str]] = {}
        self._ended_at = 0.0
        self._ended: set[bytes] = set()

    def fetch(self, wanted: Sequence[tuple[Held, Ref]]) -> list[bytes | memoryview | DeviceRows | None]:
        """What is behind every ref, None where it is gone: views of shared memory, rows on another device, else bytes
        for a round trip per lane. What was in shared memory alone when it was made may have been copied since."""
        found: list[bytes | memoryview | DeviceRows | None] = [self._view(held, ref) for held, ref in wanted]
        left = [i for i, _ in enumerate(wanted) if found[i] is None]
        for number, lane in enumerate(self._context.lanes) if left else ():
            mine = [i for i in left if wanted[i][0].lane == number]
            if mine:
                refs = [wanted[i][1].as_copied for i in mine]
                for i, data in zip(mine, patiently(partial(fetch_blobs, self._client, lane, refs)), strict=True):
                    found[i] = data
        return found

    def _view(self, held: Held, ref: Ref) -> memoryview | DeviceRows | None:
        place = ref.place
        if place is None or self._reader is None:
            return None
        view = self._reader.view(place, ref.nbytes)
        if view is None:
            return None
        exporter, rows = "", None
        if is_ticket(view):
            exporter, rows = self._on_device(view)
            if rows is None:
                self._reader.drop(place)
                return None
        edges = self._edges_of(held, ref)
        self._custody.reads(held, Read(place, edges, ref.maker or 0, ref.chunks > 0, exporter))
        return view if rows is None else rows

    def _on_device(self, view: memoryview) -> tuple[str, DeviceRows | None]:
        """Who has the rows that a ticket tells of, and these; None where they cannot be reached."""
        importer = self._memory.importer
        if importer is None:
            return "", None
        try:
            ticket = Ticket.decode(view)
        except DecodeError:
            return "", None  # the block was taken back, and holds something else by now
        return ticket.exporter, importer.rows(ticket)

    def _edges_of(self, held: Held, ref: Ref) -> tuple[int, ...]:
        """Those of all the nodes that this worker runs for the job: its commit is theirs."""
        key = (ref.column, ref.maker or 0, held.entrance)
        edges = self._edges.get(key)
        if edges is None:
            entrance = self._entrances[held.entrance]
            graph = entrance.pipeline.graph
            found = [edge_of(graph, *key[:2], reader=node.index) for node in entrance.group.nodes]
            edges = self._edges[key] = tuple(edge for edge in found if edge is not None)
        return edges

    def place(self, held: Held, closed: Closed, meta: bytes) -> tuple[Output, dict[str, HostMessage]]:
        """What is committed for one job, and the blobs to write first.

        Raises InputError for a large column whose name no ref can hold.
        """
        entrance, wire = self._entrances[held.entrance], self._wires[held.entrance]
        node, graph = entrance.group.last, entrance.pipeline.graph
        inline, large = split_inline(closed.made, INLINE_MAX_BYTES if node.succs else INLINE_RESULT_MAX_BYTES)
        columns: dict[str, Packed] = {**closed.riding, **inline}
        refs = ""
        blobs: dict[str, HostMessage] = {}
        for column, message in large.items():
            name = f"{held.entry.job_id}.{node.index}.{held.fence}.{column}"
            # What was lost once is not entrusted to one host again: a reader elsewhere would restart it for ever.
            readers = () if held.entry.restarted else self.readers_of(column, held.entrance)
            ref = self._on_this_device(held, name, message, readers)
            if ref is None:
                encoded = on_host(message)
                place = self._placer.put(name, held.lane, encoded, readers, patience_s=_PATIENCE_S)
                if place is not None:
                    self._custody.makes(held, place)
                else:
                    encoded = encoded if wire is None else wire.compressed(column, encoded)
                    blobs[name] = encoded
                ref = Ref.of(name, len(encoded), place, in_redis=place is None)
            columns[column] = ref
            refs += ref.text(graph.holders(column, node.index))
        if not node.succs:
            columns = in_order(columns, entrance.pipeline.output)
        rows = None if closed.rows == held.entry.rows else closed.rows
        return Output(held.entry.packed, encode_payload(columns, meta, closed.origins), rows, refs), blobs

    def _on_this_device(self, held: Held, name: str, message: Message, readers: Sequence[str]) -> Ref | None:
        """The ref of a column that stays on this worker's device; None where it lies elsewhere, or is to."""
        exporter = self._memory.exporter
        if not isinstance(message, DeviceMessage) or exporter is None:
            return None
        rows = message.rows
        ticket = exporter.ticket(rows) if self._placer.copies_from(exporter.gpu, readers) else None
        place = None if ticket is None else self._placer.put_ticket(name, held.lane, ticket, rows, readers)
        if ticket is None or place is None:
            return None
        self._custody.makes(held, place, on_device=True)
        return Ref.of(name, len(ticket), place, in_redis=False)

    def readers_of(self, column: str, number: int) -> list[str]:
        """The nodes that read a column that this worker makes at this entrance; none for one of the result."""
        found = self._readers.get((column, number))
        if found is None:
            entrance = self._entrances[number]
            pipeline, maker = entrance.pipeline, entrance.group.last.index
            found = self._readers[column, number] = readers_of(pipeline.graph, pipeline.ref, column, maker)
        return found

    def write(self, blobs: dict[int, dict[str, HostMessage]]) -> None:
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
