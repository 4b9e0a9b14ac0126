"""Ends other than the last commit, and how what jobs leave is forgotten: cancel, deadline, keys, ack, sweep."""

from __future__ import annotations

import hashlib

import pytest

from torchrelay.queues.job import FLAG_KEYED, FLAG_UNTIL_ACK
from torchrelay.queues.keys import IdSource
from torchrelay.queues.transitions import Session


def waiting(lane, pipeline, **options):
    return lane.submit(pipeline, **options)


def delayed(lane, pipeline, **options):
    return lane.submit(pipeline, delay_ms=3_600_000, **options)


def retried(lane, pipeline, **options):
    jobs = lane.submit(pipeline, **options)
    worker = lane.worker(pipeline)
    assert worker.fail(worker.claim(1), 1, delay_ms=3_600_000) == "r"
    return jobs


def claimed(lane, pipeline, **options):
    jobs = lane.submit(pipeline, **options)
    lane.late = lane.worker(pipeline)
    lane.held = lane.late.claim(1)
    return jobs


def forked(lane, pipeline, **options):
    jobs = lane.submit(pipeline, **options)
    lane.worker(pipeline).step(1)
    return jobs


def half_joined(lane, pipeline, **options):
    jobs = forked(lane, pipeline, **options)
    lane.worker(pipeline).step(2)
    return jobs


def half_joined_and_held(lane, pipeline, **options):
    jobs = half_joined(lane, pipeline, **options)
    lane.late = lane.worker(pipeline)
    lane.held = lane.late.claim(3)
    return jobs


STATES = [waiting, delayed, retried, claimed, forked, half_joined, half_joined_and_held]
JOINS = [half_joined, half_joined_and_held]
EVERYWHERE = pytest.mark.parametrize("reach", STATES, ids=[s.__name__ for s in STATES])


@pytest.mark.parametrize(
    ("shape", "reach"), [("CHAIN", s) for s in STATES if s not in JOINS] + [("DIAMOND", s) for s in STATES]
)
def test_cancel_ends_a_job_wherever_it_is(lane, shape, reach):
    """Cancelling wins once, tells the client, leaves nothing behind, and makes held work stale."""
    pipeline = lane.define(getattr(lane, shape))
    [job] = reach(lane, pipeline)
    assert lane.run(lane.t.cancel([job, job, "nobody0000000000", "", "x"])) == "wtuuu"
    assert lane.run(lane.t.cancel([job])) == "t"
    assert [(i, t.status) for i, t in lane.replies()] == [(job, "cancelled")]
    lane.audit()
    if hasattr(lane, "held"):
        node = 3 if reach is half_joined_and_held else 1
        assert lane.late.commit(lane.held, node) == "s"
    assert all(lane.ready(pipeline, n.index) == [] for n in lane.graphs[pipeline].nodes)


@EVERYWHERE
def test_a_deadline_ends_a_job_wherever_it_is(lane, diamond, reach):
    """When the deadline passes, the job is expired once, and its client is told."""
    [job] = reach(lane, diamond, deadline_ms=40)
    lane.until(lambda: lane.run(lane.t.expire()))
    assert [(i, t.status) for i, t in lane.replies()] == [(job, "expired")]
    assert lane.run(lane.t.expire()) == 0
    lane.audit()
    if hasattr(lane, "held"):
        assert lane.late.commit(lane.held, 3 if reach is half_joined_and_held else 1) == "s"


def test_claim_ends_expired_jobs_at_the_head(lane, chain):
    """Jobs past their deadline are not granted; what lies behind them is, in the same claim."""
    late = lane.submit(chain, 150, deadline_ms=1, boost_ms=1000.0)
    good = lane.submit(chain, 3)
    lane.until(lambda: lane.server_ms() > lane.redis.zrange(lane.keys.tag + "deadline", -1, -1, withscores=True)[0][1])
    assert [e.job_id for e in lane.worker(chain).claim(1).entries] == good
    assert {lane.status(i) for i in late} == {"expired"}


def test_claim_ends_at_most_256_expired_jobs_and_passes_the_baton(lane, chain):
    """A claim that spent its time on expired jobs leaves a wake token for what remains."""
    for _ in range(4):
        lane.submit(chain, 100, deadline_ms=1, boost_ms=1000.0)
    good = lane.submit(chain, 1)
    lane.until(lambda: lane.server_ms() > lane.redis.zrange(lane.keys.tag + "deadline", -1, -1, withscores=True)[0][1])
    lane.redis.delete(lane.keys.wake("p1@v/s1"))
    worker = lane.worker(chain)
    first = worker.claim(1)
    assert (first.entries, first.left) == ([], 145)
    assert lane.tokens(chain, 1) == 1
    assert [e.job_id for e in worker.claim(1).entries] == good


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_commit_past_the_deadline_ends_the_job(lane, shape):
    """A commit after the deadline expires the job instead of advancing it."""
    pipeline = lane.define(getattr(lane, shape))
    [job] = lane.submit(pipeline, deadline_ms=30)
    worker = lane.worker(pipeline)
    grant = worker.claim(1)
    lane.until(lambda: lane.server_ms() > grant.entries[0].deadline_ms)
    assert worker.commit(grant, 1) == "d"
    assert lane.status(job) == "expired"


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_delayed_jobs_start_when_they_are_due(lane, shape):
    """A delayed job is not ready before its time; then a claim itself takes it, ranked by that time."""
    pipeline = lane.define(getattr(lane, shape))
    [late] = lane.submit(pipeline, delay_ms=30)
    worker = lane.worker(pipeline)
    grant = worker.claim(1)
    assert grant.entries == []
    assert 0 <= grant.next_due_ms <= 30
    [soon] = lane.submit(pipeline)
    lane.until(lambda: lane.server_ms() > lane.redis.zrange(lane.keys.delayed, 0, 0, withscores=True)[0][1])
    assert [e.job_id for e in worker.claim(1).entries] == [soon, late]


def test_promote_says_when_the_next_is_due(lane, chain):
    """promote counts what it made ready and tells how long until the next."""
    lane.submit(chain, 2, delay_ms=1)
    lane.submit(chain, delay_ms=60_000)
    lane.until(lambda: len(lane.ready(chain, 1)) + lane.run(lane.t.promote())[0] >= 2)
    count, due_ms = lane.run(lane.t.promote())
    assert count == 0
    assert 0 < due_ms <= 60_000
    assert lane.tokens(chain, 1) == 1


def keyed(lane, key, content="c", ids=None, **options):
    digests = hashlib.md5(key.encode()).digest() + hashlib.md5(content.encode()).digest()
    return lane.job(ids=ids, flags=FLAG_KEYED | options.pop("flags", 0), key_digests=digests, **options)


def test_a_key_leads_to_its_job(lane, chain):
    """The same key and content names the first job, live or ended; other content is refused."""
    first = keyed(lane, "doc")
    assert lane.push(chain, [first]).statuses == "n"
    again = lane.push(chain, [keyed(lane, "doc"), keyed(lane, "doc", "other"), keyed(lane, "new")])
    assert (again.statuses, again.named) == ("kxn", [first.id, first.id])
    lane.drain(chain)
    ended = lane.push(chain, [keyed(lane, "doc"), keyed(lane, "doc", "other")])
    assert (ended.statuses, ended.named) == ("ex", [first.id, first.id])
    assert lane.replies()[-1][0] == first.id
    assert lane.load("p1@v.k") == 2


def test_a_key_twice_in_one_call_makes_one_job(lane, chain):
    """Duplicates within a batch are found, with the same and with other content."""
    jobs = [keyed(lane, "a"), keyed(lane, "a"), keyed(lane, "a", "other"), keyed(lane, "b")]
    answer = lane.push(chain, jobs)
    assert (answer.statuses, answer.named) == ("nkxn", [jobs[0].id, jobs[0].id])
    assert lane.ready(chain, 1) == [jobs[0].id, jobs[3].id]


def test_another_client_with_the_same_key_hears_of_the_end(lane, chain):
    """A subscriber gets the reply too, once, and at once when the job had ended."""
    first = keyed(lane, "doc")
    lane.push(chain, [first])
    other, late = IdSource(0), IdSource(0)
    session = Session(other.client)
    for _ in range(2):
        assert lane.push(chain, [keyed(lane, "doc", ids=other)], session=session).named == [first.id]
    lane.drain(chain)
    assert [(i, t.status) for i, t in lane.replies(other.client)] == [(first.id, "done")]
    assert lane.push(chain, [keyed(lane, "doc", ids=late)], session=Session(late.client)).statuses == "e"
    assert [(i, t.status) for i, t in lane.replies(late.client)] == [(first.id, "done")]
    assert [i for i, _ in lane.replies()] == [first.id]


def test_at_most_sixteen_subscribers(lane, chain):
    """More clients than sixteen find the job's record by asking; nothing breaks."""
    first = keyed(lane, "doc")
    lane.push(chain, [first])
    clients = [IdSource(0) for _ in range(20)]
    for ids in clients:
        assert lane.push(chain, [keyed(lane, "doc", ids=ids)], session=Session(ids.client)).statuses == "k"
    lane.drain(chain)
    assert sum(len(lane.replies(c.client)) for c in clients) == 16


def test_a_subscriber_prolongs_how_long_the_result_is_kept(lane, chain):
    """A fire-and-forget job that another client names by its key leaves a result for it."""
    first = keyed(lane, "doc", keep_s=0)
    lane.push(chain, [first])
    other = IdSource(0)
    lane.push(chain, [keyed(lane, "doc", ids=other, keep_s=60)], session=Session(other.client))
    lane.drain(chain)
    assert lane.status(first.id) == "done"
    assert [i for i, _ in lane.replies(other.client)] == [first.id]


def test_keys_are_free_after_the_sweep(lane, chain):
    """When a result is swept, its key can name a new job with other content."""
    first = keyed(lane, "doc", keep_s=1)
    lane.push(chain, [first])
    lane.drain(chain)
    lane.redis.zadd(lane.keys.tag + "doneq", {first.id: 1})
    assert lane.run(lane.t.sweep()) == 1
    assert lane.redis.hlen(lane.keys.tag + "keys") == 0
    assert lane.push(chain, [keyed(lane, "doc", "other")]).statuses == "n"


def test_a_key_whose_job_was_deleted_is_free(lane, chain):
    """A key that leads nowhere, since somebody deleted the record, makes a new job."""
    first = keyed(lane, "doc")
    lane.push(chain, [first])
    lane.redis.delete(lane.keys.bucket(first.id))
    assert lane.worker(chain).step(1) == []
    second = keyed(lane, "doc", ids=IdSource(0))
    assert lane.push(chain, [second]).statuses == "n"
    lane.drain(chain)
    assert lane.status(second.id) == "done"


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_fire_and_forget_leaves_nothing(lane, chain, end):
    """With keep_s 0 there is no terminal record, no reply, and the key is free again."""
    job = keyed(lane, "doc", keep_s=0)
    lane.push(chain, [job])
    if end == "done":
        lane.drain(chain)
    elif end == "cancelled":
        assert lane.run(lane.t.cancel([job.id])) == "w"
    else:
        worker = lane.worker(chain)
        worker.fail(worker.claim(1), 1, most=1)
        assert lane.run(lane.t.drop_dead([job.id])) == [job.id]
    assert lane.replies() == []
    assert lane.terminal(job.id) is None
    assert lane.load("results.bytes") == 0
    assert lane.push(chain, [keyed(lane, "doc")]).statuses == "n"


def test_ack_frees_what_is_kept_until_delivered(lane, chain):
    """Acks free until-ack results once, however often an id is named; kept and keyed ones stay."""
    [brief] = lane.submit(chain, flags=FLAG_UNTIL_ACK)
    [kept] = lane.submit(chain)
    named = keyed(lane, "doc", flags=FLAG_UNTIL_ACK)
    lane.push(chain, [named])
    lane.drain(chain)
    assert lane.run(lane.t.ack([brief, brief, kept, named.id, "nobody0000000000"])) == 1
    assert lane.run(lane.t.ack([brief])) == 0
    assert lane.run(lane.t.ack([])) == 0
    assert [lane.status(i) for i in (brief, kept, named.id)] == [None, "done", "done"]


def test_sweep_forgets_what_is_past_its_keep_time(lane, chain):
    """Swept results are gone with their bytes in the budget; younger ones stay."""
    old = lane.submit(chain, 5, keep_s=1)
    young = lane.submit(chain, 2, keep_s=3600)
    lane.drain(chain)
    lane.redis.zadd(lane.keys.tag + "doneq", dict.fromkeys(old, 1))
    assert lane.run(lane.t.sweep(3)) == 3
    assert lane.run(lane.t.sweep(3)) == 2
    assert lane.run(lane.t.sweep(3)) == 0
    assert [lane.status(i) for i in (*old, *young)] == [None] * 5 + ["done"] * 2
