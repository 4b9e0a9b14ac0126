"""Two stages that sleep, of which the fast one becomes the slow one half way; ten slots on two hosts.

Ours is a coordinator with agents that are given no more than those slots. The alternative is the best fixed allocation
for the new mix, of workers without a coordinator, under the same demand. Prints ratio lines (name, ours, fixed, ratio):
jobs per second from ten seconds after the change on, and seconds after the change until nine tenths of that are reached
and kept, against ten.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path

from benchmarks.fleet_ends import Demand, fixed, scaled, serving, wait_for, workplace, write_pipeline
from benchmarks.harness import BenchServer, parse, parser, ratio_line
from torchrelay import Relay
from torchrelay.queues.fleet import FleetRecords
from torchrelay.testing.serving import fresh_namespace

STAGES = {"first": (0.2, 0.05), "second": (0.05, 0.2)}
BEFORE, AFTER = {"first": 8, "second": 2}, {"first": 2, "second": 8}
IN_FLIGHT, BACK_S, WINDOW_S = 160, 10.0, 3.0


def back_s(demand: Demand, since_s: float, until_s: float, enough: float) -> float:
    """From when on every few seconds had this rate; the whole time where that never was."""
    at = until_s - WINDOW_S
    while at >= since_s and demand.rate(at, at + WINDOW_S) >= enough:
        at -= 0.25
    return at + 0.25 - since_s


def ours(url: str, path: Path, flag: Path, seconds: float, enough: float) -> tuple[float, float]:
    """Jobs per second from ten seconds after the change on, and when `enough` was reached for good."""
    namespace = fresh_namespace()
    with Relay(url, namespace=namespace) as relay, scaled(url, namespace, path):
        relay.register(path)
        records = FleetRecords(relay.registry.client, relay.registry.control)
        wait_for(lambda: len(serving(relay)) == 2, "a worker of each stage")
        with Demand(relay, IN_FLIGHT) as demand:
            wait_for(lambda: serving(relay) == BEFORE, f"workers as for the old mix, not {serving(relay)}")
            time.sleep(seconds / 2)
            flag.touch()
            changed = time.monotonic()
            shown, decided = [], []
            while time.monotonic() < changed + BACK_S + seconds:
                time.sleep(1.0)
                workers = serving(relay)
                shown.append(f"{workers['first']}+{workers['second']}")
                given = Counter(one.stage for state in records.view().desired.values() for one in state.workers)
                decided.append(f"{given['first']}+{given['second']}")
            end = changed + BACK_S + seconds
            print(f"# decided by the second: {' '.join(decided)}", flush=True)
            print(f"# workers by the second: {' '.join(shown)}", flush=True)
            rates = [f"{demand.rate(changed + i, changed + i + 1):.0f}" for i in range(int(BACK_S + seconds))]
            print(f"# jobs by the second: {' '.join(rates)}", flush=True)
            return demand.rate(changed + BACK_S, end), back_s(demand, changed, end, enough)


def alternative(url: str, path: Path, seconds: float) -> float:
    """Jobs per second of the best fixed allocation for the new mix."""
    namespace = fresh_namespace()
    with Relay(url, namespace=namespace) as relay:
        relay.register(path)
        with fixed(url, namespace, path, AFTER):
            wait_for(lambda: serving(relay) == AFTER, "the fixed workers")
            with Demand(relay, IN_FLIGHT) as demand:
                time.sleep(BACK_S)
                began = time.monotonic()
                time.sleep(seconds)
                return demand.rate(began, began + seconds)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--seconds", type=float, default=20.0, help="that are measured in each case")
    made.set_defaults(rounds=3)
    options = parse(made)
    rates: dict[str, list[float]] = {"ours": [], "fixed": []}
    back: list[float] = []
    with BenchServer() as server:
        for _ in range(options.rounds):
            with workplace() as folder:
                flag = folder / "changed"
                path = write_pipeline(folder, STAGES, flag)
                flag.touch()
                rates["fixed"].append(alternative(server.url, path, options.seconds))
                flag.unlink()
                rate, seconds = ours(server.url, path, flag, options.seconds, 0.9 * rates["fixed"][-1])
                rates["ours"].append(rate)
                back.append(seconds)
    ratio_line("fleet.shift.jobs_per_s/best_fixed", rates["ours"], rates["fixed"])
    ratio_line("fleet.shift.back_s/allowed", back, BACK_S)
    print(
        f"# seconds until 90 % of the fixed rate, round by round: {', '.join(f'{s:.1f}' for s in back)}; ideal rate "
        f"{min(AFTER['second'] / STAGES['second'][1], AFTER['first'] / STAGES['first'][1]):.0f}, median "
        f"{statistics.median(rates['ours']):.1f}"
    )


if __name__ == "__main__":
    main()
