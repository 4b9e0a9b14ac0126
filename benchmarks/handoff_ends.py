"""The two ends of a hand-off, for benchmarks/handoff.py: a sender that submits arrays, a receiver that claims them.

Both go the way of the product: the array becomes a message, its bytes get a place, a submit announces the ref; a claim
brings it, the bytes are read where they are, and the commit gives the place back. Only the place differs (`Road`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from typing import Any, Protocol

import numpy as np
import redis

from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.blobs import fetch_blobs, write_blobs
from torchrelay.queues.channel import Channel, Pending
from torchrelay.queues.codec import Message, decode, encode, message
from torchrelay.queues.job import Place, Ref, decode_payload, encode_payload
from torchrelay.queues.keys import IdSource, LaneKeys
from torchrelay.queues.transitions import ClaimLimits, Grant, NewJob, Output, Session, Submitted, Transitions

PAGE_BYTES = 4096
NODE = 1
_LEASE_MS = 60_000
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """One measurement: `jobs` arrays of so many bytes by the `road` "arena" or "redis", `window` per submit and per
    claim, at most `ahead` windows under way. The clock runs from the end of the first `warm` to the end of `until`
    arrays: those behind them keep the sender as busy as before, since without them the last ones would have been sent
    before the clock began."""

    road: str
    nbytes: int
    window: int
    ahead: int
    warm: int
    until: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Joint:
    """Where both ends meet: the server, the number and key of the pipeline's one node, and the arena's largest size."""

    url: str
    number: int
    node_key: str
    home: ArenaHome
    arena_bytes: int

    def lane(self) -> Transitions:
        return Transitions(LaneKeys("bench", 0))


class Sender:
    """Submits arrays; `slots` bounds how many windows of them the receiver has not committed yet."""

    def __init__(self, joint: Joint, slots: Semaphore) -> None:
        self._joint = joint
        self._client = redis.Redis.from_url(joint.url)
        self._lane = joint.lane()
        self._channel = Channel(self._client)
        self._ids = IdSource(0)
        self._session = Session(self._ids.client)
        self._slots = slots
        self._writer = ArenaWriter(joint.home, ArenaLimits(joint.arena_bytes), lambda lane, names: [True] * len(names))
        self._flight: deque[tuple[Pending[Submitted], list[Place]]] = deque()

    def run(self, order: Order) -> None:
        """Hands all of an order's arrays over, and returns when the last one is announced."""
        # The same array each time: what a stage has just made is in the caches as well.
        source = np.ones(order.nbytes, np.uint8)
        for _ in range(order.jobs // order.window):
            if not self._slots.acquire(timeout=_PATIENCE_S):
                raise SystemExit("the receiver stopped; what it printed says why")
            ids = [self._ids.take() for _ in range(order.window)]
            messages = {f"{job_id}.0.in.data": message(source) for job_id in ids}
            refs = self._written(messages) if order.road == "redis" else self._placed(messages)
            jobs = []
            for job_id, ref in zip(ids, refs, strict=True):
                payload = encode_payload({"data": ref})
                jobs.append(NewJob(job_id, payload, 1, ref.nbytes, keep_s=0, refs=ref.text(NODE)))
            pending = self._channel.send(self._lane.submit(self._session, self._joint.number, jobs, 1 << 40))
            self._flight.append((pending, [ref.place for ref in refs if ref.place is not None]))
            self._settle(most_left=1)
        self._settle(most_left=0)

    def _written(self, messages: dict[str, Message]) -> list[Ref]:
        write_blobs(self._client, self._lane, messages)
        return [Ref.of(name, len(made)) for name, made in messages.items()]

    def _placed(self, messages: dict[str, Message]) -> list[Ref]:
        refs = []
        for name, made in messages.items():
            place = self._writer.put(name, 0, made, edges=1)
            if place is None:
                raise SystemExit(f"no room in the arena for {len(made)} bytes; give it more shared memory")
            refs.append(Ref.of(name, len(made), place, in_redis=False))
        return refs

    def _settle(self, most_left: int) -> None:
        while len(self._flight) > most_left:
            pending, places = self._flight.popleft()
            statuses = pending.result().statuses
            if statuses.strip("n"):
                raise SystemExit(f"a submit was refused: {statuses}")
            self._writer.publish(places)

    def close(self) -> None:
        self._channel.close()
        self._client.close()
        self._writer.close()


class Road(Protocol):
    """Where the receiver's bytes come from."""

    def views(self, refs: Sequence[Ref]) -> list[bytes | memoryview]:
        """The bytes behind the refs."""

    def intact(self, refs: Sequence[Ref]) -> bool:
        """Whether they were right while they were used."""

    def release(self, refs: Sequence[Ref]) -> None:
        """The commit was accepted."""


class ArenaRoad:
    """Bytes in place in shared memory."""

    def __init__(self, home: ArenaHome) -> None:
        self._reader = ArenaReader(home)

    def views(self, refs: Sequence[Ref]) -> list[bytes | memoryview]:
        found: list[bytes | memoryview] = []
        for ref in refs:
            view = self._reader.view(_place(ref), ref.nbytes)
            if view is None:
                raise SystemExit(f"the bytes of {ref.name} are gone")
            found.append(view)
        return found

    def intact(self, refs: Sequence[Ref]) -> bool:
        return all(self._reader.intact(_place(ref)) for ref in refs)

    def release(self, refs: Sequence[Ref]) -> None:
        for ref in refs:
            self._reader.release(_place(ref), 0)

    def close(self) -> None:
        self._reader.close()


class RedisRoad:
    """Bytes in Redis, fetched in one round trip; the server frees them when the job ends."""

    def __init__(self, client: redis.Redis, lane: Transitions) -> None:
        self._client = client
        self._lane = lane

    def views(self, refs: Sequence[Ref]) -> list[bytes | memoryview]:
        found = [data for data in fetch_blobs(self._client, self._lane, list(refs)) if data is not None]
        if len(found) != len(refs):
            raise SystemExit("the bytes of a blob are gone")
        return [*found]

    def intact(self, refs: Sequence[Ref]) -> bool:
        return True

    def release(self, refs: Sequence[Ref]) -> None:
        """Nothing is held here."""


def _place(ref: Ref) -> Place:
    assert ref.place is not None  # the sender put it there
    return ref.place


class Receiver:
    """Claims, reads, commits and releases; one claim is under way while the last grant is worked on."""

    def __init__(self, joint: Joint, slots: Semaphore) -> None:
        self._joint = joint
        self._client = redis.Redis.from_url(joint.url)
        self._lane = joint.lane()
        self._channel = Channel(self._client)
        self._incarnation = IdSource(0).client
        self._session = Session(self._incarnation)
        self._slots = slots
        self._fences = 0
        self._arena = ArenaRoad(joint.home)
        self._redis = RedisRoad(self._client, self._lane)
        self._commits: deque[tuple[Pending[str], list[Ref]]] = deque()
        self._done = 0
        self._started_s = self._ended_s = 0.0

    def run(self, order: Order) -> float:
        """Seconds from the release of the first `warm` arrays to that of `until`."""
        road: Road = self._redis if order.road == "redis" else self._arena
        self._done, left = 0, order.jobs
        asked = self._ask(order)
        while left:
            grant = asked.result()
            if not grant.entries:
                self._settle(road, order)
                self._channel.block_pop([self._lane.keys.wake(self._joint.node_key)], 1.0)
                asked = self._ask(order)
                continue
            left -= len(grant.entries)
            if left:
                asked = self._ask(order)
            self._work(road, order, grant)
        self._settle(road, order)
        return self._ended_s - self._started_s

    def _ask(self, order: Order) -> Pending[Grant]:
        self._fences += 1
        fence = f"{self._incarnation}-{self._fences:x}"
        limits = ClaimLimits(order.window, order.window, 1 << 20, _LEASE_MS)
        call = self._lane.claim(self._session, fence, self._incarnation, self._joint.number, NODE, limits)
        return self._channel.send(call)

    def _work(self, road: Road, order: Order, grant: Grant) -> None:
        refs: list[Ref] = []
        for entry in grant.entries:
            ref = decode_payload(entry.payloads[0]).columns["data"]
            assert isinstance(ref, Ref)  # the sender sends nothing else
            refs.append(ref)
        pages = -(-order.nbytes // PAGE_BYTES)
        outputs = []
        for entry, data in zip(grant.entries, road.views(refs), strict=True):
            array: Any = decode(data)
            touched = int(array[::PAGE_BYTES].sum())
            if touched != pages:
                raise SystemExit(f"{touched} pages of {pages} were touched")
            outputs.append(Output(entry.packed, encode_payload({"data": encode(touched)})))
        if not road.intact(refs):
            raise SystemExit("a block changed while it was read")
        # The commit before this one was answered while these bytes were read.
        self._settle(road, order)
        call = self._lane.commit(self._session, grant.fence, self._joint.number, NODE, outputs)
        self._commits.append((self._channel.send(call), refs))

    def _settle(self, road: Road, order: Order) -> None:
        while self._commits:
            pending, refs = self._commits.popleft()
            statuses = pending.result()
            if statuses.strip("k"):
                raise SystemExit(f"a commit was refused: {statuses}")
            road.release(refs)
            self._done += len(refs)
            if self._done % order.window == 0:
                self._slots.release()
            if self._done == order.warm:
                self._started_s = time.perf_counter()
            elif self._done == order.until:
                self._ended_s = time.perf_counter()

    def close(self) -> None:
        self._channel.close()
        self._client.close()
        self._arena.close()


def receive(joint: Joint, slots: Semaphore, orders: Connection) -> None:
    """The receiver's process: answers each order with its seconds; None ends it."""
    receiver = Receiver(joint, slots)
    try:
        while (order := orders.recv()) is not None:
            orders.send(receiver.run(order))
    finally:
        receiver.close()
