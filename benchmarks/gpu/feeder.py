"""The producer process of `benchmarks.gpu.efficiency`: table jobs, at most so many under way, results in order.

Commands are single bytes on standard input: `g` starts, `s` stops and waits for what is under way; at its end the
process ends. It prints one JSON line when it is ready, ten a second while results come, and one when it has stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import deque
from typing import Any

from benchmarks.gpu.workloads import Table, Workload
from torchrelay import AsyncRelay

_RESULT_S = 120.0
_SAY_S = 0.1


class Feeder:
    """Sends the pool's jobs, round and round. The sums are over the life of the process; seconds by time.monotonic."""

    def __init__(self, relay: AsyncRelay, pipeline: str, load: Workload, in_flight: int, seed: int) -> None:
        self._relay = relay
        self._pipeline = pipeline
        self._jobs = [(table, load.units_of(table)) for table in load.tables(seed)]
        self._job_rows = load.job_rows
        self._in_flight = in_flight
        self._next = 0
        self._under_way: deque[tuple[asyncio.Task[Table], int]] = deque()
        self._sums = {"jobs": 0, "units": 0, "wait_s": 0.0}
        self._said_at = 0.0

    async def feed(self, stop: asyncio.Event) -> None:
        """Until it is told to stop."""
        while not stop.is_set():
            if len(self._under_way) >= self._in_flight:
                await self._take()
            table, units = self._jobs[self._next % len(self._jobs)]
            self._next += 1
            self._under_way.append((asyncio.create_task(self._infer(table)), units))
        while self._under_way:
            await self._take()
        say(event="stopped")

    async def _infer(self, table: Table) -> Table:
        # A durable copy of gigabytes per second does not fit through Redis.
        future = await self._relay.submit_table(self._pipeline, table, wait_s=_RESULT_S, durable=False)
        return await future

    async def _take(self) -> None:
        task, units = self._under_way.popleft()
        started = time.monotonic()
        result = await task
        now = time.monotonic()
        sizes = {name: len(column) for name, column in result.items()}
        if not sizes or set(sizes.values()) != {self._job_rows}:
            raise SystemExit(f"a job of {self._job_rows} rows came back with {sizes}")
        self._sums["wait_s"] += now - started
        self._sums["jobs"] += 1
        self._sums["units"] += units
        if now - self._said_at >= _SAY_S:
            self._said_at = now
            say(event="progress", at=now, **self._sums)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def obey(args: argparse.Namespace) -> None:
    """Runs until standard input ends."""
    loop, commands = asyncio.get_running_loop(), asyncio.Queue[bytes]()
    loop.add_reader(0, lambda: commands.put_nowait(os.read(0, 1)))
    async with AsyncRelay(args.url, namespace=args.namespace) as relay:
        feeder = Feeder(relay, args.pipeline, Workload.decode(args.workload), args.in_flight, args.seed)
        say(event="ready")
        while await commands.get():
            stop = asyncio.Event()
            feeding = asyncio.create_task(feeder.feed(stop))
            command = asyncio.create_task(commands.get())
            await asyncio.wait([feeding, command], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            await feeding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "namespace", "pipeline", "workload"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    asyncio.run(obey(parser.parse_args()))


if __name__ == "__main__":
    main()
