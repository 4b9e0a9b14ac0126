"""Groups of ranks that compute one model: as the whole model does, from as much memory as a part."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from torchrelay.config.spec import ShardsSpec, StageConfig, TorchSpec
from torchrelay.errors import ConfigError, StageLoadError
from torchrelay.stages import Stage, StageContext, TorchStage, make_runner

ROOT = Path(__file__).parents[2]


def compute(folder: Path, count: int, *what: str) -> str:
    """Runs a group of ranks; what they said, if all of them passed."""
    command = [sys.executable, "-m", "tests.stages.tensor_ranks", str(folder)]
    files = [(folder / f"rank-{rank}").open("w+") for rank in range(count)]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(r), str(count), ",".join(what)], stdout=f, stderr=f, cwd=ROOT, env=env)
        for r, f in enumerate(files)
    ]
    codes: list[int | None] = []
    until = time.monotonic() + 100
    # The others wait for one that failed.
    while time.monotonic() < until and None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.wait()
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read())
        file.close()
    assert codes == [0] * count, "\n".join(said)
    return said[0]


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_compute_what_the_whole_model_does(tmp_path: Path, count: int) -> None:
    """MLP, BERT-like, Llama-like with key-value heads that divide and that are fewer than the ranks, and a model with a
    plan of its own; with weights and without; what ranks refuse together."""
    said = compute(tmp_path, count, "own")
    assert said.count("equals") == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of memory are read from /proc")
def test_a_rank_loads_its_part_alone(tmp_path: Path) -> None:
    """Two ranks load 200 MB; each needs half of it, and less than 15 % more."""
    head, at = {}, 0
    for name, shape in {"0.weight": [5000, 5000], "0.bias": [5000], "2.weight": [5000, 5000], "2.bias": [5000]}.items():
        size = 4 * 5000 * (5000 if len(shape) == 2 else 1)
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
    compute(tmp_path, 2, "memory")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is in the examples extra")
def test_models_of_hugging_face(tmp_path: Path) -> None:
    """Tiny Llama with tied embeddings and with one key-value head, BERT and ViT, by their modules' names."""
    said = compute(tmp_path, 2, "transformers")
    assert said.count("equals") == 4


@pytest.mark.slow
def test_compiled_ranks(tmp_path: Path) -> None:
    """torch.compile takes the collectives too."""
    compute(tmp_path, 2, "compiled")


class Model(TorchStage):
    pass


def test_a_plan_comes_from_the_file() -> None:
    """It reaches a TorchStage; a plain Stage has no use for one, and one without a group says so."""
    shards = ShardsSpec(count=2, mode="tensor", plan={"fc1": "column", "fc2": "row"})
    spec = StageConfig(name="s", use="a.py:Model", shards=shards)
    runner = make_runner(type("Model", (Model,), {"forward": lambda self, batch: {}}), spec)
    assert runner.stage._plan == shards.plan  # type: ignore[attr-defined]
    with pytest.raises(StageLoadError, match=r"stage 's': .* process group, and there is none"):
        runner.load(StageContext(rank=0, world_size=2))
    with pytest.raises(ConfigError, match=r"stage 's': .*plain Stage, which cuts its model itself"):
        make_runner(type("Plain", (Stage,), {"forward": lambda self, batch: {}}), spec)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"layers.*.up": "column"}, r"plan: 'layers\.\*\.up' names no module of Sequential; it has '\*'"),
        (
            {"0": "row", "2": "column:5"},
            r"module '2': its 6 outputs in 5 blocks do not divide by 1 shards; choose",
        ),
        ("llama", r"model Sequential has no blocks of the plan 'llama' .* those of the plan 'mlp'"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_stage_the_module_and_the_remedy(plan: Any, says: str) -> None:
    def build(self: TorchStage, context: StageContext) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6))

    made = {"build": build, "forward": lambda self, batch: {}}
    spec = StageConfig(name="s", use="a.py:Model", shards=ShardsSpec(count=2, mode="tensor", plan=plan))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(StageLoadError, match=f"^stage 's': {says}"):
            make_runner(type("Model", (Model,), made), spec).load(StageContext(rank=0, world_size=2))
    finally:
        dist.destroy_process_group()


def test_cuda_graphs_are_refused_in_a_group() -> None:
    """Ranks would record at different times, and wait for each other's collectives."""
    spec = StageConfig(name="s", use="a.py:Model", torch=TorchSpec(cuda_graphs=True))
    runner = make_runner(type("Model", (Model,), {"forward": lambda self, batch: {}}), spec)
    with pytest.raises(StageLoadError, match=r"stage 's': .*cuda_graphs.*mode: tensor.*take it out"):
        runner.load(StageContext(rank=0, world_size=2))
