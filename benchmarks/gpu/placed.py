"""Pipelines on workers with devices chosen by hand, for `benchmarks.gpu.shards`: streams of jobs, and single ones."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.gpu.streams import STALL_S, Producer, Stream
from benchmarks.gpu.workloads import Table, Workload
from torchrelay import Pipeline, Relay
from torchrelay.testing.serving import await_ready
from torchrelay.up import Fleet

__all__ = ["Placed", "Setup", "Timing"]

_LOAD_S = 540.0


@dataclass(frozen=True, slots=True)
class Timing:
    """`seconds` are timed, after `warm_s` of the same."""

    seconds: float
    warm_s: float


@dataclass(frozen=True, slots=True)
class Setup:
    """A pipeline as plain data, and what serves it: (stage, device) of each worker; `feeders` are producer processes
    that send `load`, none for single jobs."""

    pipeline: dict[str, Any]
    places: Sequence[tuple[str, str]]
    folder: Path
    load: Workload | None = None
    feeders: int = 1
    namespace: str = field(default="")

    @property
    def name(self) -> str:
        return str(self.pipeline["pipeline"])


class Placed:
    """Workers, and producers where there is a load, for as long as a `with` block lasts; idle outside `measure`."""

    def __init__(self, url: str, setup: Setup, timing: Timing) -> None:
        self._url = url
        self._setup = setup
        self._timing = timing
        self._stack = ExitStack()
        self._stream: Stream | None = None

    def __enter__(self) -> Placed:
        setup, namespace = self._setup, self._setup.namespace or f"bench-{self._setup.name}"
        with ExitStack() as stack:
            # In the folder of its weights, under a name of its own: several cases may share them.
            text = tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=setup.folder, delete=False)
            with text:
                json.dump(setup.pipeline, text)  # JSON is YAML
            stack.callback(Path(text.name).unlink)
            pipeline = Pipeline.load(text.name)
            fleet = Fleet(self._url, namespace, allow_cpu=True)
            for stage, device in setup.places:
                fleet.add(pipeline, stage=stage, device=device)
            stack.enter_context(fleet)
            await_ready(fleet, _LOAD_S)
            self.relay = stack.enter_context(Relay(self._url, namespace=namespace))
            if setup.load is not None:
                self._stream = Stream(
                    self.relay, self._feeders(setup.load, namespace, stack), self._timing.warm_s, self._timing.seconds
                )
            self._stack = stack.pop_all()
        return self

    def _feeders(self, load: Workload, namespace: str, stack: ExitStack) -> list[Producer]:
        feeders = [
            Producer(self._url, namespace, self._setup.name, load, load.in_flight // self._setup.feeders, seed)
            for seed in range(self._setup.feeders)
        ]
        for feeder in feeders:
            feeder.start()
            stack.callback(feeder.close)
        return feeders

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def result(self, table: Table) -> Table:
        """What the pipeline makes of one table job."""
        return self.relay.submit_table(self._setup.name, table, wait_s=60).result(STALL_S)

    def measure(self) -> float:
        """Rows per second of a steady stream."""
        assert self._stream is not None  # only for setups with a load
        return self._stream.measure()

    def latency_ms(self, row: dict[str, Any]) -> float:
        """Median time from submit to result of one row after another, in milliseconds."""
        times: list[float] = []
        began = time.monotonic()
        while (passed := time.monotonic() - began) < self._timing.warm_s + self._timing.seconds or len(times) < 3:
            started = time.perf_counter()
            self.relay.infer(self._setup.name, row, deadline_s=STALL_S)
            if passed >= self._timing.warm_s:
                times.append((time.perf_counter() - started) * 1000)
        return statistics.median(times)

    def told(self) -> list[str]:
        """A line for each timed window: how busy each stage was, and how full its batches were."""
        lines = []
        for window in self._stream.windows if self._stream is not None else ():
            parts = [f"feeder waits {p['wait']:.0%}" for p in window["producers"]]
            for stage, shares in sorted(window["stages"].items()):
                parts.append(f"{stage} " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
            lines.append("; ".join(parts))
        return lines


def nearly(ours: Table, theirs: Table, *, rtol: float, atol: float) -> float:
    """The share of numbers that are the same but for rounding, over all columns of floats."""
    near = [
        np.isclose(ours[name], theirs[name], rtol=rtol, atol=atol).mean()
        for name in theirs
        if np.asarray(theirs[name]).dtype.kind == "f"
    ]
    return float(np.mean(near))
