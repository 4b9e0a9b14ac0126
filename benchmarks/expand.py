"""Expand x11, work, collapse as three stages, against the same work inside one stage: in one process, and on workers.

Batches of 256 pages; the work is that of `expand_stages`: cut 11 crops, a small conv net on each, regroup. On workers
(one per stage) each batch is one table job, and several are under way.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.expand_stages import CROP, CROPS, PAGE
from benchmarks.harness import BenchServer, interleave, parse, parser, ratio_line
from torchrelay import Pipeline, Relay, testing
from torchrelay.local import run_local

ROWS = 256
INPUT = f"""
input: {{page: "uint8[{PAGE}, {PAGE}]", boxes: "int64[{CROPS}, 2]"}}
output: [label, score]
"""
THREE = f"""
pipeline: three
{INPUT}
stages:
  - name: cut
    use: benchmarks.expand_stages:cut
    rows: expand
    outputs: {{crop: "uint8[{CROP}, {CROP}]"}}
    batch: {{max_rows: {ROWS}}}
  - name: classify
    use: benchmarks.expand_stages:Classify
    inputs: [crop]
    outputs: {{label: int64, score: float32}}
    batch: {{max_rows: {ROWS * CROPS}}}
  - name: regroup
    rows: {{collapse: cut}}
    batch: {{max_rows: {ROWS}}}
"""
ONE = f"""
pipeline: one
{INPUT}
stages:
  - name: whole
    use: benchmarks.expand_stages:Whole
    outputs: {{label: "int64[{CROPS}]", score: "float32[{CROPS}]"}}
    batch: {{max_rows: {ROWS}}}
"""
Rows = list[dict[str, Any]]


def pages(count: int) -> Rows:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, PAGE, PAGE), np.uint8)
    boxes = random.integers(0, PAGE - CROP, (count, CROPS, 2))
    return [{"page": page, "boxes": places} for page, places in zip(images, boxes, strict=True)]


def same(ones: Rows, others: Rows) -> bool:
    return all(
        np.array_equal(a["label"], b["label"]) and np.allclose(a["score"], b["score"])
        for a, b in zip(ones, others, strict=True)
    )


def timed(act: Callable[[], Any], rows: int) -> float:
    """Milliseconds per 1000 rows."""
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1e6 / rows


def through_workers(relay: Relay, pipeline: str, tables: list[dict[str, Any]]) -> None:
    for future in [relay.submit_table(pipeline, table) for table in tables]:
        future.result(timeout=300)


def main() -> None:
    made = parser(__doc__ or "")
    made.set_defaults(jobs=2560, rounds=15)
    options = parse(made)
    torch.set_num_threads(1)
    rows = pages(max(ROWS, options.jobs // ROWS * ROWS))
    parts = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    tables = [{name: np.stack([row[name] for row in part]) for name in part[0]} for part in parts]
    with tempfile.TemporaryDirectory() as folder, BenchServer() as server:
        three, one = Path(folder) / "three.yaml", Path(folder) / "one.yaml"
        three.write_text(THREE)
        one.write_text(ONE)
        pipelines = {"three": Pipeline.load(three), "one": Pipeline.load(one)}
        if not same(*(run_local(p, rows[:ROWS]) for p in pipelines.values())):
            raise SystemExit("the two do not agree on the results")
        local = {n: lambda p=p: timed(lambda: run_local(p, rows), len(rows)) for n, p in pipelines.items()}
        times = interleave(local, options.rounds)
        ratio_line("expand/run_local/ms_per_1000_rows", times["three"], times["one"])
        with testing.running(three, one, url=server.url) as relay:
            served = {n: lambda n=n: timed(lambda: through_workers(relay, n, tables), len(rows)) for n in pipelines}
            interleave(served, 1)
            times = interleave(served, options.rounds)
        ratio_line("expand/workers/ms_per_1000_rows", times["three"], times["one"])


if __name__ == "__main__":
    main()
