"""A model over several GPUs against the same on one: `shards` of each mode, and plain replicas.

Per case all sides are loaded on one machine and measured in turns, each while the others idle. See README.md.
Prints ratio lines: name, ours, the alternative, ratio. Throughput is rows per second, latency milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import shard_setups as setups
from benchmarks.gpu.bare_tensor import BareTensor
from benchmarks.gpu.placed import Placed, Timing, nearly
from benchmarks.harness import BenchServer, interleave, machine_line, ratio_line

Figures = dict[str, list[float]]
# Of two GPUs; printed beside the figures, never compared with them here.
AIMS = "pipeline >= 1.85, gather >= 1.70, replicas >= 1.95, tensor <= 0.62 of one and <= 1.05 of bare"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.shards", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=2, help="of each side, there and back (default 2)")
    parser.add_argument("--seconds", type=float, help="of each timed window (default 6; with --quick 1)")
    parser.add_argument("--devices", default="2", help="how many GPUs (default 2)", type=int)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check, no result")
    parser.add_argument("--handoff", choices=("device", "host"), default="device", help="between parts of a pipeline")
    parser.add_argument("--rows", type=int, help="of a job and a batch of the encoder (default 128)")
    parser.add_argument("--graphs", action="store_true", help="the encoder whole and in parts with CUDA graphs")
    parser.add_argument("--layers", type=int, help="of the Llama-like stack (default 6)")
    parser.add_argument("--passes", type=int, default=1, help="so often the stack's blocks are run (default 1)")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args(argv)
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    count = options.devices
    if count < 2:
        parser.error("--devices: shards are two at least")
    if options.device == "cuda" and torch.cuda.device_count() < count:
        parser.error(f"needs {count} NVIDIA GPUs, torch sees {torch.cuda.device_count()}; try --device cpu --quick")
    options.places = ["cpu"] * count if options.device == "cpu" else [f"cuda:{i}" for i in range(count)]
    options.seconds = options.seconds or (1.0 if options.quick else 6.0)
    options.timing = Timing(options.seconds, min(3.0, options.seconds / 2))
    options.sizes = setups.sizes_of(options.quick, options.layers, options.passes, options.rows)
    return options


def rates(case: str, made: dict[str, setups.Setup], url: str, options: argparse.Namespace, atol: float) -> Figures:
    """Rows per second of one device and of several; ends the benchmark when their results differ."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Placed(url, setup, options.timing)) for name, setup in made.items()}
        load = made["one"].load
        assert load is not None  # of all setups that come here
        table = load.tables(seed=7)[0]
        results = {name: side.result(table) for name, side in sides.items()}
        many = next(name for name in made if name != "one")
        agree(case, results[many], results["one"], atol)
        found = interleave({name: side.measure for name, side in sides.items()}, options.rounds)
        ratio_line(f"shards.{case}.{many}/one", found[many], found["one"])
        for name, side in sides.items():
            for line in side.told():
                print(f"# {case} {name}: {line}", flush=True)
    return found


def agree(case: str, ours: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    """Ends the benchmark unless nearly all numbers agree but for the type's rounding."""
    share = nearly(ours, theirs, rtol=0.05, atol=atol)
    print(f"# {case}: {share:.2%} of the numbers agree within 5 % or {atol:g}", flush=True)
    if share < 0.99:
        raise SystemExit(f"{case}: only {share:.1%} of the numbers are those of one device")


def pipeline(folder: Path, url: str, options: argparse.Namespace) -> Figures:
    """An encoder cut into parts, one a device, against all of it on one."""
    made = setups.encoder(options.sizes, folder, options.places, options.handoff, options.graphs)
    return rates("pipeline", made, url, options, atol=0.05)


def gather(folder: Path, url: str, options: argparse.Namespace) -> Figures:
    """Experts, one a device, what they return summed, against all on one."""
    return rates("gather", setups.experts(options.sizes, folder, options.places), url, options, atol=0.05)


def replicas(folder: Path, url: str, options: argparse.Namespace) -> Figures:
    """Whole models, one a device, as many feeders, against one of each."""
    return rates("replicas", setups.replicas(folder, options.places, options.quick), url, options, atol=0.05)


def tensor(folder: Path, url: str, options: argparse.Namespace) -> Figures:
    """Latency of a stack of blocks over a group, against one device, and against torch.distributed alone."""
    made = setups.blocks(options.sizes, folder, options.places)
    tokens = np.random.default_rng(7).integers(0, options.sizes.blocks["vocabulary"], options.sizes.length)
    row = {"tokens": tokens}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Placed(url, setup, options.timing)) for name, setup in made.items()}
        weights = folder / "blocks.safetensors"
        bare = stack.enter_context(BareTensor(options.sizes.blocks, weights, options.places))
        many = next(name for name in made if name != "one")
        hidden = {name: side.result({"tokens": tokens[None]}) for name, side in sides.items()}
        agree("tensor", hidden[many], hidden["one"], atol=0.1)
        agree("tensor bare", {"hidden": bare.hidden(tokens)}, hidden["one"], atol=0.1)
        measured: dict[str, Callable[[], float]] = {n: lambda s=s: s.latency_ms(row) for n, s in sides.items()}
        measured["bare"] = lambda: bare.latency_ms(tokens, options.seconds)
        found = interleave(measured, options.rounds)
    ratio_line(f"shards.tensor.{many}/one.ms", found[many], found["one"])
    ratio_line(f"shards.tensor.{many}/bare.ms", found[many], found["bare"])
    return found


CASES = {"pipeline": pipeline, "gather": gather, "replicas": replicas, "tensor": tensor}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    line = f"{machine_line()}, torch {torch.__version__}, {len(options.places)} x {device}"
    print(line, flush=True)
    if not options.quick:
        print(f"# aims for two GPUs: {AIMS}", flush=True)
    figures: dict[str, Any] = {"machine": line, "cases": {}}
    with BenchServer() as server:
        for case in options.cases:
            server.restart_clean()
            with tempfile.TemporaryDirectory(prefix="trbench-") as folder:
                found = CASES[case](Path(folder), server.url, options)
            medians = {name: statistics.median(values) for name, values in found.items() if values}
            figures["cases"][case] = {"values": found, "medians": medians}
            if options.json is not None:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
