"""Arrays from one process to another of the same host: shared memory, a Redis blob, Ray's object store, plain memcpy.

A hand-off here is all that the product does for one: the message, its place, submit, claim, reading each page, commit
and release, one array a job, one or eight jobs per claim, a few windows under way. memcpy copies the same hot array
into private buffers, as many as there are blocks under way, and reads nothing. In turns on one private server; GB/s are
10^9 bytes a second. Prints ratio lines (name, ours, alternative, ratio), then a table with the microseconds of one
hand-off.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.handoff_ends import Joint, Order, Sender, receive
from benchmarks.harness import RAY_PYTHON, BenchServer, interleave, parse, parser, peer_lines, ratio_line
from benchmarks.transport import BareLane
from torchrelay.queues.arena.home import ArenaHome

MIB = 1 << 20
SIZES_BYTES = {"0.15MiB": int(0.15 * MIB), "1MiB": MIB, "9.6MiB": int(9.6 * MIB), "38MiB": 38 * MIB}
WINDOWS = (1, 8)
# Bytes that one measurement moves, about, in so many windows at least and jobs at most, after those that warm up.
ROUND_BYTES = {"arena": 4 << 30, "memcpy": 4 << 30, "ray": 1 << 30, "redis": 256 << 20}
MIN_WINDOWS, MAX_JOBS = 6, 8192
ARENA_BYTES = 4 << 30
RAY_STORE_BYTES = 4 << 30


def order_of(road: str, nbytes: int, window: int, ahead: int, quick: bool) -> Order:
    """How many arrays this measurement takes."""
    share = 8 if quick else 1
    timed = max(MIN_WINDOWS, min(ROUND_BYTES[road] // nbytes, MAX_JOBS) // share // window)
    warm = ahead + 2
    until = warm + timed
    return Order(road, nbytes, window, ahead, warm * window, until * window, (until + ahead) * window)


def gb_per_s(order: Order, seconds: float) -> float:
    """10^9 bytes a second over what was timed."""
    return order.nbytes * (order.until - order.warm) / seconds / 1e9


class Pair:
    """A sender here and a receiver in a process of its own."""

    def __init__(self, joint: Joint) -> None:
        context = multiprocessing.get_context("spawn")
        self._slots = context.Semaphore(0)
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(joint, self._slots, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._sender = Sender(joint, self._slots)

    def run(self, order: Order) -> float:
        """GB/s of one order."""
        for _ in range(order.ahead):
            self._slots.release()
        self._orders.send(order)
        self._sender.run(order)
        seconds: float = self._orders.recv()
        for _ in range(order.ahead):
            self._slots.acquire()
        return gb_per_s(order, seconds)

    def close(self) -> None:
        self._orders.send(None)
        self._process.join()
        self._sender.close()


@contextmanager
def pair_on(server: BenchServer) -> Iterator[Pair]:
    """Both ends on a lane of this server, with an arena in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="trbench-", dir="/dev/shm") as folder:
        lane = BareLane.open(server, Path(folder), nodes=1)
        lane.client.close()
        home = ArenaHome.open(folder, "bench")
        pair = Pair(Joint(server.url, lane.number, f"{lane.ref}/s1", home, ARENA_BYTES))
        try:
            yield pair
        finally:
            pair.close()


def memcpy(order: Order) -> float:
    """GB/s of copying a hot array into as many private buffers as there are blocks under way."""
    source = np.ones(order.nbytes, np.uint8)
    targets = [np.zeros(order.nbytes, np.uint8) for _ in range(order.ahead * order.window)]
    started_s = 0.0
    for number in range(order.until):
        if number == order.warm:
            started_s = time.perf_counter()
        np.copyto(targets[number % len(targets)], source)
    return gb_per_s(order, time.perf_counter() - started_s)


class Ray:
    """Ray's figures: a session measures every size and window, since one takes seconds to start."""

    def __init__(self, server: BenchServer, ahead: int, quick: bool) -> None:
        self._folder = server.sock.parent
        self._ahead = ahead
        self._quick = quick
        self.gb_per_s: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> float:
        """One session; how many cases it measured."""
        sizes = SIZES_BYTES.values()
        orders = [order_of("ray", nbytes, window, self._ahead, self._quick) for nbytes in sizes for window in WINDOWS]
        cases = [f"{o.nbytes}:{o.window}:{o.warm}:{o.until}:{o.jobs}" for o in orders]
        argv = [*cases, "--ahead", str(self._ahead), "--store-bytes", str(RAY_STORE_BYTES)]
        lines = peer_lines("ray", RAY_PYTHON, argv, cwd=self._folder)
        names = [case_name("ray", size, window) for size in SIZES_BYTES for window in WINDOWS]
        for name, line in zip(names, lines, strict=True):
            self.gb_per_s[name].append(float(line["gb_per_s"]))
        return len(lines)


def case_name(road: str, size: str, window: int) -> str:
    """How a case is called in lines and tables."""
    return f"{road}{window}.{size}"


def measure(rounds: int, ahead: int, quick: bool) -> dict[str, list[float]]:
    """GB/s of every case, by name."""
    with BenchServer() as server, pair_on(server) as pair:
        cases: dict[str, Callable[[], float]] = {}
        for size, nbytes in SIZES_BYTES.items():
            for window in WINDOWS:
                for road, run in (("arena", pair.run), ("redis", pair.run), ("memcpy", memcpy)):
                    cases[case_name(road, size, window)] = partial(run, order_of(road, nbytes, window, ahead, quick))
        ray = Ray(server, ahead, quick)
        values = interleave({**cases, "ray": ray}, rounds)
        values.pop("ray")
        return {**values, **ray.gb_per_s}


def report(values: dict[str, list[float]]) -> None:
    """Ratio lines, then the table of medians."""
    for window in WINDOWS:
        for size in SIZES_BYTES:
            ours = values[case_name("arena", size, window)]
            for other in ("redis", "ray", "memcpy"):
                theirs = values.get(case_name(other, size, window), [])
                ratio_line(f"handoff.arena{window}/{other}{window}.{size}", ours, theirs)
    print("# GB/s (us per hand-off), medians; the number after a name is the jobs per claim")
    for window in WINDOWS:
        for road in ROUND_BYTES:
            cells = []
            for size, nbytes in SIZES_BYTES.items():
                found = values.get(case_name(road, size, window))
                rate = statistics.median(found) if found else 0.0
                cells.append(f"{size} {rate:.3g} ({nbytes / rate / 1e3:.0f})" if rate else f"{size} not-measured")
            print(f"# {road}{window}: " + "  ".join(cells))


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--ahead", type=int, default=4, help="windows under way (default 4)")
    options = parse(made)
    report(measure(options.rounds, options.ahead, options.quick))


if __name__ == "__main__":
    main()
