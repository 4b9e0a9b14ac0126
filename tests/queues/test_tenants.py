"""Start-time fair queueing between tenants, by rank alone, on a real server."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.queues.conftest import Lane
from torchrelay.errors import InputError
from torchrelay.queues.job import HEAD
from torchrelay.queues.tenants import MAX_WEIGHT, parse_tenant, set_weight, share_of, weights

MEDIUM = 50


def submit(lane: Lane, pipeline: int, tenant: str, n: int = 1, priority: int = MEDIUM, **options: float) -> list[str]:
    """Submits n jobs of a tenant, a millisecond of boost a point."""
    ids: list[str] = []
    while len(ids) < n:
        jobs = [lane.job(boost_ms=float(priority), **options) for _ in range(min(256, n - len(ids)))]
        assert set(lane.push(pipeline, jobs, share=share_of(tenant, priority)).statuses) == {"n"}
        ids += [job.id for job in jobs]
    return ids


def serve(lane: Lane, pipeline: int, jobs: int, at_once: int = 4) -> list[str]:
    """The jobs that are claimed next at the entry, in order. How fast the test runs is not measured."""
    worker, served = lane.worker(pipeline), list[str]()
    while len(served) < jobs and (ids := worker.step(1, min(at_once, jobs - len(served)))):
        lane.redis.hdel(lane.keys.fair(lane.refs[pipeline]), "since")
        served += ids
    return served


def test_ten_jobs_do_not_wait_for_a_hundred_thousand(lane, chain):
    """B comes when 100,000 jobs of A wait, some of them served: its ten are among the next twenty and a window."""
    a = set(submit(lane, chain, "a", 100_000))
    serve(lane, chain, 500, 100)
    b = set(submit(lane, chain, "b", 10))
    served = serve(lane, chain, 30)
    assert b <= set(served)
    assert len(a.intersection(served)) == 20


def test_jobs_without_a_tenant_keep_their_ranks_and_records(lane, chain):
    """Rank is time less boost, beside tenants that wait; the record has the very bytes that it had."""
    submit(lane, chain, "a", 1000)
    before = lane.server_ms()
    [plain] = lane.submit(chain, boost_ms=5.0)
    rank, *_, suspect, _ = HEAD.unpack_from(lane.record(plain))
    assert before - 5.0 <= rank <= lane.server_ms() - 5.0
    assert suspect == 0
    assert lane.submit(chain, boost_ms=1e6)[0] == serve(lane, chain, 1)[0]


def test_without_tenants_a_submit_and_a_claim_run_the_commands_that_they_ran(lane, chain):
    """No key of tenants is looked at, nor made."""
    lane.submit(chain, 3)
    serve(lane, chain, 3)
    assert not list(lane.redis.scan_iter(match=f"{lane.keys.tag}fair:*"))


def test_a_low_job_is_overtaken_only_by_what_comes_within_the_boost(lane, chain):
    """Tags do not precede the clock, whoever else waits: the bound of rule 17."""
    [low] = lane.submit(chain)
    lane.until(lambda: lane.server_ms() > HEAD.unpack_from(lane.record(low))[0] + MEDIUM)
    submit(lane, chain, "a", 2000)
    late = [submit(lane, chain, tenant)[0] for tenant in ("a", "b", "c")]
    ready = lane.ready(chain, 1)
    assert all(ready.index(low) < ready.index(job) for job in late)


def test_a_tenant_overtakes_a_low_job_by_no_more_than_the_boost_holds(lane, chain):
    """Nobody works, and what waits first has a tenant: others join it there, but each row costs its tenant 10 ms."""
    submit(lane, chain, "a", 200)
    began = HEAD.unpack_from(lane.record(lane.ready(chain, 1)[0]))[0]
    [low] = lane.submit(chain)
    behind = HEAD.unpack_from(lane.record(low))[0] - began
    for tenant in "bcd":
        ids = submit(lane, chain, tenant, 200)
        ready = lane.ready(chain, 1)
        assert len(set(ready[: ready.index(low)]).intersection(ids)) <= behind / 10 + 1


def test_priorities_are_apart(lane, chain):
    """A tenant's backlog of low jobs delays no high one of its own: virtual times are kept for each priority."""
    submit(lane, chain, "a", 5000, priority=0)
    [high] = submit(lane, chain, "a", priority=100)
    assert serve(lane, chain, 1) == [high]


def test_a_delayed_job_keeps_its_time_and_costs_its_turn_only(lane, chain):
    """Its rank is not before it may start; what its tenant submits next does not wait for it."""
    [late] = submit(lane, chain, "a", delay_ms=3_600_000.0)
    [soon] = submit(lane, chain, "a")
    assert HEAD.unpack_from(lane.record(late))[0] >= lane.server_ms() + 3_000_000
    assert HEAD.unpack_from(lane.record(soon))[0] <= lane.server_ms() + 1000
    assert serve(lane, chain, 1) == [soon]


def test_debts_end_with_the_queue_and_tenants_are_forgotten(lane, chain):
    """Once nobody waits, all begin alike; while somebody does, tenants whose turn is over are swept."""
    submit(lane, chain, "a", 3000)
    serve(lane, chain, 3000, 200)
    [again] = submit(lane, chain, "a")
    assert HEAD.unpack_from(lane.record(again))[0] <= lane.server_ms()
    key = lane.keys.fair(lane.refs[chain])
    for number in range(2500):
        submit(lane, chain, f"t{number}")
        if number % 2:
            serve(lane, chain, 2)
    assert lane.redis.hlen(key) < 1200


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    shares=st.lists(st.tuples(st.sampled_from([1, 2, 3, 0.5]), st.integers(1, 5)), min_size=2, max_size=4),
    window=st.integers(1, 16),
    first=st.integers(0, 200),
)
def test_backlogged_tenants_share_by_weight(
    make_lane, shares: list[tuple[float, int]], window: int, first: int
) -> None:
    """However many each submitted, and whoever came first: while all wait, rows per weight differ by a job or two of
    each, and the window that was claimed before the last came."""
    lane = make_lane()
    chain = lane.define(Lane.CHAIN)
    owner: dict[str, int] = {}
    for number, (weight, rows) in enumerate(shares):
        lane.redis.hset(lane.keys.tenants, f"t{number}", weight)
        owner |= dict.fromkeys(submit(lane, chain, f"t{number}", 400, rows=rows), number)
        if number == 0:
            serve(lane, chain, first, window)
    total = sum(weight / rows for weight, rows in shares)
    jobs = int(180 * total / max(weight / rows for weight, rows in shares))  # none runs out
    got = Counter(owner[job] for job in serve(lane, chain, jobs, window))
    turns = [got[number] * rows / weight for number, (weight, rows) in enumerate(shares)]
    slack = 2 * sum(rows / weight for weight, rows in shares) + window * max(r / w for w, r in shares)
    assert max(turns) - min(turns) <= slack, (turns, got)
    lane.audit()


def test_weights_and_names_are_checked(registry):
    """A weight is a positive number, a name is short and plain; 1 is as if none was set."""
    set_weight(registry, "a", 3)
    set_weight(registry, "b.c@d", 0.5)
    assert weights(registry) == {"a": 3.0, "b.c@d": 0.5}
    set_weight(registry, "a", 1)
    assert weights(registry) == {"b.c@d": 0.5}
    for wrong in ("", "a b", "-a", "a" * 65, "ä", 3, "a\n"):
        with pytest.raises(InputError, match="tenant"):
            parse_tenant(wrong)
    for weight in (0, -1, float("nan"), float("inf"), MAX_WEIGHT + 1, True, "3"):
        with pytest.raises(InputError, match="weight"):
            set_weight(registry, "a", weight)  # type: ignore[arg-type]


def test_what_a_row_costs_follows_the_measured_pace(lane, chain):
    """Rows that take 100 ms each: within a few seconds of claims a row's cost comes from 10 ms to above that."""
    submit(lane, chain, "a", 200)
    key = lane.keys.fair(lane.refs[chain])
    worker = lane.worker(chain)
    for _ in range(12):
        worker.step(1, 10)
        since = lane.redis.hget(key, "since")
        lane.redis.hset(key, "since", float(since) - 1000.0)  # as if a second had passed
    assert 100 < float(lane.redis.hget(key, "c")) < 180
