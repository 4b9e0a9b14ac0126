"""What a namespace knows: its lanes, its pipeline versions, and the workers that are alive.

`Registry` is the synchronous edge over the control slot; the records it moves are plain JSON and dataclasses.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

import redis
from redis.exceptions import NoScriptError, OutOfMemoryError, ResponseError

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import base_ref, run_ref
from torchrelay.errors import BrokerMisconfigured, InputError, PipelineNotFound
from torchrelay.queues.keys import ControlKeys, LaneKeys, lane_of, new_token
from torchrelay.queues.scripts import Arg, Call, explain, script
from torchrelay.queues.transitions import Transitions, pack_graph

T = TypeVar("T")
HEARTBEAT_TTL_MS = 6_000
WANTED_MS = 10_000
# A client that read which version is current may go on with it so long.
CURRENT_S = 1.0
_HISTORY = 20


@dataclass(frozen=True, slots=True)
class Registered:
    """A pipeline version as the namespace knows it: the pipeline, and the number by which job records name it."""

    pipeline: Pipeline
    number: int


class Reign(NamedTuple):
    """A version that new jobs took, since `since` (seconds since the epoch; 0 for before this was written down)."""

    ref: str
    since: float


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker tells of itself with each heartbeat. Times are seconds of the worker's own clock.

    `host_id` says whose shared memory it can read, '' for none; `moved` counts bytes of columns by where they went;
    `device_idle_s` is how long a GPU stood still between forwards, by its own events. `fused` are the nodes that it
    serves beside `node`: those fused to it, and the same stages in the graph of the pipeline's runs. `gpus` are the
    devices of its host from which it copies columns. `service` counts its forwards by their time and `fills` its
    batches by how full they were (`queues.histogram`, zeros at the end left out); `memory` is what it holds of its
    GPU's memory, what all processes use, and what there is; `load_s` how long its stage took to start, 0 before that.
    `assignment` is the decision of a coordinator by which it runs, '' for none. `sent_at` is when this was said.
    `rank` of `ranks` is its place in a `group` that computes together.
    """

    worker: str
    host: str
    pid: int
    node: str
    device: str
    state: str
    started_at: float
    jobs: int = 0
    rows: int = 0
    batches: int = 0
    max_rows: int = 1
    busy_s: float = 0.0
    failures: int = 0
    host_id: str = ""
    moved: dict[str, int] = field(default_factory=dict)
    device_idle_s: float = 0.0
    fused: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    service: list[int] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=lambda: [0, 0, 0])
    load_s: float = 0.0
    assignment: str = ""
    sent_at: float = 0.0
    rank: int = 0
    ranks: int = 1
    group: str = ""

    @property
    def nodes(self) -> list[str]:
        """Every node that it serves."""
        return [self.node, *self.fused]

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> WorkerReport | None:
        """None for a report of another version of torchrelay: it is shown nowhere, and harms nothing."""
        try:
            return cls(**json.loads(data))
        except (TypeError, ValueError):
            return None


def run(client: redis.Redis, call: Call[T]) -> T:
    """Runs one idempotent call over a pooled connection. Operations that need a replay ring go through a Channel."""
    send: Callable[..., Any] = client.execute_command
    try:
        value: Any = send(*call.command())
    except NoScriptError:
        try:
            value = send(*call.command(with_source=True))
        except ResponseError as refusal:
            raise explain(call.script.name, str(refusal)) from refusal
    except ResponseError as refusal:
        raise explain(call.script.name, str(refusal)) from refusal
    return call.read(value)


class Registry:
    """Opens the namespace and registers or finds pipelines. Thread-safe, as the client's pool is."""

    def __init__(self, client: redis.Redis, namespace: str, lanes: int) -> None:
        self.client = client
        self.control = ControlKeys(namespace)
        self.lanes: tuple[Transitions, ...] = tuple(Transitions(LaneKeys(namespace, i)) for i in range(lanes))
        self._by_ref: dict[str, Registered] = {}
        self._current: dict[str, tuple[float, str]] = {}

    def open(self) -> bool:
        """Opens every lane; True when this call created the namespace. Raises BrokerMisconfigured for other lanes."""
        created = False
        for lane in self.lanes:
            schema, lanes, fresh = run(self.client, lane.init(len(self.lanes)))
            if schema != "1":
                raise BrokerMisconfigured(f"the namespace has data of schema {schema}, this torchrelay speaks 1")
            if lanes != len(self.lanes):
                raise BrokerMisconfigured(
                    f"the namespace was opened with {lanes} lanes, not {len(self.lanes)}: "
                    f"set TORCHRELAY_LANES={lanes}, or use another namespace"
                )
            created = created or fresh
        return created

    def namespace_id(self) -> str:
        """What tells this namespace from all others, on whatever server and by whatever URL: it names its folders."""
        meta = self.lanes[0].keys.meta
        try:
            self.client.hsetnx(meta, "arena", new_token(8))
        except OutOfMemoryError:
            pass  # then it is there, or there is no shared memory until there is room
        return _text(self.client.hget(meta, "arena"))

    def register(self, pipeline: Pipeline, *, current: bool = True) -> Registered:
        """Makes a version known in every lane, and the one that new jobs take. Idempotent; updates tuning.

        With `current` False new jobs go on with the version that they take; the first one of a name is taken anyway.
        The run graph of a pipeline, `pipeline.twin`, is registered by itself, and never taken by new jobs.
        """
        number, _ = self._write(pipeline.name, pipeline.ref, pipeline.record(), "0", pipeline.source)
        marks = [(s.queue.max_rows, s.queue.max_bytes) for s in pipeline.spec.stages]
        graph = pack_graph(pipeline.ref, pipeline.graph, marks)
        for lane in self.lanes:
            run(self.client, lane.define(number, graph))
        # Only now: a submit must not meet a lane that does not know the version yet.
        if not pipeline.of_runs:
            self._write(pipeline.name, pipeline.ref, "", "1" if current else "f")
        registered = Registered(pipeline, number)
        self._by_ref[pipeline.ref] = registered
        return registered

    def make_current(self, ref: str) -> None:
        """New jobs take this version from now on; PipelineNotFound when nobody registered it."""
        number, _ = self._write(ref.partition("@")[0], ref, "", "1")
        if not number:
            raise PipelineNotFound(f"{ref} is not registered in namespace {self.control.namespace!r}")

    def _write(self, name: str, ref: str, record: str, current: str, path: object = None) -> tuple[int, str]:
        """The version's number, and which version is current now."""
        control = self.control
        keys = (control.current, control.records, control.numbers, control.history(name), control.sources)
        source = "" if path is None else f"{socket.gethostname()}:{path}"
        args: list[Arg] = [name, ref, record, current, source, _HISTORY]
        self._current.pop(name, None)
        return run(self.client, Call(script("register"), keys, args, lambda v: (int(v[0]), _text(v[2]))))

    def history(self, name: str) -> list[Reign]:
        """Which versions of this pipeline new jobs took, the latest first; at most 20."""
        entries: Any = self.client.lrange(self.control.history(name), 0, -1)
        pairs = [_text(e).partition(" ") for e in entries]
        return [Reign(ref, int(ms) / 1000.0) for ms, _, ref in pairs]

    def sources(self) -> dict[str, str]:
        """name@version -> the `host:path` that it was registered from, where that is known. To show, never to open."""
        return {_text(k): _text(v) for k, v in self.client.hgetall(self.control.sources).items()}

    def lane(self, job_id: str) -> Transitions:
        """The lane of a job; raises InputError for what is no id of this namespace."""
        number = lane_of(job_id)
        if number >= len(self.lanes):
            raise InputError(f"job {job_id} is of lane {number}, this namespace has {len(self.lanes)}")
        return self.lanes[number]

    def find(self, name: str) -> Registered:
        """`name` or `name@version`; which version a bare name means is read anew every second."""
        ref = name if "@" in name else self._current_ref(name)
        if ref in self._by_ref:
            return self._by_ref[ref]
        record = self.client.hget(self.control.records, ref) if ref else None
        number = self.client.hget(self.control.numbers, ref) if ref else None
        if record is None or number is None:
            known = ", ".join(sorted(_text(k) for k in self.client.hkeys(self.control.current))) or "none yet"
            raise PipelineNotFound(
                f"pipeline {name!r} is not registered in namespace {self.control.namespace!r} (known: {known}); "
                "register its YAML file, or start a worker with it"
            )
        registered = Registered(Pipeline.from_record(_text(record)), int(number))
        self._by_ref[ref] = registered
        return registered

    def _current_ref(self, name: str) -> str:
        read_at, ref = self._current.get(name, (0.0, ""))
        if not ref or time.monotonic() - read_at > CURRENT_S:
            ref = _text(self.client.hget(self.control.current, name))
            self._current[name] = (time.monotonic(), ref)
        return ref

    def current(self) -> dict[str, str]:
        """Pipeline name -> name@version that new jobs take."""
        return {_text(k): _text(v) for k, v in self.client.hgetall(self.control.current).items()}

    def versions(self) -> dict[str, int]:
        """name@version -> number, of every version that was ever registered; without those of run graphs."""
        return {ref: number for ref, number in self._numbers().items() if ref == base_ref(ref)}

    def with_runs(self, refs: Iterable[str]) -> list[str]:
        """These refs, and with each that of its run graph where it was registered."""
        known = self._numbers()
        return [ref for base in refs for ref in (base, run_ref(base)) if ref == base or ref in known]

    def _numbers(self) -> dict[str, int]:
        return {_text(k): int(v) for k, v in self.client.hgetall(self.control.numbers).items()}

    def beat(self, report: WorkerReport, *, leave: bool = False) -> int:
        """Reports a worker alive for six seconds, or gone; returns how many are alive."""
        keys = (self.control.alive, self.control.workers)
        args: list[Arg] = [report.worker, 0 if leave else HEARTBEAT_TTL_MS, report.encode()]
        return run(self.client, Call(script("heartbeat"), keys, args, int))

    def workers(self) -> list[WorkerReport]:
        """Workers whose heartbeat has not run out, by the server's clock. A group is one: its rank 0."""
        return [report for report in self.ranks() if not report.rank]

    def ranks(self) -> list[WorkerReport]:
        """The same with every rank of each group by itself."""
        alive: Any = self.client.zrangebyscore(self.control.alive, self._server_ms(), "+inf")
        if not alive:
            return []
        found: Any = self.client.hmget(self.control.workers, alive)
        reports = [WorkerReport.decode(v) for v in found if v]
        return sorted((r for r in reports if r), key=lambda r: (r.node, r.group, r.rank, r.worker))

    def want(self, nodes: Iterable[str]) -> None:
        """Says that a run lacks these nodes, which read or write. It is believed for some seconds, so that who waits
        says it again and again; whoever can serves them."""
        asked = list(nodes)
        if asked:
            until = self._server_ms() + WANTED_MS
            with self.client.pipeline() as pipe:
                pipe.zremrangebyscore(self.control.wanted, "-inf", until - WANTED_MS)
                pipe.zadd(self.control.wanted, dict.fromkeys(asked, until))
                pipe.execute()

    def wanted(self) -> set[str]:
        """Nodes that a run lacks now."""
        found: Any = self.client.zrangebyscore(self.control.wanted, self._server_ms(), "+inf")
        return {_text(node) for node in found}

    def _server_ms(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def loads(self) -> dict[str, int]:
        """Every load counter, summed over the lanes: `<pipeline@version>/<stage>.ready_rows` and its like."""
        total: dict[str, int] = {}
        for lane in self.lanes:
            for key, value in self.client.hgetall(lane.keys.load).items():
                total[_text(key)] = total.get(_text(key), 0) + int(value)
        return total

    def unserved(self, pipeline: Pipeline) -> list[str]:
        """Stages of this version without a live worker."""
        served = {node for r in self.workers() if r.state != "failed" for node in r.nodes}
        return [n.name for n in pipeline.graph.nodes if f"{pipeline.ref}/{n.name}" not in served]

    def wait_served(self, pipeline: Pipeline, timeout_s: float) -> Sequence[str]:
        """Waits until every stage has a ready worker; returns the stages still without one."""
        deadline = time.monotonic() + timeout_s
        while True:
            ready = {node for r in self.workers() if r.state == "ready" for node in r.nodes}
            missing = [n.name for n in pipeline.graph.nodes if f"{pipeline.ref}/{n.name}" not in ready]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else (value or "")
