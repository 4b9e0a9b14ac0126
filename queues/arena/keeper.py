"""Takes over the arenas of dead owners: their blocks live until their readers have them, then their files go.

Every supervisor has one. Whoever gets a dead owner's lock keeps that arena until it is empty; if it dies too, the next
one does. Files of another namespace are not touched, but for those that nobody owned or changed for an hour.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.pool import BlockPool
from torchrelay.queues.arena.segment import OwnerLock, Segment, segments_in
from torchrelay.queues.arena.writer import Wanted, forget_unwanted

log = logging.getLogger("torchrelay.arena")
_ASK_EVERY_S = 1.0
_ABANDONED_S = 3600.0
_LOCK = re.compile(r"([0-9A-Za-z]{8})\.lock")


@dataclass(slots=True, eq=False)
class _Adopted:
    owner: OwnerLock
    pool: BlockPool
    ask_at: float = 0.0


class ArenaKeeper:
    """Call `tick()` about once a second, `close()` at the end."""

    def __init__(self, home: ArenaHome, wanted: Wanted) -> None:
        self._home = home
        self._wanted = wanted
        self._adopted: dict[str, _Adopted] = {}

    @property
    def adopted(self) -> int:
        """How many dead owners' arenas this process keeps."""
        return len(self._adopted)

    def tick(self) -> None:
        """Adopts what became ownerless, and removes what nobody waits for."""
        folder = self._home.folder
        for arena, numbers in segments_in(folder).items():
            if arena not in self._adopted:
                self._adopt(arena, numbers)
        for arena, adopted in list(self._adopted.items()):
            self._drain(arena, adopted)
        _remove_stray_locks(folder)
        _remove_abandoned(folder)

    def close(self) -> None:
        """A last look, then lets go: what is still waited for stays for the next keeper."""
        self.tick()
        for adopted in self._adopted.values():
            adopted.owner.give(remove=False)
        self._adopted.clear()

    def _adopt(self, arena: str, numbers: list[int]) -> None:
        owner = OwnerLock(self._home.folder, arena)
        if not owner.take():
            return
        pool = BlockPool(self._home.folder)
        for number in sorted(numbers):
            segment = Segment.attach(self._home.folder, arena, number, writable=True)
            if segment is None:
                # Half made when its owner died, or no segment at all.
                for path in self._home.folder.glob(f"{arena}.{number}.*"):
                    path.unlink(missing_ok=True)
                continue
            pool.adopt(segment)
        (self._home.folder / f"{arena}.orphan").unlink(missing_ok=True)
        log.info("took over the shared memory of a dead process (%d MiB)", pool.nbytes >> 20)
        self._adopted[arena] = _Adopted(owner, pool)

    def _drain(self, arena: str, adopted: _Adopted) -> None:
        pool = adopted.pool
        pool.collect()
        if not pool.empty and time.monotonic() >= adopted.ask_at:
            adopted.ask_at = time.monotonic() + _ASK_EVERY_S
            pool.evict_caches(wanted_bytes=pool.nbytes)
            forget_unwanted(pool, self._wanted)
        for segment in pool.drop_empty():
            segment.unlink(self._home.folder)
        if pool.empty:
            adopted.owner.give(remove=True)
            del self._adopted[arena]


def _remove_stray_locks(folder: Path) -> None:
    """Locks of owners that died before their first segment, or between its removal and theirs."""
    known = segments_in(folder)
    for path in folder.glob("*.lock"):
        match = _LOCK.fullmatch(path.name)
        if match and match[1] not in known:
            lock = OwnerLock(folder, match[1])
            if lock.take(make=False):
                lock.give(remove=match[1] not in segments_in(folder))


def _remove_abandoned(folder: Path) -> None:
    """Arenas of other namespaces that nobody has owned for an hour: their servers, or their jobs, are gone."""
    for other in folder.parent.iterdir():
        if other == folder or not other.is_dir():
            continue
        for arena, numbers in segments_in(other).items():
            lock = OwnerLock(other, arena)
            if not lock.take():
                continue
            # The first keeper that finds it without an owner notes when; a keeper of its own namespace adopts it.
            note = other / f"{arena}.orphan"
            note.touch(mode=0o600, exist_ok=True)
            stale = note.stat().st_mtime < time.time() - _ABANDONED_S
            for path in [p for n in numbers for p in other.glob(f"{arena}.{n}.*")] if stale else ():
                path.unlink(missing_ok=True)
            if stale:
                note.unlink(missing_ok=True)
            lock.give(remove=stale)
        _remove_unused(other)


def _remove_unused(folder: Path) -> None:
    """A namespace's folder in which nothing has lain for an hour."""
    if folder.stat().st_mtime < time.time() - _ABANDONED_S:
        try:
            folder.rmdir()
        except OSError:
            pass  # something lies there
