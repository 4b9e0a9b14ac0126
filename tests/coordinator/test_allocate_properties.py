"""Allocations of drawn fleets, judged from outside: never too much, nobody refused without need, nobody moved."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.coordinator.strategies import Ledger, busy, hosts, numbered, stages, strangers
from torchrelay.config.fleet import CPU, Assignment, HostReport
from torchrelay.coordinator.allocate import Allocation, Unit, allocate

counts = st.lists(st.integers(0, 4), min_size=5, max_size=5)
many = settings(max_examples=100)


def _units(kinds: list[Unit], wanted: list[int]) -> list[Unit]:
    return numbered(kinds, wanted[: len(kinds)])


def _judge(fleet: list[HostReport], wanted: list[Unit], before: list[Assignment], found: Allocation) -> None:
    ledger = Ledger(fleet, found.assignments)
    by_stage = {(u.ref, u.stage): u for u in wanted}
    assert ledger.oversubscribed() == []
    shape = Counter((u.ref, u.stage, u.shard, u.shards) for u in wanted)
    shape.subtract((a.ref, a.stage, a.shard, a.shards) for a in found.assignments)
    shape.subtract((r.unit.ref, r.unit.stage, r.unit.shard, r.unit.shards) for r in found.refused)
    assert set(shape.values()) <= {0}
    ids = [a.id for a in found.assignments]
    assert len(set(ids)) == len(ids)
    dropped = {d.assignment.id for d in found.dropped}
    assert {a.id for a in before} == dropped | (set(ids) & {a.id for a in before})
    assert not dropped & set(ids)
    for one in found.assignments:
        unit, report = by_stage[one.ref, one.stage], ledger.reports[one.host]
        assert ledger.allowed(unit, report, one.slot), one
        assert one.why
        others = [a for a in found.assignments if a is not one and (not one.group or a.group != one.group)]
        assert not Ledger(fleet, others).apart(unit, wanted, report), one
    _judge_groups(found, by_stage)


def _judge_groups(found: Allocation, by_stage: dict[tuple[str, str], Unit]) -> None:
    groups: dict[str, list[Assignment]] = {}
    for one in found.assignments:
        assert (one.shards > 1) == bool(one.group)
        if one.group:
            groups.setdefault(one.group, []).append(one)
    for members in groups.values():
        assert sorted(a.shard for a in members) == list(range(members[0].shards))
        places = [(a.host, a.slot) for a in members if a.slot != CPU]
        assert len(set(places)) == len(places)
        if by_stage[members[0].ref, members[0].stage].one_host:
            assert len({a.host for a in members}) == 1


def _judge_refusals(fleet: list[HostReport], wanted: list[Unit], before: list[Assignment], found: Allocation) -> None:
    """No refused worker fits any slot as things stand in the end, and the named reason is true."""
    ledger = Ledger(fleet, found.assignments)
    for refusal in found.refused:
        unit = refusal.unit
        able = [h for h in fleet if unit.ref in h.refs]
        awake = [h for h in able if not h.draining]
        labelled = [h for h in awake if set(unit.labels) <= set(h.labels)]
        slots = [(h, s) for h in labelled for s in h.slots if ledger.allowed(unit, h, s)]
        assert {
            "hosts": not fleet,
            "version": bool(fleet) and not able,
            "draining": bool(able) and not awake,
            "labels": bool(awake) and not labelled,
            "device": bool(labelled) and not slots and unit.device == "gpu",
            "trouble": bool(labelled) and not slots,
            "apart": bool(slots) and all(ledger.apart(unit, wanted, h) for h, _ in slots),
        }.get(refusal.what, bool(slots)), refusal
        if unit.shards > 1:
            continue
        for report, slot in slots:
            used, used_host = strangers(report, before)
            assert ledger.apart(unit, wanted, report) or not ledger.fits(unit, report, slot, used, used_host), refusal
        if refusal.what in ("compute", "memory", "cpus", "host_memory"):
            assert refusal.missing > 0


@many
@given(hosts(), stages(), counts)
def test_from_nothing_everything_holds(fleet: list[HostReport], kinds: list[Unit], wanted: list[int]) -> None:
    """Nothing is oversubscribed; each unit is placed where it may be, or refused for a reason that is true."""
    units = _units(kinds, wanted)
    found = allocate(fleet, units, [])
    _judge(fleet, units, [], found)
    _judge_refusals(fleet, units, [], found)


@many
@given(hosts(), stages(), counts, counts, st.data())
def test_from_what_runs_everything_holds(
    fleet: list[HostReport], kinds: list[Unit], first: list[int], second: list[int], data: st.DataObject
) -> None:
    """The same after the fleet changed and other numbers are wanted."""
    before = list(allocate(fleet, _units(kinds, first), []).assignments)
    changed = [
        replace(h, draining=data.draw(st.booleans()), cpus=data.draw(st.sampled_from([h.cpus, 1.0])))
        for h in busy(fleet, before)
        if data.draw(st.integers(0, 3))
    ]
    units = _units(kinds, second)
    found = allocate(changed, units, before, stamp="2")
    _judge(changed, units, before, found)
    _judge_refusals(changed, units, before, found)


@many
@given(hosts(), stages(), counts)
def test_nothing_changes_when_nothing_changed(fleet: list[HostReport], kinds: list[Unit], wanted: list[int]) -> None:
    """What was placed is given back as it was, and nothing is dropped; whoever was refused still is."""
    units = _units(kinds, wanted)
    once = allocate(fleet, units, [])
    again = allocate(busy(fleet, once.assignments), units, once.assignments, stamp="later")
    assert again.assignments == once.assignments
    assert again.dropped == ()
    assert [r.unit for r in again.refused] == [r.unit for r in once.refused]


@many
@given(hosts(), stages(), counts, counts)
def test_what_runs_moves_only_so_that_more_have_a_place(
    fleet: list[HostReport], kinds: list[Unit], first: list[int], more: list[int]
) -> None:
    """When only more is wanted, nothing ends but what made room for another, or gets all that is presumed elsewhere."""
    before = allocate(fleet, _units(kinds, first), [])
    units = _units(kinds, [a + b for a, b in zip(first, more, strict=True)])
    found = allocate(busy(fleet, before.assignments), units, before.assignments, stamp="2")
    assert all(d.why.startswith("moved") for d in found.dropped)
    assert len(found.assignments) >= len(before.assignments)
    for gone in found.dropped:
        mine = [a for a in found.assignments if (a.ref, a.stage) == (gone.assignment.ref, gone.assignment.stage)]
        assert any(a.why.startswith("moved") for a in mine)


@many
@given(hosts(), stages(), counts, st.integers(0, 2**32))
def test_the_order_of_what_is_given_does_not_matter(
    fleet: list[HostReport], kinds: list[Unit], wanted: list[int], seed: int
) -> None:
    """Hosts, units and assignments in any order give the same."""
    units = _units(kinds, wanted)
    once = allocate(fleet, units, [])
    running = list(once.assignments)[::2]
    shuffled = [list(values) for values in (fleet, units, running)]
    for values in shuffled:
        random.Random(seed).shuffle(values)
    mixed = shuffled[0], shuffled[1], shuffled[2]
    assert allocate(fleet, units, running) == allocate(*mixed)


@many
@given(hosts(), stages(), counts, counts)
def test_fewer_wanted_ends_as_many(
    fleet: list[HostReport], kinds: list[Unit], first: list[int], less: list[int]
) -> None:
    """What is left runs where it ran, and as many ended as are wanted no more."""
    before = allocate(fleet, _units(kinds, first), [])
    wanted = [max(0, a - b) for a, b in zip(first, less, strict=True)]
    units = _units(kinds, wanted)
    found = allocate(busy(fleet, before.assignments), units, before.assignments)
    for kind in kinds:
        key = (kind.ref, kind.stage)
        had = sum((a.ref, a.stage) == key for a in before.assignments)
        has = sum((a.ref, a.stage) == key for a in found.assignments)
        assert has >= min(had, sum((u.ref, u.stage) == key for u in units))
    ended = [d for d in found.dropped if not d.why.startswith("moved")]
    assert all("wanted" in d.why for d in ended)
