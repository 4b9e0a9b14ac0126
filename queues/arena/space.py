"""Gives out runs of pages inside a segment. Pure.

Free pages are the ones of an integer; a run of n is found by folding that integer onto itself, about log2(n) operations
of a few microseconds. So neighbours join by themselves when they are freed, no block is rounded up to a size class, and
one block that stays long holds up nothing but its own pages. The lowest run that fits is taken: what was freed last and
lies low is used again soon, while the processor's caches still hold it.
"""

from __future__ import annotations

PAGE_BYTES = 4096


class Space:
    """`pages` pages, all free at first."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._free = (1 << pages) - 1

    def take(self, pages: int) -> int | None:
        """The first page of a run of so many, None where there is none."""
        if pages > self.free_pages:
            return None
        starts, length = self._free, 1
        # Bit i of `starts`: the pages from i on are free, `length` of them.
        while length < pages and starts:
            step = min(length, pages - length)
            starts &= starts >> step
            length += step
        if not starts:
            return None
        first = (starts & -starts).bit_length() - 1
        self._free &= ~(((1 << pages) - 1) << first)
        self.free_pages -= pages
        return first

    def claim(self, first: int, pages: int) -> bool:
        """Takes this very run; False when it does not lie in the segment, or part of it is taken."""
        if first < 0 or pages < 1 or first + pages > self.pages:
            return False
        run = ((1 << pages) - 1) << first
        if self._free & run != run:
            return False
        self._free &= ~run
        self.free_pages -= pages
        return True

    def give(self, first: int, pages: int) -> None:
        """Gives a run back."""
        self._free |= ((1 << pages) - 1) << first
        self.free_pages += pages


def pages_of(nbytes: int) -> int:
    """How many pages hold so many bytes."""
    return max(1, -(-nbytes // PAGE_BYTES))
