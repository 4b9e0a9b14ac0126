"""`handoff: device` between real workers: on one GPU, and from one to another where there are two."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakePipeline, Workers, wait_until
from torchrelay import Relay

torch = pytest.importorskip("torch", reason="GPU stages need torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PAIRS = [
    "cuda:0",
    pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
]
ROW_BYTES = 256 * 1024 * 2
YAML = """
pipeline: wide
input: {seed: int64, ballast: "uint8[8192]"}
output: [total, first, device]
stages:
  - {name: count, use: "stages.py:count", outputs: {seed: int64, ballast: "uint8[8192]"}}
  - name: spread
    use: stages.py:Spread
    inputs: [seed, ballast]
    outputs: {wide: "DTYPE[256, 1024]", maker: str}
    device: gpu
    handoff: device
    batch: {max_rows: 16}
  - name: total
    use: stages.py:Total
    inputs: [wide]
    outputs: {total: float64, first: float64, device: str}
    device: gpu
    batch: {max_rows: 8}
"""
CODE = """
import time
from pathlib import Path

import torch
from torch import nn
from torchrelay import TorchStage


def count(batch, *, log: str = ""):
    return {"seed": batch["seed"] + 1, "ballast": batch["ballast"]}


class Spread(TorchStage):
    def build(self, context):
        return nn.Identity()

    def forward(self, batch):
        at = torch.arange(256 * 1024, device=self.device).view(256, 1024) % 97
        wide = (batch["seed"].view(-1, 1, 1) % 5 + at).to(torch.DTYPE)
        return {"wide": wide, "maker": [str(self.device)] * len(batch)}


class Total(TorchStage):
    def build(self, context):
        return nn.Identity()

    def forward(self, batch):
        while not (Path(__file__).parent / "gate").exists():
            time.sleep(0.01)
        wide = batch["wide"].double()
        return {"total": wide.sum((1, 2)), "first": wide[:, 0, 0], "device": [str(self.device)] * len(batch)}
"""


def expected(seed: int) -> tuple[float, float]:
    wide = (seed + 1) % 5 + np.arange(256 * 1024) % 97
    return float(wide.sum()), float(wide[0])


def moved(relay: Relay, stage: str) -> dict[str, int]:
    (report,) = [r for r in relay.registry.workers() if r.node.endswith(f"/{stage}")]
    return report.moved


def start(path: Path, workers: Workers, relay: Relay, device: str) -> Any:
    relay.register(path)
    workers.start(path, stage="count")
    (maker,) = workers.start(path, stage="spread", ready_s=120, device="cuda:0")
    workers.start(path, stage="total", ready_s=120, device=device)
    return maker


def row(seed: int) -> dict[str, Any]:
    return {"seed": seed, "ballast": np.zeros(8192, np.uint8)}


def await_device(relay: Relay) -> None:
    """Until the maker's worker has heard that the reader copies from its device."""
    wait_until(lambda: (relay.infer("wide", row(0), deadline_s=60), moved(relay, "spread")["device"])[1] > 0, 60)


@pytest.mark.parametrize("device", PAIRS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_columns_come_from_the_other_worker_as_they_were(
    make_pipeline: MakePipeline, tmp_path: Path, relay: Relay, workers: Workers, device: str, dtype: str
) -> None:
    path = make_pipeline(YAML.replace("DTYPE", dtype), CODE.replace("DTYPE", dtype))
    (tmp_path / "gate").touch()
    start(path, workers, relay, device)
    await_device(relay)
    futures = relay.submit_many("wide", [row(seed) for seed in range(200)])
    rows = [future.result(60) for future in futures]
    assert [(row["total"], row["first"]) for row in rows] == [expected(seed) for seed in range(200)]
    assert {row["device"] for row in rows} == {device}
    wait_until(lambda: moved(relay, "spread")["device"] >= 200 * ROW_BYTES)


@pytest.mark.parametrize("device", PAIRS)
def test_the_makers_death_costs_its_own_work_and_no_more(
    make_pipeline: MakePipeline, tmp_path: Path, relay: Relay, workers: Workers, device: str
) -> None:
    """kill -9 while its columns wait on its device: what it read was kept, also of jobs in shared memory alone."""
    path = make_pipeline(YAML.replace("DTYPE", "float16"), CODE.replace("DTYPE", "float16"))
    (tmp_path / "gate").touch()
    maker = start(path, workers, relay, device)
    await_device(relay)
    (tmp_path / "gate").unlink()
    (version,) = relay.registry.current().values()

    def committed(stage: str) -> int:
        return relay.registry.loads().get(f"{version}/{stage}.committed", 0)

    before, counted = committed("spread"), committed("count")
    # The ballast is too large to travel inline: what `spread` reads lies in shared memory.
    tables = [np.arange(a, a + 16) for a in range(4)]
    ballast = np.zeros((16, 8192), np.uint8)
    futures = [relay.submit_table("wide", {"seed": seeds, "ballast": ballast}, durable=False) for seeds in tables]
    wait_until(lambda: committed("spread") - before == len(tables), 30)
    pid = maker.child_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: maker.child_pid != pid, 30)
    (tmp_path / "gate").touch()
    for seeds, future in zip(tables, futures, strict=True):
        assert future.result(120)["total"].tolist() == [expected(int(seed))[0] for seed in seeds]
    assert committed("count") - counted == len(tables)
    assert committed("spread") - before > len(tables)
