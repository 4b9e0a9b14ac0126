"""Takes jobs from the ready sets: claims in windows, asked for ahead, and waits without polling when there are none."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from torchrelay.queues.channel import Channel, Pending
from torchrelay.queues.job import Entry
from torchrelay.queues.transitions import MAX_JOBS_PER_CALL, Entrance, Grant, Reader, Session
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import Every
from torchrelay.workers.rows_in_hand import RowsInHand

_POLL_S = 1.0
# How often it is looked whether something better came while a long job is computed.
_BETTER_EVERY_S = 0.2
# A window holds what is computed in this time: large enough to amortise a claim, small enough to share with replicas.
_WINDOW_S = 0.05
# Where rows of like length are put together, one that holds more leaves fewer batches half full at its end.
_SORTED_WINDOW_S = 0.25
# Jobs whose bytes lie on another host are left to its workers so long; while this worker has something to compute, for
# about as long as theirs take to come back for more.
_IDLE_PATIENCE_MS, _BUSY_PATIENCE_MS = 10, 50
# A worker that found only such jobs lets theirs have the next wakes, and looks again after a while: whoever was to copy
# them may have died.
_ASIDE_S, _LOOK_AGAIN_S = 0.005, 0.25


@dataclass(slots=True)
class Held:
    """One granted job in this worker's hands; `entrance` is at which of the worker's it was claimed."""

    lane: int
    fence: str
    entry: Entry
    claimed_at: float
    entrance: int = 0


def weight(entry: Entry) -> int:
    """What a job counts in a batch: its rows; one without rows counts too, else a batch could hold any number."""
    return entry.rows or 1


class _Asked(NamedTuple):
    """A claim under way, in which lane, and time.monotonic() when it was sent. `all`: of whatever rank."""

    lane: int
    at: float
    pending: Pending[Grant]
    all: bool


class Claimer:
    """The window of held jobs in rank order. `rows_per_s` is what the loop measured, 0 before it has."""

    def __init__(
        self,
        context: NodeContext,
        channel: Channel,
        session: Session,
        opened: Callable[[Sequence[Held]], object],
        asks: Callable[[], object] = int,
        host: str = "",
    ) -> None:
        """`opened` hears of jobs that were taken into the window; `asks` is called before each claim is sent, when its
        fence is known already. `host` is whose shared memory this worker reads, as refs name it."""
        self._opened = opened
        self._asks = asks
        self._context = context
        self._entrances = context.entrances()
        self._keys = [entrance.key for entrance in self._entrances]
        self._host = host
        wakes = [lane.keys.wake for lane in context.lanes]
        own = [wake(f"{key}@{host}") for wake in wakes for key in self._keys] if host else []
        self._wakes = [wake(key) for wake in wakes for key in self._keys] + own
        self._aside_until = 0.0
        self._look_at = math.inf
        self._lanes = deque(range(len(context.lanes)))
        self._found_empty: set[int] = set()
        self._channel = channel
        self._session = session
        self._numbers = count(1)
        self._better_every = Every(_BETTER_EVERY_S)
        self._asked: _Asked | None = None
        self.asked_fences: tuple[str, ...] = ()
        """Fences of claims whose answer was not read yet: the server may have granted them already."""
        self.in_hand = RowsInHand(context.spec.batch.in_flight_rows)
        self._clock_offset_ms = 0.0
        self._next_due_s = _POLL_S
        self._expected_at = math.inf
        self.window: deque[Held] = deque()
        self.window_rows = 0
        self.rows_per_s = 0.0
        self.ready_left = 1

    def server_ms(self) -> float:
        """The server's clock, as the last claim told it."""
        return time.monotonic() * 1000.0 + self._clock_offset_ms

    def ask_ahead(self, *, idle: bool = False) -> None:
        """Sends a claim unless one is under way or the window holds what is taken next. `idle`: there is nothing else
        to do."""
        if self._asked or not 0 < self._missing <= self.in_hand.room:
            return
        self._ask(self._next_lane(), idle=idle)

    def _ask(self, lane: int, better_than: float | None = None, *, idle: bool = False) -> None:
        context = self._context
        fence = f"{context.incarnation}-{next(self._numbers):x}"
        places = [self._place(number) for number in range(len(self._entrances))]
        reader = Reader(self._host, _IDLE_PATIENCE_MS if idle else _BUSY_PATIENCE_MS)
        call = context.lanes[lane].claim_any(
            self._session, fence, context.incarnation, places, context.lease_ms, better_than=better_than, reader=reader
        )
        # Its lease may begin any moment from here on.
        self.asked_fences = (fence,)
        self._asks()
        self._asked = _Asked(lane, time.monotonic(), self._channel.send(call), better_than is None)

    def has_better(self, rank: float) -> bool:
        """Whether the window now begins with a job that is better in rank than one under way: it should not have to
        wait for all of a long job. Asks the server a few times a second, in each lane in turn; call it often."""
        if not (self.window and self.window[0].entry.rank < rank) and self._better_every.due():
            self.collect()
            if self.in_hand.room > 0 and not (self.window and self.window[0].entry.rank < rank):
                self._lanes.rotate(-1)
                self._ask(self._lanes[-1], rank)
                self.collect()
        return bool(self.window) and self.window[0].entry.rank < rank

    def _place(self, entrance: int) -> Entrance:
        """Where to claim, and how much."""
        context = self._entrances[entrance]
        rows = max(self.rows_at_once(entrance), int(self.rows_per_s * _WINDOW_S))
        rows = min(rows, self.in_hand.room)
        return Entrance(context.number, *context.nodes, self._keys[entrance], min(rows, MAX_JOBS_PER_CALL), rows)

    def _next_lane(self) -> int:
        """Each lane in turn; one that was found empty only when all were."""
        for _ in range(len(self._lanes)):
            self._lanes.rotate(-1)
            if self._lanes[-1] not in self._found_empty:
                break
        return self._lanes[-1]

    def collect(self) -> bool:
        """Waits for the claim under way, if any; True when it brought jobs."""
        asked = self._asked
        if asked is None:
            return False
        grant = asked.pending.result()
        now = time.monotonic()
        # The answer may have lain unread for the length of a forward: the server's clock is that of the asking.
        self._clock_offset_ms = grant.expires_ms - self._context.lease_ms - asked.at * 1000.0
        self._next_due_s = _POLL_S if grant.next_due_ms < 0 else min(_POLL_S, grant.next_due_ms / 1000.0 + 0.001)
        if asked.all:
            self.ready_left = 0 if grant.gated else grant.left
        held = [Held(asked.lane, grant.fence, entry, now, grant.entrance) for entry in grant.entries]
        self._opened(held)
        # Only now: another thread would find the grant neither asked for nor opened, and its lease would end.
        self._asked, self.asked_fences = None, ()
        late = bool(self.window and held) and held[0].entry.rank < self.window[-1].entry.rank
        self.window.extend(held)
        if late:
            self.window = deque(sorted(self.window, key=lambda h: h.entry.rank))
        rows = sum(map(weight, grant.entries))
        self.window_rows += rows
        self.in_hand.took(rows)
        if grant.entries:
            self._found_empty.clear()
        elif asked.all:
            self._found_empty.add(asked.lane)
            if grant.elsewhere:
                self._aside_until, self._look_at = now + _ASIDE_S, now + _LOOK_AGAIN_S
        return bool(grant.entries)

    def top_up(self) -> bool:
        """Asks for more and waits for it; True when jobs came."""
        self.ask_ahead(idle=not self.window)
        return self.collect()

    def expect(self, wait_s: float) -> None:
        """A job of this node is due again in so many seconds: later than the last claim could know."""
        self._expected_at = min(self._expected_at, time.monotonic() + wait_s + 0.001)

    def idle(self) -> bool:
        """Whether every lane was found empty in turn, or no more may be taken just now."""
        return len(self._found_empty) == len(self._lanes) or self._full

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until a wake token comes, a delayed job is due, or the time-out (at most a second) is over.

        While no more may be taken, until some of what is in hand has left, and wakes are for other workers.
        """
        if self._full:
            self.in_hand.wait(self._missing, _POLL_S if timeout_s is None else min(timeout_s, _POLL_S))
            return
        now = time.monotonic()
        limit = min(self._next_due_s, self._expected_at - now, self._look_at - now)
        limit = limit if timeout_s is None else min(timeout_s, limit)
        if (aside_s := min(self._aside_until - now, limit)) > 0:
            time.sleep(aside_s)  # a server that has little to do ends short waits up to 100 ms late
        self._channel.block_pop(self._wakes, limit - max(aside_s, 0.0))
        self._look_at = math.inf
        if time.monotonic() >= self._expected_at:
            self._expected_at = math.inf
        self._found_empty.clear()
        self.ready_left = 1

    def rows_at_once(self, entrance: int = 0) -> int:
        """How many rows are taken at once, of jobs of this entrance; more than the stage's `batch` entry asks for where
        they are sorted, as far as they are soon computed."""
        batch = self._entrances[entrance].spec.batch
        if not batch.sorts:
            return batch.window_rows
        rows = int(self.rows_per_s * _SORTED_WINDOW_S)
        if batch.in_flight_rows is not None:
            rows = min(rows, batch.in_flight_rows // 2)  # the next is claimed while these are computed
        return max(batch.window_rows, rows)

    @property
    def _missing(self) -> int:
        """How many rows the window lacks of what is taken next."""
        return self.rows_at_once() - self.window_rows

    @property
    def _full(self) -> bool:
        return self._asked is None and self.in_hand.room < self._missing

    def take(self, rows: int) -> list[Held]:
        """Up to so many rows from the head of the window, in order; at least one job. All were claimed at one entrance;
        a suspect comes alone."""
        taken: list[Held] = []
        total = 0
        while self.window:
            head = self.window[0]
            if taken and (total + weight(head.entry) > rows or head.entry.suspect or taken[-1].entry.suspect):
                break
            if taken and head.entrance != taken[0].entrance:
                break
            taken.append(self.window.popleft())
            total += weight(head.entry)
        self.window_rows -= total
        return taken

    def surrender(self) -> list[Held]:
        """Everything still in the window, to be released."""
        self.collect()
        left = list(self.window)
        self.window.clear()
        self.window_rows = 0
        return left
