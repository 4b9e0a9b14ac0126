"""Rows in, results out, a bounded number of jobs under way between them: the flow of both clients, without I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from torchrelay.errors import InputError, QueueFull, RunConflict
from torchrelay.producer.futures import JobFuture

Future = JobFuture[dict[str, Any]]
# Rows that come more slowly than this are sent as they come.
PATIENCE_WITH_ROWS_S = 0.005


class Ends(Protocol):
    """What a window holds."""

    def done(self) -> bool: ...


F = TypeVar("F", bound=Ends)


class Window(Generic[F]):
    """What is under way: at most `in_flight`, given back done, in order or as they come."""

    def __init__(self, in_flight: int, ordered: bool = True) -> None:
        if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
            raise InputError(f"in_flight {in_flight!r:.60} must be a whole number from 1")
        self.in_flight = in_flight
        # Refilling in steps keeps the round trips few; a step of a quarter keeps three quarters under way.
        self.step = max(1, in_flight // 4)
        self.sending = 0
        self._ordered = ordered
        self._waiting: deque[F] = deque()
        self._ready: deque[F] = deque()

    def __len__(self) -> int:
        return self.sending + len(self._waiting) + len(self._ready)

    def room(self) -> int:
        """How many more may be sent now: a whole step, or 0."""
        return self.step if len(self) <= self.in_flight - self.step else 0

    def add(self, futures: Iterable[F]) -> None:
        """Takes in what was sent."""
        self._waiting.extend(futures)

    def has_done(self) -> bool:
        """Whether `pop` has one to give."""
        if self._ordered:
            return bool(self._waiting) and self._waiting[0].done()
        if not self._ready:
            # One look at all for every batch of endings.
            waiting: deque[F] = deque()
            for future in self._waiting:
                (self._ready if future.done() else waiting).append(future)
            self._waiting = waiting
        return bool(self._ready)

    def pop(self) -> F | None:
        """The next one that is done, or None while there is none."""
        if not self.has_done():
            return None
        return self._waiting.popleft() if self._ordered else self._ready.popleft()

    @property
    def oldest(self) -> F | None:
        """The one that is waited for longest."""
        return self._waiting[0] if self._waiting else None

    def pending(self) -> list[F]:
        """All that have not ended."""
        return [future for future in self._waiting if not future.done()]


def yields_errors(on_error: str) -> bool:
    """What `map` was told to do with a job that fails; raises InputError."""
    if on_error not in ("raise", "return"):
        raise InputError(f'on_error {on_error!r:.60} must be "raise" or "return"')
    return on_error == "return"


def accepted_of(refused: QueueFull | RunConflict) -> list[Future]:
    """What went in of a part that was refused: it is to be cancelled with the rest."""
    return [f for f in refused.accepted if isinstance(f, JobFuture)]


def map_rows(
    rows: Iterator[Mapping[str, Any]],
    window: Window[Future],
    submit: Callable[[list[Mapping[str, Any]], int], list[Future]],
    wait: Callable[[Future, Callable[[], bool]], object],
    cancel: Callable[[list[str]], object],
) -> Generator[Future, None, None]:
    """Yields the jobs of all rows as they are done; `submit` takes some rows and the number of the first.

    Whatever ends it early (an error, closing the generator) cancels the jobs under way.
    """
    sent = 0
    try:
        while True:
            while part := some(rows, window.room()):
                try:
                    window.add(submit(part, sent))
                except (QueueFull, RunConflict) as refused:
                    window.add(accepted_of(refused))
                    raise
                sent += len(part)
                if window.has_done():
                    break  # rows that come slowly must not hold up results that are there
            if (future := window.pop()) is not None:
                yield future
            elif (oldest := window.oldest) is not None:
                wait(oldest, window.has_done)
            else:
                return
    finally:
        if ids := [f.id for f in window.pending()]:
            cancel(ids)


def some(rows: Iterator[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The next rows, at most so many; fewer where they come slowly, none at the end."""
    part: list[Mapping[str, Any]] = []
    started = time.monotonic()
    for row in islice(rows, most):
        part.append(row)
        if time.monotonic() - started > PATIENCE_WITH_ROWS_S:
            break
    return part
