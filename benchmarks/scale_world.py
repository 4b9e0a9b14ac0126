"""A simulated pipeline for `scale_sim.py`: stages in a row, workers that load, compute batches and drain, on slots.

Time goes in steps of `STEP_S`, within which batches start and end at their own times. What a rule may see is what a
coordinator sees: heartbeats every 2 s, each worker at its own moment, and load counters with a little noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchrelay.queues.histogram import SERVICE_BUCKETS
from torchrelay.queues.registry import WorkerReport
from torchrelay.queues.waiting import ReadyClass

STEP_S = 0.1
BEAT_S = 2.0
DELAYS_S = {"high": 0.5, "medium": 2.0}
HIGH_SHARE = 0.2
REF = "sim@00000000"
# What a low job is placed behind a high one.
_OVERTAKES_S = 30.0
_COUNTER_NOISE = 0.03
_ABSENT, _LOADING, _READY, _DRAINING = 0, 1, 2, 3
_STATES = ("gone", "loading", "ready", "draining")
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class StageShape:
    """A batch of r rows takes (fixed_s + r * row_s) * X seconds, X of mean 1: log-normal of this sigma, or Pareto of
    this tail where that is given. From `slower_at_s` on it takes `slower` times as long."""

    name: str
    max_rows: int
    fixed_s: float
    row_s: float
    sigma: float
    tail: float | None
    load_s: float
    slower: float = 1.0
    slower_at_s: float = float("inf")

    def seconds_per_row(self, at_s: float = 0.0) -> float:
        """Of a worker with full batches."""
        return (self.fixed_s / self.max_rows + self.row_s) * (self.slower if at_s >= self.slower_at_s else 1.0)


class _Fifo:
    """Arrival times of waiting rows, oldest first."""

    def __init__(self) -> None:
        self._data: Floats = np.empty(1024)
        self._head = self._tail = 0

    def __len__(self) -> int:
        return self._tail - self._head

    def put(self, times: Floats) -> None:
        if self._tail + len(times) > len(self._data):
            alive = self._data[self._head : self._tail]
            grown = np.empty(max(len(self._data), 2 * (len(alive) + len(times))))
            grown[: len(alive)] = alive
            self._data, self._head, self._tail = grown, 0, len(alive)
        self._data[self._tail : self._tail + len(times)] = times
        self._tail += len(times)

    def take(self, count: int) -> Floats:
        taken = self._data[self._head : min(self._head + count, self._tail)].copy()
        self._head += len(taken)
        return taken

    def first(self) -> float:
        return float(self._data[self._head]) if len(self) else float("inf")

    def rest(self) -> Floats:
        return self._data[self._head : self._tail]


@dataclass
class Result:
    """`missed` of `visits` (a row at a stage) waited longer than the delay of their class."""

    missed: int = 0
    visits: int = 0
    slot_s: float = 0.0
    changes: int = 0
    peak: int = 0
    refused: int = 0
    counts: list[tuple[int, ...]] = field(default_factory=list)


class StageWorld:
    """One stage and its workers."""

    def __init__(self, shape: StageShape, room: int, rng: np.random.Generator) -> None:
        self.shape, self.rng = shape, rng
        self.queues = {"high": _Fifo(), "medium": _Fifo()}
        self.state = np.zeros(room, np.int8)
        self.free_at, self.ready_at, self.took_s = np.zeros(room), np.zeros(room), np.zeros(room)
        self.started_at, self.life = np.zeros(room), np.zeros(room, np.int64)
        # Which workers tell of themselves in each step of a heartbeat.
        moments = rng.integers(0, round(BEAT_S / STEP_S), room)
        self.beats = [np.flatnonzero(moments == i) for i in range(round(BEAT_S / STEP_S))]
        self.pending = False
        self.counts = np.zeros((room, 4))  # rows, batches, seconds, and how long it loaded
        self.service = np.zeros((room, SERVICE_BUCKETS), np.int64)
        self.open = np.zeros((room, 4))  # rows, 1, seconds and bucket of the batch that it computes; or noughts
        self.told, self.told_service = np.zeros((room, 4)), np.zeros((room, SERVICE_BUCKETS), np.int64)
        self.told_at, self.told_state = np.zeros(room), np.zeros(room, np.int8)
        self.done_rows = 0.0
        # Batches that will leave: when, and rows of each class.
        self.leaving = np.empty((0, 3))

    def occupied(self) -> int:
        return int(np.count_nonzero(self.state))

    def planned(self) -> int:
        return int(np.count_nonzero((self.state == _LOADING) | (self.state == _READY)))

    def start(self, count: int, at_s: float, *, ready: bool = False) -> None:
        new = np.flatnonzero(self.state == _ABSENT)[:count]
        if not len(new):
            return
        n = len(new)
        load_s = self.shape.load_s * self.rng.lognormal(0.0, 0.15, n)
        self.state[new] = _READY if ready else _LOADING
        self.pending = True
        # The agent looks every two seconds.
        self.ready_at[new] = at_s if ready else at_s + self.rng.uniform(0.2, 2.0, n) + load_s
        self.free_at[new], self.started_at[new] = self.ready_at[new], at_s
        self.took_s[new] = load_s
        self.life[new] += 1
        for block in (self.counts, self.service, self.open, self.told, self.told_service):
            block[new] = 0
        if ready:
            self.counts[new, 3] = self.told[new, 3] = self.took_s[new]
        self.told_state[new], self.told_at[new] = (_READY, at_s) if ready else (_ABSENT, at_s)

    def stop(self, count: int, at_s: float) -> None:
        """Those that load go first, then those that are free soonest; each ends its batch."""
        mine = np.flatnonzero((self.state == _LOADING) | (self.state == _READY))
        order = np.lexsort((self.free_at[mine], self.state[mine]))
        gone = mine[order[:count]]
        loading = gone[self.state[gone] == _LOADING]
        self.state[gone] = _DRAINING
        self.pending = True
        self.free_at[loading] = at_s

    def step(self, at_s: float, result: Result) -> Floats:
        """One step; returns what left: times and rows of each class."""
        end_s = at_s + STEP_S
        if self.pending:
            self._move_on(at_s)
        while len(self.queues["high"]) or len(self.queues["medium"]):
            idle = np.flatnonzero((self.state == _READY) & (self.free_at < end_s))
            if not len(idle):
                break
            self._begin(idle[np.argsort(self.free_at[idle])], at_s, result)
        self._tell(self.beats[round(at_s / STEP_S) % len(self.beats)], at_s)
        gone = self.leaving[:, 0] < end_s
        if not gone.any():
            return self.leaving[:0]
        left, self.leaving = self.leaving[gone], self.leaving[~gone]
        self.done_rows += float(left[:, 1:].sum())
        return left[np.argsort(left[:, 0], kind="stable")]

    def _move_on(self, at_s: float) -> None:
        """Those that have loaded, and those that have drained."""
        ready = (self.state == _LOADING) & (self.ready_at <= at_s)
        if ready.any():
            self.state[ready] = _READY
            self.counts[ready, 3] = self.took_s[ready]
        over = (self.state == _DRAINING) & (self.free_at <= at_s)
        if over.any():
            self._close_batches(np.flatnonzero(over))
            self.state[over] = _ABSENT
        self.pending = bool(((self.state == _LOADING) | (self.state == _DRAINING)).any())

    def _begin(self, idle: np.ndarray[Any, Any], at_s: float, result: Result) -> None:
        most = len(idle) * self.shape.max_rows
        names = ["high", "medium"]
        if self.queues["medium"].first() + _OVERTAKES_S < self.queues["high"].first():
            names.reverse()
        first = self.queues[names[0]].take(most)
        second = self.queues[names[1]].take(most - len(first))
        times = np.concatenate((first, second))
        edges = np.arange(0, len(times), self.shape.max_rows)
        rows = np.full(len(edges), self.shape.max_rows)
        rows[-1] = len(times) - edges[-1]
        who = idle[: len(edges)]
        start = np.maximum(self.free_at[who], np.maximum.reduceat(times, edges))
        delay = np.repeat(start, rows) - times
        result.missed += int(np.count_nonzero(delay[: len(first)] > DELAYS_S[names[0]]))
        result.missed += int(np.count_nonzero(delay[len(first) :] > DELAYS_S[names[1]]))
        result.visits += len(times)
        shape, n = self.shape, len(who)
        if shape.tail is None:
            factor = self.rng.lognormal(-(shape.sigma**2) / 2.0, shape.sigma, n)
        else:
            factor = (self.rng.pareto(shape.tail, n) + 1.0) * (shape.tail - 1.0) / shape.tail
        slower = shape.slower if at_s >= shape.slower_at_s else 1.0
        took = (shape.fixed_s + shape.row_s * rows) * factor * slower
        self._close_batches(who)
        self.free_at[who] = start + took
        batch = np.empty((n, 4))
        batch[:, 0], batch[:, 1], batch[:, 2] = rows, 1.0, took
        batch[:, 3] = np.minimum(np.ceil(2.0 * np.log2(np.maximum(took, 1e-4) / 1e-4)), SERVICE_BUCKETS - 1)
        self.open[who] = batch
        firsts = np.minimum(np.maximum(len(first) - edges, 0), rows)
        left = np.empty((n, 3))
        left[:, 0] = start + took
        left[:, 1] = firsts if names[0] == "high" else rows - firsts
        left[:, 2] = rows - left[:, 1]
        self.leaving = np.concatenate((self.leaving, left))

    def _close_batches(self, which: np.ndarray[Any, Any]) -> None:
        batches = self.open.take(which, axis=0)
        alive = batches[:, 1] > 0
        if not alive.all():
            which, batches = which[alive], batches[alive]
        self.counts[which, :3] += batches[:, :3]
        self.service[which, batches[:, 3].astype(np.int64)] += 1
        self.open[which] = 0.0

    def _tell(self, beats: np.ndarray[Any, Any], at_s: float) -> None:
        beats = beats[self.state[beats] != _ABSENT]
        if len(beats):
            self._close_batches(beats[self.free_at[beats] <= at_s])
            self.told[beats], self.told_service[beats] = self.counts[beats], self.service[beats]
            self.told_at[beats], self.told_state[beats] = at_s, self.state[beats]

    def reports(self) -> list[WorkerReport]:
        """As the workers last told of themselves."""
        heard = np.flatnonzero((self.state != _ABSENT) & (self.told_state != _ABSENT))
        node, max_rows = f"{REF}/{self.shape.name}", self.shape.max_rows
        told, service = self.told[heard].tolist(), self.told_service[heard].tolist()
        found = []
        for i, (rows, batches, busy_s, load_s), counts in zip(heard.tolist(), told, service, strict=True):
            found.append(
                WorkerReport(
                    worker=f"{self.shape.name}-{i}-{self.life[i]}",
                    host="h",
                    pid=int(self.life[i]),
                    node=node,
                    device="cuda",
                    state=_STATES[self.told_state[i]],
                    started_at=float(self.started_at[i]),
                    jobs=int(rows),
                    rows=int(rows),
                    batches=int(batches),
                    max_rows=max_rows,
                    busy_s=busy_s,
                    service=counts,
                    load_s=load_s,
                    sent_at=float(self.told_at[i]),
                )
            )
        return found

    def counters(self) -> dict[str, int]:
        noise = 1.0 + _COUNTER_NOISE * self.rng.standard_normal()
        ready = sum(len(q) for q in self.queues.values())
        held = float(self.leaving[:, 1:].sum())
        node = f"{REF}/{self.shape.name}"
        return {
            f"{node}.ready_rows": int(max(ready * noise, 0)),
            f"{node}.held_rows": int(held),
            f"{node}.committed": int(self.done_rows),
        }

    def classes(self, at_s: float) -> dict[str, ReadyClass]:
        return {
            name: ReadyClass(len(q), 1000.0 * max(at_s - q.first(), 0.0)) for name, q in self.queues.items() if len(q)
        }


@dataclass(frozen=True)
class View:
    """What a rule sees."""

    at_s: float
    stages: Sequence[StageWorld]

    @property
    def reports(self) -> list[WorkerReport]:
        return [report for stage in self.stages for report in stage.reports()]

    @property
    def counters(self) -> dict[str, int]:
        return {key: value for stage in self.stages for key, value in stage.counters().items()}

    @property
    def ready(self) -> dict[str, dict[str, ReadyClass]]:
        ready = {f"{REF}/{stage.shape.name}": stage.classes(self.at_s) for stage in self.stages}
        return {node: c for node, c in ready.items() if c}


Rule = Callable[[View], Mapping[str, int] | None]


def simulate(
    shapes: Sequence[StageShape],
    rates: Floats,
    begin: Mapping[str, int],
    rule: Rule,
    *,
    slots: int,
    seed: int,
    every_s: float = BEAT_S,
) -> Result:
    """Runs the trace: `rates` are rows per second in each step. `rule` is asked every `every_s` for the number of
    workers of each stage; None leaves them as they are. Rows still waiting at the end count if they waited too long."""
    rng = np.random.default_rng(seed)
    # Workers that drain beside those that replace them.
    room = slots + max(slots // 4, 16)
    stages = [StageWorld(shape, room, np.random.default_rng([seed, i])) for i, shape in enumerate(shapes)]
    result = Result()
    for stage in stages:
        stage.start(begin[stage.shape.name], 0.0, ready=True)
    burst = 1.0
    for step, rate in enumerate(rates):
        at_s = step * STEP_S
        if step % int(1.0 / STEP_S) == 0:
            burst = rng.gamma(8.0, 1.0 / 8.0)
        came = np.sort(at_s + STEP_S * rng.random(rng.poisson(rate * burst * STEP_S)))
        high = rng.random(len(came)) < HIGH_SHARE
        incoming = (came[high], came[~high])
        for stage in stages:
            if len(incoming[0]):
                stage.queues["high"].put(incoming[0])
            if len(incoming[1]):
                stage.queues["medium"].put(incoming[1])
            left = stage.step(at_s, result)
            incoming = (
                np.repeat(left[:, 0], left[:, 1].astype(np.int64)),
                np.repeat(left[:, 0], left[:, 2].astype(np.int64)),
            )
        used = sum(stage.occupied() for stage in stages)
        result.slot_s += used * STEP_S
        result.peak = max(result.peak, used)
        if step % round(every_s / STEP_S) == 0:
            _apply(rule(View(at_s, stages)), stages, slots, at_s, result)
            result.counts.append(tuple(stage.planned() for stage in stages))
    end_s = len(rates) * STEP_S
    for stage in stages:
        for name, queue in stage.queues.items():
            late = int(np.count_nonzero(end_s - queue.rest() > DELAYS_S[name]))
            result.missed += late
            result.visits += late
    return result


def _apply(
    wanted: Mapping[str, int] | None, stages: Sequence[StageWorld], slots: int, at_s: float, result: Result
) -> None:
    """Stops first, then starts what there are free slots for."""
    if wanted is None:
        return
    changed = False
    for stage in stages:
        surplus = stage.planned() - wanted[stage.shape.name]
        if surplus > 0:
            stage.stop(surplus, at_s)
            changed = True
    free = slots - sum(stage.occupied() for stage in stages)
    for stage in stages:
        missing = wanted[stage.shape.name] - stage.planned()
        if missing > 0:
            count = min(missing, free)
            result.refused += missing - count
            stage.start(count, at_s)
            free -= count
            changed = changed or count > 0
    result.changes += changed
