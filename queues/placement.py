"""Where a large column goes: into shared memory where its readers are on this host, else to Redis, or to both.

What must survive this host (submitted input, results) is in Redis always; shared memory is a cache beside it. What
goes between stages lies in shared memory when the workers of all its readers are here, and in Redis when those of one
reader are all elsewhere, when nobody reads it as a stage does, or when there is no room. Where a part of the workers is
here, so is that part of the jobs: what lies here is claimed here first, and copied to Redis (`spiller`) where somebody
elsewhere waits for it. Each decision is counted, in bytes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal
from zlib import crc32

import redis

from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.graph import Graph
from torchrelay.config.settings import Settings
from torchrelay.errors import BrokerUnavailable, ConfigError, TorchrelayError
from torchrelay.queues.arena.home import ArenaHome, unsupported
from torchrelay.queues.arena.segment import MAX_EDGES
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter, Wanted
from torchrelay.queues.codec import HostMessage
from torchrelay.queues.job import Place, host_text
from torchrelay.queues.registry import Registry, run

log = logging.getLogger("torchrelay.arena")
HOSTS_EVERY_S = 2.0
_PAUSE_S = 0.001

Where = Literal["arena", "cache", "result", "remote", "full", "device"]
"""`arena`: shared memory alone; `cache`: beside Redis; `device`: memory of the maker's GPU. To Redis alone: `result` as
it must last (it is the result's, or of a job that lost bytes before), `remote` as a reader has no worker here, or this
is another host's part of the jobs, `full` as there was no room."""
MOVED: tuple[Where, ...] = ("arena", "cache", "result", "remote", "full", "device")


def open_home(registry: Registry, settings: Settings) -> ArenaHome | None:
    """The namespace's arenas on this host; None where there are none, and the log says why."""
    if settings.arena_bytes == 0:
        return None
    why = unsupported()
    if not why:
        namespace_id = registry.namespace_id()
        if namespace_id:
            try:
                return ArenaHome.open(settings.arena_dir, namespace_id)
            except ConfigError as error:
                log.warning("%s", error)
                return None
        why = "the server has no memory left to name it"
    log.info("large columns go through Redis: %s", why)
    return None


def open_writer(registry: Registry, settings: Settings) -> ArenaWriter | None:
    """This process's arena; it takes no memory before something is put there."""
    home = open_home(registry, settings)
    if home is None:
        return None
    most = home.usual_bytes() if settings.arena_bytes is None else settings.arena_bytes
    return ArenaWriter(home, ArenaLimits(most), wanted_by(registry))


def wanted_by(registry: Registry) -> Wanted:
    """Asks the lanes which blocks jobs still wait for."""

    def wanted(lane: int, names: Sequence[str]) -> Sequence[bool]:
        if lane >= len(registry.lanes):
            return [False] * len(names)  # a dead process's memory may say anything
        try:
            return run(registry.client, registry.lanes[lane].holders(names))
        except (TorchrelayError, redis.RedisError, OSError) as error:
            raise BrokerUnavailable(str(error)) from error

    return wanted


class Placer:
    """Finds places for the columns that one process makes. `counts` holds bytes by decision; see `Where`.

    `before_waiting` is called before it waits for room: what the caller has not sent yet holds blocks, too. `rest` is
    how it waits, so many seconds at a time.
    """

    def __init__(self, registry: Registry, writer: ArenaWriter | None) -> None:
        self.writer = writer
        self.counts: Counter[str] = Counter()
        self._registry = registry
        self.before_waiting: Callable[[], object] = int
        self.rest: Callable[[float], object] = time.sleep
        self._hosts: dict[str, Counter[str]] = {}
        self._gpus: dict[str, frozenset[str]] = {}
        self._hosts_at = -HOSTS_EVERY_S
        self._impatient_until = 0.0

    def put(
        self,
        name: str,
        lane: int,
        message: HostMessage,
        readers: Sequence[str],
        *,
        cache: bool = False,
        patience_s: float = 0.0,
    ) -> Place | None:
        """A block that holds the message; None when it goes to Redis alone.

        Args:
            name, lane, message: see `ArenaWriter.put`.
            readers: the nodes (`pipeline@version/stage`) that will read and release it; none for what must last.
            cache: whether Redis holds it too.
            patience_s: how long to wait for room before Redis takes it.
        """
        where: Where = "result"
        place = None
        if readers and self.writer is not None and len(readers) <= MAX_EDGES:
            where = "remote"
            if self._is_for_here(name, readers):
                place = self._put(name, lane, message, len(readers), cache, patience_s)
                where = "full" if place is None else "cache" if cache else "arena"
        elif readers:
            where = "remote"
        self.counts[where] += len(message)
        return place

    def put_ticket(self, name: str, lane: int, ticket: bytes, rows: DeviceRows, readers: Sequence[str]) -> Place | None:
        """A block that tells where on this worker's device the rows lie; None where they go another way.

        It keeps them until it is gone. `name`, `lane` and `readers` are as for `put`, the ticket is the exporter's.
        """
        writer = self.writer
        place = None if writer is None else writer.put(name, lane, ticket, len(readers), keeps=rows.memory)
        if place is not None:
            self.counts["device"] += rows.nbytes
        return place

    def _put(
        self, name: str, lane: int, message: HostMessage, edges: int, cache: bool, patience_s: float
    ) -> Place | None:
        writer = self.writer
        assert writer is not None  # asked by the caller
        place = writer.put(name, lane, message, edges, cache=cache)
        if place is not None or cache or len(message) >= writer.max_bytes or time.monotonic() < self._impatient_until:
            return place
        # Readers release what they have taken: back-pressure comes before the slower way.
        self.before_waiting()
        deadline = time.monotonic() + patience_s
        while place is None and time.monotonic() < deadline:
            self.rest(_PAUSE_S)
            place = writer.put(name, lane, message, edges)
        if place is None:
            # They do not just now: waiting for each column anew would only add up.
            self._impatient_until = time.monotonic() + patience_s
        return place

    def _is_for_here(self, name: str, readers: Sequence[str]) -> bool:
        """Whether each reader has living workers on this host, and the job is of their part.

        The job's id decides, so that its columns stay together, at this stage and at later ones.
        """
        assert self.writer is not None  # asked by the caller
        self.look()
        part = self._part_here(readers, self.writer)
        return part == 1.0 or crc32(name.partition(".")[0].encode()) < part * (1 << 32)

    def _part_here(self, readers: Sequence[str], writer: ArenaWriter) -> float:
        """The part of the readers' workers that is here, of the reader with the least."""
        mine = host_text(writer.host)
        least = 1.0
        for node in readers:
            hosts = self._hosts.get(node)
            least = min(least, hosts[mine] / hosts.total() if hosts else 0.0)
        return least

    def look(self) -> None:
        """Finds out where the workers of all nodes are, unless it did a moment ago."""
        if time.monotonic() - self._hosts_at <= HOSTS_EVERY_S:
            return
        self._hosts_at = time.monotonic()
        try:
            found = self._registry.workers()
        except (redis.RedisError, OSError) as error:
            log.info("which hosts the readers are on is not known: %s", error)
            found = []
        hosts: dict[str, Counter[str]] = {}
        gpus: dict[str, frozenset[str]] = {}
        for report in found:
            for node in report.nodes if report.state != "failed" else ():
                hosts.setdefault(node, Counter())[report.host_id] += 1
                gpus[node] = gpus.get(node, frozenset(report.gpus)).intersection(report.gpus)
        self._hosts, self._gpus = hosts, gpus

    def copies_from(self, gpu: int, readers: Sequence[str]) -> bool:
        """Whether all workers of these nodes are here and copy from this GPU, as `look` last saw it. Asks nobody."""
        if not readers or len(readers) > MAX_EDGES or self.writer is None:
            return False
        wanted = host_text(gpu)
        return self._part_here(readers, self.writer) == 1.0 and all(wanted in self._gpus.get(n, ()) for n in readers)


def readers_of(graph: Graph, ref: str, column: str, maker: int) -> list[str]:
    """The nodes that read a column that `maker` made (0 for the input), in the order of their edges.

    Empty for one that stays to the end of the job, since it belongs to the result or to what lines rows up.
    """
    return [f"{ref}/{n.name}" for n in graph.nodes if graph.consumers(column, maker) & n.bit]


def edge_of(graph: Graph, column: str, maker: int, reader: int) -> int | None:
    """Which of a block's edges is this reader's; None when it has none, or the ref that says so is forged."""
    try:
        consumers = graph.consumers(column, maker)
    except (IndexError, ValueError):
        return None
    bit = 1 << (reader - 1)
    edge = (consumers & (bit - 1)).bit_count()
    return edge if consumers & bit and edge < MAX_EDGES else None
