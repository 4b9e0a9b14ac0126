"""submit -> result through one no-op stage on an idle system, against the server's PING on the same socket.

Both are preceded by the same idle gap, one after the other, so that sleeping processors and caches weigh on both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import redis

from benchmarks.harness import BenchServer, parse, parser, ratio_line
from benchmarks.transport import write_pipeline
from torchrelay import Pipeline, Relay
from torchrelay.up import Fleet

GAP_S = 0.02


def quantile(values: list[float], q: float) -> float:
    """The value at rank q of the sorted values."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def one_round(relay: Relay, client: redis.Redis, name: str, calls: int) -> tuple[list[float], list[float]]:
    """Seconds of each infer and of each PING, taken in turns."""
    infers, pings = [], []
    for _ in range(calls):
        time.sleep(GAP_S)
        started = time.perf_counter()
        client.ping()
        pings.append(time.perf_counter() - started)
        time.sleep(GAP_S)
        started = time.perf_counter()
        relay.infer(name, {"data": b"x" * 100})
        infers.append(time.perf_counter() - started)
    return infers, pings


def main() -> None:
    options = parse(parser(__doc__ or ""))
    calls = 100 if options.quick else 400
    p50: list[tuple[float, float]] = []
    p99: list[tuple[float, float]] = []
    with BenchServer() as server, tempfile.TemporaryDirectory() as name:
        pipeline = Pipeline.load(write_pipeline(Path(name), 1))
        fleet = Fleet(server.url, "bench")
        fleet.add(pipeline)
        client = server.client()
        with fleet, Relay(server.url, namespace="bench") as relay:
            relay.registry.wait_served(pipeline, 30.0)
            one_round(relay, client, pipeline.name, 20)
            for _ in range(options.rounds):
                infers, pings = one_round(relay, client, pipeline.name, calls)
                p50.append((quantile(infers, 0.5), quantile(pings, 0.5)))
                p99.append((quantile(infers, 0.99), quantile(pings, 0.99)))
    for label, pairs in (("p50", p50), ("p99", p99)):
        ours = [1e6 * a for a, _ in pairs]
        ping = [1e6 * b for _, b in pairs]
        ratio_line(f"latency.{label}_us/ping", ours, ping)
    # The p99 of a few hundred calls on a shared machine is mostly the machine: PING's own p50 is the steadier measure.
    ratio_line("latency.p99_us/ping_p50", [1e6 * a for a, _ in p99], [1e6 * b for _, b in p50])
    print(f"rounds {len(p50)} of {calls} calls; spread of p50 {statistics.pstdev([1e6 * a for a, _ in p50]):.0f} us")


if __name__ == "__main__":
    main()
