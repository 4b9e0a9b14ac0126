"""Simulates scaling: our rule against a fixed plan and a queue-length rule, on traces as InferLine's are made.

    python -m benchmarks.scale_sim                                        60 workers, five pipelines of 2-5 stages
    python -m benchmarks.scale_sim --workers 600 --hosts 128 --seeds 1    up to 1,024 workers

Our rule is the very code that a coordinator runs: `coordinator.loads.LoadTracker` and `coordinator.scale.decide`. All
rules see the same arrivals, heartbeats every 2 s, counters with 3 % of noise, workers that take seconds to a minute to
load, and the same slots.

    fixed mean, fixed peak    sized for the trace's mean and highest rate, at 80 % of a worker's time
    fixed, same cost          as many slots as ours used on average, shared by the stages' need
    queue N/60s               replicas = ceil(rows waiting and running / (N batches)), as KEDA does on a list's length:
                              10 % tolerance; fewer only when the highest of the last 60 s (or 300 s, HPA's default)
                              says so; its maximum is the plan for the highest rate, which nobody else is told

A *miss* is a row that waits at a stage longer than its class may: 500 ms high (a fifth of the rows), 2 s the others.
Slot-seconds count from a worker's start, loading and draining included. Lines: `name ours alternative ratio`.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.harness import ratio_line
from benchmarks.scale_world import DELAYS_S, REF, STEP_S, Floats, Result, Rule, StageShape, View, simulate
from torchrelay.config.fleet import Assignment, Gpu, HostReport, Need
from torchrelay.coordinator.allocate import Unit, allocate
from torchrelay.coordinator.loads import LoadTracker
from torchrelay.coordinator.scale import Limits, State, decide
from torchrelay.coordinator.sharing import slots as slots_of

TRACES = ("steady", "step", "burst", "diurnal", "mix")
RULES = ("fixed", "queue")
FIXED = ("fixed mean", "fixed peak", "fixed, same cost")
QUEUE_RULES = [(1.0, 300.0), (4.0, 300.0), (16.0, 300.0), (64.0, 300.0), (16.0, 60.0)]
_BUSY = 0.8


@dataclass(frozen=True)
class Scenario:
    """A pipeline, its rates by step, and how many slots there are."""

    trace: str
    seed: int
    shapes: tuple[StageShape, ...]
    rates: Floats
    slots: int
    hosts: int = 0
    every_s: float = 2.0

    def need(self, rate: float, at_s: float = 0.0) -> dict[str, float]:
        """Workers per stage that this rate keeps busy all the time."""
        return {s.name: rate * s.seconds_per_row(at_s) for s in self.shapes}

    def plan(self, rate: float) -> dict[str, int]:
        """Workers for this rate, for the dearest of what each stage costs over the trace's first and second half."""
        end_s = len(self.rates) * STEP_S
        halves = (self.need(rate), self.need(rate, end_s))
        mean = {n: (halves[0][n] + halves[1][n]) / 2.0 for n in halves[0]}
        return {n: max(math.ceil(v / _BUSY - 1e-9), 1) for n, v in mean.items()}


def scenario(trace: str, seed: int, workers: float, seconds: float, hosts: int = 0) -> Scenario:
    """A pipeline drawn by the seed whose mean need is about `workers`, and the trace. With `hosts`, of 8 GPUs each,
    what is decided is also placed on them."""
    rng = np.random.default_rng([seed, 7])
    count = int(rng.integers(2, 6))
    shapes = []
    for i in range(count):
        max_rows = int(2 ** rng.integers(2, 6))
        batch_s = float(np.exp(rng.uniform(math.log(0.05), math.log(0.4))))
        fixed = float(rng.uniform(0.1, 0.5))
        tail = None if rng.random() < 0.5 else float(rng.uniform(2.1, 3.0))
        load_s = float(np.exp(rng.uniform(math.log(3.0), math.log(60.0))))
        row_s = batch_s * (1.0 - fixed) / max_rows
        shapes.append(StageShape(f"s{i}", max_rows, fixed * batch_s, row_s, float(rng.uniform(0.3, 0.9)), tail, load_s))
    total = sum(s.seconds_per_row() for s in shapes)
    rates = workers / total * _shape_of(trace, int(seconds / STEP_S), rng)
    slots = 8 * hosts or math.ceil(4.0 * workers)
    if trace == "mix":
        # The dearest stage becomes cheap, and the cheapest dear, while slots are scarce.
        order = sorted(range(count), key=lambda i: shapes[i].seconds_per_row())
        a, b = shapes[order[0]], shapes[order[-1]]
        swap = b.seconds_per_row() / a.seconds_per_row()
        shapes[order[0]] = replace(a, slower=min(swap, 4.0), slower_at_s=seconds / 2)
        shapes[order[-1]] = replace(b, slower=max(1.0 / swap, 0.25), slower_at_s=seconds / 2)
        ends = [sum(s.seconds_per_row(t) for s in shapes) for t in (0.0, seconds)]
        rates = rates * total / max(ends)
        slots = 8 * hosts or math.ceil(1.25 * workers) + count
    return Scenario(trace, seed, tuple(shapes), rates, slots, hosts)


def _shape_of(trace: str, steps: int, rng: np.random.Generator) -> Floats:
    """Rates of mean about 1."""
    x = np.arange(steps) / steps
    if trace in ("steady", "mix"):
        return np.ones(steps)
    if trace == "step":
        return np.select([x < 1 / 3, x < 2 / 3], [0.6, 1.6], 0.8)
    if trace == "diurnal":
        return 1.0 + 0.7 * np.sin(2.0 * np.pi * (x - 0.2))
    rates = np.full(steps, 0.75)
    for start in rng.uniform(0.05, 0.9, 4):
        length = rng.uniform(0.03, 0.08)
        rates[(x >= start) & (x < start + length)] = rng.uniform(1.5, 2.5)
    return rates


def our_rule(case: Scenario, begin: Mapping[str, int]) -> Rule:
    """What a coordinator does: track, decide, within the slots."""
    tracker, state = LoadTracker(), State.of({(REF, name): n for name, n in begin.items()}, 0.0)
    names = [s.name for s in case.shapes]
    delays = {name: 1000.0 * s for name, s in DELAYS_S.items()}
    limits = [
        Limits(REF, name, (name,), tuple(names[max(i - 1, 0) : i]), 1, case.slots, "gpu", delay_ms=delays)
        for i, name in enumerate(names)
    ]
    fits = slots_of({"gpu": case.slots}, {one.key: ("gpu", 1.0) for one in limits})

    def rule(view: View) -> Mapping[str, int]:
        nonlocal state
        loads = tracker.update(view.at_s, view.reports, view.counters, view.ready)
        plan, state = decide(loads, limits, fits, state)
        counts = {stage: count for (_, stage), count in plan.replicas.items()}
        return counts if place is None else place(counts)

    place = _placing(case) if case.hosts else None
    return rule


def _placing(case: Scenario) -> Callable[[Mapping[str, int]], dict[str, int]]:
    """What the allocator finds a place for."""
    gib, names = 1 << 30, [s.name for s in case.shapes]
    gpus = tuple(Gpu(i, f"gpu-{i}", "gpu", 80 * gib, 80 * gib) for i in range(8))
    hosts = [
        HostReport(f"h{i:03}", "1", 1, 64.0, 512 * gib, 512 * gib, gpus=gpus, refs=(REF,)) for i in range(case.hosts)
    ]
    before = [tuple(names[max(i - 1, 0) : i]) for i in range(len(names))]
    current: tuple[Assignment, ...] = ()
    asked: Mapping[str, int] = {}

    def place(counts: Mapping[str, int]) -> dict[str, int]:
        nonlocal current, asked
        if counts != asked:
            units = [
                Unit(REF, name, number, need=Need(compute=1.0), device="gpu", neighbours=before[i])
                for i, name in enumerate(names)
                for number in range(counts[name])
            ]
            current, asked = allocate(hosts, units, current).assignments, dict(counts)
        return {name: sum(1 for one in current if one.stage == name) for name in names}

    return place


def queue_rule(case: Scenario, batches: float, keep_s: float) -> Rule:
    """ceil(rows waiting and running / (max_rows * batches)); 10 % tolerance; the highest of `keep_s` counts.
    Never more than the trace's highest rate needs."""
    most = case.plan(float(case.rates.max()))
    history: dict[str, list[tuple[float, int]]] = {s.name: [] for s in case.shapes}
    now: dict[str, int] = {}

    def rule(view: View) -> Mapping[str, int]:
        counters = view.counters
        for shape in case.shapes:
            node = f"{REF}/{shape.name}"
            rows = counters[f"{node}.ready_rows"] + counters[f"{node}.held_rows"]
            exact = rows / (shape.max_rows * batches)
            current = now.get(shape.name)
            wanted = min(max(math.ceil(exact), 1), most[shape.name])
            if current and abs(exact / current - 1.0) <= 0.1:
                wanted = current
            recent = [(t, n) for t, n in history[shape.name] if t > view.at_s - keep_s] + [(view.at_s, wanted)]
            history[shape.name] = recent
            kept = max(n for _, n in recent)
            now[shape.name] = wanted if current is None or wanted > current else min(current, kept)
        return _squeezed(now, case.slots)

    return rule


def _squeezed(wanted: Mapping[str, int], slots: int) -> dict[str, int]:
    """As many as there are slots, in the proportion that is wanted."""
    total = sum(wanted.values())
    if total <= slots:
        return dict(wanted)
    return spread({n: float(v) for n, v in wanted.items()}, slots)


def spread(need: Mapping[str, float], slots: int) -> dict[str, int]:
    """`slots` in proportion to the need, one for each at least."""
    counts = dict.fromkeys(need, 1)
    for _ in range(slots - len(counts)):
        counts[max(need, key=lambda n: need[n] / counts[n])] += 1
    return counts


def run_case(case: Scenario, rules: Sequence[str] = RULES) -> dict[str, Result]:
    """Ours and the other kinds of `rules` on one scenario."""
    begin = case.plan(float(case.rates[0]))
    begin = _squeezed(begin, case.slots)
    mean, peak = float(case.rates.mean()), float(case.rates.max())

    def go(start: Mapping[str, int], rule: Rule) -> Result:
        return simulate(case.shapes, case.rates, start, rule, slots=case.slots, seed=case.seed, every_s=case.every_s)

    def fixed(plan: Mapping[str, int]) -> Result:
        return go(_squeezed(plan, case.slots), lambda view: None)

    found = {"ours": go(begin, our_rule(case, begin))}
    if "fixed" in rules:
        seconds = len(case.rates) * STEP_S
        need = {n: v + case.need(mean, seconds)[n] for n, v in case.need(mean).items()}
        same = spread(need, max(math.ceil(found["ours"].slot_s / seconds), len(need)))
        found |= {name: fixed(plan) for name, plan in zip(FIXED, (case.plan(mean), case.plan(peak), same), strict=True)}
    for batches, keep_s in QUEUE_RULES if "queue" in rules else ():
        found[f"queue {batches:g}/{keep_s:g}s"] = go(begin, queue_rule(case, batches, keep_s))
    return found


def _run(args: tuple[str, int, float, float, int], rules: Sequence[str]) -> tuple[str, int, dict[str, Result], float]:
    began = time.perf_counter()
    case = scenario(*args)
    return case.trace, case.seed, run_case(case, rules), time.perf_counter() - began


def percent(result: Result) -> float:
    """Misses of 100 rows."""
    return 100.0 * result.missed / max(result.visits, 1)


def best_queue(found: Mapping[str, Result]) -> str:
    """The queue rule's setting with the fewest misses of those that cost no more than ours; '' if all cost more."""
    cheap = [n for n, r in found.items() if n.startswith("queue") and r.slot_s <= found["ours"].slot_s]
    return min(cheap, key=lambda n: (percent(found[n]), found[n].slot_s), default="")


def cheapest_queue(found: Mapping[str, Result]) -> str:
    """The queue rule's cheapest setting of those that miss no more than ours; '' if all miss more."""
    good = [n for n, r in found.items() if n.startswith("queue") and percent(r) <= percent(found["ours"])]
    return min(good, key=lambda n: found[n].slot_s, default="")


def report(trace: str, runs: Sequence[dict[str, Result]]) -> None:
    """The table of one trace, medians over the pipelines, and its ratios."""

    def median(name: str, value: Callable[[Result], float]) -> float:
        return statistics.median(value(found[name]) for found in runs)

    def ratios(label: str, pairs: Sequence[tuple[Result, Result]]) -> None:
        ratio_line(
            f"scale_{trace}_misses_pct_vs_{label}", *zip(*((percent(a), percent(b)) for a, b in pairs), strict=True)
        )
        ratio_line(f"scale_{trace}_slot_s_vs_{label}", *zip(*((a.slot_s, b.slot_s) for a, b in pairs), strict=True))

    print(f"# {trace}: {len(runs)} pipelines; medians: misses in %, slot-seconds (ours = 1), changes; misses of each")
    for name in runs[0]:
        cost = statistics.median(found[name].slot_s / found["ours"].slot_s for found in runs)
        numbers = f"{median(name, percent):8.3f} {cost:6.2f} {median(name, lambda r: r.changes):6.0f}"
        each = " ".join(f"{percent(found[name]):.2f}/{found[name].slot_s / found['ours'].slot_s:.2f}" for found in runs)
        print(f"#   {name:18} {numbers}    {each}", flush=True)
    for name in FIXED:
        if name in runs[0]:
            ratios(name.replace(", ", "_").replace(" ", "_"), [(f["ours"], f[name]) for f in runs])
    for label, choose in (("queue_no_dearer", best_queue), ("queue_no_more_misses", cheapest_queue)):
        pairs = [(f["ours"], f[n]) for f in runs if (n := choose(f))]
        names = [choose(f) or "none" for f in runs]
        print(f"# {label}: {', '.join(names)}")
        if pairs:
            ratios(label, pairs)


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, default=5, help="pipelines per trace (default 5)")
    made.add_argument("--first-seed", type=int, default=1)
    made.add_argument("--workers", type=float, default=60.0, help="workers that the mean rate keeps busy (default 60)")
    made.add_argument("--seconds", type=float, default=1200.0, help="simulated seconds (default 1200)")
    made.add_argument("--hosts", type=int, default=0, help="of 8 GPUs, to place workers on; 0: slots are only counted")
    made.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    made.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES), help="what to compare ours with")
    made.add_argument("--processes", type=int, default=2)
    args: Any = made.parse_args(argv)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(trace, seed, args.workers, args.seconds, args.hosts) for trace in args.traces for seed in seeds]
    with ProcessPoolExecutor(args.processes) as pool:
        done = list(pool.map(functools.partial(_run, rules=args.rules), jobs))
    for trace in args.traces:
        report(trace, [found for name, _, found, _ in done if name == trace])
    print(f"# seeds {seeds[0]} to {seeds[-1]}, {args.workers:g} workers, {args.seconds:g} s")
    print(f"# {sum(s for *_, s in done):.0f} s of computing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
