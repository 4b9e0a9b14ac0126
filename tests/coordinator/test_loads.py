"""Reports and counters become rates: restarts, gaps, run twins and fused stages included."""

from __future__ import annotations

from typing import Any

import pytest

from torchrelay.coordinator.loads import Loads, LoadTracker, Waiting, node_of
from torchrelay.queues.histogram import SERVICE_BUCKETS, service_bucket
from torchrelay.queues.registry import WorkerReport
from torchrelay.queues.waiting import ReadyClass

NODE = "p@1/a"


def report(worker: str = "w1", at_s: float = 0.0, **values: Any) -> WorkerReport:
    given = {"node": NODE, "state": "ready", "pid": 1, "started_at": 1.0, "max_rows": 8, **values}
    return WorkerReport(worker=worker, host="h", device="cuda:0", sent_at=at_s, **given)


def at_work(at_s: float, rate: float = 50.0, **values: Any) -> WorkerReport:
    """A worker that computes that many rows per second in batches of 8, of 0.08 s each."""
    batches = int(rate / 8 * at_s)
    counts = [0] * SERVICE_BUCKETS
    counts[service_bucket(0.08)] = batches
    kinds = {"rows": 8 * batches, "batches": batches, "jobs": 8 * batches, "busy_s": 0.08 * batches, "service": counts}
    return report(at_s=at_s, **(kinds | values))


def follow(tracker: LoadTracker, seconds: int, rate: float = 50.0) -> Loads:
    loads = Loads(0.0)
    for at_s in range(0, seconds, 2):
        done = int(rate / 8 * at_s) * 8
        loads = tracker.update(
            at_s, [at_work(float(at_s), rate)], {f"{NODE}.committed": done, f"{NODE}.ready_rows": 16}
        )
    return loads


def test_rates_are_differences() -> None:
    """A worker and its node, after a minute of steady work: rows per second, busy share, cost of a row, quantiles."""
    loads = follow(LoadTracker(), 60)
    node, worker = loads.nodes["p@1", "a"], loads.workers[0]
    assert worker.rows_per_s == pytest.approx(50.0, rel=0.05)
    assert worker.busy == pytest.approx(0.5, rel=0.05)
    assert node.arrivals_per_s == pytest.approx(50.0, rel=0.1)
    assert node.rows_per_s == pytest.approx(50.0, rel=0.1)
    assert node.seconds_per_row == pytest.approx(0.01, rel=0.05)
    assert node.fill == 1.0
    assert node.service is not None
    assert 60.0 < node.service.p50_ms < 100.0
    assert (node.ready, node.loading, node.draining, node.ready_rows) == (1, 0, 0, 16)


def test_a_new_incarnation_counts_from_nought() -> None:
    """The child died and another counts anew: no rate is negative, and none leaps."""
    tracker = LoadTracker()
    follow(tracker, 60)
    for at_s in range(60, 80, 2):
        again = at_work(float(at_s - 60)) if at_s > 60 else report(at_s=float(at_s))
        fresh = report(
            at_s=float(at_s), pid=2, started_at=60.0, rows=again.rows, batches=again.batches, busy_s=again.busy_s
        )
        loads = tracker.update(at_s, [fresh], {f"{NODE}.committed": 50 * at_s})
        assert 0.0 <= loads.workers[0].rows_per_s <= 75.0
    assert loads.nodes["p@1", "a"].seconds_per_row == pytest.approx(0.01, rel=0.05)


def test_a_repeated_report_is_no_news() -> None:
    """The tracker looks more often than workers tell: what was told before is not counted as a time of rest."""
    tracker = LoadTracker()
    for tick in range(120):
        at_s = tick * 0.5
        loads = tracker.update(at_s, [at_work(at_s // 2 * 2)], {})
    assert loads.workers[0].rows_per_s == pytest.approx(50.0, rel=0.05)


def test_a_gap_of_heartbeats_leaves_the_rate() -> None:
    """Thirty seconds without the worker: what it did meanwhile counts over that time."""
    tracker = LoadTracker()
    follow(tracker, 40)
    assert tracker.update(50.0, [], {}).workers == ()
    loads = tracker.update(70.0, [at_work(70.0)], {})
    assert loads.workers[0].rows_per_s == pytest.approx(50.0, rel=0.05)
    assert loads.workers[0].silent_s == 0.0


def test_a_leader_that_takes_over_knows_what_rows_cost() -> None:
    """Workers that ran before anybody looked tell of their whole life."""
    loads = LoadTracker().update(1000.0, [at_work(600.0)], {})
    assert loads.nodes["p@1", "a"].seconds_per_row == pytest.approx(0.01, rel=0.01)


def test_runs_count_under_the_stage_itself() -> None:
    """What stands in the graph of the pipeline's runs is added; a worker of both counts once."""
    one = report(fused=["p@1+run/a"])
    counters = {"p@1/a.ready_rows": 3, "p@1+run/a.ready_rows": 40, "p@1+run/@read.held_rows": 2, "p@1.dead": 7}
    ready = {"p@1+run/a": {"low": ReadyClass(4, 100.0)}, "p@1/a": {"high": ReadyClass(1, 5.0)}}
    loads = LoadTracker().update(0.0, [one], counters, ready)
    assert set(loads.nodes) == {("p@1", "a"), ("p@1", "@read")}
    node = loads.nodes["p@1", "a"]
    assert (node.ready_rows, node.ready) == (43, 1)
    assert node.waiting["low"] == Waiting(pytest.approx(34.4), 0.0, 100.0)
    assert node.waiting["high"].rows == pytest.approx(8.6)
    assert loads.workers[0].stages == ("a",)
    assert node_of("p@1+run/a") == ("p@1", "a")


def test_fused_stages_share_their_workers() -> None:
    """A worker of two stages is capacity of both, and its cost is known for both."""
    loads = LoadTracker().update(1000.0, [at_work(600.0, fused=["p@1/b", "p@1+run/a", "p@1+run/b"])], {})
    assert loads.nodes["p@1", "b"].ready == 1
    assert loads.nodes["p@1", "b"].seconds_per_row == loads.nodes["p@1", "a"].seconds_per_row > 0


def test_loading_workers_tell_how_long() -> None:
    """A worker that loads is capacity on its way: since when, and how long others took."""
    tracker = LoadTracker()
    tracker.update(0.0, [report(load_s=12.0)], {})
    tracker.update(5.0, [report(load_s=12.0, at_s=5.0), report("w2", state="loading")], {})
    node = tracker.update(9.0, [report(load_s=12.0, at_s=9.0), report("w2", state="loading")], {}).nodes["p@1", "a"]
    assert (node.ready, node.loading, node.loading_s, node.load_s) == (1, 1, (4.0,), 12.0)


def test_counters_that_fall_make_no_negative_rate() -> None:
    """A purge, or a server that lost its data."""
    tracker = LoadTracker()
    tracker.update(0.0, [], {f"{NODE}.ready_rows": 10_000, f"{NODE}.committed": 500})
    node = tracker.update(2.0, [], {f"{NODE}.ready_rows": 0, f"{NODE}.committed": 0}).nodes["p@1", "a"]
    assert (node.arrivals_per_s, node.rows_per_s) == (0.0, 0.0)


def test_a_clock_that_stands_still_changes_nothing() -> None:
    """Two looks at the same moment."""
    tracker = LoadTracker()
    follow(tracker, 20)
    before = tracker.update(20.0, [at_work(20.0)], {f"{NODE}.committed": 1000})
    after = tracker.update(20.0, [at_work(20.0)], {f"{NODE}.committed": 9000})
    assert before.nodes["p@1", "a"].rows_per_s == after.nodes["p@1", "a"].rows_per_s
