"""Whatever a host is told, however often it looks, and whichever workers die: it comes to run what it is to run."""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchrelay.config.fleet import Assignment, Desired, Gpu, Need, set_aside_s
from torchrelay.workers.reconcile import Reconciler, Servable
from torchrelay.workers.slots import Offer

REF = "p@00000000"
SLOTS = ("cpu", "cuda:0", "cuda:1")
OFFER = Offer(2.0, 1 << 30, 1 << 30, tuple(Gpu(i, f"u{i}", "gpu", 100, 100) for i in range(2)))
FITTING = [(slot, stage) for slot in SLOTS for stage in ("a", "b")]


class _Pipeline:
    """As much of a pipeline as is asked."""

    stage_names: ClassVar[list[str]] = ["a", "b"]


def one(number: int, slot: str, stage: str, ref: str = REF) -> Assignment:
    need = Need(cpus=1.0) if slot == "cpu" else Need(compute=0.5, memory=50)
    return Assignment(f"w{number}", "host", slot, ref, stage, need=need)


class Host(RuleBasedStateMachine):
    """An agent's part is played here: it starts and drains what it is told, and tells what becomes of it."""

    def __init__(self) -> None:
        super().__init__()
        servable: Any = Servable(_Pipeline())  # type: ignore[arg-type]
        self.decides = Reconciler({REF: servable}, lambda: self.now)
        self.now = 1000.0
        self.number = 0
        self.ids = 0
        self.desired: Desired | None = None
        self.running: dict[str, Assignment] = {}
        self.draining: set[str] = set()
        self.last_failure: dict[tuple[str, str], float] = {}

    def look(self) -> None:
        turn = self.decides.turn(self.desired, OFFER, self.now)
        for worker in turn.drain:
            assert worker in self.running
            assert worker not in self.draining, "it is asked once to drain"
            self.draining.add(worker)
        for started in turn.start:
            assert started.id not in self.running, "a worker runs once"
            assert self.desired is not None
            assert started in self.desired.workers, "only what the newest state says is started"
            failed_at = self.last_failure.get((started.slot, started.stage))
            assert failed_at is None or self.now >= failed_at + set_aside_s(1), "what failed is set aside for a while"
            self.running[started.id] = started

    @rule(chosen=st.lists(st.sampled_from(FITTING), max_size=4), keep=st.booleans())
    def another_state(self, chosen: list[tuple[str, str]], keep: bool) -> None:
        """What the leader writes fits the host; it keeps some of the workers, or none."""
        kept = list(self.desired.workers[:1]) if keep and self.desired else []
        room = {slot: 2 - sum(w.slot == slot for w in kept) for slot in SLOTS}
        for slot, stage in chosen:
            if room[slot] > 0:
                room[slot] -= 1
                self.ids += 1
                kept.append(one(self.ids, slot, stage))
        self.number += 1
        self.desired = Desired("host", 1, self.number, tuple(kept))

    @rule(times=st.integers(1, 3))
    def looks(self, times: int) -> None:
        """An asking that came twice, or late, changes nothing."""
        for _ in range(times):
            self.look()

    @rule(seconds=st.sampled_from([0.1, 3.0, 40.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_worker_ends(self, data: st.DataObject) -> None:
        """Drained, if it was asked to, or died over it; else it died."""
        worker = data.draw(st.sampled_from(sorted(self.running)))
        gone = self.running.pop(worker)
        drained = worker in self.draining
        self.draining.discard(worker)
        failure = "" if drained and data.draw(st.booleans()) else "exit code 1"
        counted = self.decides.ended(worker, failure, self.now)
        assert counted is not drained
        if counted:
            self.last_failure[gone.slot, gone.stage] = self.now

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_worker_is_ready(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.running)))
        before = {(t.slot, t.stage) for t in self.decides.trouble()}
        self.decides.ready(worker, self.now)
        forgotten = before - {(t.slot, t.stage) for t in self.decides.trouble()}
        for key in forgotten:
            assert self.now >= self.last_failure.pop(key) + set_aside_s(1)

    @invariant()
    def no_slot_holds_more_than_fits(self) -> None:
        for slot in SLOTS:
            assert sum(w.slot == slot for w in self.running.values()) <= 2

    @invariant()
    def applied_means_that_nothing_else_runs(self) -> None:
        assert self.decides.applied <= self.number
        if self.desired is not None and self.decides.applied == self.number:
            assert not self.draining
            assert set(self.running) <= {w.id for w in self.desired.workers}

    def teardown(self) -> None:
        """Left alone, with workers that no longer die, it runs just what it is to run, and says so."""
        for _ in range(4):
            self.now += 5000.0
            self.look()
            for worker in sorted(self.draining):
                del self.running[worker]
                self.decides.ended(worker, "", self.now)
            self.draining.clear()
        wanted = {w.id for w in self.desired.workers} if self.desired else set()
        assert set(self.running) == wanted
        assert self.decides.applied == self.number


Host.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestHost = Host.TestCase


def decider() -> Reconciler:
    servable: Any = Servable(_Pipeline())  # type: ignore[arg-type]
    return Reconciler({REF: servable}, lambda: 7.0)


def test_what_the_host_cannot_run_is_trouble_with_the_reason_and_the_rest_runs() -> None:
    """Another version, an unknown stage, a slot that is not there."""
    bad = [one(1, "cpu", "a", "p@11111111"), one(2, "cpu", "zzz"), one(3, "cuda:7", "a")]
    decides = decider()
    turn = decides.turn(Desired("host", 1, 5, (*bad, one(4, "cuda:0", "a"))), OFFER, 100.0)
    assert [w.id for w in turn.start] == ["w4"]
    assert turn.news
    told = {trouble.slot + trouble.stage + trouble.ref[-1]: trouble.reason for trouble in decides.trouble()}
    assert "its files differ" in told["cpua1"]
    assert "has no stage 'zzz'" in told["cpuzzz0"]
    assert "no slot 'cuda:7'" in told["cuda:7a0"]
    # The leader knows of it, so there is nothing to wait for.
    assert decides.applied == 5


def test_a_slot_that_keeps_failing_is_set_aside_longer_each_time_and_comes_back() -> None:
    decides, now, waits = decider(), 100.0, []
    state = Desired("host", 1, 1, (one(1, "cuda:0", "a"),))
    for count in range(1, 5):
        assert [w.id for w in decides.turn(state, OFFER, now).start] == ["w1"]
        assert decides.ended("w1", "exit code 1", now + 0.1)
        (trouble,) = decides.trouble()
        assert trouble.failures == count
        waits.append(set_aside_s(count))
        assert not decides.turn(state, OFFER, now + waits[-1]).start
        now += 0.1 + waits[-1]
    assert waits == sorted(set(waits))
    assert decides.turn(state, OFFER, now).start
    decides.ready("w1", now + 1)
    assert decides.trouble(), "it was ready each time"
    decides.ready("w1", now + 2 * set_aside_s(4))
    assert not decides.trouble()


def test_a_worker_waits_for_room_that_another_still_drains_from() -> None:
    decides = decider()
    first = Desired("host", 1, 1, (one(1, "cuda:0", "a"), one(2, "cuda:0", "b")))
    assert len(decides.turn(first, OFFER, 1.0).start) == 2
    second = Desired("host", 1, 2, (one(2, "cuda:0", "b"), one(3, "cuda:0", "b")))
    turn = decides.turn(second, OFFER, 2.0)
    assert turn.drain == ("w1",)
    assert not turn.start
    assert decides.applied == 1
    decides.ended("w1", "", 3.0)
    assert [w.id for w in decides.turn(second, OFFER, 3.0).start] == ["w3"]
    assert decides.applied == 2
