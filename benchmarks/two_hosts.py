"""How long a worker stands still while all work for it lies on another host.

Two hosts as far as shared memory goes: a folder with a token of its own for each. A stage on the first leaves columns
in its memory, a worker there and one on the second share the next stage, which sleeps. Prints, for the second one's
worker, the time between two forwards as long as work is left (median, 90th percentile, longest, in ms), the part of its
time in which it computed, and the part of the rows that it did.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.harness import BenchServer, parse, parser
from torchrelay import Relay

YAML = """
pipeline: hosts
input: {image: "uint8[*]"}
stages:
  - {name: make, use: "stages.py:make", outputs: {image: "uint8[*]"}}
  - name: work
    use: stages.py:work
    inputs: [image]
    outputs: {total: int64}
    batch: {max_rows: 4, max_wait_ms: 0}
output: [total]
"""
CODE = """
import os
import time
from pathlib import Path


def make(batch):
    return {"image": [255 - image for image in batch["image"]]}


def work(batch):
    began = time.monotonic()
    totals = [int(image.sum(dtype="int64")) for image in batch["image"]]
    time.sleep(0.005 * len(batch))
    name = "log-" + Path(os.environ["TORCHRELAY_ARENA_DIR"]).name
    with Path(__file__).with_name(name).open("a") as log:
        log.write(f"{began} {time.monotonic()} {len(batch)}\\n")
    return {"total": totals}
"""


def start(url: str, path: Path, stage: str, host: Path) -> subprocess.Popen[bytes]:
    """A worker of this stage on this host."""
    command = [sys.executable, "-m", "torchrelay.cli", "worker", str(path), "--stage", stage, "--redis", url]
    environment = os.environ | {"TORCHRELAY_ARENA_DIR": str(host)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def forwards(path: Path, host: Path) -> list[tuple[float, float, int]]:
    """Begin, end and rows of each forward of `work` on this host."""
    log = path.with_name(f"log-{host.name}")
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(float(a), float(b), int(n)) for a, b, n in lines]


def measure(relay: Relay, url: str, path: Path, hosts: list[Path], jobs: int, nbytes: int) -> None:
    """The second host's worker comes when the columns lie on the first."""
    workers = [start(url, path, stage, hosts[0]) for stage in ("make", "work")]
    try:
        while sum(r.state == "ready" for r in relay.registry.workers()) < len(workers):
            time.sleep(0.05)
        image = np.ones(nbytes, np.uint8)
        futures = relay.submit_many("hosts", [{"image": image}] * jobs, durable=False, wait_s=60.0)
        workers.append(start(url, path, "work", hosts[1]))
        for future in futures:
            future.result(timeout=600)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    found = [forwards(path, host) for host in hosts]
    last = min(log[-1][0] for log in found)
    mine = [f for f in found[1] if f[0] <= last]
    idle_ms = sorted((b[0] - a[1]) * 1000.0 for a, b in pairwise(mine))
    busy = sum(b - a for a, b, _ in mine) / (mine[-1][1] - mine[0][0])
    share = sum(n for _, _, n in found[1]) / jobs
    median, p90 = statistics.median(idle_ms), idle_ms[len(idle_ms) * 9 // 10]
    print(
        f"{nbytes >> 10:6d} KiB  idle ms: median {median:.1f}, p90 {p90:.1f}, longest {idle_ms[-1]:.1f};  "
        f"computing {busy:.0%} of the time;  {share:.0%} of the rows"
    )


def main() -> None:
    options = parse(parser(__doc__))
    jobs = 800 if options.quick else 3000
    for nbytes in (50_000, 200_000):
        with tempfile.TemporaryDirectory() as folder, BenchServer() as server:
            hosts = [Path(tempfile.mkdtemp(prefix="trs-host-", dir="/dev/shm")) for _ in range(2)]
            path = Path(folder) / "pipeline.yaml"
            path.write_text(YAML)
            path.with_name("stages.py").write_text(CODE)
            os.environ["TORCHRELAY_ARENA_DIR"] = str(hosts[0])
            try:
                with Relay(server.url) as relay:
                    relay.register(path)
                    measure(relay, server.url, path, hosts, jobs, nbytes)
            finally:
                for host in hosts:
                    shutil.rmtree(host, ignore_errors=True)


if __name__ == "__main__":
    main()
