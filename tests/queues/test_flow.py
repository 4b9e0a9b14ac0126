"""How work is let in and woken: gates, marks, wake tokens, the reaper's clock; and keys that somebody else wrote."""

from __future__ import annotations

import pytest

from torchrelay.errors import BrokerMisconfigured, QueueFull
from torchrelay.queues.job import FLAG_HIGH
from torchrelay.queues.scripts import NamespaceMissing


def test_submit_is_refused_above_the_mark_of_rows(lane):
    """Over max_rows at the entry, submit raises QueueFull with place and numbers, and writes nothing."""
    pipeline = lane.define(lane.CHAIN, marks={"s1": (10, 10**9)})
    lane.submit(pipeline, 2, rows=4)
    with pytest.raises(QueueFull, match=r"p1@v/s1 is full: 8 rows wait, the mark is 10"):
        lane.push(pipeline, [lane.job(rows=3)])
    lane.submit(pipeline, rows=2)
    assert lane.load("p1@v/s1.ready_rows") == 10


def test_submit_is_refused_above_the_mark_of_bytes(lane):
    """Over max_bytes at the entry, submit raises QueueFull."""
    pipeline = lane.define(lane.CHAIN, marks={"s1": (100, 1000)})
    lane.submit(pipeline, nbytes=600)
    with pytest.raises(QueueFull, match="600 bytes wait, the mark is 1000"):
        lane.push(pipeline, [lane.job(nbytes=500)])
    lane.submit(pipeline, nbytes=400)


def test_every_entry_node_counts(lane):
    """With two entry nodes, the fuller one decides."""
    pipeline = lane.define({"a": (0,), "b": (0,), "c": (1, 2)}, marks={"b": (2, 10**9)})
    lane.submit(pipeline, 2)
    lane.worker(pipeline).step(1)
    with pytest.raises(QueueFull, match="/b is full"):
        lane.push(pipeline, [lane.job()])


def test_a_job_larger_than_the_mark_enters_an_empty_queue(lane):
    """An oversized job is let in when nothing waits, by rows and by bytes."""
    pipeline = lane.define(lane.CHAIN, marks={"s1": (10, 1000)})
    lane.submit(pipeline, rows=50, nbytes=5000)
    with pytest.raises(QueueFull):
        lane.push(pipeline, [lane.job()])
    lane.worker(pipeline).step(1)
    lane.submit(pipeline)


def test_delayed_and_repeated_jobs_pass_a_full_queue(lane):
    """What adds nothing to the ready rows is not refused."""
    pipeline = lane.define(lane.CHAIN, marks={"s1": (1, 10**9)})
    job = lane.job()
    assert lane.push(pipeline, [job]).statuses == "n"
    assert lane.push(pipeline, [job]).statuses == "d"
    lane.submit(pipeline, delay_ms=60_000)


@pytest.mark.parametrize("mark", [(4, 10**9), (10**6, 40)])
def test_a_worker_does_not_claim_above_its_successors_mark(lane, mark):
    """The gate closes at the mark and opens below it; commits always pass."""
    pipeline = lane.define(lane.CHAIN, marks={"s2": mark})
    jobs = lane.submit(pipeline, 8)
    worker = lane.worker(pipeline)
    grants = [worker.claim(1, 3), worker.claim(1, 3)]
    assert [worker.commit(g, 1) for g in grants] == ["kkk", "kkk"]
    shut = worker.claim(1)
    assert (shut.entries, shut.gated, shut.left) == ([], True, 2)
    assert worker.step(2, 3) == jobs[:3]
    assert worker.step(1) == jobs[6:]


def test_high_priority_passes_up_to_a_quarter_above_the_mark(lane):
    """Between the mark and 1.25 times it, only high-priority jobs are claimed; above, none."""
    pipeline = lane.define(lane.CHAIN, marks={"s2": (8, 10**9)})
    lane.submit(pipeline, 8)
    worker = lane.worker(pipeline)
    worker.step(1)
    lane.submit(pipeline)
    high = lane.submit(pipeline, 3, boost_ms=60_000.0, flags=FLAG_HIGH)
    assert worker.step(1, 2) == high[:2]
    assert worker.claim(1).entries == []
    worker.step(2, 1)
    grant = worker.claim(1)
    assert [e.job_id for e in grant.entries] == high[2:]
    assert grant.gated


def test_falling_below_half_the_mark_wakes_the_predecessors(lane):
    """A gate's opening leaves one token for the stage before it."""
    pipeline = lane.define(lane.DIAMOND, marks={"d": (4, 10**9)})
    lane.submit(pipeline, 6)
    worker = lane.worker(pipeline)
    worker.step(1)
    worker.step(2, 4)
    worker.step(3, 4)
    for node in (2, 3):
        assert worker.claim(node).gated
        lane.redis.delete(lane.keys.wake(lane.node_key(pipeline, node)))
    worker.step(4, 2)
    assert (lane.tokens(pipeline, 2), lane.tokens(pipeline, 3)) == (0, 0)
    worker.step(4, 1)
    assert (lane.tokens(pipeline, 2), lane.tokens(pipeline, 3)) == (1, 1)


def test_a_slow_branch_at_high_water_is_no_deadlock(lane):
    """With the entry full and one branch far behind, the join still drains: half-joined work closes no gate."""
    pipeline = lane.define(lane.DIAMOND, marks=dict.fromkeys("abcd", (4, 10**9)))
    worker = lane.worker(pipeline)
    done, turns = 0, 0
    submitted = []
    while len(submitted) < 40 or done < 40:
        turns += 1
        assert turns < 500, "it does not move"
        try:
            while len(submitted) < 40:
                submitted += lane.submit(pipeline)
        except QueueFull:
            pass
        worker.step(1, 2)
        worker.step(2, 4)
        if turns % 5 == 0:
            worker.step(3, 1)
        done = lane.load("p1@v.k") + len(worker.step(4, 4))
        for name in "abcd":
            assert lane.load(f"p1@v/{name}.ready_rows") <= 6
    assert {lane.status(i) for i in submitted} == {"done"}


def test_one_wake_token_at_most(lane, chain):
    """However much work comes, one token waits; a claim that leaves work behind passes the baton."""
    for _ in range(5):
        lane.submit(chain, 10)
    assert lane.tokens(chain, 1) == 1
    assert lane.redis.blpop([lane.keys.wake("p1@v/s1")], 1) is not None
    worker = lane.worker(chain)
    first = worker.claim(1, 8)
    assert (first.left, lane.tokens(chain, 1)) == (42, 1)
    assert lane.redis.blpop([lane.keys.wake("p1@v/s1")], 1) is not None
    assert (len(worker.claim(1).entries), lane.tokens(chain, 1)) == (42, 0)
    assert lane.tokens(chain, 2) == 0
    worker.commit(first, 1)
    assert lane.tokens(chain, 2) == 1


@pytest.mark.parametrize("gap_ms", [3_500, 3_600_000, -5_000])
def test_an_outage_moves_leases_instead_of_reaping(lane, chain, gap_ms):
    """When the reaper was away over 3 s, or the clock went back, every lease moves by the gap and nothing is reaped."""
    lane.submit(chain, 3)
    worker = lane.worker(chain)
    grant = worker.claim(1, lease_ms=1)
    lane.until(lambda: lane.server_ms() > grant.expires_ms)
    lane.redis.hset(lane.keys.meta, "tick", int(lane.server_ms() - gap_ms))
    back, moved, *_ = lane.run(lane.t.reap())
    assert (back, moved) == (0, 1)
    shift = lane.redis.zscore(lane.keys.lease, grant.fence) - grant.expires_ms
    assert abs(shift - gap_ms) < 1_000
    assert worker.commit(grant, 1) == "kkk"


def test_a_reaper_on_time_does_reap(lane, chain):
    """A tick of up to 3 s is no outage."""
    lane.submit(chain, 3)
    grant = lane.worker(chain).claim(1, lease_ms=1)
    lane.until(lambda: lane.server_ms() > grant.expires_ms)
    lane.redis.hset(lane.keys.meta, "tick", int(lane.server_ms() - 2_000))
    assert lane.run(lane.t.reap())[:2] == [3, 0]


def test_a_reaper_leaves_a_lane_alone_that_somebody_keeps(lane, chain):
    """Workers look whether the lane was kept a moment ago; a clock that went back or an outage is no such moment."""
    lane.submit(chain, 3)
    grant = lane.worker(chain).claim(1, lease_ms=1)
    lane.until(lambda: lane.server_ms() > grant.expires_ms)
    lane.redis.hset(lane.keys.meta, "tick", int(lane.server_ms()))
    before = lane.redis.hget(lane.keys.meta, "tick")
    assert lane.run(lane.t.reap(unless_kept_ms=60_000)) == [0, 0, 0, 0, 0]
    assert lane.redis.hget(lane.keys.meta, "tick") == before
    lane.redis.hset(lane.keys.meta, "tick", int(lane.server_ms() + 1_000))
    assert lane.run(lane.t.reap(unless_kept_ms=60_000))[:2] == [0, 1]
    lane.until(lambda: lane.server_ms() > lane.redis.zscore(lane.keys.lease, grant.fence))
    assert lane.run(lane.t.reap(unless_kept_ms=0))[0] == 3


def test_reap_tells_what_else_is_due(lane, chain):
    """The reaper says whether promote, expire and sweep have work."""
    assert lane.run(lane.t.reap()) == [0, 0, 0, 0, 0]
    [done] = lane.submit(chain)
    lane.drain(chain)
    lane.redis.zadd(lane.keys.tag + "doneq", {done: 1})
    lane.submit(chain, delay_ms=1)
    lane.submit(chain, deadline_ms=1)
    lane.until(lambda: lane.run(lane.t.reap())[2:] == [1, 1, 1])


FIXED = ["grants", "lease", "load", "delayed", "deadline", "done", "doneq", "keys", "dead", "graph", "meta"]
OPERATIONS = [
    "submit",
    "claim",
    "commit",
    "fail",
    "release",
    "lost",
    "retire",
    "reap",
    "renew",
    "promote",
    "cancel",
    "expire",
]


@pytest.mark.parametrize("name", [*FIXED, "ready:p1@v/s1", "ready:p1@v/s2"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_foreign_key_is_named_and_nothing_is_half_written(lane, chain, name, operation):
    """A key of another type refuses an operation before it writes; when it is gone, everything goes on."""
    jobs = lane.submit(chain, 4)
    worker = lane.worker(chain)
    jobs += worker.step(1, 1)
    grant = worker.claim(1, 1, lease_ms=1)
    jobs += lane.submit(chain, delay_ms=1) + lane.submit(chain, deadline_ms=1)
    late = lane.job()
    lane.until(lambda: lane.server_ms() > lane.redis.zrange(lane.keys.tag + "deadline", 0, 0, withscores=True)[0][1])
    calls = {
        "submit": lambda: lane.push(chain, [late]),
        "claim": lambda: worker.claim(1),
        "commit": lambda: worker.commit(grant, 1),
        "fail": lambda: worker.fail(grant, 1),
        "release": lambda: worker.release(grant),
        "lost": lambda: worker.lost(grant),
        "retire": lambda: worker.die(grant.entries),
        "reap": lambda: lane.run(lane.t.reap()),
        "renew": lambda: lane.run(lane.t.renew(60_000, [grant.fence])),
        "promote": lambda: lane.run(lane.t.promote()),
        "cancel": lambda: lane.run(lane.t.cancel(jobs)),
        "expire": lambda: lane.run(lane.t.expire()),
    }
    key = lane.keys.tag + name
    saved = lane.redis.exists(key) and lane.redis.dump(key)
    lane.redis.delete(key)
    lane.redis.set(key, "foreign")
    refusals = []
    try:
        calls[operation]()
    except BrokerMisconfigured as error:
        refusals.append(str(error))
    assert all("another type" in text for text in refusals)
    lane.redis.delete(key)
    if saved:
        lane.redis.restore(key, 0, saved)
    lane.push(chain, [late])
    worker.die()
    while lane.redis.zcard(lane.keys.delayed):
        lane.run(lane.t.promote())
    while any(lane.ready(chain, n) for n in (1, 2, 3)):
        lane.drain(chain)
    assert all(lane.status(i) for i in [*jobs, late.id])


def test_foreign_wake_and_reply_keys_stop_no_work(lane, chain):
    """Wakes and replies are hints: with foreign keys in their places, jobs still end with their records."""
    for key in [lane.keys.reply(lane.ids.client), *(lane.keys.wake(f"p1@v/s{n}") for n in (1, 2, 3))]:
        lane.redis.set(key, "foreign")
    jobs = lane.submit(chain, 3)
    lane.drain(chain)
    assert {lane.status(i) for i in jobs} == {"done"}
    for n in (1, 2, 3):
        assert lane.redis.get(lane.keys.wake(f"p1@v/s{n}")) == b"foreign"
        lane.redis.delete(lane.keys.wake(f"p1@v/s{n}"))


def test_deleted_job_records_disturb_nobody(lane, chain):
    """A bucket that somebody deleted in mid-job: its jobs are gone, loads recover, others finish."""
    lane.submit(chain, 3)
    worker = lane.worker(chain)
    gone = worker.claim(1, 1)
    lane.redis.delete(lane.keys.bucket(gone.entries[0].job_id))
    assert worker.commit(gone, 1) == "s"
    assert worker.claim(1).entries == []
    lane.audit()
    while True:
        [job] = lane.submit(chain)
        if job[:14] != gone.entries[0].job_id[:14]:
            break
        lane.drain(chain)
    lane.drain(chain)
    assert lane.status(job) == "done"


def test_a_namespace_that_is_gone_is_named(lane, chain):
    """Every operation on a lane without a schema is refused as such."""
    lane.redis.delete(lane.keys.meta)
    with pytest.raises(NamespaceMissing):
        lane.push(chain, [lane.job()])
    with pytest.raises(NamespaceMissing):
        lane.worker(chain).claim(1)
    lane.run(lane.t.init(1))


def test_another_schema_is_refused(lane, chain):
    """A lane of another schema takes no operation and is not changed."""
    lane.redis.hset(lane.keys.meta, "schema", "2")
    with pytest.raises(BrokerMisconfigured, match="schema 2"):
        lane.push(chain, [lane.job()])
    lane.redis.hset(lane.keys.meta, "schema", "1")


def test_lanes_are_fixed_by_the_first_opening(lane):
    """Whoever opens a lane later learns what it was opened with."""
    assert lane.run(lane.t.init(4)) == ("1", 1, False)


def test_recount_mends(lane, chain):
    """A counter that drifted is reported with both values, and mended when asked."""
    lane.submit(chain, 2)
    lane.redis.hset(lane.keys.load, "p1@v/s1.ready_rows", 77)
    assert lane.run(lane.t.recount()) == [("p1@v/s1.ready_rows", 77, 2)]
    assert lane.run(lane.t.recount(mend=True)) == [("p1@v/s1.ready_rows", 77, 2)]
    assert lane.run(lane.t.recount()) == []
