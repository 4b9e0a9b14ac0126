"""The blocks of the segments that this process owns: which live, which their readers released, which wait in limbo.

Shared by the writer of an arena and by whoever takes over a dead writer's. Not thread-safe: its owner locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchrelay.queues.arena.holds import block_key, blocks_in_use
from torchrelay.queues.arena.segment import (
    FIRST_RELEASE,
    KIND_CACHE,
    MAX_EDGES,
    MAX_NAME_BYTES,
    READY,
    SLOT_WORDS,
    WRITING,
    Segment,
)
from torchrelay.queues.arena.space import PAGE_BYTES, Space, pages_of

# So many unreleased blocks are passed over before younger ones are not looked at.
_OLDEST_LEFT = 4
_EDGES = np.arange(MAX_EDGES, dtype=np.uint64)


@dataclass(slots=True, eq=False)
class Block:
    """One live block. `published`: Redis was told of it, so Redis knows whether it is wanted. `keeps` is what must live
    as long as its bytes may be read; `on_gone` is called when they no longer may, with whether its readers had them."""

    part: _Part
    slot: int
    generation: int
    first_page: int
    pages: int
    nbytes: int
    kind: int
    lane: int
    made_ms: int
    published: bool = False
    keeps: object = None
    on_gone: Callable[[bool], object] | None = None

    @property
    def offset(self) -> int:
        return self.first_page * PAGE_BYTES

    @property
    def name(self) -> str:
        return self.part.segment.name_of(self.slot)


@dataclass(slots=True, eq=False)
class _Part:
    segment: Segment
    space: Space
    free_slots: list[int]
    live: dict[int, Block]


class BlockPool:
    """Segments and their blocks, oldest segment first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[_Part] = []
        self._limbo: list[Block] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(part.segment.nbytes for part in self._parts)

    @property
    def free_bytes(self) -> int:
        """Bytes in no block."""
        return sum(part.space.free_pages for part in self._parts) * PAGE_BYTES

    def blocks(self) -> list[Block]:
        """Every live block, in no order; those in limbo are not among them."""
        return [block for part in self._parts for block in part.live.values()]

    @property
    def empty(self) -> bool:
        """Whether no block lives or waits."""
        return not self._limbo and not any(part.live for part in self._parts)

    def add(self, segment: Segment) -> None:
        """Takes a new segment in."""
        slots = list(range(segment.slots - 1, -1, -1))
        self._parts.append(_Part(segment, Space(segment.nbytes // PAGE_BYTES), slots, {}))

    def adopt(self, segment: Segment) -> None:
        """Takes a dead owner's segment in: blocks that it had finished live on; half-written ones, and whatever else
        is no block (the words may hold anything), end."""
        part = _Part(segment, Space(segment.nbytes // PAGE_BYTES), [], {})
        self._parts.append(part)
        for slot in range(segment.slots - 1, -1, -1):
            generation, state, offset, size, name_length, stamp = segment.words[slot * SLOT_WORDS :][:6]
            if generation % 2 == 0:
                continue
            pages, first = pages_of(size + name_length), offset // PAGE_BYTES
            sound = state & 0xFF == READY and offset % PAGE_BYTES == 0 and name_length <= MAX_NAME_BYTES
            if not sound or not part.space.claim(first, pages):
                segment.words[slot * SLOT_WORDS] = _after(generation)
                continue
            kind, made_ms = state >> 8 & 0xFF, stamp & (1 << 48) - 1
            part.live[slot] = Block(part, slot, generation, first, pages, size, kind, stamp >> 48, made_ms, True)

    def take(self, nbytes: int) -> Block | None:
        """A run of pages and a slot, under a new odd generation, with nothing in it yet; None where none is free."""
        pages = pages_of(nbytes)
        for part in self._parts:
            first = part.space.take(pages) if part.free_slots else None
            if first is None:
                continue
            slot = part.free_slots.pop()
            at = slot * SLOT_WORDS
            generation = part.segment.words[at] + 1
            # First: what the words say of the last block must never stand under the new generation as ready.
            part.segment.words[at + 1] = WRITING
            part.segment.words[at] = generation
            block = Block(part, slot, generation, first, pages, 0, 0, 0, now_ms())
            part.live[slot] = block
            return block
        return None

    def find(self, segment: int, slot: int, generation: int) -> Block | None:
        """The live block that a ref means; None when it is gone."""
        for part in self._parts:
            if part.segment.number == segment:
                block = part.live.get(slot)
                return block if block is not None and block.generation == generation else None
        return None

    def free(self, block: Block) -> None:
        """Its space can be used again at once: nobody may read it any more."""
        self._end(block)
        self._give(block, released=True)

    def retire(self, block: Block) -> None:
        """It goes, but somebody may still be reading: its space waits until no living reader lists it."""
        self._end(block)
        self._limbo.append(block)

    def _end(self, block: Block) -> None:
        del block.part.live[block.slot]
        block.part.segment.words[block.slot * SLOT_WORDS] = _after(block.generation)

    def _give(self, block: Block, *, released: bool) -> None:
        block.part.space.give(block.first_page, block.pages)
        block.part.free_slots.append(block.slot)
        block.keeps = None
        if block.on_gone is not None:
            block.on_gone(released)

    def collect(self) -> int:
        """Frees blocks that every reader released, and those in limbo that nobody uses now. Returns how many."""
        freed = 0
        for part in self._parts:
            for slot in _released(part):
                self.free(part.live[slot])
                freed += 1
        return freed + self.empty_limbo()

    def collect_oldest(self) -> int:
        """What `collect` frees, as far as it is among the oldest blocks, where it nearly always is: much cheaper."""
        freed = 0
        for part in self._parts:
            done: list[Block] = []
            left = _OLDEST_LEFT
            for block in part.live.values():
                if _is_released(block):
                    done.append(block)
                elif left:
                    left -= 1
                else:
                    break
            for block in done:
                self.free(block)
            freed += len(done)
        return freed

    def empty_limbo(self) -> int:
        """Frees blocks in limbo that no living reader lists."""
        if not self._limbo:
            return 0
        in_use = blocks_in_use(self._folder)
        waiting, self._limbo = self._limbo, []
        for block in waiting:
            if key_of(block) in in_use:
                self._limbo.append(block)
            else:
                self._give(block, released=False)
        return len(waiting) - len(self._limbo)

    def evict_caches(self, *, wanted_bytes: int) -> int:
        """Retires cache blocks that nobody uses, oldest first, until so many bytes went. Returns the bytes."""
        caches = sorted((b for b in self.blocks() if b.kind == KIND_CACHE and b.published), key=lambda b: b.made_ms)
        if not caches:
            return 0
        in_use = blocks_in_use(self._folder)
        gone = 0
        for block in caches:
            if gone >= wanted_bytes:
                break
            if key_of(block) not in in_use:
                self.retire(block)
                gone += block.pages * PAGE_BYTES
        self.empty_limbo()
        return gone

    def drop_empty(self, *, keep: int = 0) -> list[Segment]:
        """Takes segments without any block out, but for the first `keep`."""
        in_limbo = {id(block.part) for block in self._limbo}
        gone = [p for p in self._parts[keep:] if not p.live and id(p) not in in_limbo]
        self._parts = [p for p in self._parts if p not in gone]
        return [p.segment for p in gone]

    def segments(self) -> Iterable[Segment]:
        return [part.segment for part in self._parts]


def _after(generation: int) -> int:
    return generation + 1 & (1 << 64) - 1


def _is_released(block: Block) -> bool:
    words, at = block.part.segment.words, block.slot * SLOT_WORDS
    state = words[at + 1]
    edges, at = state >> 16, at + FIRST_RELEASE
    if edges == 0 or state & 0xFF != READY:
        return False
    return words[at : at + edges].tolist() == [block.generation] * edges


def _released(part: _Part) -> list[int]:
    """Slots of this segment whose readers all released what lives there now."""
    if not part.live:
        return []
    slots = np.fromiter(part.live, np.int64, len(part.live))
    rows = part.segment.table[slots]
    edges = rows[:, 1] >> np.uint64(16)
    mine = rows[:, FIRST_RELEASE:] == rows[:, :1]
    done = (mine | (edges[:, None] <= _EDGES)).all(axis=1) & (edges > 0) & (rows[:, 1] & np.uint64(0xFF) == READY)
    return [int(slot) for slot in slots[done]]


def key_of(block: Block) -> tuple[int, int]:
    """How in-use lists name this block."""
    return block_key(block.part.segment.arena, block.part.segment.number, block.slot)


def now_ms() -> int:
    """CLOCK_MONOTONIC in ms: the same in all processes of a host."""
    return time.monotonic_ns() // 1_000_000
