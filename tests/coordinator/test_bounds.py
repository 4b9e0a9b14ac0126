"""What has no place is not asked for again and again; others get its room, and nobody moves in and out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import redis
from hypothesis import given
from hypothesis import strategies as st

from torchrelay import Relay
from torchrelay.config.fleet import Assignment, HostReport, Need, SlotTrouble
from torchrelay.coordinator.allocate import Allocation, allocate
from torchrelay.coordinator.bounds import HOLD_S, Bounds, agree
from torchrelay.coordinator.service import Coordinator
from torchrelay.coordinator.sharing import Wish, share, slots
from torchrelay.coordinator.units import Unit
from torchrelay.queues.fleet import FleetRecords
from torchrelay.queues.registry import Registry, WorkerReport

GIB = 2**30
REF = "p@1"
HOST = HostReport("a", "x", 1, 8.0, 8 * GIB, 8 * GIB, refs=(REF,))
BIG, SMALL = Need(cpus=1.0, host_memory=3 * GIB), Need(cpus=1.0)
Counts = dict[tuple[str, str], int]


class World:
    """Stages that always want the same, and hosts; one `turn()` is what the leader does each second."""

    def __init__(self, hosts: Sequence[HostReport], wishes: Mapping[str, tuple[int, int, Need]]) -> None:
        self.hosts = list(hosts)
        self.wishes = dict(wishes)
        self.bounds = Bounds()
        self.allocation = Allocation(())
        self.plan: Counts = {}
        self.now_s = 0.0
        self.turns = 0

    def turn(self, seconds: float = 1.0) -> Counts:
        self.now_s += seconds
        self.plan, self.allocation, self.bounds = agree(
            self._propose, self._place, self.bounds.at(self.hosts, self.now_s), self.now_s
        )
        return self.plan

    def _propose(self, most: Mapping[tuple[str, str], int]) -> Counts:
        self.turns += 1
        keys = {(REF, name): (least, wanted) for name, (least, wanted, _) in self.wishes.items()}
        there = slots({"cpu": sum(h.cpus for h in self.hosts)}, {k: ("cpu", self.wishes[k[1]][2].cpus) for k in keys})

        def fits(counts: Mapping[tuple[str, str], int]) -> bool:
            if any(n > max(most.get(k, n), keys[k][0]) for k, n in counts.items()):
                return False
            return there({k: min(n, most.get(k, n)) for k, n in counts.items()})

        return share(
            [Wish(k, low, high, self.plan.get(k, low), 0, float(high)) for k, (low, high) in keys.items()], fits
        )

    def _place(self, plan: Counts) -> Allocation:
        units = [Unit(REF, s, i, need=self.wishes[s][2]) for (_, s), count in plan.items() for i in range(count)]
        return allocate(self.hosts, units, self.allocation.assignments, stamp=str(self.now_s), now=self.now_s)

    @property
    def placed(self) -> Counter[str]:
        return Counter(one.stage for one in self.allocation.assignments)


def test_the_room_that_a_stage_cannot_use_is_others() -> None:
    """Memory for two of `big`: the six other processors go to `small`, at once, and nothing is refused any more."""
    world = World([HOST], {"big": (1, 8, BIG), "small": (1, 8, SMALL)})
    world.turn()
    assert world.placed == {"big": 2, "small": 6}
    assert world.allocation.refused == ()
    assert world.bounds.found[REF, "big"].workers == 2
    assert "of a host's memory" in world.bounds.found[REF, "big"].why


def test_what_must_be_is_wanted_all_the_same_and_takes_no_room() -> None:
    """Four of `big` at least: two of them are refused each time, and `small` has what is left."""
    world = World([HOST], {"big": (4, 8, BIG), "small": (1, 8, SMALL)})
    for _ in range(3):
        assert world.turn() == {(REF, "big"): 4, (REF, "small"): 6}
        assert (world.placed, len(world.allocation.refused)) == ({"big": 2, "small": 6}, 2)


def test_nobody_moves_while_nothing_changes_and_little_is_computed() -> None:
    """For minutes: bounds run out and are found again, and what runs stays what it is."""
    world = World([HOST, replace(HOST, name="b", cpus=5.0)], {"big": (1, 9, BIG), "small": (1, 12, SMALL)})
    world.turn()
    before, world.turns = world.allocation.assignments, 0
    for _ in range(200):
        world.turn()
        assert world.allocation.assignments == before
    assert world.turns < 200 + 200 / HOLD_S * 3


def test_bounds_end_when_a_host_comes_or_another_stage_has_fewer_workers() -> None:
    """Long before their time is over."""
    world = World([HOST], {"big": (1, 8, BIG), "small": (1, 8, SMALL)})
    world.turn()
    world.hosts.append(replace(HOST, name="b"))
    world.turn()
    assert world.placed == {"big": 4, "small": 8}
    world = World([replace(HOST, cpus=5.5)], {"half": (1, 8, Need(cpus=1.5)), "small": (1, 8, SMALL)})
    world.turn()
    half = world.placed["half"]
    world.wishes["small"] = (1, 1, SMALL)
    world.turn()
    world.turn()
    assert world.placed["small"] == 1
    assert world.placed["half"] == 3 > half


def test_what_is_set_aside_is_tried_again_at_once() -> None:
    """The room of `big` goes to `small` meanwhile, and no bound keeps it there."""
    trouble = SlotTrouble("cpu", REF, "big", 1, 2.0, "no")
    world = World([HOST], {"big": (1, 3, SMALL), "small": (1, 12, SMALL)})
    world.turn()
    assert world.placed["big"] > 0
    world.hosts = [replace(HOST, trouble=(trouble,))]
    world.allocation = Allocation(tuple(o for o in world.allocation.assignments if o.stage != "big"))
    world.turn()
    assert world.placed == {"small": 8}
    world.hosts = [HOST]
    assert world.turn() == {(REF, "big"): 2, (REF, "small"): 6}


NEEDS = st.builds(
    Need, cpus=st.sampled_from([0.5, 1.0, 1.5, 2.0]), host_memory=st.sampled_from([0, GIB, 3 * GIB, 9 * GIB])
)
HOSTS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 16)), min_size=1, max_size=3)
WISHES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), NEEDS), min_size=1, max_size=4)


@given(HOSTS, WISHES)
def test_it_settles_and_asks_for_nothing_that_has_no_place(
    hosts: list[tuple[int, int]], wishes: list[tuple[int, int, Need]]
) -> None:
    """Whatever is wanted where: soon nothing changes any more, and only what must be is refused."""
    made = [
        replace(HOST, name=f"h{i}", cpus=float(c), memory=m * GIB, free_memory=m * GIB)
        for i, (c, m) in enumerate(hosts)
    ]
    world = World(made, {f"s{i}": (low, low + more, need) for i, (low, more, need) in enumerate(wishes)})
    for _ in range(4):
        world.turn()
    before = world.allocation.assignments
    for _ in range(50):
        world.turn(1.7)
        assert world.allocation.assignments == before
        for one in world.allocation.refused:
            assert world.plan[REF, one.unit.stage] == world.wishes[one.unit.stage][0]


def beat(registry: Registry, assignments: Sequence[Assignment], turn: int) -> None:
    """Workers that take a second for each row, and have enough of them."""
    for one in assignments:
        registry.beat(
            WorkerReport(
                worker=one.id, host="a", pid=1, node=f"{one.ref}/{one.stage}", device="cpu", state="ready",
                started_at=1.0, jobs=turn, rows=turn, batches=turn, busy_s=float(turn), service=[0] * 9 + [turn],
                fills=[0, turn], assignment=one.id, sent_at=time.time(),
            )
        )  # fmt: skip


def test_the_leader_gives_others_the_room_that_a_stage_cannot_use(
    redis_client: redis.Redis, registry: Registry, relay: Relay, make_pipeline: Callable[..., Path]
) -> None:
    """Two stages with more to do than the host has processors, one of which is short of memory: what is decided stays
    as it is, and the reasons say what is short."""
    text = """
        pipeline: {name}
        stages: [{{name: s, use: "stages.py:f", batch: {{max_rows: 1}}, replicas: {{min: 1, max: 9}}{more}}}]
    """
    code = "def f(batch): return {}"
    big = relay.register(
        make_pipeline(text.format(name="big", more=", resources: {host_memory: 3GiB}"), code, "b.yaml")
    )
    small = relay.register(make_pipeline(text.format(name="small", more=""), code, "s.yaml"))
    records = FleetRecords(redis_client, registry.control)
    made = Coordinator(registry, "one")
    seen: list[Counter[str]] = []
    for turn in range(1, 60):
        for name in ("big", "small"):
            relay.submit_many(name, [{"n": i} for i in range(5)])
        records.beat(replace(HOST, refs=(big, small)))
        state = records.view().desired.get("a")
        beat(registry, () if state is None else state.workers, turn)
        made.poke()
        assert made.step()
        seen.append(Counter(one.ref for one in records.view().desired["a"].workers))
        time.sleep(0.1)
    assert seen[-1] == {big: 2, small: 6}
    settled = seen.index(seen[-1])
    assert seen[settled:] == [seen[-1]] * (len(seen) - settled)
    assert all(one[big] <= 2 for one in seen)
    why = records.view().reasons
    assert "2 have a place: " in why["stages"][f"{big}/s"]
    assert "of a host's memory" in why["stages"][f"{big}/s"]
    assert why["refused"] == []
