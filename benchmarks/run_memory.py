"""Millions of JSON lines through a trivial pipeline: how large driver and server get, and whether the output is exact.

`torchrelay run` reads {"n": i} lines and writes n + 1. Prints ratio lines (name, ours, limit, ratio): the driver's
largest resident memory against 300 MB, and the largest of driver and server against that of a tenth of the rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import redis

from benchmarks.harness import ROOT, BenchServer, parse, parser, ratio_line

ROWS = 5_000_000
LIMIT_MB = 300.0


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        for start in range(0, count, 100_000):
            file.writelines(f'{{"n": {n}}}\n' for n in range(start, min(start + 100_000, count)))


class Watch(threading.Thread):
    """The largest memory of a process and of a server, in MB, until `over` is set."""

    def __init__(self, pid: int, client: redis.Redis) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._client = client
        self.over = threading.Event()
        self.driver_mb = self.server_mb = 0.0

    def run(self) -> None:
        while not self.over.wait(0.1):
            found = [line.split()[1] for line in self._lines() if line.startswith("VmRSS:")]
            self.driver_mb = max(self.driver_mb, *(int(kib) * 1024 / 1e6 for kib in found), 0.0)
            self.server_mb = max(self.server_mb, self._client.info("memory")["used_memory"] / 1e6)

    def _lines(self) -> list[str]:
        try:
            return self._status.read_text().splitlines()
        except OSError:
            return []  # it has just ended


def run(server: BenchServer, folder: Path, count: int) -> Watch:
    """One run; ends the program where the output is not exact."""
    source, output = folder / "rows.jsonl", folder / "out"
    write_rows(source, count)
    command = [sys.executable, "-m", "torchrelay.cli", "run", "benchmarks/batch_stages.py:numbers", "--json"]
    command += ["-i", str(source), "-o", str(output), "--redis", server.url, "--namespace", f"bench-{count}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    watch = Watch(process.pid, server.client())
    watch.start()
    told, _ = process.communicate()
    watch.over.set()
    watch.join()
    if process.returncode:
        raise SystemExit(f"torchrelay run ended with status {process.returncode}")
    numbers = np.sort(ds.dataset(str(output), format="parquet").to_table(columns=["n"]).column(0).to_numpy())
    if len(numbers) != count or not np.array_equal(numbers, np.arange(1, count + 1)):
        raise SystemExit(f"{len(numbers)} rows came out of {count}, or not these")
    summary = json.loads(told)
    seconds = time.perf_counter() - began
    print(f"# {count} rows: {seconds:.1f} s, {summary['rows'] / summary['seconds']:.0f} rows/s in the run", flush=True)
    return watch


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rows", type=int, default=ROWS)
    options = parse(made)
    count = options.rows // (20 if options.quick else 1)
    with BenchServer() as server:
        watches = []
        for rows in (count // 10, count):
            with tempfile.TemporaryDirectory(prefix="trbench-", dir="/tmp") as folder:
                watches.append(run(server, Path(folder), rows))
            server.restart_clean()
    small, large = watches
    ratio_line("run.memory.driver_mb/limit", large.driver_mb, LIMIT_MB)
    ratio_line("run.memory.driver_mb/tenth_of_the_rows", large.driver_mb, small.driver_mb)
    ratio_line("run.memory.server_mb/tenth_of_the_rows", large.server_mb, small.server_mb)


if __name__ == "__main__":
    main()
