"""How a run stands and how much of it is kept under way: decisions, from what the namespace tells. No I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torchrelay.config.graph import is_runs
from torchrelay.config.runs import CHUNK_ROWS
from torchrelay.config.spec import StageConfig
from torchrelay.queues.registry import WorkerReport

__all__ = [
    "Progress",
    "StageFigures",
    "Throughput",
    "bottleneck",
    "chunks_in_flight",
    "rows_per_chunk",
    "slowest_rate",
    "stage_figures",
]

_LEAST_IN_FLIGHT, _MOST_IN_FLIGHT = 4, 256
# Each worker computes one chunk and has the next at hand.
_PER_WORKER = 2
_RECENT_S = 20.0
_CHUNK_S, _MEASURED_S = 1.0, 0.5
_LEAST_ROWS, _MOST_ROWS = 16, 16_384


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage, for runs and online work together, since the run began.

    `busy` is the share of the time that its workers spent in forwards, 0 to 1; `service_s` the seconds of forward per
    1000 rows; `batch_fill` how full its batches were; `wait_s` how many seconds a row waits for its forward, in the
    queue and in a worker's hand. All three are None before it computed anything. Where a run reads and writes, a row
    is a chunk.
    """

    name: str
    waiting_rows: int
    running_rows: int
    workers: int
    busy: float = 0.0
    rows: int = 0
    service_s: float | None = None
    batch_fill: float | None = None
    moved_bytes: int = 0
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How a run stands. `chunks` is how many there are, None while they are still being found; `eta_s` how many seconds
    are left at the rate of the last ones, None where that is not known."""

    chunks: int | None
    chunks_done: int
    rows: int
    failed_rows: int
    failed_chunks: int
    seconds: float
    rows_per_s: float
    eta_s: float | None
    stages: tuple[StageFigures, ...] = ()
    bottleneck: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(slots=True)
class Throughput:
    """Rows and chunks as they end, of the last seconds."""

    began: float = field(default_factory=time.monotonic)
    rows: int = 0
    chunks: int = 0
    over: float | None = None
    """When the last chunk had ended."""
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)

    def ended(self, rows: int) -> None:
        """A chunk of so many rows, failed ones included, ended."""
        now = time.monotonic()
        self.rows += rows
        self.chunks += 1
        self._recent.append((now, self.rows, self.chunks))
        while self._recent[-1][0] - self._recent[0][0] > _RECENT_S:
            self._recent.popleft()

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.over is None else self.over) - self.began

    def rates(self) -> tuple[float, float]:
        """(rows, chunks) a second: of the last seconds once there are enough, else of all."""
        now = time.monotonic()
        if len(self._recent) >= 8:
            at, rows, chunks = self._recent[0]
            span = max(now - at, 1e-9)
            return (self.rows - rows) / span, (self.chunks - chunks) / span
        span = max(now - self.began, 1e-9)
        return self.rows / span, self.chunks / span

    def eta_s(self, left: int | None) -> float | None:
        rate = self.rates()[1]
        return None if left is None or not rate else left / rate


def rows_per_chunk(stages: Sequence[StageConfig], rate: float | None) -> int:
    """How many rows one job takes where nobody said: about a second's work of one worker at the slowest stage.

    A multiple of the largest batch, since a chunk ends with a batch that is not full. `rate` is what such a worker
    computes a second, None where that is not known.
    """
    target = float(CHUNK_ROWS) if rate is None else min(max(rate * _CHUNK_S, _LEAST_ROWS), _MOST_ROWS)
    batch = max((s.batch.max_rows for s in stages if s.use is not None), default=1)
    return int(target) if batch > _MOST_ROWS else batch * max(round(target / batch), 1)


def slowest_rate(nodes: Sequence[str], workers: Sequence[WorkerReport]) -> float | None:
    """Rows that one worker of the slowest of these nodes computes a second; None until each has computed a little."""
    rates = []
    for node in nodes:
        mine = [w for w in workers if node in w.nodes]
        rows, busy_s = sum(w.rows for w in mine), sum(w.busy_s for w in mine)
        if busy_s < _MEASURED_S:
            return None
        rates.append(rows / busy_s)
    return min(rates, default=None)


def chunks_in_flight(nodes: Iterable[str], workers: Sequence[WorkerReport]) -> int:
    """How many chunks are kept under way: no worker of these nodes waits, and what is on the way stays small."""
    wanted = set(nodes)
    serving = sum(1 for w in workers if w.state != "failed" and not wanted.isdisjoint(w.nodes))
    return min(max(_PER_WORKER * serving, _LEAST_IN_FLIGHT), _MOST_IN_FLIGHT)


def stage_figures(
    names: Sequence[str],
    refs: Sequence[str],
    loads: Mapping[str, int],
    workers: Sequence[WorkerReport],
    before: Mapping[str, WorkerReport],
    seconds: float,
    stood_row_s: Mapping[str, float],
) -> list[StageFigures]:
    """Figures of each stage of these refs, which are one pipeline and its run graph. `before` are the workers' reports
    as the run began, by worker; `stood_row_s` is, by stage, the sum of the seconds that rows have waited or run there.
    """
    found = []
    for name in names:
        keys = [f"{ref}/{name}" for ref in refs]
        mine = [w for w in workers if not set(keys).isdisjoint(w.nodes)]
        rows = busy_s = batches = most = moved = 0.0
        for now in mine:
            then = before.get(now.worker)
            # A child that died began to count anew.
            known = then is not None and then.rows <= now.rows and then.busy_s <= now.busy_s
            rows += now.rows - (then.rows if known and then else 0)
            busy_s += now.busy_s - (then.busy_s if known and then else 0.0)
            mine_batches = now.batches - (then.batches if known and then else 0)
            batches += mine_batches
            most += mine_batches * now.max_rows
            moved += sum(now.moved.values()) - (sum(then.moved.values()) if known and then else 0)
        found.append(
            StageFigures(
                name,
                sum(loads.get(f"{key}.ready_rows", 0) for key in keys),
                sum(loads.get(f"{key}.held_rows", 0) for key in keys),
                len(mine),
                min(busy_s / (len(mine) * seconds), 1.0) if mine and seconds > 0 else 0.0,
                int(rows),
                1000 * busy_s / rows if rows else None,
                None if not most or is_runs(name) else rows / most,
                int(moved),
                # All rows of a batch run as long as its forward.
                max(stood_row_s.get(name, 0.0) / rows - busy_s / batches, 0.0) if rows and batches else None,
            )
        )
    return found


def bottleneck(stages: Sequence[StageFigures]) -> str:
    """The stage that holds up the others: nobody serves it though rows wait, or else its workers are busiest; '' while
    nothing has been computed."""
    stuck = [s for s in stages if not s.workers and s.waiting_rows]
    if stuck:
        return max(stuck, key=lambda s: s.waiting_rows).name
    busiest = max(stages, key=lambda s: (round(s.busy, 2), s.waiting_rows), default=None)
    return busiest.name if busiest is not None and busiest.busy > 0 else ""
