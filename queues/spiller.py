"""Copies to Redis what lies in this host's shared memory and others wait for: a worker of another host that has nothing
to do, a job that is delayed, a dead letter; and what has lain there for long.

Each supervisor has one, and one of a host's is at work, under a lock that its death frees. What is asked for stands in
Redis (`spilling.lua`) until the copy is recorded (`spill.lua`), so it may die anywhere. A copy has a name of its own
until it is recorded, and goes by itself if it never is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis

from torchrelay.errors import BrokerError, ConfigError, DecodeError, QueueFull
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.pool import now_ms
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.segment import KIND_ONLY, READY, SLOT_WORDS, OwnerLock, Segment, segments_in
from torchrelay.queues.blobs import write_blobs
from torchrelay.queues.codec import HostMessage
from torchrelay.queues.job import Ref, decode_payload, host_text, split_refs
from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import Registry, run
from torchrelay.queues.tickets import is_ticket
from torchrelay.queues.transitions import Asked, Copied, Transitions

log = logging.getLogger("torchrelay.arena")
ANSWERS_MS = 6_000
_LEAVES_MS = 2_000
_FULL_S = 5.0
AGED_MS = 60_000
_WAIT_S = 1.5
_OVERDUE_MS = 2_500
_SOON_S, _LOOK_S = 0.2, 0.004
_AT_ONCE = 64
_GROUP_BYTES = 8 << 20
_ASK_AGED_S = 10.0
_AGED_AT_ONCE = 256


@dataclass(slots=True)
class _Copy:
    """What one ref of a job means, read: `data` None where nothing is there any more."""

    member: str
    name: str
    data: bytes | None


class Spiller:
    """`start()` begins a thread; `stop()` ends it, after it did what it was asked for."""

    def __init__(self, registry: Registry, home: ArenaHome, aged_ms: int = AGED_MS) -> None:
        self._registry = registry
        self._home = home
        self._host = host_text(home.host)
        self._aged_ms = aged_ms
        self._aged_at = time.monotonic() + _ASK_AGED_S
        self._full_since: float | None = None
        self._stopping = threading.Event()
        self._wakes = [lane.keys.wake(f"@{self._host}") for lane in registry.lanes]
        self._thread = threading.Thread(target=self._run, name="torchrelay-spiller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the round that is under way, and does one more."""
        self._stopping.set()
        with contextlib.suppress(redis.RedisError, OSError), self._registry.client.pipeline() as pipe:
            pipe.rpush(self._wakes[0], 1)
            pipe.ltrim(self._wakes[0], -1, -1)
            pipe.pexpire(self._wakes[0], 2 * ANSWERS_MS)
            pipe.execute()
        self._thread.join(10.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            lock = OwnerLock(self._home.folder, "spiller")
            try:
                mine = lock.take()
            except OSError as error:
                log.warning("what other hosts wait for is not copied: %s", error)
                mine = False
            if not mine and not self._overdue():
                self._stopping.wait(_WAIT_S)
                continue
            reader = ArenaReader(self._home)
            try:
                self._serve(reader, instead=not mine)
            finally:
                reader.close()
                lock.give(remove=True)

    def _overdue(self) -> bool:
        """Whether who has the lock said nothing for some time: it may be stopped. Two at work do no harm."""
        try:
            left: Any = self._registry.client.pttl(self._registry.lanes[0].keys.present(self._host))
        except (redis.RedisError, OSError):
            return False
        return int(left) < ANSWERS_MS - _OVERDUE_MS

    def _serve(self, reader: ArenaReader, *, instead: bool = False) -> None:
        """Until it is to stop; `instead` of another that has the lock, for one round."""
        while True:
            last = self._stopping.is_set()
            try:
                due_s = min([self._copy_asked(lane, reader) for lane in self._registry.lanes])
                if last and not instead:
                    # Time for the next one: else others take the host's jobs meanwhile, and find them lost.
                    self._answers_for(_LEAVES_MS)
                if last or instead:
                    return
                self._ask_for_aged()
                reader.tend()
                self._await_more(due_s)
            except (BrokerError, redis.RedisError, OSError, ConfigError) as error:
                log.warning("what other hosts wait for is not copied: %s", error)
                if last:
                    return
                self._stopping.wait(_WAIT_S)

    def _await_more(self, due_s: float) -> None:
        if due_s < _SOON_S:
            # A server that has little to do ends short waits up to 100 ms late.
            time.sleep(min(due_s, _LOOK_S))
        else:
            self._registry.client.blpop(self._wakes, timeout=due_s)

    def _answers_for(self, ttl_ms: int) -> None:
        """Says so, in all lanes: a round may take longer than what each of its looks says."""
        for lane in self._registry.lanes:
            run(self._registry.client, lane.spilling(self._host, 1, ttl_ms))

    def _copy_asked(self, lane: Transitions, reader: ArenaReader) -> float:
        """Does what is due; returns the seconds until more is, or to look again."""
        wait_ms, asked = run(self._registry.client, lane.spilling(self._host, _AT_ONCE, ANSWERS_MS))
        group: list[_Copy] = []
        size = 0
        for job in asked:
            for copy in self._copies(job, reader):
                group.append(copy)
                size += len(copy.data or b"")
            # Between two jobs: what is asked for of one is recorded together.
            if size >= _GROUP_BYTES:
                if not self._record(lane, group):
                    return 0.0
                group, size = [], 0
        self._record(lane, group)
        if asked:
            return 0.0
        return _WAIT_S if wait_ms < 0 else min(_WAIT_S, wait_ms / 1000.0)

    def _copies(self, job: Asked, reader: ArenaReader) -> Iterator[_Copy]:
        refs: dict[str, Ref] = {}
        for payload in job.payloads:
            with contextlib.suppress(DecodeError):
                columns = decode_payload(payload).columns.values()
                refs |= {column.name: column for column in columns if isinstance(column, Ref)}
        for name in split_refs(job.refs):
            ref = refs.get(name)
            yield _Copy(job.member, name, None if ref is None else _read(reader, ref))

    def _record(self, lane: Transitions, group: list[_Copy]) -> bool:
        """False when the server's memory is full, after a while."""
        if not group:
            return True
        self._answers_for(ANSWERS_MS)
        token = new_token(8)
        named = [(copy, "" if copy.data is None else f"spill.{token}.{n}") for n, copy in enumerate(group)]
        try:
            blobs: dict[str, HostMessage] = {blob: copy.data for copy, blob in named if copy.data is not None}
            write_blobs(self._registry.client, lane, blobs, must_pass=self._full_for_long())
        except QueueFull:
            # The workers of this host go on with their part of the jobs, and drain it, if there are any.
            self._full_since = self._full_since or time.monotonic()
            self._stopping.wait(_WAIT_S)
            return False
        self._full_since = None
        done = [Copied(c.member, c.name, blob, Ref.of(c.name, len(c.data or b"")).chunks) for c, blob in named]
        answers = run(self._registry.client, lane.spill(self._host, done))
        if missing := answers.count("u"):
            log.info("%d columns that are waited for are gone; their jobs restart", missing)
        return True

    def _full_for_long(self) -> bool:
        """Whether to write all the same, once: who could drain the server may wait for this."""
        return self._full_since is not None and time.monotonic() - self._full_since > _FULL_S

    def _ask_for_aged(self) -> None:
        """Has what lay here for long copied too: a host's memory is for what is handed on soon."""
        if time.monotonic() < self._aged_at:
            return
        self._aged_at = time.monotonic() + _ASK_AGED_S
        by_lane: dict[int, list[str]] = {}
        for number, name in _older_than(self._home, now_ms() - self._aged_ms):
            by_lane.setdefault(number, []).append(name)
        for number, names in by_lane.items():
            if number < len(self._registry.lanes):
                run(self._registry.client, self._registry.lanes[number].aged(self._host, names[:_AGED_AT_ONCE]))


def _read(reader: ArenaReader, ref: Ref) -> bytes | None:
    """What lies there, whole; None where it does not, or only tells of a device's memory."""
    view = None if ref.place is None else reader.view(ref.place, ref.nbytes)
    if view is None or ref.place is None:
        return None
    try:
        data = None if is_ticket(view) else bytes(view)
        return data if reader.intact(ref.place) else None
    finally:
        reader.drop(ref.place)


def _older_than(home: ArenaHome, made_ms: int) -> Iterator[tuple[int, str]]:
    """Lane and name of whole blocks that are nowhere else, the oldest segments first."""
    for arena, numbers in segments_in(home.folder).items():
        for number in sorted(numbers):
            segment = Segment.attach(home.folder, arena, number)
            for slot in range(segment.slots if segment is not None else 0):
                assert segment is not None  # it has slots
                generation, state, offset, size, _, stamp = segment.words[slot * SLOT_WORDS :][:6]
                if generation % 2 == 0 or state & 0xFFFF != READY | KIND_ONLY << 8 or stamp & (1 << 48) - 1 > made_ms:
                    continue
                if offset + size <= segment.nbytes and not is_ticket(segment.room[offset : offset + size]):
                    yield stamp >> 48, segment.name_of(slot)
