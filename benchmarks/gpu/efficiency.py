"""Rows per second of a GPU stage that other processes feed, over a bare loop of the same compiled model.

Three cases per model, in turns: `bare` over data on the device, `raw` with overlapped copies from shared memory, and
`relay`: a producer process, a CPU stage that passes on, a GPU stage, results back in the producer. See README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bare_loops import Loops
from benchmarks.gpu.models import EAGER, MODES
from benchmarks.gpu.relay_case import RelayCase, RelayOptions
from benchmarks.gpu.workloads import MODELS, Workload, workload
from benchmarks.harness import BenchServer, interleave, machine_line, ratio_line

RATIOS = (("relay", "bare"), ("relay", "raw"), ("raw", "bare"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.efficiency", description=__doc__)
    parser.add_argument("--models", default="resnet50,vit_b16,mlp,text", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=2, help="of each case, there and back (default 2)")
    parser.add_argument("--seconds", type=float, help="of each timed loop and window (default 8; with --quick 1)")
    parser.add_argument("--mode", choices=MODES, help="of torch.compile, on both sides (default default; cpu: eager)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check, no result")
    parser.add_argument("--job-rows", type=int, help="rows of a job")
    parser.add_argument("--max-rows", type=int, help="rows of a batch, on both sides")
    parser.add_argument("--in-flight", type=int, help="jobs under way, over all producers")
    parser.add_argument("--producers", type=int, default=1, help="producer processes (default 1)")
    parser.add_argument("--passers", type=int, default=1, help="workers of the CPU stage (default 1)")
    parser.add_argument("--max-wait-ms", type=float, default=50.0, help="of the GPU stage (default 50)")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs, on both sides")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args(argv)
    options.models = options.models.split(",")
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"unknown model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU; try --device cpu --quick")
    options.seconds = options.seconds or (1.0 if options.quick else 8.0)
    options.mode = options.mode or (EAGER if options.device == "cpu" else "default")
    return options


def sized(name: str, options: argparse.Namespace) -> Workload:
    given = {key: getattr(options, key) for key in ("job_rows", "max_rows", "in_flight") if getattr(options, key)}
    return replace(workload(name, options.quick), **given)


def measure(load: Workload, options: argparse.Namespace, server: BenchServer) -> dict[str, Any]:
    """All rounds of one model; prints its lines and returns its figures."""
    server.restart_clean()
    tables = load.tables()
    loops = Loops(load, tables, options.device, options.mode, options.seconds, graphs=options.graphs)
    # Before the workers start: what is compiled here, they find in the compiler's cache.
    loops.start()
    warm_s = min(3.0, options.seconds / 2)
    how = RelayOptions(
        device=options.device,
        mode=options.mode,
        seconds=options.seconds,
        warm_s=warm_s,
        producers=options.producers,
        passers=options.passers,
        max_wait_ms=options.max_wait_ms,
        graphs=options.graphs,
    )
    with RelayCase(server.url, load, how) as relay:
        relay.check(tables[0], *loops.reference(load.job_rows))
        rates = interleave({"bare": loops.bare, "raw": loops.raw, "relay": relay.measure}, options.rounds)
    loops.close()
    for ours, alternative in RATIOS:
        ratio_line(f"efficiency.{load.name}.{ours}/{alternative}", rates[ours], rates[alternative])
    for rate, window in zip(rates["relay"], relay.windows, strict=True):
        print(f"# {load.name} relay {rate:.0f} {load.unit}/s: {told(window)}", flush=True)
    return {"rates": rates, "medians": {k: statistics.median(v) for k, v in rates.items()}, "windows": relay.windows}


def told(window: dict[str, Any]) -> str:
    parts = [f"producer waits {p['wait']:.0%}" for p in window["producers"]]
    for stage, shares in sorted(window["stages"].items(), reverse=True):
        parts.append(f"{stage} " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return "; ".join(parts)


def machine(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    return f"{machine_line()}, torch {torch.__version__}, {device}, mode {options.mode}"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    line = machine(options)
    print(line, flush=True)
    figures: dict[str, Any] = {"machine": line, "models": {}}
    with BenchServer() as server:
        for name in options.models:
            load = sized(name, options)
            sizes = f"# {name}: jobs of {load.job_rows} rows, {load.in_flight} under way, batches of {load.max_rows}"
            print(sizes, flush=True)
            figures["models"][name] = {"workload": json.loads(load.encode()), **measure(load, options, server)}
            if options.json is not None:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
