"""The cases of `benchmarks.gpu.shards` as plain data: models and loads by size, pipelines, and who serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.gpu.models import torch_options
from benchmarks.gpu.placed import Setup
from benchmarks.gpu.workloads import Workload, workload
from tests import models

__all__ = ["Sizes", "blocks", "encoder", "experts", "replicas", "sizes_of", "write_weights"]

VOCABULARY = 256
# Each layer's first matrices by their columns, its last ones by their rows.
PLAN = {
    "layers.*.self_attn.q_proj": "column",
    "layers.*.self_attn.k_proj": "column",
    "layers.*.self_attn.v_proj": "column",
    "layers.*.self_attn.o_proj": "row",
    "layers.*.mlp.gate_proj": "column",
    "layers.*.mlp.up_proj": "column",
    "layers.*.mlp.down_proj": "row",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: the models' arguments, and the rows of a job and of a batch."""

    encoder: dict[str, Any]
    blocks: dict[str, Any]
    expert: dict[str, Any]
    tokens: int
    length: int
    rows: int
    expert_rows: int
    in_flight: int


# - encoder: 24 layers of BERT-large, whose halves balance; a row is 77 GFLOP, and 256 KiB cross in the middle. Of 64
#   rows a half takes an H200 5.7 ms, which is less than Python needs to launch it beside a worker's other threads.
# - blocks: layers of Llama-70B's sizes, 1.7 GB in bfloat16 each.
# - expert: 8 x 2 x 8192^2 = 1.1 GFLOP a row for each of two; a row comes as 256 bytes.
FULL = Sizes(
    encoder={"width": 1024, "heads": 16, "layers": 24, "vocabulary": VOCABULARY, "longest": 128},
    blocks={"width": 8192, "heads": 64, "kv_heads": 8, "inner": 28672, "layers": 6, "vocabulary": 32_000},
    expert={"experts": 2, "features": 256, "width": 8192, "layers": 8, "scores": 16},
    tokens=128,
    length=2048,
    rows=128,
    expert_rows=4096,
    in_flight=32,
)
TINY = Sizes(
    encoder={"width": 64, "heads": 4, "layers": 4, "vocabulary": VOCABULARY, "longest": 16},
    blocks={"width": 64, "heads": 4, "kv_heads": 2, "inner": 128, "layers": 2, "vocabulary": 64},
    expert={"experts": 2, "features": 32, "width": 64, "layers": 2, "scores": 8},
    tokens=16,
    length=32,
    rows=8,
    expert_rows=32,
    in_flight=8,
)


def sizes_of(quick: bool, layers: int | None, passes: int, rows: int | None) -> Sizes:
    """The sizes; `layers` is how many blocks there are and `passes` how often they are run, `rows` how many rows an
    encoder's job and batch have."""
    sizes = TINY if quick else FULL
    blocks = {**sizes.blocks, "layers": layers or sizes.blocks["layers"], "passes": passes}
    return replace(sizes, rows=rows or sizes.rows, blocks=blocks)


def dtype_of(device: str) -> str:
    """What is computed in."""
    return "float32" if device == "cpu" else "bfloat16"


def write_weights(model: nn.Module, path: Path, device: str) -> None:
    """Random weights of a model that was built on the meta device, made where that is fast, in the type of `device`."""
    random = torch.Generator(device).manual_seed(0)
    dtype, state = getattr(torch, dtype_of(device)), {}
    for name, like in model.state_dict().items():
        value = torch.empty(like.shape, dtype=dtype, device=device)
        norm = "norm" in name.lower()
        spread = 0.1 if norm or like.dim() < 2 else like.shape[-1] ** -0.5
        value.normal_(1.0 if norm and name.endswith("weight") else 0.0, spread, generator=random)
        state[name] = value.cpu()
    save_file(state, path)


def _stage(name: str, use: str, sizes: dict[str, Any], device: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "use": f"benchmarks.gpu.shard_stages:{use}",
        "args": {"sizes": sizes},
        "device": "gpu",
        "torch": {"dtype": dtype_of(device)},
        "timeout_s": 600,
        **more,
    }


def encoder(sizes: Sizes, folder: Path, devices: Sequence[str], handoff: str, graphs: bool) -> dict[str, Setup]:
    """`one`: the whole model on the first device; `two`: a part of it on each. `graphs`: all with CUDA graphs."""
    path = folder / "encoder.safetensors"
    with torch.device("meta"):
        write_weights(models.BertLike(**sizes.encoder), path, devices[0])
    load = Workload("encode", "rows", "tokens", "uint8", (sizes.tokens,), sizes.rows, sizes.rows, sizes.in_flight, 4096)
    count = len(devices)
    stage = _stage(
        "encode",
        "Encode",
        sizes.encoder,
        devices[0],
        weights=path.name,
        outputs={"label": "int64", "score": "float32"},
        batch={"max_rows": sizes.rows, "max_wait_ms": 20},
        torch={"dtype": dtype_of(devices[0]), **({"cuda_graphs": True} if graphs else {})},
    )
    between = {"handoff": handoff} if devices[0] != "cpu" else {}
    cut = {**stage, **between, "shards": {"count": count, "mode": "pipeline"}}
    two = [(f"encode.{part}", device) for part, device in enumerate(devices)]
    return {
        "one": Setup(_pipeline("encoder-one", load, [stage]), [("encode", devices[0])], folder, load),
        f"{count}": Setup(_pipeline(f"encoder-{count}", load, [cut]), two, folder, load),
    }


def blocks(sizes: Sizes, folder: Path, devices: Sequence[str]) -> dict[str, Setup]:
    """`one`: the whole stack on the first device; else a group of processes, one on each."""
    path, count = folder / "blocks.safetensors", len(devices)
    with torch.device("meta"):
        write_weights(models.LlamaModel(**sizes.blocks), path, devices[0])
    width = sizes.blocks["width"]
    stage = _stage(
        "blocks",
        "Blocks",
        sizes.blocks,
        devices[0],
        weights=path.name,
        outputs={"hidden": f"float32[{width}]"},
        batch={"max_rows": 1},
    )
    cut = {**stage, "shards": {"count": count, "mode": "tensor", "plan": PLAN}}
    row = {"tokens": f"int64[{sizes.length}]"}
    made = {}
    for name, entry, device in (
        ("one", stage, devices[0]),
        (f"{count}", cut, "auto" if devices[0] != "cpu" else "cpu"),
    ):
        pipeline = {"pipeline": f"blocks-{name}", "input": row, "output": ["hidden"], "stages": [entry]}
        made[name] = Setup(pipeline, [("blocks", device)], folder)
    return made


def experts(sizes: Sizes, folder: Path, devices: Sequence[str]) -> dict[str, Setup]:
    """`one`: both experts on the first device; else one on each, and what they return summed."""
    rows, count = sizes.expert_rows, len(devices)
    shape = (sizes.expert["features"],)
    load = Workload("experts", "rows", "features", "uint8", shape, rows, rows, sizes.in_flight, 16 * rows)
    stage = _stage(
        "experts",
        "Experts",
        sizes.expert,
        devices[0],
        outputs={"scores": f"float32[{sizes.expert['scores']}]"},
        batch={"max_rows": rows, "max_wait_ms": 20},
    )
    cut = {**stage, "shards": {"count": count, "mode": "gather", "combine": {"scores": "sum"}}}
    places = [(f"experts.{shard}", device) for shard, device in enumerate(devices)]
    return {
        "one": Setup(_pipeline("experts-one", load, [stage]), [("experts", devices[0])], folder, load),
        f"{count}": Setup(
            _pipeline(f"experts-{count}", load, [cut]), [*places, ("experts.combine", "cpu")], folder, load
        ),
    }


def replicas(folder: Path, devices: Sequence[str], quick: bool) -> dict[str, Setup]:
    """`one`: one worker and one feeder; else a worker on each device, and as many feeders."""
    load = workload("tinycnn" if quick else "resnet50", quick)
    count = len(devices)
    stage = {
        "name": "classify",
        "use": "benchmarks.gpu.stages:Classify",
        "args": {"workload": load.encode(), "mode": "eager"},
        "outputs": {"label": "int64", "score": "float32"},
        "device": "gpu",
        "torch": torch_options(load, torch.device(devices[0]).type, "eager"),
        "batch": {"max_rows": load.max_rows, "max_wait_ms": 20},
        "timeout_s": 600,
    }
    many = replace(load, in_flight=load.in_flight * count)
    return {
        "one": Setup(_pipeline("replicas-one", load, [stage]), [("classify", devices[0])], folder, load),
        f"{count}": Setup(
            _pipeline(f"replicas-{count}", load, [stage]), [("classify", d) for d in devices], folder, many, count
        ),
    }


def _pipeline(name: str, load: Workload, stages: list[dict[str, Any]]) -> dict[str, Any]:
    output = list(stages[-1]["outputs"])
    return {"pipeline": name, "input": {load.column: load.type}, "output": output, "stages": stages}
