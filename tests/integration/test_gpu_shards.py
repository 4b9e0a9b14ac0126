"""`shards: {mode: pipeline}` on GPUs: right numbers, and what crosses stays on the devices where it is told to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Workers, wait_until
from tests.model_stages import write_pipeline
from tests.models import rows_of
from torchrelay import Pipeline, Relay

torch = pytest.importorskip("torch", reason="GPU stages need torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SECOND = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
# 64 tokens are 256 KiB a row in the middle: enough to be worth a copy of its own.
SIZES = {"width": 1024, "heads": 16, "layers": 4}


def moved(relay: Relay, part: str) -> dict[str, int]:
    (report,) = [r for r in relay.registry.workers() if r.node.endswith(f"/{part}")]
    return report.moved


@pytest.mark.parametrize("handoff", ["host", "device"])
def test_parts_on_gpus_make_what_the_whole_model_makes(
    tmp_path: Path, relay: Relay, workers: Workers, handoff: str
) -> None:
    """Two parts, each on a GPU of its own where there are two, against the whole model on one."""
    options = {"sizes": SIZES, "device": "gpu"}
    whole = Pipeline.load(write_pipeline(tmp_path, "bert", name="whole.yaml", **options))
    shards = {"count": 2, "mode": "pipeline"}
    path = write_pipeline(tmp_path, "bert", shards=shards, handoff=handoff, **options)
    relay.register(path)
    workers.start(path, stage="model.0", ready_s=200.0, device="cuda:0")
    workers.start(path, stage="model.1", ready_s=200.0, device=SECOND)
    rows = rows_of("bert", 64, longest=64)
    if handoff == "device":
        long = {"tokens": np.arange(64)}
        # Until the first part's worker has heard that the second one copies from its device.
        wait_until(lambda: (relay.infer("bert", long, deadline_s=60), moved(relay, "model.0")["device"])[1] > 0, 60.0)
    results = [f.result(60) for f in relay.submit_many("bert", rows)]
    for mine, other in zip(results, whole.run_local(rows, device="cuda:0"), strict=True):
        np.testing.assert_allclose(mine["y"], other["y"], rtol=1e-4, atol=1e-4)
    assert handoff == "device" or not moved(relay, "model.0")["device"]
