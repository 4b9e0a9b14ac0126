"""Ray's object store as a peer: arrays from one actor to another on one host, by `ray.put` and a zero-copy get.

The sender puts a window of arrays and passes their refs in one call; the receiver gets them as views of the store,
touches each page and lets go, which frees them. So many windows are under way as in benchmarks/handoff.py. Ray runs
with two CPUs, without its dashboard, in a temporary directory, and is asked for all sizes and windows in one session,
since starting it takes seconds. Prints one JSON line a case; `gb_per_s` is 10^9 bytes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The pages of its store are in place before the clock starts, as those of a store that has been in use for a while.
os.environ.setdefault("RAY_preallocate_plasma_memory", "1")

import numpy as np
import ray

PAGE_BYTES = 4096


@ray.remote(num_cpus=1)
class Receiver:
    """Touches what it is given, read-only and in place."""

    def take(self, *arrays: np.ndarray) -> tuple[int, float]:
        """How many pages were touched (each holds ones), and when that was done."""
        touched = sum(int(array[::PAGE_BYTES].sum()) for array in arrays)
        return touched, time.perf_counter()


@ray.remote(num_cpus=1)
class Sender:
    """Hands arrays of ones over."""

    def __init__(self, receiver: Any) -> None:
        self._receiver = receiver

    def run(self, windows_ahead: int, nbytes: int, window: int, warm: int, until: int, jobs: int) -> float:
        """Hands `jobs` arrays over, `window` at a time: seconds from the end of the first `warm` to that of `until`."""
        source = np.ones(nbytes, np.uint8)
        pages = len(source[::PAGE_BYTES])
        flight: deque[Any] = deque()
        started_s = ended_s = 0.0
        sent = done = 0
        while done < jobs:
            while sent < jobs and len(flight) < windows_ahead:
                flight.append(self._receiver.take.remote(*[ray.put(source) for _ in range(window)]))
                sent += window
            touched, now_s = ray.get(flight.popleft())
            if touched != pages * window:
                raise ValueError(f"{touched} pages of {pages * window} were touched")
            done += window
            if done == warm:
                started_s = now_s
            elif done == until:
                ended_s = now_s
        return ended_s - started_s


def main() -> None:
    parser = argparse.ArgumentParser(description="Ray's object store as a benchmark peer")
    parser.add_argument("cases", nargs="+", help="BYTES:WINDOW:WARM:UNTIL:JOBS, the last three in whole windows")
    parser.add_argument("--ahead", type=int, default=2, help="windows under way (default 2)")
    parser.add_argument("--store-bytes", type=int, default=2 << 30, help="size of the object store (default 2 GiB)")
    args = parser.parse_args()
    # A short path, since Ray makes Unix sockets deep below it.
    with tempfile.TemporaryDirectory(prefix="trray-", dir="/tmp") as folder:
        ray.init(
            num_cpus=2,
            object_store_memory=args.store_bytes,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            sender = Sender.remote(Receiver.remote())
            for case in args.cases:
                nbytes, window, warm, until, jobs = map(int, case.split(":"))
                seconds = ray.get(sender.run.remote(args.ahead, nbytes, window, warm, until, jobs))
                line = {
                    "peer": "ray",
                    "version": ray.__version__,
                    "case": f"{nbytes}:{window}",
                    "seconds": round(seconds, 6),
                    "gb_per_s": nbytes * (until - warm) / seconds / 1e9,
                }
                print(json.dumps(line), flush=True)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
