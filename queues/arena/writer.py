"""What a process writes for others of its host: blocks in segments of its own, until they are no longer wanted.

A block comes back by one of three ways: every reader released it; its writer frees it, since what it was for was
refused; or, when room is needed or it has grown old, Redis says that nobody waits for it. When there is no room, `put`
returns None, and the caller waits or writes to Redis instead.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torchrelay.errors import BrokerError
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.pool import Block, BlockPool, now_ms
from torchrelay.queues.arena.segment import (
    FIRST_RELEASE,
    KIND_CACHE,
    KIND_ONLY,
    MAX_EDGES,
    MAX_NAME_BYTES,
    READY,
    SLOT_WORDS,
    WRITING,
    OwnerLock,
    Segment,
)
from torchrelay.queues.arena.space import PAGE_BYTES
from torchrelay.queues.codec import HostMessage, copy_into
from torchrelay.queues.job import Place
from torchrelay.queues.keys import new_token

log = logging.getLogger("torchrelay.arena")
FIRST_SEGMENT_BYTES, SEGMENT_BYTES = 64 << 20, 256 << 20
_OLD_MS = 5_000
_ASK_EVERY_MS = 250
_GROW_EVERY_MS = 100
_COLLECT_EVERY_BYTES = 4 << 20
_ASK_AT_ONCE = 256
# A segment may be smaller than the first one should be, where there is less room (64 MB in a container by default).
_SMALLEST_PART = 8

Wanted = Callable[[int, Sequence[str]], Sequence[bool]]
"""Of a lane's blocks, by name: whether Redis still waits for each. Raises BrokerError when it cannot be asked."""


@dataclass(frozen=True, slots=True)
class ArenaLimits:
    """How much shared memory one process takes at most, and in what pieces."""

    nbytes: int
    first_segment_bytes: int = FIRST_SEGMENT_BYTES
    segment_bytes: int = SEGMENT_BYTES


class ArenaWriter:
    """One process's arena. Thread-safe. Nothing is created before the first `put`."""

    def __init__(self, home: ArenaHome, limits: ArenaLimits, wanted: Wanted) -> None:
        self._home = home
        self._pid = os.getpid()
        self._gone = False
        self._limits = limits
        self._wanted = wanted
        self._pool = BlockPool(home.folder)
        # By the names of their arenas; nothing is put there any more.
        self._renounced: dict[str, BlockPool] = {}
        self._lock = threading.Lock()
        self._arena = ""
        self._owner: OwnerLock | None = None
        self._segments_made = 0
        self._ask_again_ms = 0
        self._look_again_ms = 0
        self._no_growth_until_ms = 0
        self._fresh_bytes = 0

    @property
    def arena(self) -> str:
        """This arena's id; '' before its first block."""
        return self._arena

    @property
    def host(self) -> int:
        return self._home.host

    @property
    def max_bytes(self) -> int:
        """The largest block that can ever be placed."""
        return min(self._limits.segment_bytes, self._limits.nbytes) - 4096

    def put(
        self, name: str, lane: int, message: HostMessage, edges: int, *, cache: bool = False, keeps: object = None
    ) -> Place | None:
        """Copies a message into a new block; None where there is no room now, or it is too large for ever.

        Args:
            name: the blob's name, by which Redis knows it.
            lane: of the job.
            message: what `codec.message` made.
            edges: how many nodes will read and release it, 0 to 8.
            cache: whether Redis holds the same bytes: such a block may go whenever nobody is reading it.
            keeps: what the message refers to; the block holds on to it.
        """
        tail, nbytes = name.encode(), len(message)
        if edges > MAX_EDGES or len(tail) > MAX_NAME_BYTES or nbytes + len(tail) > self.max_bytes:
            return None
        if self._gone or os.getpid() != self._pid:
            return None  # a forked child has a copy of this object, and no arena
        with self._lock:
            block = self._room_for(nbytes + len(tail), cache)
            if block is None:
                return None
            block.kind = KIND_CACHE if cache else KIND_ONLY
            block.lane, block.nbytes, block.keeps = lane, nbytes, keeps
            segment, offset = block.part.segment, block.offset
            words, at = segment.words, block.slot * SLOT_WORDS
            words[at + 1] = WRITING | block.kind << 8 | edges << 16
            words[at + 2], words[at + 3], words[at + 4] = offset, nbytes, len(tail)
            words[at + 5] = lane << 48 | block.made_ms
            for edge in range(edges):
                words[at + FIRST_RELEASE + edge] = 0
        # Outside the lock: the block is this thread's alone until it is ready.
        room = segment.room[offset : offset + nbytes + len(tail)]
        try:
            copy_into(message, room)
            room[nbytes:] = tail
        except BaseException:
            with self._lock:
                self._pool.free(block)
            raise
        words[at + 1] = READY | block.kind << 8 | edges << 16
        return Place(self._home.host, segment.arena, segment.number, block.slot, block.generation, offset)

    def publish(self, places: Iterable[Place]) -> None:
        """Redis knows these now: from here on it decides whether they are wanted."""
        with self._lock:
            for block in self._mine(places):
                block.published = True

    def collect(self) -> int:
        """Takes back what its readers released; returns how many blocks."""
        with self._lock:
            return sum(pool.collect() for pool in self._pools)

    @property
    def _pools(self) -> list[BlockPool]:
        return [self._pool, *self._renounced.values()]

    @property
    def keeping(self) -> int:
        """How many blocks refer to something else that must live as long as they do."""
        with self._lock:
            return sum(block.keeps is not None for pool in self._pools for block in pool.blocks())

    def when_gone(self, places: Iterable[Place], call: Callable[[bool], object]) -> None:
        """Calls it for each of these once nobody may read it any more, at once where that is so already: with True
        where its readers had it, with False where nobody waits for it. It must not call this object."""
        with self._lock:
            for place in places:
                found = self._mine([place])
                if found:
                    found[0].on_gone = call
                else:
                    # Of an arena that was given up it is not known who had it.
                    call(place.arena == self._arena)

    def free(self, places: Iterable[Place]) -> None:
        """Nobody was told of these, or what told of them was refused."""
        with self._lock:
            for block in self._mine(places):
                if block.part.segment.arena == self._arena:
                    self._pool.free(block)
                else:
                    block.published = True  # its arena was given up: Redis, which knows nothing of it, says that

    def _mine(self, places: Iterable[Place]) -> list[Block]:
        if os.getpid() != self._pid:
            return []
        pools = {**self._renounced, self._arena: self._pool}
        found = (pools[p.arena].find(p.segment, p.slot, p.generation) for p in places if p.arena in pools)
        return [block for block in found if block is not None]

    def _room_for(self, nbytes: int, cache: bool) -> Block | None:
        """Tries the cheapest way first, and asks Redis last."""
        self._fresh_bytes += nbytes
        if self._fresh_bytes > _COLLECT_EVERY_BYTES:
            # Space that was given back a moment ago is still in the processor's caches.
            self._fresh_bytes = 0
            if not self._pool.collect_oldest():
                self._pool.collect()
        block = self._pool.take(nbytes)
        if block is not None:
            return block
        ways: tuple[Callable[[int], object], ...] = (self._collect, self._grow)
        if not cache:
            # What is only a cache makes room for what has no other place.
            ways += (self._evict, self._forget_unwanted)
        for way in ways:
            block = self._pool.take(nbytes) if way(nbytes) else None
            if block is not None:
                break
        return block

    def _collect(self, nbytes: int) -> int:
        return self._pool.collect()

    def _evict(self, nbytes: int) -> int:
        return self._pool.evict_caches(wanted_bytes=nbytes)

    def _grow(self, nbytes: int) -> bool:
        """One more segment, each larger than the one before, within what the process and the host allow."""
        limits = self._limits
        if now_ms() < self._no_growth_until_ms:
            return False
        size = min(limits.first_segment_bytes << self._segments_made, limits.segment_bytes)
        while size < nbytes + PAGE_BYTES:
            size *= 2
        size = min(size, limits.segment_bytes, limits.nbytes - self._pool.nbytes, self._home.free_bytes())
        if size < max(nbytes, limits.first_segment_bytes // _SMALLEST_PART):
            self._no_growth_until_ms = now_ms() + _GROW_EVERY_MS
            return False
        try:
            self._own()
            segment = Segment.create(self._home.folder, self._arena, self._segments_made, size)
        except OSError as error:
            log.warning("no room for %d MiB of shared memory: %s; columns go through Redis", size >> 20, error)
            self._no_growth_until_ms = now_ms() + 20 * _GROW_EVERY_MS
            return False
        self._segments_made += 1
        self._pool.add(segment)
        return True

    def _own(self) -> None:
        while self._owner is None:
            self._arena = new_token(8)
            lock = OwnerLock(self._home.folder, self._arena)
            self._owner = lock if lock.take() else None

    def _forget_unwanted(self, nbytes: int = 0) -> int:
        """Asks Redis, at most four times a second, which published blocks it still waits for; retires the others."""
        if now_ms() < self._ask_again_ms:
            return 0
        self._ask_again_ms = now_ms() + _ASK_EVERY_MS
        return sum(forget_unwanted(pool, self._wanted) for pool in self._pools)

    def tend(self) -> None:
        """What can wait until there is time: takes back what is old and unwanted, and gives unused segments back."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._is_reachable():
                self._renounce()
            for pool in self._pools:
                pool.collect()
            now = now_ms()
            # Thousands may wait for long, and each is asked about: no more often than it takes to grow old.
            if now >= self._look_again_ms and any(
                b.made_ms < now - _OLD_MS for pool in self._pools for b in pool.blocks()
            ):
                self._look_again_ms = now + _OLD_MS
                self._forget_unwanted()
            self._renounced = {arena: pool for arena, pool in self._renounced.items() if not pool.empty}
            for segment in self._pool.drop_empty(keep=1):
                segment.unlink(self._home.folder)

    def _is_reachable(self) -> bool:
        if self._owner is None:
            return True
        files = self._owner.is_there() and all(s.is_there(self._home.folder) for s in self._pool.segments())
        return files and self._home.is_there()

    def _renounce(self) -> None:
        """Somebody removed its files: who has mapped them reads on; nothing is put there, where no other could read it.

        Without the lock's file a keeper would take it for a dead process's arena. So another one is begun, if this
        still is the host that it was.
        """
        log.warning("files of shared memory were removed under a living process; it lets go of %s", self._arena)
        assert self._owner is not None  # it is reachable else
        for segment in self._pool.segments():
            segment.unlink(self._home.folder)
        self._owner.give(remove=self._owner.is_there())
        # Who mapped a block may still read what it keeps, until its readers released it or nobody waits for it.
        self._renounced[self._arena] = self._pool
        self._owner, self._arena, self._pool = None, "", BlockPool(self._home.folder)
        self._gone = not self._home.is_there()

    def close(self) -> None:
        """Removes what nobody waits for. The rest is left to be taken over: readers of this host go on with it."""
        with self._lock:
            if self._owner is None or os.getpid() != self._pid:
                return
            self._pool.collect()
            for block in self._pool.blocks():
                if block.kind == KIND_CACHE or not block.published:
                    self._pool.retire(block)
            forget_unwanted(self._pool, self._wanted)
            for segment in self._pool.drop_empty():
                segment.unlink(self._home.folder)
            self._owner.give(remove=not list(self._pool.segments()))
            # Its keeper's now: nothing may be put there any more.
            self._owner, self._pool = None, BlockPool(self._home.folder)


def forget_unwanted(pool: BlockPool, wanted: Wanted) -> int:
    """Retires the published blocks that Redis does not wait for; nothing while it cannot be asked. Returns how many."""
    by_lane: dict[int, list[Block]] = {}
    for block in pool.blocks():
        if block.published:
            by_lane.setdefault(block.lane, []).append(block)
    gone = 0
    for lane, blocks in by_lane.items():
        for start in range(0, len(blocks), _ASK_AT_ONCE):
            part = blocks[start : start + _ASK_AT_ONCE]
            try:
                answers = wanted(lane, [block.name for block in part])
            except BrokerError as error:
                log.info("the server was not asked which blocks are wanted: %s", error)
                return gone
            for block, keep in zip(part, answers, strict=True):
                if not keep:
                    pool.retire(block)
                    gone += 1
    pool.empty_limbo()
    return gone
