"""Tracker, decision and allocator together, on a simulated pipeline: what `benchmarks/scale_sim.py` measures."""

from __future__ import annotations

from benchmarks.scale_sim import our_rule, percent, scenario
from benchmarks.scale_world import simulate


def test_a_step_is_followed_within_the_slots_of_the_hosts() -> None:
    """The load rises to more than twice of what there are workers for: they come, within the hosts' 64 GPUs, and far
    fewer rows wait too long than with the plan that fitted before."""
    case = scenario("step", 3, 12.0, 360.0, hosts=8)
    begin = case.plan(float(case.rates[0]))
    ours, fixed = (
        simulate(case.shapes, case.rates, begin, rule, slots=case.slots, seed=case.seed)
        for rule in (our_rule(case, begin), lambda view: None)
    )
    assert ours.peak <= 64
    assert percent(ours) < percent(fixed) / 2
    middle = len(ours.counts) // 2
    assert sum(ours.counts[middle]) > sum(begin.values())
    assert sum(ours.counts[-1]) < sum(ours.counts[middle])
