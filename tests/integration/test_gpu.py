"""A GPU stage in a real worker process, fed by a CPU stage in another: right numbers, and no job lost to a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from tests.conftest import MakePipeline, Workers, wait_until
from torchrelay import Pipeline, Relay

torch = pytest.importorskip("torch", reason="GPU stages need torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

YAML = """
pipeline: vision
input: {image: "uint8[64, 64, 3]"}
stages:
  - {name: flip, use: "stages.py:Flip", outputs: {image: "uint8[64, 64, 3]"}, batch: {max_rows: 64}}
  - name: classify
    use: stages.py:Classify
    inputs: [image]
    outputs: {logits: "float32[10]", device: str}
    device: gpu
    weights: w.safetensors
    torch: TORCH
    batch: {max_rows: 64, max_wait_ms: 2}
"""
CODE = """
import torch
from torch import nn
from torchrelay import Stage, TorchStage


def network():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )


class Flip(Stage):
    def forward(self, batch):
        return {"image": batch["image"][:, ::-1].copy()}


class Classify(TorchStage):
    def build(self, context):
        return network()

    def forward(self, batch):
        x = batch["image"].permute(0, 3, 1, 2).to(self.dtype or torch.float32) / 255
        return {"logits": self.model(x).float(), "device": [str(x.device)] * len(batch)}
"""


@pytest.mark.parametrize(
    ("options", "atol"),
    [("{}", 1e-3), ("{dtype: float16, channels_last: true}", 2e-2), ("{dtype: float16, compile: true}", 2e-2)],
)
def test_a_gpu_stage_agrees_with_the_cpu(
    make_pipeline: MakePipeline, tmp_path: Path, relay: Relay, workers: Workers, options: str, atol: float
) -> None:
    """Through two processes and kill -9 of the GPU's, every image gets the CPU's logits within the dtype's rounding."""
    path = make_pipeline(YAML.replace("TORCH", options), CODE)
    space: dict[str, object] = {}
    exec(CODE, space)  # the same network, for the reference
    torch.manual_seed(0)
    model = space["network"]().eval()  # type: ignore[operator]
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    images = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    with torch.no_grad():
        flipped = torch.from_numpy(images[:, ::-1].copy()).permute(0, 3, 1, 2).float() / 255
        expected = model(flipped).numpy()
    relay.register(Pipeline.load(path))
    supervisors = workers.start(path, ready_s=200.0)
    gpu = next(s for s in supervisors if "classify" in s.name)
    first = relay.submit_many("vision", [{"image": i} for i in images[:100]])
    first[0].result(timeout=200)
    pid = gpu.child_pid
    second = relay.submit_many("vision", [{"image": i} for i in images[100:]])
    os.kill(pid, signal.SIGKILL)
    rows = [f.result(timeout=200) for f in first + second]
    wait_until(lambda: gpu.child_pid != pid)
    assert {row["device"] for row in rows} == {"cuda:0"}
    np.testing.assert_allclose(np.stack([row["logits"] for row in rows]), expected, atol=atol)
    assert not relay.registry.client.keys(f"*{relay.registry.control.namespace}*blob*")
