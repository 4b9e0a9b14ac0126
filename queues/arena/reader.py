"""Reads blocks of other processes in place, and releases them once what was made of them is committed.

`view` gives the bytes and lists the block as in use; `intact` says whether they are still what the ref meant; `release`
gives them back to their owner; `drop` only takes them off the list. The bytes may change under a view whose block was
taken back: nothing that was computed from it may leave before `intact` said yes.
"""

from __future__ import annotations

import logging
import re
from typing import Protocol

from torchrelay.queues.arena.holds import Holds, block_key
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.segment import FIRST_RELEASE, READY, SLOT_WORDS, Segment, data_path, segments_in
from torchrelay.queues.job import Place

log = logging.getLogger("torchrelay.arena")
_ARENA = re.compile(r"[0-9A-Za-z]{8}")
_FORGET_EVERY = 256


class Pins(Protocol):
    """Pins the memory of segments."""

    def mapped(self, segment: Segment) -> None:
        """It was just mapped."""
        ...

    def unmapped(self, segment: Segment) -> None:
        """It is about to be unmapped."""
        ...


class ArenaReader:
    """Maps segments as refs to them come. One thread calls `view`; the other calls may come from another.

    Args:
        home: the namespace's arenas on this host.
        pins: what pins mapped segments for a GPU; they are then mapped writable, since a driver pins nothing that is
            read-only.
    """

    def __init__(self, home: ArenaHome, pins: Pins | None = None) -> None:
        self._home = home
        self._pins = pins
        self._segments: dict[tuple[str, int], Segment] = {}
        self._holds: Holds | None = None
        self._views = 0

    @property
    def host(self) -> int:
        return self._home.host

    def view(self, place: Place, nbytes: int) -> memoryview | None:
        """Read-only bytes of a block, None when they are not here (any more), or are no block of this host's."""
        if place.host != self._home.host:
            return None
        segment = self._segment(place)
        if segment is None or not _is_block(segment, place, nbytes):
            return None
        # Without a place on the list a block that is taken back may change sooner, which `intact` tells all the same.
        key, holds = _key(place), self._listing()
        if holds is not None:
            holds.add(key)
        if segment.words[place.slot * SLOT_WORDS] != place.generation:
            self.drop(place)
            return None
        return segment.room[place.offset : place.offset + nbytes]

    def _listing(self) -> Holds | None:
        if self._holds is None:
            try:
                self._holds = Holds(self._home.folder)
            except OSError as error:
                log.debug("what is read is not listed as in use: %s", error)
        return self._holds

    def tend(self) -> None:
        """Gives back the memory of segments whose owners removed them; by the thread that calls `view`."""
        self._forget_removed()

    def segment(self, place: Place) -> Segment | None:
        """The mapped segment of a block that `view` gave."""
        return self._segments.get((place.arena, place.segment))

    def intact(self, place: Place) -> bool:
        """Whether the block still is what the ref meant: its bytes are as they were written."""
        segment = self._segments.get((place.arena, place.segment))
        return segment is not None and segment.words[place.slot * SLOT_WORDS] == place.generation

    def release(self, place: Place, *edges: int) -> None:
        """These edges need the block no longer: their commit was accepted. Takes it off the list, too."""
        self.give_back(place, *edges)
        self.drop(place)

    def give_back(self, place: Place, *edges: int) -> None:
        """As `release`, of a block that is off the list already."""
        segment = self._segments.get((place.arena, place.segment))
        if segment is not None and self.intact(place):
            for edge in edges:
                segment.words[place.slot * SLOT_WORDS + FIRST_RELEASE + edge] = place.generation

    def drop(self, place: Place) -> None:
        """Takes one use of the block off the list."""
        if self._holds is not None:
            self._holds.drop(_key(place))

    def close(self) -> None:
        """Forgets every mapping; views that still live keep theirs."""
        for key in list(self._segments):
            self._forget(key)
        if self._holds is not None:
            self._holds.close()
            self._holds = None

    def _segment(self, place: Place) -> Segment | None:
        self._views += 1
        if self._views % _FORGET_EVERY == 0:
            self._forget_removed()
        key = (place.arena, place.segment)
        found = self._segments.get(key)
        if found is None and _ARENA.fullmatch(place.arena):
            found = Segment.attach(self._home.folder, *key, writable=self._pins is not None)
            if found is not None:
                self._segments[key] = found
                if self._pins is not None:
                    self._pins.mapped(found)
        return found

    def map_all(self) -> None:
        """Maps what is there, where that takes time later: a GPU's worker pins it before its first claim."""
        if self._pins is None:
            return
        for arena, numbers in segments_in(self._home.folder).items():
            for number in numbers:
                self._segment(Place(self._home.host, arena, number, 0, 0, 0))

    def _forget_removed(self) -> None:
        """A segment whose file is gone gives its memory back when the last mapping goes."""
        for key in list(self._segments):
            if not data_path(self._home.folder, *key).exists():
                self._forget(key)

    def _forget(self, key: tuple[str, int]) -> None:
        segment = self._segments.pop(key)
        if self._pins is not None:
            self._pins.unmapped(segment)


def _key(place: Place) -> tuple[int, int]:
    return block_key(place.arena, place.segment, place.slot)


def _is_block(segment: Segment, place: Place, nbytes: int) -> bool:
    """Whether a finished block of this generation, place and size lies there: a ref may say anything."""
    if not 0 <= place.slot < segment.slots or nbytes < 0 or place.offset + nbytes > segment.nbytes:
        return False
    at = place.slot * SLOT_WORDS
    generation, state, offset, size = segment.words[at : at + 4]
    return (generation, state & 0xFF, offset, size) == (place.generation, READY, place.offset, nbytes)
