"""What every stage and every worker has to do and gets done, as plain values.

`LoadTracker` turns successive looks at a namespace (workers' reports, load counters, what is ready by priority) into
`Loads`. It does no I/O and reads no clock: whoever calls it says what time it is. The stages of a pipeline's runs are
the pipeline's own, so what stands at `name@version+run/stage` is counted at `name@version/stage`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torchrelay.config.run_graph import base_ref
from torchrelay.coordinator.signals import Level, Service, sane
from torchrelay.queues.histogram import mean_fill, service_quantile
from torchrelay.queues.registry import WorkerReport
from torchrelay.queues.waiting import CLASSES, ReadyClass

__all__ = ["LoadTracker", "Loads", "Node", "NodeLoad", "Quantiles", "Waiting", "WorkerLoad", "node_of"]

Node = tuple[str, str]
"""`name@version` of the pipeline itself, and the stage."""
# A worker that is not heard of for so long is forgotten; if it comes back before, its counters go on.
_FORGET_S = 120.0
_RATE_S = 10.0


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Milliseconds that a half, nine tenths and 99 of 100 forwards took at most."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is ready of one class of priority (`queues.waiting`): rows and bytes, by its share of the jobs."""

    rows: float = 0.0
    nbytes: float = 0.0
    oldest_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker. `busy` is the share of its time that it computed, `age_s` how long it has been known, `silent_s` how
    old its last report is. `memory` is what it holds of its GPU's memory, what all use, and what there is, in bytes."""

    worker: str
    host: str
    device: str
    assignment: str
    ref: str
    stages: tuple[str, ...]
    state: str
    age_s: float
    silent_s: float
    rows_per_s: float = 0.0
    busy: float = 0.0
    service: Quantiles | None = None
    fill: float | None = None
    failures: int = 0
    load_s: float = 0.0
    memory: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """One stage of one version.

    `seconds_per_row` is what a row costs a worker that has enough to do, 0 while that is unknown; `seconds_per_batch`
    and `cv2` are the mean of a forward's time and its squared coefficient of variation. `dispersion` is the variance of
    the arrivals of a few seconds over their mean, in batches: 1 is chance; `trend` is by how many rows per second they
    rise every second. `arrivals_per_s` and
    `rows_per_s` are rows that came and rows that were done, `done_rows` those done since the last look; `ready`,
    `loading` and `draining` count workers.
    `load_s` is how long a worker takes until it is ready, 0 while that is unknown. `loading_s` is for how long each
    loading one has been at it.
    """

    ref: str
    stage: str
    ready_rows: int = 0
    ready_bytes: int = 0
    held_rows: int = 0
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    arrivals_per_s: float = 0.0
    rows_per_s: float = 0.0
    done_rows: float = 0.0
    failures_per_s: float = 0.0
    seconds_per_row: float = 0.0
    seconds_per_batch: float = 0.0
    cv2: float = 1.0
    dispersion: float = 1.0
    trend: float = 0.0
    service: Quantiles | None = None
    fill: float | None = None
    busy: float = 0.0
    ready: int = 0
    loading: int = 0
    draining: int = 0
    loading_s: tuple[float, ...] = ()
    load_s: float = 0.0
    memory_per_worker: int = 0

    @property
    def alive(self) -> int:
        """Workers that serve the stage, or will."""
        return self.ready + self.loading


@dataclass(frozen=True, slots=True)
class Loads:
    """A namespace at `at_s`."""

    at_s: float
    nodes: Mapping[Node, NodeLoad] = field(default_factory=dict)
    workers: tuple[WorkerLoad, ...] = ()


def node_of(text: str) -> Node:
    """Of `name@version/stage`, or of the same in the graph of the pipeline's runs."""
    ref, _, stage = text.partition("/")
    return base_ref(ref), stage


def _quantiles(counts: list[float]) -> Quantiles | None:
    found = [service_quantile(counts, q) for q in (0.5, 0.9, 0.99)]
    p50, p90, p99 = (None if s is None else round(1000.0 * s, 4) for s in found)
    return None if p50 is None or p90 is None or p99 is None else Quantiles(p50, p90, p99)


@dataclass(slots=True)
class _Worker:
    """What is remembered of one worker between two looks."""

    report: WorkerReport
    born_s: float
    heard_s: float
    rate: float = 0.0
    busy: float = 0.0
    rated: bool = False

    def same_life(self, report: WorkerReport) -> bool:
        """Whether its counters go on: the same process, and none has gone back."""
        old = self.report
        same = (report.pid, report.started_at) == (old.pid, old.started_at)
        return same and report.rows >= old.rows and report.batches >= old.batches and report.busy_s >= old.busy_s


@dataclass(slots=True)
class _Stage:
    """What is remembered of one node between two looks."""

    arrivals: Level = field(default_factory=Level)
    done: Level = field(default_factory=Level)
    failures: Level = field(default_factory=Level)
    standing: float = 0.0
    committed: float = 0.0
    failed: float = 0.0
    done_rows: float = 0.0
    rows_per_job: float = 1.0


class LoadTracker:
    """Remembers what it takes to make rates of counters. Call `update` every second or two."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._stages: dict[Node, _Stage] = {}
        self._services: dict[Node, Service] = {}
        self._load_s: dict[Node, float] = {}
        self._at_s: float | None = None

    def update(
        self,
        at_s: float,
        reports: Iterable[WorkerReport],
        counters: Mapping[str, int],
        ready: Mapping[str, Mapping[str, ReadyClass]] | None = None,
    ) -> Loads:
        """One look.

        Args:
            at_s: the server's clock; a look that is no later than the last one changes no rate.
            reports: of the workers that are alive.
            counters: `name@version/stage.ready_rows` and its like, summed over the lanes.
            ready: what is ready by class, of the nodes that have any.
        """
        seconds = 0.0 if self._at_s is None else max(at_s - self._at_s, 0.0)
        alive = [r for r in reports if r.state != "gone"]
        for report in alive:
            self._hear(report, at_s)
        for service in self._services.values():
            service.pass_time(seconds)
        totals = _totals(counters)
        classes = _classes(ready or {})
        workers = tuple(self._worker_load(r, at_s) for r in alive)
        mine: dict[Node, list[WorkerReport]] = {}
        for report in alive:
            for node in dict.fromkeys(map(node_of, report.nodes)):
                mine.setdefault(node, []).append(report)
        nodes = {
            node: self._node_load(node, totals.get(node, {}), classes.get(node, {}), mine.get(node, []), seconds, at_s)
            for node in dict.fromkeys((*totals, *classes, *mine))
        }
        if seconds or self._at_s is None:
            self._at_s = at_s
        self._workers = {name: w for name, w in self._workers.items() if at_s - w.heard_s < _FORGET_S}
        return Loads(at_s, nodes, workers)

    def _hear(self, report: WorkerReport, at_s: float) -> None:
        node = node_of(report.node)
        service = self._services.setdefault(node, Service())
        if report.load_s > 0:
            known = self._load_s.get(node, 0.0)
            new = report.worker not in self._workers or self._workers[report.worker].report.load_s != report.load_s
            if new:
                self._load_s[node] = report.load_s if not known else 0.7 * known + 0.3 * sane(report.load_s)
        seen = self._workers.get(report.worker)
        if seen is None or not seen.same_life(report):
            self._workers[report.worker] = _Worker(report, at_s, at_s)
            service.seed(report.batches, report.rows, report.busy_s, report.service)
            return
        old = seen.report
        if report.sent_at and report.sent_at <= old.sent_at:
            seen.report = report if report.sent_at == old.sent_at else old
            return
        seconds = report.sent_at - old.sent_at if report.sent_at and old.sent_at else at_s - seen.heard_s
        if seconds <= 0:
            return
        histogram = [n - (old.service[i] if i < len(old.service) else 0) for i, n in enumerate(report.service)]
        batches, rows, spent = report.batches - old.batches, report.rows - old.rows, report.busy_s - old.busy_s
        service.add(batches, rows, spent, histogram)
        part = 1.0 if not seen.rated else 1.0 - 0.5 ** (min(seconds, 60.0) / _RATE_S)
        seen.rate += part * (rows / seconds - seen.rate)
        seen.busy += part * (min(spent / seconds, 1.0) - seen.busy)
        seen.rated, seen.report, seen.heard_s = True, report, at_s

    def _worker_load(self, report: WorkerReport, at_s: float) -> WorkerLoad:
        seen = self._workers[report.worker]
        held, used, total = (*report.memory, 0, 0, 0)[:3]
        return WorkerLoad(
            worker=report.worker,
            host=report.host,
            device=report.device,
            assignment=report.assignment,
            ref=node_of(report.node)[0],
            stages=tuple(dict.fromkeys(node_of(n)[1] for n in report.nodes)),
            state=report.state,
            age_s=max(at_s - seen.born_s, 0.0),
            silent_s=max(at_s - seen.heard_s, 0.0),
            rows_per_s=seen.rate,
            busy=seen.busy,
            service=_quantiles([float(n) for n in report.service]),
            fill=mean_fill(report.fills),
            failures=report.failures,
            load_s=report.load_s,
            memory=(held, used, total),
        )

    def _node_load(
        self,
        node: Node,
        totals: Mapping[str, int],
        classes: Mapping[str, ReadyClass],
        reports: list[WorkerReport],
        seconds: float,
        at_s: float,
    ) -> NodeLoad:
        first = node not in self._stages
        stage = self._stages.setdefault(node, _Stage())
        ready_rows, held = max(totals.get("ready_rows", 0), 0), max(totals.get("held_rows", 0), 0)
        jobs = sum(c.jobs for c in classes.values())
        self._rates(stage, totals, ready_rows + held, reports, 0.0 if first else seconds)
        by_state = {s: [r for r in reports if r.state == s] for s in ("ready", "loading", "draining")}
        own = node_of(reports[0].node) if reports else node
        service = self._services.get(own, Service())
        shares = {name: classes[name].jobs / jobs if jobs and name in classes else 0.0 for name in CLASSES}
        nbytes = max(totals.get("ready_bytes", 0), 0)
        batches = sum(r.batches for r in reports)
        serving = by_state["ready"]
        return NodeLoad(
            ref=node[0],
            stage=node[1],
            ready_rows=ready_rows,
            ready_bytes=nbytes,
            held_rows=held,
            waiting={
                name: Waiting(share * ready_rows, share * nbytes, classes[name].oldest_ms if name in classes else 0.0)
                for name, share in shares.items()
            },
            arrivals_per_s=stage.arrivals.now,
            rows_per_s=stage.done.now,
            done_rows=stage.done_rows,
            failures_per_s=stage.failures.value,
            trend=stage.arrivals.trend,
            seconds_per_row=service.seconds_per_row(max((r.max_rows for r in reports), default=1)),
            seconds_per_batch=service.seconds_per_batch,
            cv2=service.cv2,
            dispersion=stage.arrivals.dispersion(max(seconds, 1.0)) / max(service.rows_per_batch, 1.0),
            service=_quantiles(service.histogram),
            fill=sum(r.rows for r in reports) / sum(r.batches * max(r.max_rows, 1) for r in reports)
            if batches
            else None,
            busy=sum(self._workers[r.worker].busy for r in serving) / len(serving) if serving else 0.0,
            ready=len(serving),
            loading=len(by_state["loading"]),
            draining=len(by_state["draining"]),
            loading_s=tuple(sorted(max(at_s - self._workers[r.worker].born_s, 0.0) for r in by_state["loading"])),
            load_s=self._load_s.get(own, 0.0),
            memory_per_worker=max((int(r.memory[0]) for r in reports if r.memory), default=0),
        )

    @staticmethod
    def _rates(
        stage: _Stage, totals: Mapping[str, int], standing: float, reports: list[WorkerReport], seconds: float
    ) -> None:
        """Rows that came are those that are there now, less those that were, and those that left meanwhile."""
        jobs, rows = sum(r.jobs for r in reports), sum(r.rows for r in reports)
        if jobs > 0 and rows > 0:
            stage.rows_per_job = rows / jobs
        committed, failed = totals.get("committed", 0), totals.get("failed", 0)
        stage.done_rows = 0.0
        if seconds > 0:
            left = max(committed - stage.committed, 0.0) * stage.rows_per_job
            came = max(standing - stage.standing + left, 0.0)
            stage.done_rows = left
            stage.arrivals.add(came / seconds, seconds, stage.rows_per_job)
            stage.done.add(left / seconds, seconds, stage.rows_per_job)
            stage.failures.add(max(failed - stage.failed, 0.0) / seconds, seconds)
        stage.standing, stage.committed, stage.failed = standing, committed, failed


def _totals(counters: Mapping[str, int]) -> dict[Node, dict[str, int]]:
    found: dict[Node, dict[str, int]] = {}
    for key, value in counters.items():
        text, _, counter = key.rpartition(".")
        if "/" not in text:
            continue  # of a whole version
        here = found.setdefault(node_of(text), {})
        here[counter] = here.get(counter, 0) + value
    return found


def _classes(ready: Mapping[str, Mapping[str, ReadyClass]]) -> dict[Node, dict[str, ReadyClass]]:
    found: dict[Node, dict[str, ReadyClass]] = {}
    for text, classes in ready.items():
        here = found.setdefault(node_of(text), {})
        for name, one in classes.items():
            old = here.get(name, ReadyClass())
            here[name] = ReadyClass(old.jobs + one.jobs, max(old.oldest_ms, one.oldest_ms))
    return found
