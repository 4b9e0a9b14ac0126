"""A small simulated fleet: two stages that sleep, few slots, a closed loop of jobs; what `benchmarks/fleet_shift.py`
has in the real world. One event after the other, so that hundreds of cases take seconds."""

from __future__ import annotations

import bisect
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchrelay.coordinator.loads import LoadTracker
from torchrelay.coordinator.scale import Limits, State, decide
from torchrelay.coordinator.sharing import slots
from torchrelay.queues.histogram import SERVICE_BUCKETS, service_bucket
from torchrelay.queues.registry import WorkerReport
from torchrelay.queues.waiting import ReadyClass

REF = "shift@1"
STAGES = ("first", "second")
BEAT_S, LOOK_S = 2.0, 1.0


@dataclass
class Worker:
    """Its counters are as of now, `told` as of its last heartbeat."""

    name: str
    stage: str
    began_s: float
    load_s: float
    state: str = "loading"
    busy: bool = False
    took_s: float = 0.0
    jobs: int = 0
    busy_s: float = 0.0
    service: list[int] = field(default_factory=lambda: [0] * SERVICE_BUCKETS)
    told: WorkerReport | None = None


class ShiftWorld:
    """`cost_s` are the seconds of a job at each stage, times a log-normal of mean 1 with this `sigma`; it may be
    changed at any time. A new worker is ready after `load_s` seconds, drawn evenly. A stage may have all slots."""

    def __init__(
        self,
        cost_s: Mapping[str, float],
        seed: int,
        *,
        slots: int = 10,
        in_flight: int = 160,
        load_s: tuple[float, float] = (1.0, 3.0),
        sigma: float = 0.02,
    ) -> None:
        self.cost_s, self.sigma, self.load_s = dict(cost_s), sigma, load_s
        self.draw = random.Random(seed)
        self.limits = [Limits(REF, name, (name,), STAGES[:i], 1, slots, "cpu") for i, name in enumerate(STAGES)]
        self.slots = slots
        self.at_s = 0.0
        self.waiting = Counter({STAGES[0]: in_flight})
        self.committed: Counter[str] = Counter()
        self.done_at: list[float] = []
        self.plans: list[tuple[float, dict[str, int]]] = []
        self.workers: dict[str, Worker] = {}
        self.wanted = dict.fromkeys(STAGES, 1)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, str, str]] = []
        self._tracker, self._state = LoadTracker(), State()
        self._at(self.draw.uniform(0.0, LOOK_S), "look", "")
        self._reconcile()

    def run(self, seconds: float) -> None:
        until = self.at_s + seconds
        while self._events[0][0] < until:
            self.at_s, _, kind, name = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(name)
        self.at_s = until

    def given(self) -> dict[str, int]:
        """Workers that are not to leave, by stage."""
        return {s: sum(w.stage == s and w.state != "draining" for w in self.workers.values()) for s in STAGES}

    def rate(self, from_s: float, until_s: float) -> float:
        count = bisect.bisect_left(self.done_at, until_s) - bisect.bisect_left(self.done_at, from_s)
        return count / (until_s - from_s)

    def back_s(self, since_s: float, enough: float, window_s: float = 3.0) -> float:
        """When the rate was so high for good, in seconds from then on."""
        at = self.at_s - window_s
        while at >= since_s and self.rate(at, at + window_s) >= enough:
            at -= 0.25
        return at + 0.25 - since_s

    def _at(self, at_s: float, kind: str, name: str) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), kind, name))

    def _look(self, _: str) -> None:
        reports = [w.told for w in self.workers.values() if w.told is not None]
        held = Counter(w.stage for w in self.workers.values() if w.busy)
        counters, ready = {}, {}
        for stage in STAGES:
            node = f"{REF}/{stage}"
            counters[f"{node}.ready_rows"] = self.waiting[stage]
            counters[f"{node}.held_rows"] = held[stage]
            counters[f"{node}.committed"] = self.committed[stage]
            if self.waiting[stage]:
                ready[node] = {"medium": ReadyClass(self.waiting[stage], 0.0)}
        loads = self._tracker.update(self.at_s, reports, counters, ready)
        room = slots({"cpu": float(self.slots)}, {one.key: ("cpu", 1.0) for one in self.limits})
        plan, self._state = decide(loads, self.limits, room, self._state)
        self.wanted = {stage: n for (_, stage), n in plan.replicas.items()}
        if not self.plans or self.plans[-1][1] != self.wanted:
            self.plans.append((self.at_s, self.wanted))
        self._at(self.at_s + self.draw.uniform(0.05, 0.4), "reconcile", "")
        self._at(self.at_s + LOOK_S, "look", "")

    def _reconcile(self, _: str = "") -> None:
        given = self.given()
        for stage in STAGES:
            mine = [w for w in self.workers.values() if w.stage == stage and w.state != "draining"]
            for worker in mine[self.wanted[stage] :]:
                worker.state = "draining"
                self._at(self.at_s, "leave", worker.name)
        for stage in STAGES:
            for _i in range(min(self.wanted[stage] - given[stage], self.slots - len(self.workers))):
                worker = Worker(f"{stage}-{next(self._numbers)}", stage, self.at_s, self.draw.uniform(*self.load_s))
                self.workers[worker.name] = worker
                self._at(self.at_s + worker.load_s, "loaded", worker.name)
                self._at(self.at_s + 0.1, "beat", worker.name)

    def _leave(self, name: str) -> None:
        if name in self.workers and not self.workers[name].busy:
            del self.workers[name]
            self._reconcile()

    def _loaded(self, name: str) -> None:
        if name in self.workers and self.workers[name].state == "loading":
            self.workers[name].state = "ready"
            self._tell(self.workers[name])
            self._fill()

    def _beat(self, name: str) -> None:
        if name in self.workers:
            self._tell(self.workers[name])
            self._at(self.at_s + BEAT_S, "beat", name)

    def _tell(self, worker: Worker) -> None:
        worker.told = WorkerReport(
            worker=worker.name,
            host="h",
            pid=1,
            node=f"{REF}/{worker.stage}",
            device="cpu",
            state=worker.state,
            started_at=worker.began_s,
            jobs=worker.jobs,
            rows=worker.jobs,
            batches=worker.jobs,
            max_rows=1,
            busy_s=worker.busy_s,
            service=list(worker.service),
            load_s=0.0 if worker.state == "loading" else worker.load_s,
            sent_at=self.at_s + 1.0,
        )

    def _fill(self) -> None:
        for worker in self.workers.values():
            if worker.state == "ready" and not worker.busy and self.waiting[worker.stage]:
                self.waiting[worker.stage] -= 1
                worker.busy = True
                took = self.cost_s[worker.stage] * self.draw.lognormvariate(-(self.sigma**2) / 2.0, self.sigma)
                worker.took_s = took
                self._at(self.at_s + took, "done", worker.name)

    def _done(self, name: str) -> None:
        worker = self.workers[name]
        worker.busy = False
        worker.jobs += 1
        worker.busy_s += worker.took_s
        worker.service[service_bucket(worker.took_s)] += 1
        self.committed[worker.stage] += 1
        if worker.stage == STAGES[-1]:
            self.done_at.append(self.at_s)
        following = (STAGES.index(worker.stage) + 1) % len(STAGES)
        self.waiting[STAGES[following]] += 1  # from the last one: somebody submits the next job at once
        if worker.state == "draining":
            self._leave(name)
        self._fill()
