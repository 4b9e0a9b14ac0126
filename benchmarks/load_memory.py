"""Host memory of the workers that load a model: whole, and cut into N parts in each mode of `shards`.

Real workers on the CPU, one after the other per mode; `gather` is of whole experts, `wide` of layers that are cut by
columns and by rows. What is told of each is the peak of its resident memory (VmHWM)
until it has computed a row, less that of an idle worker (one with torch and a stage of a few numbers), over the bytes
of the weights. A part should take at most 1/N and 15 % more: it holds its own weights, and never the whole model. In a
fresh namespace, so that one of the parts of a pipeline also works out where to cut. Linux only.

Prints `load_memory.MODE.WORKER peak_mib weights_mib share`, and what the share may be.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.harness import BenchServer, machine_line, ratio_line
from benchmarks.load_stages import Mixture, wide
from tests import models
from tests.model_stages import write_pipeline
from torchrelay import Pipeline, Relay
from torchrelay.testing.serving import await_ready, fresh_namespace
from torchrelay.up import Fleet

MODES = ("whole", "gather", "wide", "tensor", "pipeline")
# 8 layers of 61 MB in float32, and a twentieth of that around them.
FULL = {"width": 1024, "heads": 16, "kv_heads": 4, "layers": 8, "vocabulary": 4096}
QUICK = {**FULL, "width": 256, "vocabulary": 1024}
PLAN = {
    **{f"model.layers.*.self_attn.{name}_proj": "column" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
}
_LOAD_S = 300.0
_MIB = 1 << 20


def llama(folder: Path, parts: int, sizes: Mapping[str, Any], *, mode: str) -> Path:
    """The pipeline of a Llama-like model; its weights lie in the folder."""
    more: dict[str, dict[str, Any]] = {"tensor": {"plan": PLAN}}
    shards = None if mode == "whole" else {"count": parts, "mode": mode, **more.get(mode, {})}
    return write_pipeline(folder, "llama", shards=shards, sizes=sizes, name=f"{mode}.yaml")


def gathered(folder: Path, parts: int, sizes: Mapping[str, Any], *, mode: str) -> Path:
    """The pipeline of about as many numbers that are gathered: in experts, one a shard, or in two layers."""
    width, numbers = sizes["width"], sizes["layers"] * 16 * sizes["width"] ** 2
    if mode == "gather":
        args = {"experts": parts, "width": width, "layers": sizes["layers"] * 16 // parts}
        model: nn.Module = Mixture(**args)
    else:
        args = {"width": width, "hidden": numbers // (2 * width)}
        model = wide(**args)
    models.save(models.fill(model), folder / f"{mode}.safetensors")
    column = {"x": f"float32[{width}]"}
    stage = {
        "name": "mix",
        "use": f"benchmarks.load_stages:{'Mix' if mode == 'gather' else 'Wide'}",
        "args": args,
        "weights": f"{mode}.safetensors",
        "outputs": {"y": column["x"]},
        "shards": {"count": parts, "mode": "gather", "combine": {"y": "sum"}},
    }
    path = folder / f"{mode}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({"pipeline": "mix", "input": column, "output": ["y"], "stages": [stage]}))
    return path


def peaks(path: Path, url: str) -> dict[str, int]:
    """Worker -> the peak of its resident memory in bytes, once all workers of a pipeline have computed a row: what is
    mapped from a file and was not looked at yet, is not resident."""
    namespace, pipeline = fresh_namespace(), Pipeline.load(path)
    fleet = Fleet(url, namespace, allow_cpu=True)
    fleet.add(pipeline, device="cpu")
    with fleet:
        await_ready(fleet, _LOAD_S)
        with Relay(url, namespace=namespace) as relay:
            row = {c: np.zeros(kind.shape[0] or 8, kind.np_dtype) for c, kind in pipeline.input.items()}
            relay.infer(pipeline.name, row, deadline_s=_LOAD_S)
        names = {report.pid: report.node.rpartition("/")[2] for report in fleet.registry.workers()}
        # The processes of a group report as one worker.
        found = sorted(_children(os.getpid()))
        return {names.get(pid, f"process-{pid}"): peak for pid in found if (peak := _peak(pid))}


def _peak(pid: int) -> int:
    """VmHWM of a worker's process in bytes; 0 for any other process."""
    folder = Path(f"/proc/{pid}")
    if b"torchrelay.workers" not in (folder / "cmdline").read_bytes():
        return 0
    line = next(t for t in (folder / "status").read_text().splitlines() if t.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found = (task / "children").read_text().split()
        except FileNotFoundError:
            continue  # a thread that ended meanwhile
        for child in found:
            yield int(child)
            yield from _children(int(child))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_memory", description=__doc__)
    parser.add_argument("--parts", type=int, default=2, help="how many parts (default 2)")
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {','.join(MODES)}")
    parser.add_argument(
        "--layers", type=int, help="of the model (default 8): what a split costs beside them is the same"
    )
    parser.add_argument("--quick", action="store_true", help="a small model: a check, no result")
    options = parser.parse_args()
    if unknown := set(options.modes.split(",")) - set(MODES):
        parser.error(f"unknown mode {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory(prefix="trbench-") as name, BenchServer() as server:
        folder = Path(name)
        (folder / "idle").mkdir()
        idle = max(peaks(write_pipeline(folder / "idle", "llama"), server.url).values())
        print(f"# an idle worker takes {idle / _MIB:.0f} MiB", flush=True)
        sizes = QUICK if options.quick else FULL
        sizes = {**sizes, "layers": options.layers or sizes["layers"]}
        for mode in options.modes.split(","):
            make = gathered if mode in ("gather", "wide") else llama
            path = make(folder, parts=options.parts, sizes=sizes, mode=mode)
            weights = (folder / json.loads(path.read_text())["stages"][0]["weights"]).stat().st_size
            for worker, peak in peaks(path, server.url).items():
                ratio_line(f"load_memory.{mode}.{worker}", (peak - idle) / _MIB, weights / _MIB)
            if mode != "whole":
                print(f"# of which at most {1 / options.parts + 0.15:.2f} is aimed at", flush=True)
            server.restart_clean()


if __name__ == "__main__":
    main()
