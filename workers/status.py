"""What a worker tells its supervisor: written to the progress page at each change, by the thread that made it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count

from torchrelay.workers import progress
from torchrelay.workers.claimer import Held
from torchrelay.workers.progress import Progress, ProgressPage

# A call into the driver.
_MEMORY_EVERY_S = 2.0


class Status:
    """Counters and running forwards of one worker. Thread-safe.

    Args:
        page: where the supervisor reads.
        fences: the grants in hand.
        moved: bytes of columns by where they went.
        failures: jobs charged so far.
        gpus: the devices from which this worker copies.
        max_rows: what a batch may hold.
    """

    def __init__(
        self,
        page: ProgressPage,
        fences: Callable[[], Iterable[str]],
        moved: Callable[[], tuple[int, ...]],
        failures: Callable[[], int],
        gpus: Callable[[], tuple[int, ...]] = tuple,
        max_rows: int = 1,
    ) -> None:
        self._page = page
        self._fences = fences
        self._moved = moved
        self._failures = failures
        self._gpus = gpus
        self._max_rows = max_rows
        self._memory: Callable[[], tuple[int, int, int] | None] = lambda: None
        self._memory_at = 0.0
        self._lock = threading.Lock()
        self._numbers = count()
        # Forwards under way, oldest first: their packed entries.
        self._running: dict[int, list[bytes]] = {}
        # Of these, the ones that a thread is in or waits for, and since when.
        self._watched: dict[int, float] = {}
        self._oldest_since = 0.0
        self._state = progress.READY
        self._jobs = 0
        self._rows = self._batches = 0
        self._busy_s = self._idle_s = 0.0

    def started(self, jobs: Sequence[Held]) -> int:
        """A forward begins; returns its number, for `stopped`."""
        with self._lock:
            number, now = next(self._numbers), time.monotonic()
            if not self._running:
                self._oldest_since = now
            self._running[number] = [h.entry.packed for h in jobs]
            self._watched[number] = now
            self._write()
        if now >= self._memory_at:
            self._look_at_memory(now)
        return number

    def watch_memory(self, look: Callable[[], tuple[int, int, int] | None]) -> None:
        """Tells of the device's memory from now on. `look` gives what `ProgressPage.tell_memory` takes, or None; it is
        called by the thread that computes."""
        self._memory = look
        self._look_at_memory(time.monotonic())

    def _look_at_memory(self, now: float) -> None:
        self._memory_at = now + _MEMORY_EVERY_S
        found = self._memory()
        if found is not None:
            self._page.tell_memory(*found)

    def launched(self, number: int) -> None:
        """`forward` returned, and the device may still compute. Until `awaited` its time does not count: the thread
        that is to look for its end may wait for the server, which is no hang."""
        with self._lock:
            since = self._watched.pop(number, 0.0)
            # While an earlier one is waited for, the page says so already.
            if since and not (self._watched and min(self._watched.values()) < since):
                self._write()

    def awaited(self, number: int) -> None:
        """A thread waits for its end from now on."""
        with self._lock:
            if number in self._running:
                self._watched[number] = time.monotonic()
                self._write()

    def stopped(self, number: int, rows: int, idle_s: float = 0.0) -> None:
        """It is over: what follows may wait for the server, and is no fault of these jobs.

        `idle_s` is how long the device stood still before it, as its events say.
        """
        with self._lock:
            # Several are launched ahead, and end in order: the next one's time begins now.
            if self._running.pop(number, None) is None:
                return
            self._watched.pop(number, None)
            now = time.monotonic()
            took_s = now - self._oldest_since
            self._busy_s += took_s
            if rows:
                self._page.tally(took_s, rows, self._max_rows)
            self._oldest_since = now
            self._batches += 1
            self._rows += rows
            self._idle_s += idle_s
            self._write()

    def ended(self, jobs: int) -> None:
        """So many jobs left the stage, whatever became of them. Told with the next change."""
        with self._lock:
            self._jobs += jobs

    def none_running(self) -> None:
        """What ends the loop now is no fault of the jobs under way: none of them is a suspect."""
        with self._lock:
            self._running.clear()
            self._watched.clear()
            self._write()

    def report(self, state: int | None = None) -> None:
        """Still alive."""
        with self._lock:
            self._state = self._state if state is None else state
            self._write()

    def _entries(self) -> Iterable[bytes]:
        """Each job once, though several of its parts may be under way: one that is there alone earns a strike."""
        if len(self._running) == 1:
            return next(iter(self._running.values()))
        return dict.fromkeys(chain.from_iterable(self._running.values()))

    def _write(self) -> None:
        self._page.write(
            Progress(
                state=self._state,
                forward_since=min(self._watched.values(), default=0.0),
                beat=time.monotonic(),
                jobs=self._jobs,
                rows=self._rows,
                batches=self._batches,
                busy_s=self._busy_s,
                idle_s=self._idle_s,
                failures=self._failures(),
                fences=tuple(self._fences()),
                started=b"".join(self._entries()),
                moved=self._moved(),
                gpus=self._gpus(),
            )
        )
