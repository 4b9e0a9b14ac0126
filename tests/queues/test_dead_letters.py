"""What happens to jobs that fail or kill their workers: retries, suspects, dead letters, redrive, drop."""

from __future__ import annotations

import msgpack
import pytest

from torchrelay.queues.job import Failure


def die_with_all(lane, pipeline, node, poison):
    """Workers claim and crash while a poisonous job is in their batch, until nothing is ready."""
    solo = dict.fromkeys(poison, 0)
    for _ in range(200):
        worker = lane.worker(pipeline)
        grant = worker.claim(node, 8)
        if not grant.entries:
            return solo
        if poison & {e.job_id for e in grant.entries}:
            if len(grant.entries) == 1:
                solo[grant.entries[0].job_id] += 1
            worker.die(grant.entries)
        else:
            assert worker.commit(grant, node) == "k" * len(grant.entries)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_failed_jobs_are_retried_then_dead(lane, shape):
    """A job that raises on its last attempt is dead, keeps its history, and ends once for its client."""
    pipeline = lane.define(getattr(lane, shape))
    [job] = lane.submit(pipeline)
    worker = lane.worker(pipeline)
    worker.step(1)
    assert [worker.fail(worker.claim(2), 2) for _ in range(3)] == ["r", "r", "f"]
    ended = lane.terminal(job)
    assert (ended.status, ended.attempts, ended.node) == ("failed", 3, 2)
    assert Failure.decode(ended.payload) == lane.WHY
    assert [i for i, _ in lane.replies()] == [job]
    letter = msgpack.unpackb(lane.redis.hget(lane.keys.dead, job), raw=True, strict_map_key=False)
    assert Failure.decode_all(letter[3]) == [lane.WHY] * 3
    assert lane.load(f"p{pipeline}@v.dead") == 1
    assert lane.load(f"{lane.node_key(pipeline, 2)}.failed") == 3


def test_a_failure_on_one_branch_ends_the_other(lane, diamond):
    """When a branch fails for good, the other branch's ready entry leaves, and its held one is stale."""
    ready_too, held_too = lane.submit(diamond, 2)
    worker = lane.worker(diamond)
    worker.step(1)
    other = lane.worker(diamond)
    grant = worker.claim(2)
    held = other.claim(3, 1)
    assert [e.job_id for e in held.entries] == [ready_too]
    assert worker.fail(grant, 2, most=1) == "ff"
    assert lane.ready(diamond, 3) == []
    assert other.commit(held, 3) == "s"
    assert lane.status(held_too) == "failed"


def test_stale_failures_are_not_charged(lane, chain):
    """Failing what is not held counts nothing."""
    lane.submit(chain)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    worker.commit(grant, 1)
    assert worker.fail(grant, 1) == "s"
    assert lane.load("p1@v/s1.failed") == 0


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_redrive_starts_where_the_job_died(lane, shape):
    """A redriven job runs from the node where it died, with the outputs made before, and exists once."""
    pipeline = lane.define(getattr(lane, shape))
    [job] = lane.submit(pipeline, rows=2)
    worker = lane.worker(pipeline)
    last = len(lane.graphs[pipeline].nodes)
    for node in range(1, last):
        grant = worker.claim(node)
        worker.commit(grant, node, rows=5)
    inputs = worker.claim(last)
    assert worker.fail(inputs, last, most=1) == "f"
    call = lane.t.redrive([job, job, "nobody0000000000"])
    assert lane.run(call) == [f"{job}~1", f"{job}~1", ""]
    assert lane.run(call) == [f"{job}~1", f"{job}~1", ""]
    lane.audit()
    grant = worker.claim(last)
    assert [e.job_id for e in grant.entries] == [f"{job}~1"]
    assert grant.entries[0].payloads == inputs.entries[0].payloads
    assert (grant.entries[0].attempts, grant.entries[0].rows) == (0, 5)
    worker.commit(grant, last)
    assert (lane.status(job), lane.status(f"{job}~1")) == ("failed", "done")
    assert [i for i, _ in lane.replies()] == [job, f"{job}~1"]


def test_redrive_of_a_branch_reruns_only_open_nodes(lane, diamond):
    """A job that died on one branch while the other was waiting redrives both, not what was done."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    worker.step(1)
    worker.fail(worker.claim(2), 2, most=1)
    [again] = lane.run(lane.t.redrive([job]))
    assert [lane.ready(diamond, n) for n in (1, 2, 3, 4)] == [[], [again], [again], []]
    lane.drain(diamond)
    assert lane.status(again) == "done"


def test_a_redriven_job_can_die_and_be_redriven_again(lane, chain):
    """Names go on counting: ~1, then ~2."""
    [job] = lane.submit(chain, keep_s=0)
    worker = lane.worker(chain)
    name = job
    for n in (1, 2, 3):
        assert worker.fail(worker.claim(1), 1, most=1) == "f"
        assert lane.run(lane.t.redrive([name])) == [f"{job}~{n}"]
        name = f"{job}~{n}"
    lane.drain(chain)
    assert lane.status(name) == "done"
    assert lane.run(lane.t.redrive([job, f"{job}~1"])) == [f"{job}~1", f"{job}~2"]


def test_dropped_dead_letters_are_gone(lane, chain):
    """Dropping frees a dead letter, redriven or not; what is not there is named by an empty id."""
    one, two = lane.submit(chain, 2)
    worker = lane.worker(chain)
    worker.fail(worker.claim(1), 1, most=1)
    lane.run(lane.t.redrive([two]))
    assert lane.run(lane.t.drop_dead([one, one, two, "nobody0000000000"])) == [one, "", two, ""]
    assert lane.redis.hlen(lane.keys.dead) == 0
    assert lane.load("p1@v.dead") == 0
    assert lane.run(lane.t.redrive([one])) == [""]


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_poison_dies_after_three_solo_strikes_and_innocents_live(lane, shape):
    """Suspects of a crashed batch rerun alone; only a job that kills its worker alone three times is dead."""
    pipeline = lane.define(getattr(lane, shape))
    jobs = lane.submit(pipeline, 20)
    lane.worker(pipeline).step(1)
    poison = {jobs[3], jobs[12]}
    assert die_with_all(lane, pipeline, 2, poison) == dict.fromkeys(poison, 3)
    assert {i for i in jobs if lane.status(i) == "failed"} == poison
    lane.drain(pipeline)
    assert {i for i in jobs if lane.status(i) == "done"} == set(jobs) - poison
    assert {Failure.decode(lane.terminal(i).payload) for i in poison} == {lane.WHY}


def test_suspects_are_granted_alone(lane, chain):
    """After a crash with several jobs, each suspect makes a batch of its own; a job behind them is not drawn in."""
    jobs = lane.submit(chain, 3)
    worker = lane.worker(chain)
    worker.die(worker.claim(1).entries)
    lane.submit(chain)
    successor = lane.worker(chain)
    grants = [successor.claim(1) for _ in range(4)]
    assert [[e.suspect for e in g.entries] for g in grants] == [[True], [True], [True], [False]]
    assert [g.entries[0].job_id for g in grants[:3]] == jobs
    assert [g.entries[0].strikes for g in grants] == [0, 0, 0, 0]


def test_a_window_stops_before_a_suspect(lane, chain):
    """A suspect behind others waits for a batch of its own."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    worker.die(worker.claim(1).entries)
    ahead = lane.submit(chain, 2, boost_ms=60_000.0)
    successor = lane.worker(chain)
    assert [e.job_id for e in successor.claim(1).entries] == ahead
    assert [e.suspect for e in successor.claim(1).entries] == [True]


def test_raising_clears_suspicion_and_release_charges_nothing(lane, chain):
    """A suspect that raises did not kill its worker; a job that is given back has no attempt more."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    worker.die(worker.claim(1).entries)
    worker = lane.worker(chain)
    assert worker.fail(worker.claim(1), 1) == "r"
    assert worker.release(worker.claim(1)) == "r"
    entries = worker.claim(1).entries + worker.claim(1).entries
    assert [(e.attempts, e.strikes, e.suspect) for e in entries] == [(1, 0, False), (0, 0, True)]


def test_only_started_jobs_become_suspects(lane, chain):
    """What a dead worker held but was not computing goes back unmarked."""
    lane.submit(chain, 4)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    worker.die(grant.entries[:2])
    marks = []
    while entries := lane.worker(chain).claim(1).entries:
        marks.append([e.suspect for e in entries])
    assert marks == [[True], [True], [False, False]]


def test_a_success_clears_suspicion(lane, chain):
    """A suspect that commits alone is like any other at the next node."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    worker.die(worker.claim(1).entries)
    worker = lane.worker(chain)
    assert [len(worker.step(1)) for _ in range(2)] == [1, 1]
    assert [e.suspect for e in worker.claim(2).entries] == [False, False]


def test_a_cancelled_suspect_stays_cancelled(lane, chain):
    """Retiring a worker brings nothing back that was cancelled while it computed."""
    job, other = lane.submit(chain, 2)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    lane.run(lane.t.cancel([job]))
    assert worker.die(grant.entries) == [1, 0]
    assert lane.ready(chain, 1) == [other]


def test_one_worker_with_two_branches_of_a_job_is_retired_whole(lane, diamond):
    """A job that is buried because of one grant does not come back by the dead worker's other grant."""
    [job] = lane.submit(diamond)
    lane.worker(diamond).step(1)
    for _ in range(3):
        worker = lane.worker(diamond)
        left, right = worker.claim(2), worker.claim(3)
        assert (len(left.entries), len(right.entries)) == (1, 1)
        worker.die(left.entries)
    assert lane.status(job) == "failed"


def test_history_is_bounded(lane, chain):
    """A job that fails for ever does not grow for ever."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    why = Failure("s1", "ValueError", "m" * 4000, "t" * 12000)
    for _ in range(30):
        grant = worker.claim(1)
        lane.run(lane.t.fail(worker.session, grant.fence, chain, 1, [(grant.entries[0].packed, 0, why)], 1000))
    assert lane.redis.hstrlen(lane.keys.bucket(job), job[14:] + "#h") <= 65536
    assert worker.claim(1).entries[0].attempts == 30


def test_dead_letters_that_were_redriven_are_swept_after_a_week(lane, chain):
    """The listing of what was redriven is not kept for ever."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    worker.fail(worker.claim(1), 1, most=1)
    lane.run(lane.t.redrive([job]))
    lane.redis.zadd(lane.keys.tag + "doneq", {f"dead:{job}": 1})
    assert lane.run(lane.t.sweep()) == 1
    assert lane.redis.hlen(lane.keys.dead) == 0
    lane.drain(chain)
    assert lane.status(f"{job}~1") == "done"
