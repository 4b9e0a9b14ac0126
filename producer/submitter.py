"""Sends encoded jobs: in batches, several in flight, waiting for room where asked. One owner at a time.

The synchronous client calls `send`, which waits; the sender thread of the asynchronous one goes by the steps of which
`send` is made (`parcels`, `dispatch`, `settle`, `drop`), so that who waits for room holds up nobody else.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from torchrelay.errors import BrokerError, QueueFull, ResultExpired, RunConflict, TorchrelayError
from torchrelay.producer.encoding import Draft, JobEncoder, Outcome, SubmitOptions, lane_of_key
from torchrelay.producer.futures import JobFuture, Source
from torchrelay.producer.inbox import Inbox
from torchrelay.producer.lookups import reached
from torchrelay.queues.blobs import write_blobs
from torchrelay.queues.channel import LOST, Channel, Pending
from torchrelay.queues.codec import HostMessage
from torchrelay.queues.job import Place
from torchrelay.queues.keys import IdSource
from torchrelay.queues.placement import Placer
from torchrelay.queues.transitions import (
    MAX_BYTES_PER_CALL,
    MAX_JOBS_PER_CALL,
    NewJob,
    Session,
    Submitted,
    Transitions,
)

IN_FLIGHT = 8
_STALE_S = 0.005
# A call carries so many times more bytes out of band than inline: beyond them the next call takes over.
_OUT_OF_BAND = 32
_ROOM_S = 5.0

log = logging.getLogger("torchrelay.producer")


def pauses() -> Iterator[float]:
    """Seconds between two looks for room."""
    pause_s = 0.005
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, 0.1)


@dataclass(slots=True, eq=False)
class Item:
    """One job of a parcel, and the blobs to write before it."""

    draft: Draft
    job: NewJob
    future: JobFuture[Any]
    blobs: dict[str, HostMessage]
    places: list[Place]


@dataclass(slots=True)
class Parcel:
    """What one call carries: jobs for one lane. `pending` is the answer to come, None while it is not under way."""

    encoder: JobEncoder
    options: SubmitOptions
    lane: int
    items: list[Item]
    made_at: float = field(default_factory=time.monotonic)
    pending: Pending[Submitted] | None = None
    watched: bool = False
    written: bool = False

    @property
    def gives_up_at(self) -> float:
        """When waiting for room ends, by time.monotonic()."""
        return self.made_at + self.options.wait_s


class Submitter:
    """Owns the producer's channel, sessions and id sources. Not thread-safe: the client holds its lock around it.

    `room_s` bounds how long a column waits for room in shared memory before it goes to Redis.
    """

    def __init__(
        self,
        client: redis.Redis,
        lanes: tuple[Transitions, ...],
        inbox: Inbox,
        source: Source,
        results_max_bytes: int,
        rest: Callable[[float], None],
        placer: Placer,
    ) -> None:
        """`rest` sleeps so many seconds and lets others use the submitter meanwhile."""
        self.room_s = _ROOM_S
        self._client = client
        self._lanes = lanes
        self._inbox = inbox
        self._source = source
        self._results_max_bytes = results_max_bytes
        self._sleep = rest
        self._channel = Channel(client)
        self._placer = placer
        # Others send over the same session meanwhile: what is in flight is answered first, to keep its window.
        placer.before_waiting, placer.rest = self._channel.drain, rest
        self._ids: list[IdSource] = []
        self._sessions: list[Session] = []
        self._turn = 0

    def start(self) -> None:
        for lane in range(len(self._lanes)):
            self._new_client(lane)

    def give_up(self) -> None:
        """Waits no longer for a lost server; may be called from another thread."""
        self._channel.give_up()

    def close(self) -> None:
        self._channel.close()
        if self._placer.writer is not None:
            self._placer.writer.close()

    def _new_client(self, lane: int) -> None:
        ids = IdSource(lane)
        self._ids[lane : lane + 1] = [ids]
        self._sessions[lane : lane + 1] = [Session(ids.client)]
        self._inbox.listen(lane, ids.client)

    def send(self, encoder: JobEncoder, drafts: list[Draft], options: SubmitOptions) -> list[Outcome]:
        """Submits all; returns each one's future, or why it did not go in, in order.

        One that finds no room within `wait_s`, or no server, ends the call: those behind it do not go in either.
        """
        outcomes: list[Outcome] = []
        flight: deque[Parcel] = deque()
        refusal: TorchrelayError | None = None
        deadline = time.monotonic() + options.wait_s

        def finish() -> None:
            nonlocal refusal
            parcel = flight.popleft()
            try:
                outcomes.extend(self._settle_or_wait(parcel, deadline if refusal is None else 0.0))
            except TorchrelayError as error:
                self.drop(parcel, error)
                refusal = refusal or error
                outcomes.extend([error] * len(parcel.items))

        try:
            for parcel in self.parcels(encoder, drafts, options):
                flight.append(parcel)
                try:
                    self.dispatch(parcel)
                except QueueFull:
                    pass  # tried again when its turn to be settled comes
                while len(flight) >= IN_FLIGHT:
                    finish()
                if refusal is not None:
                    break
            while flight:
                finish()
        except BaseException:
            for parcel in flight:
                self._inbox.forget(item.future for item in parcel.items)
                self._settle_places(parcel.items, None)
            raise
        if refusal is not None:
            outcomes.extend([refusal] * (len(drafts) - len(outcomes)))
        return outcomes

    def parcels(self, encoder: JobEncoder, drafts: Iterable[Draft], options: SubmitOptions) -> Iterator[Parcel]:
        """Encodes the drafts as it goes, in order: a key chooses its lane, other jobs take the lanes in turn."""
        lanes = len(self._lanes)
        items: list[Item] = []
        nbytes = 0
        parcel_lane = turn = self._turn % lanes
        self._turn += 1
        for draft in drafts:
            lane = lane_of_key(draft.digest, lanes) if draft.digest else turn
            if items and (lane != parcel_lane or len(items) >= MAX_JOBS_PER_CALL or nbytes > MAX_BYTES_PER_CALL):
                yield Parcel(encoder, options, parcel_lane, items)
                items, nbytes = [], 0
                turn = self._turn % lanes
                self._turn += 1
                lane = lane if draft.digest else turn
            parcel_lane = lane
            try:
                items.append(self._item(encoder, lane, draft, options))
            except BaseException:
                self._settle_places(items, "")  # interrupted while it waited for room: nobody was told of these
                raise
            nbytes += len(items[-1].job.payload) + items[-1].job.nbytes // _OUT_OF_BAND
        if items:
            yield Parcel(encoder, options, parcel_lane, items)

    def _item(self, encoder: JobEncoder, lane: int, draft: Draft, options: SubmitOptions) -> Item:
        places: list[Place] = []

        def store(name: str, message: HostMessage, readers: Sequence[str], options: SubmitOptions) -> Place | None:
            patience_s = 0.0 if options.durable else min(options.wait_s, self.room_s)
            place = self._placer.put(name, lane, message, readers, cache=options.durable, patience_s=patience_s)
            places.extend(() if place is None else (place,))
            return place

        try:
            job, blobs = encoder.encode(self._ids[lane].take(), draft, options, store)
        except BaseException:
            if self._placer.writer is not None:
                self._placer.writer.free(places)
            raise
        return Item(draft, job, JobFuture(self._source, job.id, encoder.ref), blobs, places)

    def _settle_places(self, items: Iterable[Item], statuses: str | None) -> None:
        """Shared memory of jobs that went in stays until it is read; that of refused ones goes. None: nobody knows."""
        writer = self._placer.writer
        if writer is None:
            return
        for number, item in enumerate(items):
            if item.places and (statuses is None or statuses[number : number + 1] == "n"):
                writer.publish(item.places)
            elif item.places:
                writer.free(item.places)

    def dispatch(self, parcel: Parcel) -> None:
        """Sends a parcel; its answer is for `settle`. Raises QueueFull when there is no memory for its blobs."""
        lane = self._lanes[parcel.lane]
        if not parcel.watched and parcel.options.keep_s != 0:
            self._inbox.watch(item.future for item in parcel.items)
            parcel.watched = True
        blobs = {name: data for item in parcel.items for name, data in item.blobs.items()}
        if blobs and not parcel.written:
            with reached():
                write_blobs(self._client, lane, blobs)
            parcel.written = True
        jobs = [item.job for item in parcel.items]
        waited_s = time.monotonic() - parcel.made_at
        if parcel.options.deadline_s is not None and waited_s > _STALE_S:
            jobs = [job._replace(deadline_ms=max(job.deadline_ms - waited_s * 1000.0, 1.0)) for job in jobs]
        number = parcel.encoder.registered.number
        share = parcel.options.share
        call = lane.submit(self._sessions[parcel.lane], number, jobs, self._results_max_bytes, share)
        parcel.pending = self._channel.send(call)

    def settle(self, parcel: Parcel, *, again: bool = False) -> list[Outcome]:
        """Waits for the answer; each job's future, or RunConflict where its key stands for other content.

        Raises QueueFull when nothing of it went in: dispatch it again, or drop it.
        """
        if parcel.pending is None:
            self.dispatch(parcel)
        pending, parcel.pending = parcel.pending, None
        assert pending is not None  # dispatched above
        answer = pending.result()
        self._settle_places(parcel.items, answer.statuses)
        now = time.monotonic()
        for item in parcel.items:
            item.future.submitted_at = now
        if answer.statuses.count("n") == len(parcel.items):
            outcomes: list[Outcome] = [item.future for item in parcel.items]
        else:
            outcomes = self._settle_each(parcel, answer, again)
        if parcel.options.keep_s == 0:
            self._settle_unkept(outcomes)
        return outcomes

    def _settle_each(self, parcel: Parcel, answer: Submitted, again: bool) -> list[Outcome]:
        named = iter(answer.named)
        outcomes: list[Outcome] = []
        moved: list[JobFuture[Any]] = []
        for item, status in zip(parcel.items, answer.statuses, strict=True):
            if status == "n":
                outcomes.append(item.future)
                continue
            self._inbox.forget([item.future])
            if status in "ke":
                item.future.id = next(named)
                item.future.joined = True
                moved.append(item.future)
                outcomes.append(item.future)
            elif status == "x":
                next(named)
                outcomes.append(
                    RunConflict(
                        f"key {item.draft.key!r:.80} was already used with other content; use another key, or submit "
                        "the same content to get the same job"
                    )
                )
            elif again:
                why = f"job {item.job.id} was refused twice ({status}): does something else write here?"
                outcomes.append(BrokerError(why))
            else:
                outcomes.append(self._once_more(parcel, item, status))
        self._inbox.watch(moved)
        try:
            self._inbox.reconcile(moved)
        except LOST as error:
            log.info("the server is away; %d jobs that keys led to are looked at later: %s", len(moved), error)
        return outcomes

    def _once_more(self, parcel: Parcel, item: Item, status: str) -> Outcome:
        if status in "dt":
            # Another client drew the same random name: take a new one.
            self._new_client(parcel.lane)
        # Else its blobs ran out while it waited for room. Either way it is sent once more.
        fresh = self._item(parcel.encoder, parcel.lane, item.draft, parcel.options)
        one = Parcel(parcel.encoder, parcel.options, parcel.lane, [fresh])
        try:
            return self.settle(one, again=True)[0]
        except TorchrelayError as error:
            self.drop(one, error)
            return error

    def _settle_unkept(self, outcomes: list[Outcome]) -> None:
        for future in outcomes:
            if isinstance(future, JobFuture):
                gone = ResultExpired("it was submitted with keep_s=0: its result is not kept", job_id=future.id)
                with self._inbox.settled:
                    future.settle(gone)

    def drop(self, parcel: Parcel, why: TorchrelayError) -> None:
        """Forgets a parcel that did not go in; where that is certain, its blobs go at once, not in ten minutes."""
        self._inbox.forget(item.future for item in parcel.items)
        certain = isinstance(why, QueueFull)
        self._settle_places(parcel.items, "" if certain else None)
        if parcel.written and certain:
            self._delete_blobs(parcel.lane, parcel.items)

    def take_out(self, parcel: Parcel, unwanted: list[Item]) -> None:
        """Takes jobs out of a parcel that waits for room."""
        self._inbox.forget(item.future for item in unwanted)
        self._settle_places(unwanted, "")
        left = set(parcel.items).difference(unwanted)
        parcel.items = [item for item in parcel.items if item in left]
        if parcel.written:
            self._delete_blobs(parcel.lane, unwanted)

    def _delete_blobs(self, lane: int, items: list[Item]) -> None:
        names = [self._lanes[lane].keys.blob(name) for item in items for name in item.blobs]
        try:
            if names:
                self._client.delete(*names)
        except (redis.RedisError, OSError) as error:
            log.debug("blobs of jobs that found no room go by themselves: %s", error)

    def _settle_or_wait(self, parcel: Parcel, deadline: float) -> list[Outcome]:
        """While the queue is full and there is time, the parcel is sent again."""
        rests = pauses()
        while True:
            try:
                return self.settle(parcel)
            except QueueFull:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
                # Others send over the same session meanwhile: what is in flight is answered first, to keep its window.
                self._channel.drain()
                self._sleep(min(next(rests), left_s))
