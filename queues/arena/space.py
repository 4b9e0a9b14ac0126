"""Gives out runs of pages inside a segment. Pure.

A run that was given back is the first to be taken again by a block of its length, the latest first: that costs next to
nothing, and the processor's caches still hold it. Only so many runs wait for that; the other free pages are the ones of
an integer, where neighbours join by themselves, and the lowest run that fits is found by folding that integer onto
itself, about log2(n) operations of a few microseconds. So no block is rounded up to a size class, and one block that
stays long holds up nothing but its own pages.
"""

from __future__ import annotations

PAGE_BYTES = 4096
# Beyond these the runs that wait join the others: fewer would miss, more would spread small blocks over cold memory.
_RECENT_RUNS, _RECENT_PAGES = 256, (32 << 20) // PAGE_BYTES


class Space:
    """`pages` pages, all free at first."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._free = (1 << pages) - 1
        # Length -> first pages of free runs that are not in `_free`.
        self._recent: dict[int, list[int]] = {}
        self._recent_runs = self._recent_pages = 0

    def take(self, pages: int) -> int | None:
        """The first page of a run of so many, None where there is none."""
        recent = self._recent.get(pages)
        if recent:
            self._recent_runs -= 1
            self._recent_pages -= pages
            self.free_pages -= pages
            return recent.pop()
        first = self._lowest(pages)
        if first is None and self._recent_runs and pages <= self.free_pages:
            self._join_recent()
            first = self._lowest(pages)
        if first is not None:
            self._free &= ~(((1 << pages) - 1) << first)
            self.free_pages -= pages
        return first

    def claim(self, first: int, pages: int) -> bool:
        """Takes this very run; False when it does not lie in the segment, or part of it is taken."""
        if first < 0 or pages < 1 or first + pages > self.pages:
            return False
        self._join_recent()
        run = ((1 << pages) - 1) << first
        if self._free & run != run:
            return False
        self._free &= ~run
        self.free_pages -= pages
        return True

    def give(self, first: int, pages: int) -> None:
        """Gives a run back."""
        self._recent.setdefault(pages, []).append(first)
        self._recent_runs += 1
        self._recent_pages += pages
        self.free_pages += pages
        if self._recent_runs > _RECENT_RUNS or self._recent_pages > _RECENT_PAGES:
            self._join_recent()

    def _lowest(self, pages: int) -> int | None:
        if pages > self.free_pages - self._recent_pages:
            return None
        starts, length = self._free, 1
        # Bit i of `starts`: the pages from i on are free, `length` of them.
        while length < pages and starts:
            step = min(length, pages - length)
            starts &= starts >> step
            length += step
        return (starts & -starts).bit_length() - 1 if starts else None

    def _join_recent(self) -> None:
        for pages, firsts in self._recent.items():
            run = (1 << pages) - 1
            for first in firsts:
                self._free |= run << first
        self._recent.clear()
        self._recent_runs = self._recent_pages = 0


def pages_of(nbytes: int) -> int:
    """How many pages hold so many bytes."""
    return max(1, -(-nbytes // PAGE_BYTES))
