"""The producer process of `benchmarks.gpu.efficiency`: table jobs, at most so many under way, results in order.

Commands are single bytes on standard input: `g` starts, `s` stops and waits for what is under way; at its end the
process ends. It prints one JSON line when it is ready, ten a second while results come, and one when it has stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import time
from collections import deque
from typing import Any

from benchmarks.gpu.workloads import Table, Workload
from torchrelay import Relay
from torchrelay.producer.encoding import Options
from torchrelay.producer.futures import JobFuture

_RESULT_S = 120.0
_SAY_S = 0.1


class Feeder:
    """Sends the pool's jobs, round and round. The sums are over the life of the process; seconds by time.monotonic."""

    def __init__(self, relay: Relay, pipeline: str, load: Workload, in_flight: int, seed: int) -> None:
        self._relay = relay
        self._pipeline = pipeline
        self._jobs = [(table, load.units_of(table)) for table in load.tables(seed)]
        self._job_rows = load.job_rows
        self._in_flight = in_flight
        self._next = 0
        self._under_way: deque[tuple[JobFuture[Table], int]] = deque()
        self._sums = {"jobs": 0, "units": 0, "submit_s": 0.0, "wait_s": 0.0}
        self._said_at = 0.0
        self._options: dict[str, Any] = {"wait_s": _RESULT_S}
        if "durable" in Options.__annotations__:
            # A durable copy of gigabytes per second does not fit through Redis.
            self._options["durable"] = False

    def feed(self) -> None:
        """Until the next command comes."""
        while not select.select([0], [], [], 0)[0]:
            if len(self._under_way) >= self._in_flight:
                self._take()
            table, units = self._jobs[self._next % len(self._jobs)]
            self._next += 1
            started = time.monotonic()
            future = self._relay.submit_table(self._pipeline, table, **self._options)
            self._sums["submit_s"] += time.monotonic() - started
            self._under_way.append((future, units))
        while self._under_way:
            self._take()
        say(event="stopped")

    def _take(self) -> None:
        future, units = self._under_way.popleft()
        started = time.monotonic()
        result = future.result(_RESULT_S)
        now = time.monotonic()
        if len(result["label"]) != self._job_rows or len(result["score"]) != self._job_rows:
            raise SystemExit(f"a job of {self._job_rows} rows came back with {len(result['label'])}")
        self._sums["wait_s"] += now - started
        self._sums["jobs"] += 1
        self._sums["units"] += units
        if now - self._said_at >= _SAY_S:
            self._said_at = now
            say(event="progress", at=now, **self._sums)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "namespace", "pipeline", "workload"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    with Relay(args.url, namespace=args.namespace) as relay:
        feeder = Feeder(relay, args.pipeline, Workload.decode(args.workload), args.in_flight, args.seed)
        say(event="ready")
        while command := os.read(0, 1):
            if command == b"g":
                feeder.feed()


if __name__ == "__main__":
    main()
