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

from torchrelay.queues.arena.holds import blocks_in_use
from torchrelay.queues.arena.home import EXPORTER_SUFFIX, ArenaHome
from torchrelay.queues.arena.life import remove_dead
from torchrelay.queues.arena.pool import BlockPool
from torchrelay.queues.arena.segment import OwnerLock, Segment, remove, segments_in
from torchrelay.queues.arena.writer import Wanted, forget_unwanted

log = logging.getLogger("torchrelay.arena")
_ASK_EVERY_S = 1.0
_ABANDONED_S = 3600.0
_UNFINISHED_S = 60.0
_OF_ARENA = re.compile(r"([0-9A-Za-z]{8})\.(?:lock|\d{1,6}\.ctl)")


@dataclass(slots=True, eq=False)
class _Adopted:
    owner: OwnerLock
    pool: BlockPool
    ask_at: float


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
        self._home.keep()
        for arena, numbers in segments_in(folder).items():
            if arena not in self._adopted:
                self._adopt(arena, numbers)
        for arena, adopted in list(self._adopted.items()):
            self._drain(arena, adopted)
        blocks_in_use(folder)  # the lists of dead readers go
        remove_dead(folder, EXPORTER_SUFFIX)
        _remove_strays(folder)
        _remove_abandoned(folder)

    def close(self) -> None:
        """A last look, then lets go: what is still waited for stays for the next keeper."""
        self.tick()
        for arena, adopted in list(self._adopted.items()):
            adopted.ask_at = 0.0
            self._drain(arena, adopted)
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
                    remove(path)
                continue
            pool.adopt(segment)
        remove(self._home.folder / f"{arena}.orphan")
        log.info("took over the shared memory of a dead process (%d MiB)", pool.nbytes >> 20)
        # The owner's last commit may still lie in the server's socket: asked at once, it would know nothing of it.
        self._adopted[arena] = _Adopted(owner, pool, time.monotonic() + _ASK_EVERY_S)

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


def _remove_strays(folder: Path) -> None:
    """What lies there of arenas without data: their owners died before their first segment, or at the end."""
    known = segments_in(folder)
    strays: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = _OF_ARENA.fullmatch(path.name)
        if match and match[1] not in known:
            strays.setdefault(match[1], []).append(path)
        elif path.suffix == ".new" and _age_s(path) > _UNFINISHED_S:
            remove(path)
    for arena, paths in strays.items():
        lock = OwnerLock(folder, arena)
        if lock.take():
            for path in paths:
                remove(path)
            lock.give(remove=True)


def _remove_abandoned(folder: Path) -> None:
    """Arenas of other namespaces that nobody has owned for an hour: their servers, or their jobs, are gone."""
    for other in folder.parent.iterdir():
        if other == folder or other.is_symlink() or not other.is_dir():
            continue
        for arena, numbers in segments_in(other).items():
            lock = OwnerLock(other, arena)
            if not lock.take():
                continue
            # The first keeper that finds it without an owner notes when; a keeper of its own namespace adopts it.
            note = other / f"{arena}.orphan"
            if not note.exists():
                note.touch(mode=0o600)
            stale = _age_s(note) > _ABANDONED_S
            for path in [p for n in numbers for p in other.glob(f"{arena}.{n}.*")] if stale else ():
                remove(path)
            if stale:
                remove(note)
            lock.give(remove=stale)
        if _age_s(other) > _ABANDONED_S:
            blocks_in_use(other)  # the lists of dead readers go
            remove_dead(other, EXPORTER_SUFFIX)
            try:
                other.rmdir()
            except OSError:
                pass  # something lies there


def _age_s(path: Path) -> float:
    """Seconds since it was changed; 0 where it is gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
