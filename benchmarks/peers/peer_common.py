"""What the peer scripts share: options, the no-op job with its clock, the safety check, the one JSON line.

Promises: a peer touches a server only if `harness.BenchServer` marked it as private and nothing else lies there;
nothing here ever deletes data; a run in which a job or a result is missing ends with an error, never with a number.

A drain is timed inside the worker, from the first call of the job to the last, so start-up is left out: N calls
span N - 1 whole cycles of fetch, run, store, acknowledge.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import redis

# Set by harness.BenchServer in each fresh private server (the same literal stands there).
MARKER = b"torchrelay:bench:private"


class Clock:
    """Notes when the first and the last of `jobs` calls ran, then calls `on_last` once."""

    def __init__(self) -> None:
        self.jobs = 0
        self.calls = 0
        self.returns_size = True
        self.first_s = 0.0
        self.last_s = 0.0
        self.on_last: Callable[[], object] | None = None

    def arm(self, jobs: int, returns_size: bool, on_last: Callable[[], object] | None = None) -> None:
        """Expect `jobs` calls; `returns_size` says whether the job returns a value or None."""
        self.jobs, self.returns_size, self.on_last = jobs, returns_size, on_last

    def tick(self) -> None:
        """Count one call."""
        self.calls += 1
        if self.calls == 1:
            self.first_s = time.perf_counter()
        if self.calls == self.jobs:
            self.last_s = time.perf_counter()
            if self.on_last is not None:
                self.on_last()


CLOCK = Clock()


def noop(payload: str) -> int | None:
    """The job: nothing but its own count; returns the payload's length when results are kept."""
    CLOCK.tick()
    return len(payload) if CLOCK.returns_size else None


def parse(peer: str) -> argparse.Namespace:
    """The options all peers share, and checks that the server is a fresh private one."""
    parser = argparse.ArgumentParser(description=f"{peer} as a benchmark peer")
    parser.add_argument("mode", choices=("drain", "enqueue"))
    parser.add_argument("--url", required=True, help="unix:///path.sock or redis://host:port/db, a BenchServer's")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--size", type=int, default=100, help="bytes of each job's argument")
    parser.add_argument("--batch", type=int, default=256, help="jobs per bulk call, where the peer has one")
    parser.add_argument("--no-results", dest="results", action="store_false", help="store no results")
    parser.add_argument("--threads", type=int, default=None, help="dramatiq: worker threads; arq: max_jobs")
    args = parser.parse_args()
    if args.jobs < 2:
        parser.error("--jobs must be 2 or more")
    require_private(args.url)
    return args


def require_private(url: str) -> None:
    """Exit unless the server holds the benchmark's marker and nothing else."""
    with redis.Redis.from_url(url) as client:
        if not client.exists(MARKER):
            sys.exit(f"refused: {url} is not a private benchmark server; start one with harness.BenchServer")
        if (keys := client.dbsize()) != 1:
            sys.exit(f"refused: {url} holds {keys - 1} keys already; call BenchServer.restart_clean() first")


def payload(size: int) -> str:
    """An argument of `size` ASCII characters: text, because celery and dramatiq encode as JSON."""
    return "x" * size


def timed_batches(jobs: int, batch: int, send: Callable[[int], object]) -> float:
    """Seconds for `jobs` jobs sent through `send(count)`, at most `batch` at a time.

    One batch goes first untimed, so that connections, scripts and imports are ready, as in a running producer.
    """
    send(batch)
    start_s = time.perf_counter()
    for left in range(jobs, 0, -batch):
        send(min(batch, left))
    return time.perf_counter() - start_s


def require_results(url: str, pattern: str, expected: int) -> None:
    """Exit with an error unless exactly `expected` keys match `pattern`, one per stored result."""
    with redis.Redis.from_url(url) as client:
        found = sum(1 for _ in client.scan_iter(match=pattern, count=1000))
    if found != expected:
        sys.exit(f"failed: {found} stored results of {expected} expected")


def report_drain(peer: str, args: argparse.Namespace, config: str) -> None:
    """Print the drain's JSON line from the clock; exit with an error if calls are missing or too many."""
    if CLOCK.calls != args.jobs:
        sys.exit(f"failed: {CLOCK.calls} calls of {args.jobs} jobs")
    report(peer, args, CLOCK.last_s - CLOCK.first_s, args.jobs - 1, config)


def report(peer: str, args: argparse.Namespace, seconds: float, cycles: int, config: str) -> None:
    """Print one JSON line; `per_s` is `cycles / seconds`."""
    line: dict[str, Any] = {
        "peer": peer,
        "version": importlib.metadata.version(peer),
        "mode": args.mode,
        "jobs": args.jobs,
        "seconds": round(seconds, 6),
        "per_s": round(cycles / seconds, 1),
        "results": args.results,
        "config": config,
    }
    print(json.dumps(line), flush=True)
