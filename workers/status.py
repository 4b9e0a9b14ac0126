"""What a worker tells its supervisor: written to the progress page at each change, by the thread that made it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count

from torchrelay.workers import progress
from torchrelay.workers.claimer import Held
from torchrelay.workers.progress import Progress, ProgressPage


class Status:
    """Counters and running forwards of one worker. Thread-safe.

    Args:
        page: where the supervisor reads.
        fences: the grants in hand.
        moved: bytes of columns by where they went.
        failures: jobs charged so far.
    """

    def __init__(
        self,
        page: ProgressPage,
        fences: Callable[[], Iterable[str]],
        moved: Callable[[], tuple[int, ...]],
        failures: Callable[[], int],
    ) -> None:
        self._page = page
        self._fences = fences
        self._moved = moved
        self._failures = failures
        self._lock = threading.Lock()
        self._numbers = count()
        # Forwards under way, oldest first: their packed entries.
        self._running: dict[int, list[bytes]] = {}
        self._oldest_since = 0.0
        self._state = progress.READY
        self._jobs = 0
        self._rows = self._batches = 0
        self._busy_s = self._idle_s = 0.0

    def started(self, jobs: Sequence[Held]) -> int:
        """A forward begins; returns its number, for `stopped`."""
        with self._lock:
            number = next(self._numbers)
            if not self._running:
                self._oldest_since = time.monotonic()
            self._running[number] = [h.entry.packed for h in jobs]
            self._write()
        return number

    def stopped(self, number: int, rows: int, idle_s: float = 0.0) -> None:
        """It is over: what follows may wait for the server, and is no fault of these jobs.

        `idle_s` is how long the device stood still before it, as its events say.
        """
        with self._lock:
            # Several are launched ahead, and end in order: the next one's time begins now.
            if self._running.pop(number, None) is None:
                return
            now = time.monotonic()
            self._busy_s += now - self._oldest_since
            self._oldest_since = now
            self._batches += 1
            self._rows += rows
            self._idle_s += idle_s
            self._write()

    def ended(self, jobs: int) -> None:
        """So many jobs left the stage, whatever became of them."""
        with self._lock:
            self._jobs += jobs
            self._write()

    def none_running(self) -> None:
        """What ends the loop now is no fault of the jobs under way: none of them is a suspect."""
        with self._lock:
            self._running.clear()
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
                forward_since=self._oldest_since if self._running else 0.0,
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
            )
        )
