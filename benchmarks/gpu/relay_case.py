"""The relay's side of `benchmarks.gpu.efficiency`: the pipeline, its workers, the producers, and the timed window."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.gpu.models import torch_options
from benchmarks.gpu.workloads import Table, Workload
from benchmarks.harness import ROOT
from torchrelay import Relay, testing

NAMESPACE = "bench"
_LOAD_S, _STALL_S, _SAMPLE_S = 540.0, 180.0, 0.1
Counts = dict[str, float]


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """`seconds` are timed after at least `warm_s` and twice the jobs that may be under way."""

    device: str
    mode: str
    seconds: float
    warm_s: float
    producers: int
    passers: int
    max_wait_ms: float
    graphs: bool


def pipeline_text(load: Workload, options: RelayOptions) -> str:
    """The pipeline file: `pass`, then `classify`."""
    column = {load.column: load.type}
    # JSON is YAML.
    stages = [
        {
            "name": "pass",
            "use": "benchmarks.gpu.stages:pass_on",
            "outputs": column,
            "batch": {"max_rows": load.pass_rows},
            "replicas": options.passers,
        },
        {
            "name": "classify",
            "use": f"benchmarks.gpu.stages:{'ClassifyText' if load.buckets else 'Classify'}",
            "inputs": [load.column],
            "outputs": {"label": "int64", "score": "float32"},
            "device": "gpu",
            "args": {"workload": load.encode(), "mode": options.mode},
            "torch": {**torch_options(load, options.device, options.mode), "cuda_graphs": options.graphs},
            "batch": batch_rules(load, options.max_wait_ms),
            "timeout_s": 600,
        },
    ]
    pipeline = {
        "pipeline": load.name.replace("_", "-"),
        "input": column,
        "output": ["label", "score"],
        "stages": stages,
    }
    return json.dumps(pipeline, indent=2)


def batch_rules(load: Workload, max_wait_ms: float) -> dict[str, Any]:
    """The `batch:` entry: one number of rows is compiled, or for tokens those that fill a batch of each bucket."""
    rules: dict[str, Any] = {"max_rows": load.max_rows, "max_wait_ms": max_wait_ms, "row_buckets": [load.max_rows]}
    if not load.buckets:
        return rules
    rules["pad"] = {load.column: 0}
    rules["row_buckets"] = sorted(load.rows_at(bucket) for bucket in load.buckets)
    rules["buckets"] = {load.column: list(load.buckets)}
    rules["max_cost"] = {"column": load.column, "total": load.batch_tokens}
    return rules


class Producer:
    """A feeder process; `latest` is the last progress that it told."""

    def __init__(self, url: str, pipeline: str, load: Workload, in_flight: int, seed: int) -> None:
        argv = [sys.executable, "-m", "benchmarks.gpu.feeder", "--url", url, "--namespace", NAMESPACE]
        argv += ["--pipeline", pipeline, "--workload", load.encode(), "--in-flight", str(in_flight)]
        self._argv = [*argv, "--seed", str(seed)]
        self.in_flight = in_flight
        self.latest: Counts = {"at": 0.0, "jobs": 0, "units": 0, "wait_s": 0.0}
        self._told = threading.Condition()
        self._event = ""

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0, text=False
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.expect("ready")

    def tell(self, command: bytes) -> None:
        assert self._process.stdin is not None  # asked for by PIPE
        self._process.stdin.write(command)

    def expect(self, event: str) -> None:
        with self._told:
            if not self._told.wait_for(lambda: self._event in (event, "ended"), _STALL_S) or self._event == "ended":
                raise SystemExit(f"the producer process said nothing, or ended, before it was {event}")

    def check(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"the producer process ended with status {self._process.returncode}; see above")

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None  # asked for by PIPE
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None  # asked for by PIPE
        for text in self._process.stdout:
            line = json.loads(text)
            event = line.pop("event")
            with self._told:
                if event == "progress":
                    self.latest = line
                self._event = event
                self._told.notify_all()
        with self._told:
            self._event = "ended"
            self._told.notify_all()


class RelayCase:
    """Workers and producers of one workload, for as long as a `with` block lasts; idle outside `measure`."""

    def __init__(self, url: str, load: Workload, options: RelayOptions) -> None:
        self._url = url
        self._load = load
        self._options = options
        self._stack = ExitStack()
        # Of each timed window: what the producers and the workers told.
        self.windows: list[dict[str, Any]] = []

    def __enter__(self) -> RelayCase:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path = folder / "pipeline.yaml"
            path.write_text(pipeline_text(self._load, self._options))
            device = "cpu" if self._options.device == "cpu" else "auto"
            served = testing.running(path, url=self._url, namespace=NAMESPACE, device=device, ready_s=_LOAD_S)
            self._relay: Relay = stack.enter_context(served)
            name = self._load.name.replace("_", "-")
            count = self._options.producers
            self._producers = [
                Producer(self._url, name, self._load, max(1, self._load.in_flight // count), seed)
                for seed in range(count)
            ]
            for producer in self._producers:
                producer.start()
                stack.callback(producer.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self, table: Table, labels: np.ndarray, scores: np.ndarray) -> None:
        """Ends the benchmark unless the relay gives these results, but for the rounding of other batches."""
        name = self._load.name.replace("_", "-")
        result = self._relay.submit_table(name, table, wait_s=60).result(_STALL_S)
        near = np.isclose(result["score"], scores, rtol=0.02, atol=0.001, equal_nan=True)
        same = float(np.mean(result["label"] == labels))
        if not np.isfinite(scores).all():
            print(f"# {name}: the random weights give scores that are not finite; speed is what is measured")
        if near.mean() < 0.99 or same < 0.9:
            raise SystemExit(
                f"{name}: {near.mean():.0%} of the scores and {same:.0%} of the labels are those of the bare loop"
            )

    def measure(self) -> float:
        """Units per second over one timed window; the workers and producers are idle before and after it."""
        began = time.monotonic()
        before = [p.latest["jobs"] for p in self._producers]
        for producer in self._producers:
            producer.tell(b"g")
        while time.monotonic() - began < self._options.warm_s or not all(
            p.latest["jobs"] - jobs >= 2 * p.in_flight for p, jobs in zip(self._producers, before, strict=True)
        ):
            self._look(began)
        starts, reports = [p.latest for p in self._producers], _Reports(self._relay)
        started = time.monotonic()
        while time.monotonic() - started < self._options.seconds:
            reports.sample()
            self._look(began)
        ends = [p.latest for p in self._producers]
        for producer in self._producers:
            producer.tell(b"s")
        for producer in self._producers:
            producer.expect("stopped")
        changes = [{k: end[k] - start[k] for k in end} for start, end in zip(starts, ends, strict=True)]
        self.windows.append(
            {
                "producers": [{**c, "wait": c["wait_s"] / (c["at"] or 1.0)} for c in changes],
                "stages": reports.shares(),
            }
        )
        if not all(change["at"] for change in changes):
            raise SystemExit("a producer had no result in the timed window; give it more --seconds")
        return sum(change["units"] / change["at"] for change in changes)

    def _look(self, began: float) -> None:
        time.sleep(_SAMPLE_S)
        for producer in self._producers:
            producer.check()
        if time.monotonic() - began > _STALL_S + self._options.seconds:
            raise SystemExit("no steady stream of results came; what the workers logged is above")


class _Reports:
    """The workers' heartbeats as they change; each is known to a tenth of a second."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._seen: dict[str, list[tuple[float, dict[str, Any]]]] = {}

    def sample(self) -> None:
        for report in self._relay.registry.workers():
            seen, fields = self._seen.setdefault(report.worker, []), asdict(report)
            if not seen or seen[-1][1] != fields:
                seen.append((time.monotonic(), fields))

    def shares(self) -> dict[str, dict[str, float]]:
        """Per stage: rows per batch over its max_rows, the busy share, and the share of every field about idling."""
        shares: dict[str, dict[str, float]] = {}
        for seen in self._seen.values():
            # The first was not seen to change: nobody knows how old it is.
            if len(seen) < 3:
                continue
            (at, first), (end, last) = seen[1], seen[-1]
            batches = last["batches"] - first["batches"]
            stage = shares.setdefault(last["node"].rpartition("/")[2], {})
            stage["fill"] = (last["rows"] - first["rows"]) / (batches * last["max_rows"]) if batches else 0.0
            stage["busy"] = (last["busy_s"] - first["busy_s"]) / (end - at)
            for name in last:
                if "idle" in name and name.endswith("_s"):
                    stage[name.removesuffix("_s")] = (last[name] - first[name]) / (end - at)
        return shares
