"""Columns from one GPU to another of the same host: left on the device, by the host, and by a bare copy of torch.

`device`: the sender copies the column into its device arena, a block of shared memory holds the ticket, the receiver
copies over NVLink into a tensor of its own. `host`: the sender brings the column to pinned memory and from there into
shared memory, whose segments the receiver has pinned. Two processes, four tensors under way, checked for equality;
`torch`: one process, `copy_` between tensors on both GPUs, as many under way. In turns; GB/s are 10^9 bytes a second.
Then the same through the relay: a pipeline whose first GPU stage hands tensors to a second one, one tensor a job,
with `handoff: device` and with `handoff: host`.

Prints ratio lines (name, ours, alternative, ratio). Needs two GPUs; with --device cuda:0 both ends share one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.handoff_ends import Joint, Order, Receiver, send
from benchmarks.harness import BenchServer, interleave, parse, parser, ratio_line
from torchrelay import Pipeline, Relay
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.testing.serving import await_ready
from torchrelay.up import Fleet

MIB = 1 << 20
SIZES_MIB = (16, 64, 128, 192)
RELAY_SIZES_MIB = (16, 64)
SENDER = "cuda:0"
ROUND_BYTES = {"device": 24 << 30, "host": 4 << 30}
MAX_BYTES = 4 << 30


def order_of(road: str, mib: int, options: argparse.Namespace) -> Order:
    """How many tensors this measurement takes."""
    timed = max(ROUND_BYTES[road] // (8 if options.quick else 1) // (mib * MIB), 3 * options.ahead)
    warm = 2 * options.ahead
    return Order(road, mib * MIB, options.ahead, warm, warm + timed)


class Pair:
    """A sender in a process of its own and a receiver here."""

    def __init__(self, joint: Joint) -> None:
        context = multiprocessing.get_context("spawn")
        slots = context.Semaphore(0)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=send, args=(joint, slots, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receiver = Receiver(joint, slots, self._pipe)

    def run(self, order: Order) -> float:
        """GB/s of one order."""
        return self._receiver.run(order)

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        self._receiver.close()


def torch_copy(mib: int, options: argparse.Namespace) -> float:
    """GB/s of torch's own copy between the two devices."""
    order = order_of("device", mib, options)
    sources = [torch.ones(order.nbytes, dtype=torch.uint8, device=SENDER) for _ in range(order.ahead)]
    targets = [torch.zeros(order.nbytes, dtype=torch.uint8, device=options.device) for _ in range(order.ahead)]
    torch.cuda.synchronize(SENDER)
    torch.cuda.synchronize(options.device)
    under_way: deque[torch.cuda.Event] = deque()
    started_s = 0.0
    with torch.cuda.device(options.device):
        for number in range(order.jobs):
            targets[number % order.ahead].copy_(sources[number % order.ahead], non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
            under_way.append(event)
            if len(under_way) >= order.ahead:
                under_way.popleft().synchronize()
            if number == order.warm - 1:
                started_s = time.perf_counter()
        torch.cuda.synchronize(options.device)
    return order.nbytes * (order.jobs - order.warm) / (time.perf_counter() - started_s) / 1e9


def pipeline_text(mib: int, handoff: str) -> str:
    """The pipeline file: `make` on one GPU, `use` on the other. JSON is YAML."""
    tensor = {"wide": f"uint8[{mib * MIB}]"}
    stages = [
        {
            "name": "make",
            "use": "benchmarks.gpu.stages:MakeWide",
            "args": {"nbytes": mib * MIB},
            "inputs": ["seed"],
            "outputs": tensor,
            "device": "gpu",
            "handoff": handoff,
            "batch": {"max_rows": 1, "ahead": 4},
        },
        {
            "name": "use",
            "use": "benchmarks.gpu.stages:UseWide",
            "inputs": ["wide"],
            "outputs": {"first": "int64"},
            "device": "gpu",
            "batch": {"max_rows": 1, "ahead": 4},
        },
    ]
    return json.dumps(
        {"pipeline": f"wide-{handoff}", "input": {"seed": "int64"}, "output": ["first"], "stages": stages}
    )


class Relayed:
    """A pipeline on real workers, on both GPUs, for as long as a `with` block lasts."""

    def __init__(self, url: str, mib: int, handoff: str, options: argparse.Namespace) -> None:
        self._url, self._mib, self._handoff, self._options = url, mib, handoff, options
        self._stack = ExitStack()

    def __enter__(self) -> Relayed:
        with ExitStack() as stack:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "pipeline.yaml"
            path.write_text(pipeline_text(self._mib, self._handoff))
            fleet = Fleet(self._url, f"bench-{self._handoff}-{self._mib}")
            pipeline = Pipeline.load(path)
            fleet.add(pipeline, stage="make", device=SENDER)
            fleet.add(pipeline, stage="use", device=self._options.device)
            stack.enter_context(fleet)
            await_ready(fleet, 120.0)
            self._relay = stack.enter_context(Relay(self._url, namespace=fleet.settings.namespace))
            self._stack = stack.pop_all()
        # Long enough for the heartbeats by which the maker knows who reads, and how.
        end = time.monotonic() + 6.0
        while time.monotonic() < end:
            self.measure(8)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def measure(self, jobs: int) -> float:
        """GB/s between the stages while so many jobs go through, 16 of them under way."""
        rows = ({"seed": number % 250} for number in range(jobs))
        started_s = time.perf_counter()
        found = list(self._relay.map(f"wide-{self._handoff}", rows, in_flight=16))
        seconds = time.perf_counter() - started_s
        if [row["first"] for row in found] != [number % 250 for number in range(jobs)]:
            raise SystemExit("the relay's results are not what was sent")
        return jobs * self._mib * MIB / seconds / 1e9

    def moved(self) -> dict[str, int]:
        """Bytes of the maker's columns by where they went."""
        return next(r.moved for r in self._relay.registry.workers() if r.node.endswith("/make"))


@contextmanager
def ends(options: argparse.Namespace) -> Iterator[Pair]:
    """Both ends, with shared memory in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="trbench-", dir="/dev/shm") as folder:
        Path(folder).chmod(0o700)
        pair = Pair(Joint(ArenaHome.open(folder, "bench"), SENDER, options.device, MAX_BYTES))
        try:
            yield pair
        finally:
            pair.close()


def measure_ends(options: argparse.Namespace) -> None:
    with ends(options) as pair:
        cases: dict[str, Callable[[], float]] = {}
        for mib in SIZES_MIB:
            for road in ROUND_BYTES:
                cases[f"{road}.{mib}MiB"] = partial(pair.run, order_of(road, mib, options))
            cases[f"torch.{mib}MiB"] = partial(torch_copy, mib, options)
        values = interleave(cases, options.rounds)
    for mib in SIZES_MIB:
        for other in ("torch", "host"):
            name = f"gpu.handoff.device/{other}.{mib}MiB"
            ratio_line(name, values[f"device.{mib}MiB"], values[f"{other}.{mib}MiB"])
    print("# GB/s, medians")
    for road in (*ROUND_BYTES, "torch"):
        print(f"# {road}: " + "  ".join(f"{m}MiB {statistics.median(values[f'{road}.{m}MiB']):.4g}" for m in SIZES_MIB))


def measure_relay(options: argparse.Namespace) -> None:
    for mib in RELAY_SIZES_MIB:
        with BenchServer() as server, ExitStack() as stack:
            ways = {h: stack.enter_context(Relayed(server.url, mib, h, options)) for h in ("device", "host")}
            jobs = {h: max(ROUND_BYTES[h] // (8 if options.quick else 2) // (mib * MIB), 32) for h in ways}
            values = interleave({h: partial(way.measure, jobs[h]) for h, way in ways.items()}, options.rounds)
            ratio_line(f"gpu.handoff.relay.device/host.{mib}MiB", values["device"], values["host"])
            for handoff, way in ways.items():
                print(f"# {handoff}: " + "  ".join(f"{k} {n >> 20} MiB" for k, n in way.moved().items() if n))


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--ahead", type=int, default=4, help="tensors under way (default 4)")
    made.add_argument("--device", default="cuda:1", help="the receiver's device (default cuda:1)")
    made.add_argument("--only", choices=("ends", "relay"), help="one half of the benchmark")
    options = parse(made)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    if not torch.cuda.is_available() or torch.device(options.device).index >= torch.cuda.device_count():
        raise SystemExit(
            f"torch sees {torch.cuda.device_count()} GPUs, and {options.device} is to receive; see --device"
        )
    torch.cuda.set_device(options.device)
    if options.only != "relay":
        measure_ends(options)
    if options.only != "ends":
        measure_relay(options)


if __name__ == "__main__":
    main()
