"""Datasets through a pipeline: `torchrelay run` against Ray Data on the same files, the same code and two CPUs.

`images`: 8,192 images uint8 [224, 224, 3] in .npy files, turned upside down, then a float32 part of each. `photos`:
JPEG files, decoded, resized, normalised, a small CNN. `texts`: sentence vectors by all-MiniLM-L6-v2, as many torch
threads on both sides. `naps`: 10,000 rows in batches of 1,000, a second each: overhead alone. Both write Parquet, which
is compared.

Each case is a process of its own, in turns. `.total` lines are rows a second from the start of that process to its end
(server, workers or session and imports included), `.run` lines without starting. Prints ratio lines (name, ours,
alternative, ratio). Ray Data lives in .bench/venv-ray (benchmarks/peers/setup.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import RAY_PYTHON, ROOT, interleave, parse, parser, peer_lines, ratio_line

COUNTS = {"images": 8192, "photos": 2000, "texts": 20_000, "naps": 10_000}
RESULTS = {"images": "middle", "photos": "logits", "texts": "vector", "naps": "number"}
INPUTS = {"images": "*.npy", "photos": "", "texts": "*.jsonl", "naps": "*.parquet"}
MORE = {"images": ["--columns", "image=array"], "naps": ["--chunk-rows", "1000"]}
PHOTO_SIZES = ((640, 480), (800, 600), (1024, 768))
_FILE_IMAGES = 256


def make_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, count, _FILE_IMAGES)):
        rows = min(_FILE_IMAGES, count - start)
        np.save(folder / f"{number:04}.npy", rng.integers(0, 256, (rows, 224, 224, 3), np.uint8))


def make_photos(folder: Path, count: int) -> None:
    """Smooth colours with edges and some noise: as large as photographs of their size."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = PHOTO_SIZES[number % len(PHOTO_SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        array = np.asarray(coarse).astype(np.int16)
        array[height // 3 : height // 2, width // 4 : width // 2] //= 2
        array += rng.normal(0, 6, array.shape).astype(np.int16)
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)


def make_texts(folder: Path, count: int) -> None:
    """Docstrings of the standard library, again and again with their sentences in another order."""
    from examples.docsearch.gather import gather

    rng = random.Random(0)
    found = [doc["text"] for doc in gather()]
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(count):
            sentences = found[number % len(found)].split(". ")
            if number >= len(found):
                rng.shuffle(sentences)
            file.write(json.dumps({"text": ". ".join(sentences)}) + "\n")


def make_naps(folder: Path, count: int) -> None:
    pq.write_table(pa.table({"number": np.arange(count)}), folder / "numbers.parquet")


class Case:
    """One dataset, and both ways of running it."""

    def __init__(self, name: str, folder: Path, count: int, threads: int) -> None:
        self.name, self.count, self._threads = name, count, threads
        self._folder = folder / name
        self._folder.mkdir()
        makers: dict[str, Callable[[Path, int], None]] = {
            "images": make_images, "photos": make_photos, "texts": make_texts, "naps": make_naps,
        }  # fmt: skip
        makers[name](self._folder, count)
        self._out = folder / f"{name}-out"
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.sums: dict[str, float] = {}

    @property
    def _source(self) -> str:
        return str(self._folder / INPUTS[self.name]) if INPUTS[self.name] else str(self._folder)

    def ours(self) -> float:
        """Rows a second, everything included."""
        command = [sys.executable, "-m", "torchrelay.cli", "run", f"benchmarks/batch_stages.py:{self.name}"]
        command += ["-i", self._source, "-o", str(self._out), "--json", *MORE.get(self.name, [])]
        if self.name == "texts":
            command += ["--set", f"embed.args={{threads: {self._threads}}}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="trb-", dir="/tmp") as server:
            (Path(server) / ".torchrelay").mkdir(mode=0o700)
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        total_s = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"torchrelay run {self.name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        summary = json.loads(done.stdout)
        return self._noted("ours", total_s, summary["seconds"])

    def ray(self) -> float:
        """The same of Ray Data."""
        source = str(self._folder)
        argv = [self.name, "--input", source, "--output", str(self._out), "--threads", str(self._threads)]
        began = time.perf_counter()
        (line,) = peer_lines("ray_data", RAY_PYTHON, argv, cwd=self._folder, timeout_s=1800)
        return self._noted("ray", time.perf_counter() - began, line["seconds"])

    def _noted(self, who: str, total_s: float, run_s: float) -> float:
        table = ds.dataset(str(self._out), format="parquet").to_table(columns=[RESULTS[self.name]])
        shutil.rmtree(self._out)
        if table.num_rows != self.count:
            raise SystemExit(f"{self.name}: {who} wrote {table.num_rows} rows of {self.count}")
        self.sums[who] = _sum(table.column(0))
        for key, seconds in (("total", total_s), ("run", run_s)):
            self.rates[f"{who}.{key}"].append(self.count / seconds)
            self.seconds[f"{who}.{key}"].append(round(seconds, 2))
        return self.count / total_s

    def report(self) -> None:
        if len(self.sums) == 2 and not np.isclose(self.sums["ours"], self.sums["ray"], rtol=1e-3):
            raise SystemExit(f"{self.name}: the results differ: {self.sums}")
        for key in ("total", "run"):
            ratio_line(f"batch.{self.name}.{key}", self.rates[f"ours.{key}"], self.rates.get(f"ray.{key}", []))
        print(f"# {self.name}: seconds {json.dumps(self.seconds)}", flush=True)


def _sum(column: Any) -> float:
    """Of the absolute values of all that the column holds."""
    total = 0.0
    for chunk in column.chunks:
        storage = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        while hasattr(storage, "flatten") and pa.types.is_nested(storage.type):
            storage = storage.flatten()
        total += float(np.abs(storage.to_numpy(zero_copy_only=False).astype(np.float64)).sum())
    return total


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--cases", default=",".join(COUNTS), help="some of them (default all)")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of texts")
    made.add_argument("--share", type=float, default=1.0, help="of the rows, but for naps (default 1)")
    made.add_argument("--only", choices=("ours", "ray"), help="one side alone")
    options: argparse.Namespace = parse(made)
    with tempfile.TemporaryDirectory(prefix="trbench-", dir="/dev/shm") as folder:
        for name in options.cases.split(","):
            share = 1.0 if name == "naps" else options.share / (16 if options.quick else 1)
            count = int(COUNTS[name] * share)
            case = Case(name, Path(folder), count, options.threads)
            sides = {"ours": case.ours, "ray": case.ray}
            interleave({k: v for k, v in sides.items() if options.only in (None, k)}, options.rounds)
            case.report()
            shutil.rmtree(Path(folder) / name)


if __name__ == "__main__":
    main()
