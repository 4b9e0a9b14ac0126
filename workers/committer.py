"""Gives jobs back: committed, failed, lost or released. Commits of one grant are joined and pipelined."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torchrelay.queues.channel import Channel, Pending
from torchrelay.queues.job import Failure
from torchrelay.queues.transitions import Output, Session
from torchrelay.workers.claimer import Held
from torchrelay.workers.node import NodeContext

log = logging.getLogger("torchrelay.worker")
# Finished jobs of a grant wait this long for the rest of it, so that one script commits them together.
_JOIN_S = 0.005
_IN_FLIGHT = 8
_MAX_COMMIT_BYTES = 1 << 20


class Charge(NamedTuple):
    """A failed job and why. `final`: it is not tried again; `after_s`: the stage chose the wait, in seconds."""

    held: Held
    why: Failure
    final: bool = False
    after_s: float | None = None


class _Grant(NamedTuple):
    """Jobs that were claimed together, at one entrance."""

    lane: int
    fence: str
    entrance: int


def _grant_of(held: Held) -> _Grant:
    return _Grant(held.lane, held.fence, held.entrance)


class Committer:
    """Sends commits without waiting for each, eight at most; `flush()` and `drain()` bound what waits here."""

    def __init__(
        self,
        context: NodeContext,
        channel: Channel,
        session: Session,
        settled: Callable[[str, Sequence[bytes], str], object],
    ) -> None:
        """`settled(fence, tokens, statuses)` hears what became of jobs; statuses are commit's, '' when given back."""
        self._settled = settled
        self._entrances = context.entrances()
        self._channel = channel
        self._session = session
        self._lock = threading.Lock()
        self._open: Counter[_Grant] = Counter()
        self._outputs: dict[_Grant, list[Output]] = {}
        self._oldest = 0.0
        self._sent: deque[tuple[Pending[str], list[bytes], str]] = deque()
        self.failures = 0

    @property
    def fences(self) -> tuple[str, ...]:
        """Grants with jobs that were not given back yet, as far as the server answered."""
        with self._lock:
            return tuple({grant.fence for grant in self._open} | {fence for _, _, fence in self._sent})

    @property
    def waiting(self) -> bool:
        """Whether outputs are not sent yet, or not answered."""
        return bool(self._outputs or self._sent)

    def opened(self, held: Iterable[Held]) -> None:
        """Notes jobs that were taken into the window; may be called by another thread than the rest."""
        with self._lock:
            self._open.update(map(_grant_of, held))

    def commit(self, held: Held, output: Output) -> None:
        """Queues one job's output; `flush()` decides when it goes."""
        if not self._outputs:
            self._oldest = time.monotonic()
        self._outputs.setdefault(_grant_of(held), []).append(output)

    def flush(self, *, everything: bool = False) -> None:
        """Sends grants that are complete, and all of them once the oldest output has waited."""
        everything = everything or (bool(self._outputs) and time.monotonic() - self._oldest > _JOIN_S)
        for grant in list(self._outputs):
            if everything or len(self._outputs[grant]) >= self._open[grant]:
                self._send(grant, self._outputs.pop(grant))
        while self._sent and self._sent[0][0].done:
            self._settle()

    def _send(self, grant: _Grant, outputs: list[Output]) -> None:
        part: list[Output] = []
        size = 0
        for output in outputs:
            if part and size + len(output.payload) > _MAX_COMMIT_BYTES:
                self._send_part(grant, part)
                part, size = [], 0
            part.append(output)
            size += len(output.payload)
        self._send_part(grant, part)
        self._closed(grant, len(outputs))

    def _send_part(self, grant: _Grant, outputs: list[Output]) -> None:
        context, fence = self._entrances[grant.entrance], grant.fence
        while len(self._sent) >= _IN_FLIGHT:
            self._settle()
        call = context.lanes[grant.lane].commit(self._session, fence, context.number, context.nodes, outputs)
        sent = (self._channel.send(call), [o.token for o in outputs], fence)
        with self._lock:
            self._sent.append(sent)

    def _closed(self, grant: _Grant, jobs: int) -> None:
        with self._lock:
            self._open[grant] -= jobs
            if self._open[grant] <= 0:
                del self._open[grant]

    def _settle(self) -> None:
        # It stays listed until the answer is here: until then its lease is needed.
        pending, tokens, fence = self._sent[0]
        statuses = pending.result()
        with self._lock:
            self._sent.popleft()
        self._settled(fence, tokens, statuses)
        if statuses.count("k") == len(tokens):
            return
        words = {"s": "another worker has them, or they ended", "d": "past their deadline", "b": "their blobs are gone"}
        for status, why in words.items():
            refused = [t[:-1].decode() for t, s in zip(tokens, statuses, strict=True) if s == status]
            if refused:
                fields = {"jobs": ",".join(refused[:3]) + (",..." if len(refused) > 3 else ""), "fence": fence}
                log.info("%d outputs not committed: %s", len(refused), why, extra={"fields": fields})

    def fail(self, failed: Sequence[Charge]) -> float:
        """Charges an attempt to each job; retries wait with full jitter, as the stage's `retry` says.

        Returns the shortest of those waits, in seconds.
        """
        shortest_s = self._entrances[0].spec.retry.backoff_s[1]
        for grant, final in {(_grant_of(c.held), c.final) for c in failed}:
            context = self._entrances[grant.entrance]
            attempts = context.spec.retry.attempts
            mine = [c for c in failed if _grant_of(c.held) == grant and c.final == final]
            charges = []
            for held, why, _, after_s in mine:
                wait_s = self._wait_s(held) if after_s is None else after_s
                shortest_s = min(shortest_s, wait_s)
                charges.append((held.entry.packed, wait_s * 1000.0, why))
                fields = {"job": held.entry.job_id, "attempt": held.entry.attempts + 1, "error": why.error_type}
                log.warning("job failed: %s", why.message[:300], extra={"fields": fields})
            call = context.lanes[grant.lane].fail(
                self._session, grant.fence, context.number, context.node.index, charges, 1 if final else attempts
            )
            self._channel.run(call)
            self._settled(grant.fence, [c.held.entry.packed for c in mine], "")
            self._closed(grant, len(mine))
        self.failures += len(failed)
        return shortest_s

    def _wait_s(self, held: Held) -> float:
        base_s, cap_s = self._entrances[held.entrance].spec.retry.backoff_s
        return random.uniform(0.0, min(cap_s, base_s * 2.0 ** min(held.entry.attempts, 30)))

    def lose(self, lost: Sequence[tuple[Held, int]], why: Failure) -> None:
        """Restarts jobs whose bytes are gone; with each, the mask of the nodes that made them, 0 when unknown."""
        makers = {(h.fence, h.entry.packed): mask for h, mask in lost}
        self._give_back(
            [h for h, _ in lost],
            lambda lane, fence, tokens: lane.lost(
                self._session, fence, tokens, why, [makers[fence, token] for token in tokens]
            ),
        )

    def release(self, held: Sequence[Held]) -> None:
        """Gives jobs back unharmed."""
        self._give_back(held, lambda lane, fence, tokens: lane.release(self._session, fence, tokens))

    def _give_back(self, held: Sequence[Held], call: object) -> None:
        for grant in set(map(_grant_of, held)):
            tokens = [h.entry.packed for h in held if _grant_of(h) == grant]
            self._channel.run(call(self._entrances[0].lanes[grant.lane], grant.fence, tokens))  # type: ignore[operator]
            self._settled(grant.fence, tokens, "")
            self._closed(grant, len(tokens))

    def drain(self) -> None:
        """Sends and settles everything."""
        self.flush(everything=True)
        while self._sent:
            self._settle()
