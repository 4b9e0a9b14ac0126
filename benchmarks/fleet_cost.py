"""What it costs that somebody decides: throughput while nothing changes, and the coordinator's own work.

Two stages that sleep alike, ten slots. Ours is a coordinator with agents, scaling on; the alternative is five workers
of each stage and nobody who decides, under the same demand, in turns. Then a coordinator of a hundred workers on ten
hosts, whose heartbeats come from this process, with jobs that come all the time. Prints ratio lines (name, ours,
alternative, ratio): jobs per second, and the coordinator's percent of a processor against five.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.fleet_ends import (
    SLOTS,
    Demand,
    coordinator,
    cpu_s,
    fixed,
    scaled,
    serving,
    wait_for,
    workplace,
    write_pipeline,
)
from benchmarks.harness import BenchServer, interleave, parse, parser, ratio_line
from torchrelay import Relay
from torchrelay.config.fleet import HostReport
from torchrelay.queues.fleet import FleetRecords
from torchrelay.queues.registry import WorkerReport
from torchrelay.testing.serving import fresh_namespace

EVEN = {"first": (0.1, 0.1), "second": (0.1, 0.1)}
SETTLE_S, ALLOWED_PERCENT = 20.0, 5.0
IN_FLIGHT, WORKERS, HOSTS, BEAT_S = 160, 100, 10, 2.0


def steady(url: str, path: Path, seconds: float, *, decided: bool) -> float:
    """Jobs per second once all has settled."""
    namespace = fresh_namespace()
    half = {"first": SLOTS // 2, "second": SLOTS // 2}
    with Relay(url, namespace=namespace) as relay:
        relay.register(path)
        records = FleetRecords(relay.registry.client, relay.registry.control)
        with scaled(url, namespace, path) if decided else fixed(url, namespace, path, half):
            wait_for(lambda: len(serving(relay)) == 2, "a worker of each stage")
            with Demand(relay, IN_FLIGHT) as demand:
                wait_for(lambda: serving(relay).total() == SLOTS, "workers on all slots")
                time.sleep(SETTLE_S)
                before, began = records.view().desired, time.monotonic()
                time.sleep(seconds)
                rate, after = demand.rate(began, began + seconds), records.view().desired
                workers = serving(relay)
    changes = sum(before[host].number != after[host].number for host in after if host in before)
    print(
        f"# {'decided' if decided else 'fixed'}: {rate:.1f} jobs/s, {workers['first']}+{workers['second']}, "
        f"{changes} hosts given other workers meanwhile",
        flush=True,
    )
    return rate


def beat(relay: Relay, records: FleetRecords, ref: str, turn: int) -> int:
    """What ten hosts and their workers say every two seconds; how many workers these are."""
    found = 0
    for number in range(HOSTS):
        name = f"h{number}"
        report = HostReport(name, f"x{number}", 1, 16.0, 2**37, 2**36, refs=(ref,), applied=turn)
        heard = records.beat(report).desired
        for one in () if heard is None else heard.workers:
            found += 1
            done = 20 * turn
            relay.registry.beat(
                WorkerReport(
                    worker=one.id, host=name, pid=1, node=f"{ref}/{one.stage}", device="cpu", state="ready",
                    started_at=1.0, jobs=done, rows=done, batches=done, busy_s=0.1 * done,
                    service=[0] * 9 + [done], fills=[0, done], assignment=one.id, sent_at=time.time(),
                )
            )  # fmt: skip
    return found


def share_of_core(url: str, path: Path, seconds: float) -> float:
    """Percent of a processor that a coordinator of a hundred workers takes."""
    namespace = fresh_namespace()
    with Relay(url, namespace=namespace) as relay, coordinator(url, namespace, path.parent) as pid:
        ref = relay.register(path)
        records = FleetRecords(relay.registry.client, relay.registry.control)
        for stage in ("first", "second"):
            records.wish_scale(f"shift/{stage}", WORKERS // 2)
        turn, began, spent, ends = 0, 0.0, 0.0, float("inf")
        while time.monotonic() < ends:
            due = time.monotonic() + BEAT_S
            turn += 1
            workers = beat(relay, records, ref, turn)
            relay.submit_many("shift", [{"n": i} for i in range(turn % 7)])
            if workers == WORKERS and not spent:
                began, spent = time.monotonic(), cpu_s(pid)
                ends = began + seconds
            time.sleep(max(due - time.monotonic(), 0.0))
        return 100.0 * (cpu_s(pid) - spent) / (time.monotonic() - began)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--seconds", type=float, default=30.0, help="that are measured in each case")
    options = parse(made)
    with BenchServer() as server, workplace() as folder:
        path = write_pipeline(folder, EVEN, folder / "never")
        cases = {
            name: lambda decided=decided: steady(server.url, path, options.seconds, decided=decided)
            for name, decided in (("ours", True), ("fixed", False))
        }
        rates = interleave(cases, options.rounds)
        percents = [share_of_core(server.url, path, options.seconds) for _ in range(options.rounds)]
    ratio_line("fleet.steady.jobs_per_s/fixed", rates["ours"], rates["fixed"])
    ratio_line(f"fleet.coordinator.percent_of_core_at_{WORKERS}_workers/allowed", percents, ALLOWED_PERCENT)


if __name__ == "__main__":
    main()
