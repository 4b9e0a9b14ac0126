"""The relay's side of `benchmarks.gpu.efficiency`: the pipeline, its workers, the producers, and the timed window."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.gpu.models import torch_options
from benchmarks.gpu.streams import STALL_S, Producer, Stream
from benchmarks.gpu.workloads import Table, Workload
from torchrelay import Relay, testing

NAMESPACE = "bench"
_LOAD_S = 540.0


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


class RelayCase:
    """Workers and producers of one workload, for as long as a `with` block lasts; idle outside `measure`."""

    def __init__(self, url: str, load: Workload, options: RelayOptions) -> None:
        self._url = url
        self._load = load
        self._options = options
        self._stack = ExitStack()

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
            producers = [
                Producer(self._url, NAMESPACE, name, self._load, max(1, self._load.in_flight // count), seed)
                for seed in range(count)
            ]
            for producer in producers:
                producer.start()
                stack.callback(producer.close)
            self._stream = Stream(self._relay, producers, self._options.warm_s, self._options.seconds)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self, table: Table, labels: np.ndarray, scores: np.ndarray) -> None:
        """Ends the benchmark unless the relay gives these results, but for the rounding of other batches."""
        name = self._load.name.replace("_", "-")
        result = self._relay.submit_table(name, table, wait_s=60).result(STALL_S)
        near = np.isclose(result["score"], scores, rtol=0.02, atol=0.001, equal_nan=True)
        same = float(np.mean(result["label"] == labels))
        if not np.isfinite(scores).all():
            print(f"# {name}: the random weights give scores that are not finite; speed is what is measured")
        if near.mean() < 0.99 or same < 0.9:
            raise SystemExit(
                f"{name}: {near.mean():.0%} of the scores and {same:.0%} of the labels are those of the bare loop"
            )

    @property
    def windows(self) -> list[dict[str, Any]]:
        """Of each timed window: what the producers and the workers told."""
        return self._stream.windows

    def measure(self) -> float:
        """Units per second over one timed window; the workers and producers are idle before and after it."""
        return self._stream.measure()
