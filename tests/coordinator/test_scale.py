"""How many workers each stage gets: within limits and room always, steady under steady load, quick where load moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchrelay.config.pipeline import Pipeline
from torchrelay.coordinator.demand import Coming, demand_of, staff
from torchrelay.coordinator.loads import Loads, NodeLoad, Waiting
from torchrelay.coordinator.scale import Limits, Plan, State, decide, limits_of
from torchrelay.coordinator.sharing import slots

REF = "p@1"
TICK_S = 2.0
ANY = st.floats(allow_nan=True, allow_infinity=True)
BOUNDS = st.tuples(st.integers(0, 5), st.integers(1, 50), st.none() | st.integers(0, 80))


def limits(*names: str, least: int = 1, most: int = 40, **more: Any) -> list[Limits]:
    """Stages in a row."""
    after = [(), *((name,) for name in names)]
    return [Limits(REF, n, (n,), after[i], least, most, "gpu", **more) for i, n in enumerate(names)]


def room(total: float, given_: Sequence[Limits]) -> Callable[[Mapping[tuple[str, str], int]], bool]:
    return slots({"gpu": total}, {one.key: ("gpu", 1.0) for one in given_})


@dataclass
class Fluid:
    """Stages as pipes: rows flow in at `rate`, each worker lets `speed` through, new ones take `load_s`."""

    speeds: dict[str, float]
    rate: float
    load_s: float = 10.0
    noise: float = 0.0
    seed: int = 0
    room: float = 100.0
    most: int = 40
    delay_ms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.limits = limits(*self.speeds, most=self.most, delay_ms=self.delay_ms)
        self.backlog = dict.fromkeys(self.speeds, 0.0)
        self.workers: dict[str, list[float]] = {name: [] for name in self.speeds}
        self.flows = dict.fromkeys(self.speeds, (0.0, 0.0))
        self.at_s = 0.0
        self.state: State | None = None
        self.changes: list[tuple[float, dict[str, int]]] = []

    def begin(self, counts: Mapping[str, int]) -> None:
        self.workers = {name: [-1e9] * count for name, count in counts.items()}
        self.state = State.of({(REF, n): c for n, c in counts.items()}, 0.0)

    def node(self, name: str) -> NodeLoad:
        ready = sum(1 for at in self.workers[name] if at <= self.at_s - self.load_s)
        loading = [self.at_s - at for at in self.workers[name] if at > self.at_s - self.load_s]
        came, done = self.flows[name]
        return NodeLoad(
            REF,
            name,
            ready_rows=int(self.backlog[name] * self._noisy()),
            held_rows=1 if came else 0,
            waiting={"low": Waiting(self.backlog[name])},
            arrivals_per_s=came * self._noisy(),
            rows_per_s=done * self._noisy(),
            seconds_per_row=self._noisy() / self.speeds[name],
            seconds_per_batch=0.05,
            ready=ready,
            loading=len(loading),
            loading_s=tuple(loading),
            load_s=self.load_s,
        )

    def _noisy(self) -> float:
        return 1.0 + self.noise * self.draw.uniform(-1.0, 1.0)

    def step(self) -> Plan:
        rate = self.rate
        for name, speed in self.speeds.items():
            ready = sum(1 for at in self.workers[name] if at <= self.at_s - self.load_s)
            done = min(self.backlog[name] / TICK_S + rate, ready * speed)
            self.backlog[name] = max(self.backlog[name] + (rate - done) * TICK_S, 0.0)
            self.flows[name] = (rate, done)
            rate = done
        loads = Loads(self.at_s, {(REF, name): self.node(name) for name in self.speeds})
        plan, self.state = decide(loads, self.limits, room(self.room, self.limits), self.state)
        counts = {stage: count for (_, stage), count in plan.replicas.items()}
        for name, count in counts.items():
            here = sorted(self.workers[name])
            if count != len(here):
                self.changes.append((self.at_s, counts))
            self.workers[name] = here[:count] + [self.at_s] * max(count - len(here), 0)
        self.at_s += TICK_S
        return plan

    def run(self, seconds: float) -> dict[str, int]:
        for _ in range(int(seconds / TICK_S)):
            self.step()
        return {name: len(here) for name, here in self.workers.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("delay_ms", [{}, {"low": 500.0}])
def test_steady_load_moves_nothing_once_settled(seed: int, delay_ms: dict[str, float]) -> None:
    """Half an hour of steady load with noise in every figure, from far too few and too many: settled within five
    minutes, and never changed again."""
    for begin in ({"a": 1, "b": 1, "c": 1}, {"a": 40, "b": 40, "c": 20}):
        world = Fluid({"a": 100.0, "b": 40.0, "c": 310.0}, 500.0, noise=0.04, seed=seed, delay_ms=delay_ms)
        world.begin(begin)
        settled = world.run(300.0)
        assert not [at for at, _ in world.changes if at > 250.0]
        world.changes.clear()
        assert world.run(1800.0) == settled
        assert world.changes == []
        for name, speed in world.speeds.items():
            assert 500.0 / speed < settled[name] <= 500.0 / speed / 0.7 + 1.0, name
        assert max(world.backlog.values()) < 50.0


@settings(max_examples=25, deadline=None)
@given(
    speeds=st.lists(st.floats(5.0, 500.0), min_size=1, max_size=4),
    begin=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    load_s=st.sampled_from([1.0, 10.0, 60.0]),
    seed=st.integers(0, 1000),
)
@example(speeds=[6.0], begin=[1, 1, 1, 1], load_s=10.0, seed=248)
def test_it_converges_from_any_start(speeds: list[float], begin: list[int], load_s: float, seed: int) -> None:
    """Whatever there was: after ten minutes every stage has enough and nothing much idles, and it stays so."""
    named = {f"s{i}": speed for i, speed in enumerate(speeds)}
    world = Fluid(named, 300.0, load_s=load_s, noise=0.03, seed=seed, room=1000.0, most=200)
    world.begin(dict(zip(named, begin, strict=False)))
    settled = world.run(900.0)
    for name, speed in named.items():
        assert 300.0 / speed <= settled[name] <= 300.0 / speed / 0.7 + 1.0
    world.changes.clear()
    world.run(600.0)
    assert world.changes == []


def test_warming_workers_are_capacity_on_its_way() -> None:
    """A stage that loads for a minute: what was asked for is not asked for again while it loads."""
    world = Fluid({"a": 100.0}, 800.0, load_s=60.0)
    world.begin({"a": 3})
    world.run(20.0)
    asked = len(world.workers["a"])
    # The need is 8 at no rest; of what piles up in a minute, a part more.
    assert 9 <= asked <= 22
    world.run(38.0)
    assert len(world.workers["a"]) <= asked + 2


def test_the_next_stages_load_at_the_same_time() -> None:
    """A jump at the first of three stages: the last one has its workers before the rows are there."""
    world = Fluid({"a": 100.0, "b": 100.0, "c": 100.0}, 100.0, load_s=30.0)
    world.begin({"a": 2, "b": 2, "c": 2})
    world.run(120.0)
    world.rate = 600.0
    world.run(20.0)
    assert min(len(here) for here in world.workers.values()) >= 6


def test_what_is_caught_up_before_is_no_rate_that_lasts() -> None:
    """Twice of what comes to the pipeline arrives, while the stage before clears its backlog: the flow that is told on
    is what lasts, and no more workers come than for a rate of that."""
    load = NodeLoad(REF, "b", arrivals_per_s=200.0, seconds_per_row=0.1, ready=13, load_s=30.0, held_rows=10)
    one = limits("a", "b")[1]
    alone, behind = demand_of(one, [load], 13), demand_of(one, [load], 13, Coming(0.0, 100.0, 50.0))
    assert alone.flow == 200.0
    assert alone.more > 20
    assert behind.flow == 100.0
    assert behind.more <= 13 <= behind.less  # neither more nor fewer


def test_idle_workers_leave_down_to_the_least() -> None:
    """Nothing comes any more: after a while each stage has its minimum, and not at once."""
    world = Fluid({"a": 100.0, "b": 50.0}, 400.0)
    world.begin({"a": 6, "b": 11})
    world.run(60.0)
    world.rate = 0.0
    assert world.run(10.0)["b"] >= 9
    assert world.run(120.0) == {"a": 1, "b": 1}


def test_slots_go_to_the_stage_that_became_slow() -> None:
    """All slots are taken, and the slow stage changes: within ten seconds those of the other begin to load there."""
    world = Fluid({"a": 20.0, "b": 60.0}, 120.0, load_s=1.0, room=10.0, most=10)
    world.begin({"a": 7, "b": 3})
    world.run(60.0)
    world.speeds = {"a": 60.0, "b": 20.0}
    world.run(10.0)
    assert {n: len(w) for n, w in world.workers.items()} == {"a": 3, "b": 7}


@given(
    figures=st.lists(st.tuples(ANY, ANY, ANY, ANY, ANY, ANY, st.integers(-5, 10**12)), min_size=2, max_size=2),
    given_=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 50), st.none() | st.integers(0, 80)), min_size=2, max_size=2
    ),
    before=st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 200)),
    total=st.integers(0, 150),
)
def test_any_figures_stay_within_limits_and_room(
    figures: list[tuple[Any, ...]], given_: tuple[tuple[int, int, int | None], ...], before: dict[str, int], total: int
) -> None:
    """NaN, endless, negative and huge figures, from any state: never above max or the room, never below min if that has
    room; what a user pinned, exactly; and the next decision from there too."""
    both = [
        Limits(REF, name, (name,), after, least, max(most, least), "gpu", pinned=pin)
        for name, after, (least, most, pin) in zip("ab", [(), ("a",)], given_, strict=True)
    ]
    nodes = {
        (REF, name): NodeLoad(
            REF, name, rows, rows, rows, {"low": Waiting(x)}, a, b, c, d, e, x, trend=c, ready=abs(rows) % 50
        )
        for name, (a, b, c, d, e, x, rows) in zip("ab", figures, strict=True)
    }
    fits, state = room(total, both), State.of({(REF, n): c for n, c in before.items()}, 0.0)
    for at_s in (100.0, 102.0, 200.0):
        plan, state = decide(Loads(at_s, nodes), both, fits, state)
        assert fits(plan.replicas)
        assert set(plan.reasons) == {one.key for one in both}
        for one in both:
            assert 0 <= plan.replicas[one.key] <= one.most
            if sum(o.least for o in both) <= total:
                assert plan.replicas[one.key] >= one.least


def test_nothing_known_changes_nothing() -> None:
    """No report, no counter: what is alive stays; stages without workers get their minimum."""
    both = limits("a", "b", least=2)
    plan, _ = decide(Loads(0.0, {(REF, "a"): NodeLoad(REF, "a", ready_rows=500, ready=5)}), both, room(50, both))
    assert plan.replicas == {(REF, "a"): 5, (REF, "b"): 2}
    assert decide(Loads(0.0), [], room(50, []))[0].replicas == {}


@given(st.floats(0.0, 200.0), st.floats(0.0, 200.0), st.floats(0.5, 20.0), st.floats(0.001, 2.0), st.floats(0.05, 10.0))
def test_more_need_never_wants_fewer(one: float, other: float, spread: float, batch_s: float, delay_s: float) -> None:
    """`staff` rises with the need, and is never below it."""
    low, high = sorted((one, other))
    assert staff(low, spread, batch_s, delay_s) <= staff(high, spread, batch_s, delay_s)
    assert staff(high, spread, batch_s, delay_s) >= high


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 50))
def test_more_load_never_wants_fewer(rate: float, more: float, backlog: int, longer: int, ready: int) -> None:
    """Of two looks that differ in what comes or waits, the heavier one asks for no fewer."""
    one = limits("a", most=10_000)[0]

    def asked(rate: float, rows: int) -> int:
        load = NodeLoad(REF, "a", rows, arrivals_per_s=rate, seconds_per_row=0.01, ready=ready, load_s=5.0, held_rows=1)
        return demand_of(one, [load], ready).more

    assert asked(rate, backlog) <= asked(rate + more, backlog)
    assert asked(rate, backlog) <= asked(rate, backlog + longer)


def test_a_pinned_number_stays_whatever_the_load() -> None:
    """`torchrelay scale a 7`: 7, idle or not, above max too; and the reason says who set it."""
    world = Fluid({"a": 100.0}, 5000.0)
    world.limits = limits("a", most=5, pinned=7)
    world.begin({"a": 1})
    plan = world.step()
    assert plan.replicas == {(REF, "a"): 7}
    assert "a user set 7" in plan.reasons[REF, "a"]
    world.rate = 0.0
    assert world.run(200.0) == {"a": 7}


def test_reasons_say_what_was_seen() -> None:
    """Rates, what waits, what is at its limit: in words."""
    world = Fluid({"a": 100.0}, 5000.0, most=5)
    world.begin({"a": 5})
    world.run(20.0)
    reason = world.step().reasons[REF, "a"]
    assert reason.startswith("stays at 5: 5e+03 rows/s come, a worker does 100")
    assert "would be needed, max is 5" in reason


def test_a_stage_with_min_nought_wakes_for_the_first_row() -> None:
    """No worker while there is nothing; one for a single row; none again later."""
    one = limits("a", least=0)
    fits = room(5, one)
    plan, state = decide(Loads(0.0), one, fits)
    assert plan.replicas[REF, "a"] == 0
    waiting = {(REF, "a"): NodeLoad(REF, "a", ready_rows=1)}
    plan, state = decide(Loads(2.0, waiting), one, fits, state)
    assert plan.replicas[REF, "a"] == 1
    for at_s in range(4, 120, 2):
        plan, state = decide(Loads(at_s, {(REF, "a"): NodeLoad(REF, "a", ready=1)}), one, fits, state)
    assert plan.replicas[REF, "a"] == 0


@pytest.mark.parametrize(("slots_there", "expected"), [(100, 5), (9, 3), (11, 3), (2, 0)])
def test_parts_of_a_cut_stage_have_as_many_workers_each(slots_there: int, expected: int) -> None:
    """As the slowest of them needs; where there is no room, whole groups only: no part has workers for nothing."""
    three = [replace(one, whole="s", after=()) for one in limits("s.0", "s.1", "s.combine", least=0)]
    costs = {"s.0": 0.001, "s.1": 0.01, "s.combine": 0.0001}
    nodes = {
        (REF, name): NodeLoad(REF, name, arrivals_per_s=380.0, seconds_per_row=cost, ready=5, load_s=1.0, held_rows=1)
        for name, cost in costs.items()
    }
    plan, _ = decide(Loads(0.0, nodes), three, room(slots_there, three))
    assert set(plan.replicas.values()) == {expected}
    if expected == 5:
        assert "as many as the other parts of s" in plan.reasons[REF, "s.combine"]
    else:
        assert "no room for 5" in plan.reasons[REF, "s.1"] or "others need the room" in plan.reasons[REF, "s.1"]


def test_limits_come_from_the_pipeline(tmp_path: Path) -> None:
    """Groups, their order, replicas, delays and pins; an old version needs nobody once it is done."""
    (tmp_path / "s.py").write_text("def f(batch):\n    return {'y': batch['x']}\n")
    text = """
pipeline: p
input: {x: str}
stages:
  - {name: a, use: "s.py:f", outputs: {y: str}, replicas: {min: 2, max: 6}, scale: {delay_ms: {high: 50, medium: 500}}}
  - {name: b, use: "s.py:f", outputs: {y: str}, replicas: {min: 1, max: 9}}
  - {name: c, use: "s.py:f"}
fuse: [[a, b]]
"""
    (tmp_path / "p.yaml").write_text(text)
    pipeline = Pipeline.load(tmp_path / "p.yaml")
    first, second = limits_of(pipeline, {"c": 4})
    assert (first.stage, first.stages, first.after, first.min, first.max) == ("a", ("a", "b"), (), 2, 9)
    assert first.delay_ms == {"high": 50.0, "medium": 500.0}
    assert (second.stage, second.after, second.pinned, second.least, second.most) == ("c", ("a",), 4, 4, 4)
    assert [one.min for one in limits_of(pipeline, old=True)] == [0, 0]


def test_what_is_asked_of_a_cut_stage_is_asked_of_all_its_parts(tmp_path: Path) -> None:
    """By the stage's own name; what stands behind it follows what combines it."""
    (tmp_path / "s.py").write_text("def f(batch):\n    return {'y': batch['x']}\n")
    text = """
pipeline: p
input: {x: "float32[4]"}
stages:
  - {name: a, use: "s.py:f", outputs: {y: "float32[4]"}, replicas: 2, shards: {count: 2, mode: gather}}
  - {name: b, use: "s.py:f"}
"""
    (tmp_path / "p.yaml").write_text(text)
    found = {one.stage: one for one in limits_of(Pipeline.load(tmp_path / "p.yaml"), {"a": 4})}
    parts = ("a.0", "a.1", "a.combine")
    assert {(found[part].whole, found[part].pinned, found[part].min) for part in parts} == {("a", 4, 2)}
    assert (found["b"].whole, found["b"].pinned, found["b"].after) == ("", None, ("a.combine",))
