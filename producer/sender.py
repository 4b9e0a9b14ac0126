"""The sending thread of an AsyncRelay: gathers what callers of one loop submit and cancel, and sends it together.

Who waits for room waits in a line of its pipeline, apart from everybody else; only the line's head asks for room.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import redis

from torchrelay.errors import BrokerError, InputError, QueueFull, TorchrelayError
from torchrelay.producer.core import Core
from torchrelay.producer.encoding import Draft, JobEncoder, Outcome, SubmitOptions
from torchrelay.producer.futures import JobFuture
from torchrelay.producer.submitter import IN_FLIGHT, Parcel, pauses

_MOST_AT_ONCE = 4096

log = logging.getLogger("torchrelay.producer")


class Request:
    """What one caller submits: `make` checks and encodes it, in the sending thread; `reply` is called there at the end.

    `error` holds what kept all of it from being sent, else `outcomes` what became of each draft.
    """

    __slots__ = ("_missing", "error", "gone", "make", "options", "outcomes", "reply")

    def __init__(
        self,
        make: Callable[[], tuple[JobEncoder, list[Draft]]],
        options: SubmitOptions,
        reply: Callable[[Request], object],
    ) -> None:
        self.make = make
        self.options = options
        self.reply = reply
        self.gone = False  # set by the caller, from its own thread, when it does not wait any more
        self.error: Exception | None = None
        self.outcomes: list[Outcome] = []
        self._missing = 0

    def expect(self, drafts: list[Draft]) -> None:
        """Makes each draft report here."""
        self._missing = len(drafts)
        self.outcomes = [_UNANSWERED] * len(drafts)
        for number, draft in enumerate(drafts):
            draft.owner, draft.number = self, number
        if not drafts:
            self.reply(self)

    def take(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        self._missing -= 1
        if not self._missing:
            self.reply(self)

    @property
    def answered(self) -> bool:
        """Whether it is known of each of its jobs what became of it."""
        return not self._missing

    def fail(self, error: Exception) -> None:
        self.error = error
        self.reply(self)


_UNANSWERED = BrokerError("not answered yet")
_UNWANTED = BrokerError("nobody waits for this job any more")


class Cancel:
    """Jobs to end; `reply` gets for each whether this ended it, or the error."""

    __slots__ = ("ids", "reply")

    def __init__(self, ids: list[str], reply: Callable[[list[bool] | Exception], object] | None = None) -> None:
        self.ids = ids
        self.reply = reply


@dataclass(slots=True)
class _Line:
    """Parcels of one pipeline that wait for room, first come first served."""

    parcels: deque[Parcel] = field(default_factory=deque)
    rests: Iterator[float] = field(default_factory=pauses)
    look_at: float = 0.0

    def next_event(self) -> float:
        return min(self.look_at, *(p.gives_up_at for p in self.parcels))


class Sender:
    """Runs in a thread of its own between `start()` and `close()`; `put` may be called from any thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._queue: SimpleQueue[Request | Cancel | None] = SimpleQueue()
        self._lines: dict[str, _Line] = {}
        # Answered when their callers had gone already.
        self._abandoned: list[Request] = []
        self._thread = threading.Thread(target=self._run, name="torchrelay-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, work: Request | Cancel) -> None:
        self._queue.put(work)

    def close(self) -> None:
        """Does what was put before, refuses those who wait for room, and ends the thread."""
        self._queue.put(None)
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        going = True
        while going:
            works = self._collect()
            going = None not in works
            with self._core.lock:
                self._submit([w for w in works if isinstance(w, Request)])
                self._look_for_room()
            self._cancel([w for w in works if isinstance(w, Cancel)])
            self._cancel_abandoned()
        why = InputError("this AsyncRelay was closed while a submit waited for room")
        for parcel in [parcel for line in self._lines.values() for parcel in line.parcels]:
            self._refuse(parcel, why)
        self._cancel_abandoned()

    def _collect(self) -> list[Request | Cancel | None]:
        works: list[Request | Cancel | None] = []
        timeout = None
        if self._lines:
            timeout = max(0.0, min(line.next_event() for line in self._lines.values()) - time.monotonic())
        try:
            works.append(self._queue.get(timeout=timeout))
            while len(works) < _MOST_AT_ONCE and works[-1] is not None:
                works.append(self._queue.get_nowait())
        except Empty:
            pass
        return works

    def _submit(self, requests: list[Request]) -> None:
        """Sends together what goes to the same pipeline in the same way."""
        groups: dict[tuple[str, SubmitOptions], tuple[JobEncoder, list[Draft]]] = {}
        for request in requests:
            if request.gone:
                continue
            try:
                encoder, drafts = request.make()
            except Exception as error:
                request.fail(error)
                continue
            request.expect(drafts)
            groups.setdefault((encoder.ref, request.options), (encoder, []))[1].extend(drafts)
        away: TorchrelayError | None = None
        for (_, options), (encoder, drafts) in groups.items():
            away = self._send(encoder, drafts, options, away)

    def _send(
        self, encoder: JobEncoder, drafts: list[Draft], options: SubmitOptions, away: TorchrelayError | None
    ) -> TorchrelayError | None:
        """Sends one group, unless the server is `away`; returns the error where it turns out to be."""
        flight: deque[Parcel] = deque()
        refused = away
        try:
            for parcel in self._core.submitter.parcels(encoder, drafts, options):
                if refused is not None and not isinstance(refused, QueueFull):
                    self._refuse(parcel, refused)
                elif options.wait_s > 0 and (refused or encoder.ref in self._lines):
                    self._wait_in_line(parcel)
                elif refused is not None:
                    self._refuse(parcel, refused)
                else:
                    refused = self._try(parcel, self._core.submitter.dispatch)
                    if refused is None:
                        flight.append(parcel)
                if len(flight) >= IN_FLIGHT:
                    refused = self._settle(flight.popleft()) or refused
        except Exception as error:
            # What does not encode is refused request by request before: this is a fault of ours.
            log.exception("submitting to %s", encoder.ref)
            self._refuse_rest(drafts, BrokerError(f"submitting failed: {error!r}"))
        while flight:
            refused = self._settle(flight.popleft()) or refused
        return None if isinstance(refused, QueueFull) else refused

    def _settle(self, parcel: Parcel) -> TorchrelayError | None:
        return self._try(parcel, self._settle_and_tell)

    def _settle_and_tell(self, parcel: Parcel) -> None:
        for item, outcome in zip(parcel.items, self._core.submitter.settle(parcel), strict=True):
            self._tell(item.draft, outcome)

    def _try(self, parcel: Parcel, step: Callable[[Parcel], object]) -> TorchrelayError | None:
        """Takes a step with a parcel; what is refused waits in line or its owners are told. Returns the refusal."""
        try:
            step(parcel)
            return None
        except Exception as error:
            refusal = _refusal(error)
        if isinstance(refusal, QueueFull) and time.monotonic() < parcel.gives_up_at:
            self._wait_in_line(parcel)
        else:
            self._refuse(parcel, refusal)
        return refusal

    def _refuse(self, parcel: Parcel, why: TorchrelayError) -> None:
        self._core.submitter.drop(parcel, why)
        for item in parcel.items:
            self._tell(item.draft, why)

    def _refuse_rest(self, drafts: list[Draft], why: TorchrelayError) -> None:
        for draft in drafts:
            owner = draft.owner
            if isinstance(owner, Request) and owner.outcomes[draft.number] is _UNANSWERED:
                self._tell(draft, why)

    def _tell(self, draft: Draft, outcome: Outcome) -> None:
        owner = draft.owner
        if owner is None:
            return
        owner.take(draft.number, outcome)
        if isinstance(owner, Request) and owner.gone and owner.answered:
            self._abandoned.append(owner)

    def _wait_in_line(self, parcel: Parcel) -> None:
        ref = parcel.encoder.ref
        line = self._lines.get(ref)
        if line is None:
            line = self._lines[ref] = _Line()
            line.look_at = time.monotonic() + next(line.rests)
        line.parcels.append(parcel)

    def _look_for_room(self) -> None:
        for ref, line in list(self._lines.items()):
            if time.monotonic() >= line.next_event():
                self._advance(line)
            if not line.parcels:
                del self._lines[ref]

    def _advance(self, line: _Line) -> None:
        """Sends the head as long as there is room; then those whose time is over leave the line."""
        why: TorchrelayError | None = None
        while line.parcels and why is None:
            if not self._still_wanted(line.parcels[0]):
                line.parcels.popleft()
                continue
            try:
                self._settle_and_tell(line.parcels[0])
            except Exception as error:
                why = _refusal(error)
            else:
                line.parcels.popleft()
                line.rests = pauses()
        now = time.monotonic()
        if why is not None:
            is_full = isinstance(why, QueueFull)
            leaving = [p for p in line.parcels if p.gives_up_at <= now or not is_full]
            line.parcels = deque(p for p in line.parcels if p.gives_up_at > now and is_full)
            for parcel in leaving:
                self._refuse(parcel, why)
        line.look_at = now + next(line.rests)

    def _still_wanted(self, parcel: Parcel) -> bool:
        """Takes out of a waiting parcel what nobody waits for any more; whether anything is left."""
        unwanted = [i for i in parcel.items if i.draft.owner is not None and i.draft.owner.gone]
        if unwanted:
            self._core.submitter.take_out(parcel, unwanted)
            for item in unwanted:
                self._tell(item.draft, _UNWANTED)
        return bool(parcel.items)

    def _cancel_abandoned(self) -> None:
        """What went in of requests whose callers had gone: when this client is being closed, the loop hears of their
        answers too late to have it cancelled."""
        gone, self._abandoned = self._abandoned, []
        self._cancel([Cancel(ids) for request in gone if (ids := orphans(request))])

    def _cancel(self, cancels: list[Cancel]) -> None:
        if not cancels:
            return
        won: list[bool] | Exception
        try:
            won = self._core.cancel([i for cancel in cancels for i in cancel.ids])
        except (TorchrelayError, redis.RedisError, OSError) as error:
            log.info("cancelling jobs: %s", error)
            won = error
        at = 0
        for cancel in cancels:
            part = won[at : at + len(cancel.ids)] if isinstance(won, list) else won
            at += len(cancel.ids)
            if cancel.reply is not None:
                cancel.reply(part)


def _refusal(error: Exception) -> TorchrelayError:
    if not isinstance(error, TorchrelayError | redis.RedisError | OSError):
        log.error("submitting failed", exc_info=error)
    return error if isinstance(error, TorchrelayError) else BrokerError(f"submitting failed: {error!r}")


def orphans(request: Request) -> list[str]:
    """Jobs of a caller that went away before it heard of them; a job that was there before is not its own."""
    return [o.id for o in request.outcomes if isinstance(o, JobFuture) and not o.joined and not o.done()]
