"""A chain read -> spread -> total whose second stage leaves its column on a device that is none (`fake_gpu`).

    read    on the CPU: images as they came, plus one
    spread  [h] -> float32 [h, 64] of each row
    total   the sum of each row's values

As a program it serves `spread` until its standard input closes: something to kill.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import redis

from tests.workers.fake_gpu import FakeGpu
from tests.workers.in_process import InProcess
from torchrelay.config import Pipeline
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.job import host_text
from torchrelay.queues.registry import Registry, WorkerReport
from torchrelay.stages import Stage
from torchrelay.stages.runner import Launched, Prepared, Runner

WIDTH, HEIGHT = 64, 1024
PIPELINE = f"""
pipeline: wide
input: {{image: "uint8[{HEIGHT}]"}}
output: [total]
stages:
  - {{name: read, use: "stages.py:Nobody", outputs: {{image: "uint8[{HEIGHT}]"}}}}
  - name: spread
    use: "stages.py:Nobody"
    inputs: [image]
    outputs: {{wide: "float32[{HEIGHT}, {WIDTH}]"}}
    device: gpu
    handoff: device
    batch: {{max_rows: 4}}
    retry: {{backoff_s: [0, 0]}}
  - name: total
    use: "stages.py:Nobody"
    inputs: [wide]
    outputs: {{total: float64}}
    device: gpu
    batch: {{max_rows: 4}}
"""


def wide(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What `spread` makes of `read`'s images."""
    spread: np.ndarray[Any, Any] = images[:, :, None].astype(np.float32) * np.arange(WIDTH, dtype=np.float32)
    return spread


def total_of(image: np.ndarray[Any, Any]) -> float:
    return float(wide((image + 1)[None]).sum(dtype=np.float64))


class Reads(Stage):
    calls = 0

    def forward(self, batch: Any) -> dict[str, Any]:
        self.calls += len(batch)
        return {"image": batch["image"] + np.uint8(1)}


class Totals(Stage):
    """Waits for `gate` before each forward."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, batch: Any) -> dict[str, Any]:
        assert self.gate.wait(60)
        return {"total": batch["wide"].sum(axis=(1, 2), dtype=np.float64)}


class Spreads(Stage):
    def forward(self, batch: Any) -> dict[str, Any]:
        return {"wide": wide(batch["image"])}


class Spreader(Runner):
    """Leaves on the device what it may; else as any runner."""

    def __init__(self) -> None:
        super().__init__(Spreads(), "spread")

    def launch(self, prepared: Prepared, exports: Any = None) -> Launched:
        if exports is None or prepared.batch is None:
            return super().launch(prepared)
        columns: dict[str, Any] = dict(self.stage.forward(prepared.batch))  # type: ignore[arg-type]
        for name, array in columns.items():
            rows = exports(name, array.shape, array.dtype)
            if rows is not None:
                exports.copy_in(rows, array.ctypes.data, 0)
                columns[name] = rows
        return Launched(self._split(columns, prepared.rows, prepared.batch))


def announce(registry: Registry, pipeline: Pipeline, home: ArenaHome, gpus: dict[str, tuple[int, ...]]) -> None:
    """Says for each stage that it has a worker on this host, which copies from these devices."""
    for node in pipeline.graph.nodes:
        report = WorkerReport(
            f"w-{node.name}", "here", 1, f"{pipeline.ref}/{node.name}", "cuda:0", "ready", 0.0,
            host_id=host_text(home.host), gpus=[host_text(gpu) for gpu in gpus.get(node.name, ())],
        )  # fmt: skip
        registry.beat(report)


def main() -> None:
    orders = json.loads(sys.argv[1])
    client = redis.Redis.from_url(orders["url"])
    registry = Registry(client, orders["namespace"], 1)
    gpu = FakeGpu(Path(orders["memory"]))
    worker = InProcess(registry, orders["url"], Path(orders["pipeline"]), Spreader(), stage=1, gpu=gpu)
    worker.start()
    reader = f"{Pipeline.load(orders['pipeline']).ref}/total"
    while not worker.memory.placer.copies_from(gpu.gpu, [reader]):
        time.sleep(0.05)
    print("ready", flush=True)
    sys.stdin.read()
    worker.stop()


if __name__ == "__main__":
    main()
