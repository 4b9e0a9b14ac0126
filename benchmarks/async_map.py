"""`AsyncRelay.map` over tiny rows, against `submit_many` and all results of the synchronous client, in turns.

Both with the same real worker and a no-op stage, from rows in memory to results in memory. Prints ratio lines.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import BenchServer, interleave, parse, parser, ratio_line
from benchmarks.transport import write_pipeline
from torchrelay import AsyncRelay, Pipeline, Relay
from torchrelay.up import Fleet

Rows = list[dict[str, bytes]]


def many(url: str, name: str, rows: Rows) -> int:
    """All at once, then every result."""
    with Relay(url, namespace="bench") as relay:
        return len([future.result() for future in relay.submit_many(name, rows)])


def mapped(url: str, name: str, rows: Rows, in_flight: int) -> int:
    """The synchronous client's map."""
    with Relay(url, namespace="bench") as relay:
        return len(list(relay.map(name, rows, in_flight=in_flight)))


def async_mapped(url: str, name: str, rows: Rows, in_flight: int) -> int:
    """The asynchronous client's map."""

    async def run() -> int:
        async with AsyncRelay(url, namespace="bench") as relay:
            return len([result async for result in relay.map(name, rows, in_flight=in_flight)])

    return asyncio.run(run())


def case(server: BenchServer, folder: Path, rows: Rows, through: Callable[[str, str, Rows], int]) -> float:
    """Rows per second through a worker that is ready when the clock starts; warmed up with a batch."""
    server.restart_clean()
    pipeline = Pipeline.load(write_pipeline(folder, 1))
    fleet = Fleet(server.url, "bench")
    fleet.add(pipeline)
    with fleet:
        through(server.url, pipeline.name, rows[:256])
        started = time.perf_counter()
        done = through(server.url, pipeline.name, rows)
        seconds = time.perf_counter() - started
    if done != len(rows):
        raise SystemExit(f"{done} results of {len(rows)} rows came")
    return len(rows) / seconds


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--size", type=int, default=100, help="bytes of a row")
    options_parser.add_argument("--in-flight", type=int, default=4096, help="jobs that a map keeps under way")
    options = parse(options_parser)
    rows = [{"data": bytes([i % 256]) * options.size} for i in range(10_000 if options.quick else 50_000)]
    flight = options.in_flight
    with BenchServer() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = {
            "many": lambda: case(server, folder, rows, many),
            "async": lambda: case(server, folder, rows, lambda *a: async_mapped(*a, flight)),
            "async256": lambda: case(server, folder, rows, lambda *a: async_mapped(*a, 256)),
            "sync": lambda: case(server, folder, rows, lambda *a: mapped(*a, flight)),
        }
        rates = interleave(cases, options.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio_line(f"async_map.in_flight_{flight}/submit_many+results", medians["async"], medians["many"])
    ratio_line("async_map.in_flight_256/submit_many+results", medians["async256"], medians["many"])
    ratio_line(f"sync_map.in_flight_{flight}/submit_many+results", medians["sync"], medians["many"])


if __name__ == "__main__":
    main()
