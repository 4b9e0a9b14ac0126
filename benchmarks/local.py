"""`run_local` against a bare loop over batches of 256 that calls the same stages, in turns in one process.

Both start from a list of rows and end with a list of result rows, and both load the stages. Rows are vectors
float32[384]; the stages are `local_stages`: a small torch model between two cheap numpy stages.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import interleave, parse, parser, ratio_line
from benchmarks.local_stages import WIDTH, Classify, Encode, Normalise
from torchrelay import Pipeline, StageContext
from torchrelay.local import run_local

BATCH = 256
YAML = f"""
pipeline: local
input: {{id: int64, x: "float32[{WIDTH}]"}}
output: [id, label, score]
stages:
  - {{name: normalise, use: "benchmarks.local_stages:Normalise", inputs: [x], batch: {{max_rows: {BATCH}}}}}
  - {{name: encode, use: "benchmarks.local_stages:Encode", inputs: [x], batch: {{max_rows: {BATCH}}}}}
  - {{name: classify, use: "benchmarks.local_stages:Classify", inputs: [vector], batch: {{max_rows: {BATCH}}}}}
"""
Rows = list[dict[str, Any]]


def bare(rows: Rows) -> Rows:
    """What one writes by hand."""
    normalise, encode, classify = Normalise(), Encode(), Classify()
    for stage in (normalise, encode, classify):
        stage.load(StageContext())
    results: Rows = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        x = normalise.forward({"x": np.stack([row["x"] for row in part])})["x"]
        with torch.inference_mode():
            vector = encode.forward({"x": torch.from_numpy(x)})["vector"].numpy()
        made = classify.forward({"vector": vector})
        for row, label, score in zip(part, made["label"].tolist(), made["score"].tolist(), strict=True):
            results.append({"id": row["id"], "label": label, "score": score})
    return results


def timed(act: Callable[[Rows], Rows], rows: Rows, expected: Rows) -> float:
    """Milliseconds per 1000 rows; ends the benchmark when the results are not those expected."""
    started = time.perf_counter()
    results = act(rows)
    seconds = time.perf_counter() - started
    if results != expected:
        raise SystemExit("the two do not agree on the results")
    return seconds * 1e6 / len(rows)


def main() -> None:
    made = parser(__doc__ or "")
    made.set_defaults(jobs=10_000, rounds=15)
    options = parse(made)
    # One thread: what is compared is the work around the model, and other processes then disturb it less.
    torch.set_num_threads(1)
    vectors = np.random.default_rng(0).standard_normal((options.jobs, WIDTH), np.float32)
    rows = [{"id": i, "x": x} for i, x in enumerate(vectors)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "local.yaml"
        path.write_text(YAML)
        pipeline = Pipeline.load(path)
        expected = bare(rows)
        cases = {
            "run_local": lambda: timed(lambda given: run_local(pipeline, given), rows, expected),
            "bare": lambda: timed(bare, rows, expected),
        }
        times = interleave(cases, options.rounds)
    ratio_line("local/ms_per_1000_rows", times["run_local"], times["bare"])


if __name__ == "__main__":
    main()
