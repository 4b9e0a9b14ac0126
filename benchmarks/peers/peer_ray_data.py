"""Ray Data as a peer: the same rows through the same code, from files to Parquet, with two CPUs.

Prints one JSON line: rows, `seconds` from the first task to the last part (a session that was up and had run a tiny
dataset before), and `start_s`, what starting took.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from ray import data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
code: Any = importlib.import_module("benchmarks.batch_code")
Batch = dict[str, Any]


class Classify:
    def __init__(self) -> None:
        self._cnn = code.Cnn()

    def __call__(self, batch: Batch) -> Batch:
        return {"logits": self._cnn(batch["pixels"])}


class Embed:
    def __init__(self, threads: int) -> None:
        self._sentences = code.Sentences(threads)

    def __call__(self, batch: Batch) -> Batch:
        return {"vector": self._sentences([str(text) for text in batch["text"]])}


def images(source: str, options: argparse.Namespace) -> data.Dataset:
    read = data.read_numpy(source)
    flipped = read.map_batches(lambda b: {"image": code.flip(b["data"])}, batch_size=128)
    return flipped.map_batches(lambda b: {"middle": code.cut(b["image"])}, batch_size=128)


def photos(source: str, options: argparse.Namespace) -> data.Dataset:
    def prepare(batch: Batch) -> Batch:
        return {"pixels": np.stack([code.normalised(np.asarray(image)) for image in batch["image"]])}

    read = data.read_images(source).map_batches(prepare, batch_size=32)
    return read.map_batches(Classify, batch_size=32, concurrency=1)


def texts(source: str, options: argparse.Namespace) -> data.Dataset:
    read = data.read_json(source)
    arguments = (options.threads,)
    return read.map_batches(Embed, batch_size=64, concurrency=1, fn_constructor_args=arguments, num_cpus=1)


def naps(source: str, options: argparse.Namespace) -> data.Dataset:
    read = data.read_parquet(source)
    return read.map_batches(lambda b: {"number": code.nap(b["number"])}, batch_size=1000, concurrency=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=("images", "photos", "texts", "naps"))
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trb-ray-", dir="/tmp") as folder:
        # Its workers import this script's module and the code beside it.
        env = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, runtime_env=env)
        data.DataContext.get_current().enable_progress_bars = False
        data.range(2).map_batches(lambda b: b).materialize()
        started = time.perf_counter()
        made = {"images": images, "photos": photos, "texts": texts, "naps": naps}[options.case](options.input, options)
        made.write_parquet(options.output)
        ended = time.perf_counter()
        ray.shutdown()
    print(json.dumps({"seconds": ended - started, "start_s": started - began}), flush=True)


if __name__ == "__main__":
    main()
