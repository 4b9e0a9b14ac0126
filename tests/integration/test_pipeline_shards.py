"""`shards: {mode: pipeline}` from the file to the result: in one process, and with real workers that are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakePipeline, Workers, wait_until
from tests.model_stages import write_pipeline
from tests.models import rows_of
from tests.workers.support import assert_settled
from torchrelay import Pipeline, Relay
from torchrelay.config.shards import parts_of
from torchrelay.queues.plans import KeptPlans, SplitPlace
from torchrelay.queues.registry import Registry

torch = pytest.importorskip("torch", reason="models need torch")

# Of float32: parts compute what the whole computes, in the same order; other batches round otherwise.
RTOL, ATOL = 1e-5, 1e-5


def whole_and_cut(folder: Path, kind: str, count: int, **options: Any) -> tuple[Pipeline, Pipeline]:
    """The same model whole and in so many parts."""
    whole = write_pipeline(folder, kind, name="whole.yaml", **options)
    cut = write_pipeline(folder, kind, shards={"count": count, "mode": "pipeline"}, name="cut.yaml", **options)
    return Pipeline.load(whole), Pipeline.load(cut)


def assert_same(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rtol: float = RTOL, atol: float = ATOL
) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for column, value in other.items():
            np.testing.assert_allclose(mine[column], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("mlp", {}), ("bert", {}), ("llama", {"tied": True}), ("resnet", {})],
    ids=["mlp", "bert", "llama", "resnet"],
)
def test_parts_make_what_the_whole_model_makes(tmp_path: Path, kind: str, sizes: dict[str, Any], count: int) -> None:
    """Rows of various lengths, in full batches and a smaller last one."""
    whole, cut = whole_and_cut(tmp_path, kind, count, sizes=sizes)
    assert parts_of(cut.spec, "model") == [f"model.{part}" for part in range(count)]
    rows = rows_of(kind, 19)
    assert_same(cut.run_local(rows), whole.run_local(rows))


def test_in_bfloat16_they_round_alike(tmp_path: Path) -> None:
    """What crosses is in the model's own type; the results agree within that type's rounding."""
    whole, cut = whole_and_cut(tmp_path, "bert", 2, torch={"dtype": "bfloat16"})
    rows = rows_of("bert", 9)
    assert_same(cut.run_local(rows), whole.run_local(rows), rtol=2**-7, atol=2**-6)


def test_a_part_that_dies_in_mid_work_costs_nothing(
    tmp_path: Path, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """Each of two parts is killed twice under load; every row ends once, with what the whole model makes of it. Their
    workers agree on one plan."""
    whole, cut = whole_and_cut(tmp_path, "bert", 2, batch={"max_rows": 4, "max_wait_ms": 1})
    relay.register(cut)
    workers.start(tmp_path / "cut.yaml", ready_s=90.0)
    place = SplitPlace(cut.ref, "model", 2, "time")
    plan = KeptPlans(registry.client, registry.control).find(place)
    assert plan is not None
    rows = rows_of("bert", 600, seed=3)
    futures = relay.submit_many("bert", rows)
    for number, part in enumerate(["model.0", "model.1"] * 2, 1):
        wait_until(lambda n=number: sum(f.done() for f in futures) >= n * 10, 60.0)
        assert not all(f.done() for f in futures)
        _kill(registry, part)
    assert_same([f.result(90) for f in futures], whole.run_local(rows))
    assert_settled(registry, {"model.0": 600, "model.1": 600})
    # The children that came after the kills went by the plan that was kept.
    assert KeptPlans(registry.client, registry.control).find(place) == plan


def _kill(registry: Registry, part: str) -> None:
    """kill -9 of the process that computes this part."""

    def pid() -> int:
        reports = (r for r in registry.workers() if r.node.endswith(f"/{part}") and r.state == "ready")
        return next((r.pid for r in reports), 0)

    wait_until(pid, 60.0)
    try:
        os.kill(pid(), signal.SIGKILL)
    except ProcessLookupError:
        _kill(registry, part)  # the report was of the one that died before


SLOW_YAML = """
    pipeline: slow
    input: {x: "float32[4]"}
    output: [y]
    stages:
      - name: model
        use: stages.py:Slow
        args: {log: "LOG"}
        outputs: {y: "float32[4]"}
        batch: {max_rows: 1}
        shards: {count: 3, mode: pipeline}
"""
SLOW_CODE = """
    import os
    import time

    import torch
    from torch import nn
    from torchrelay import TorchStage


    class Layer(nn.Module):
        def __init__(self, number, log):
            super().__init__()
            self.number, self.log = number, log
            self.scale = nn.Parameter(torch.full((4,), number + 2.0))

        def forward(self, x):
            if float(x.sum()) == 1e30:  # what decides by values cannot be traced, and is cut between layers
                return x
            began = time.monotonic()
            time.sleep(0.05)
            line = f"{self.number} {began} {time.monotonic()}\\n".encode()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(descriptor, line)
            os.close(descriptor)
            return x * self.scale


    class Slow(TorchStage):
        def __init__(self, log: str) -> None:
            self.log = log

        def build(self, context):
            return nn.Sequential(*(Layer(number, self.log) for number in range(3)))

        def forward(self, batch):
            return {"y": self.model(batch["x"])}
"""


def test_jobs_of_one_client_keep_all_parts_busy(
    tmp_path: Path, relay: Relay, workers: Workers, make_pipeline: MakePipeline
) -> None:
    """Parts are stages, so each computes another batch at the same time: of three sleeping layers, more than two sleep
    at any time."""
    log = tmp_path / "log"
    path = make_pipeline(SLOW_YAML.replace("LOG", str(log)), SLOW_CODE)
    relay.register(path)
    workers.start(path, ready_s=90.0)
    log.write_text("")  # what was measured to cut it
    rows = [{"x": np.full(4, n, np.float32)} for n in range(40)]
    results = list(relay.map("slow", rows, in_flight=40))
    np.testing.assert_array_equal([r["y"] for r in results], [r["x"] * 24 for r in rows])
    spans = [(float(began), float(ended)) for _, began, ended in (t.split() for t in log.read_text().splitlines())]
    assert len(spans) == 3 * len(rows)
    wall = max(ended for _, ended in spans) - min(began for began, _ in spans)
    assert sum(ended - began for began, ended in spans) > 2 * wall
