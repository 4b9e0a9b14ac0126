"""The path of a job through its nodes: order, replays, fences, partial commits. `lane` audits the end of each test."""

from __future__ import annotations

import pytest

from torchrelay.errors import PipelineNotFound, QueueFull
from torchrelay.queues.job import FLAG_HIGH, encode_payload
from torchrelay.queues.keys import IdSource
from torchrelay.queues.scripts import StaleOperation, WorkerRetired
from torchrelay.queues.transitions import Output, Session


def test_chain_carries_a_job_from_submit_to_its_reply(lane, chain):
    """A job passes each stage once, and its client hears of the result."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    for node in (1, 2, 3):
        assert worker.step(node) == [job]
    assert lane.result(job) == {"o3": b"\x03"}
    [(replied, ended)] = lane.replies()
    assert (replied, ended.status, ended.generation, ended.rows) == (job, "done", 0, 1)
    assert lane.record(job) is None


def test_join_waits_for_both_branches_and_sees_their_outputs(lane, diamond):
    """The last node is ready when the second branch commits, and is given both outputs."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    worker.step(1)
    assert (lane.ready(diamond, 2), lane.ready(diamond, 3)) == ([job], [job])
    worker.step(3)
    assert lane.ready(diamond, 4) == []
    worker.step(2)
    grant = worker.claim(4)
    assert list(grant.entries[0].payloads) == [encode_payload({f"o{n}": bytes([n])}) for n in (2, 3)]
    worker.commit(grant, 4)
    assert lane.result(job) == {"o4": b"\x04"}


def test_two_terminal_nodes_make_one_result(lane):
    """A fork without a join ends once, when its last branch commits, with both branches' columns."""
    pipeline = lane.define({"a": (0,), "b": (1,), "c": (1,)})
    [job] = lane.submit(pipeline)
    worker = lane.worker(pipeline)
    worker.step(1)
    worker.step(3)
    assert lane.status(job) is None
    worker.step(2)
    assert lane.result(job) == {"o2": b"\x02", "o3": b"\x03"}
    assert len(lane.replies()) == 1


def test_two_entry_nodes_start_together(lane):
    """Each node that reads the pipeline's input alone is ready at submit."""
    pipeline = lane.define({"a": (0,), "b": (0,), "c": (1, 2)})
    [job] = lane.submit(pipeline)
    worker = lane.worker(pipeline)
    assert worker.step(2) == [job]
    assert worker.step(3) == []
    assert worker.step(1) == [job]
    assert worker.step(3) == [job]


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_rank_orders_jobs_on_every_hop(lane, shape):
    """High overtakes medium and low at each node; jobs of one priority keep the order of their submission."""
    pipeline = lane.define(getattr(lane, shape))
    low = lane.submit(pipeline, 3)
    medium = lane.submit(pipeline, 3, boost_ms=30_000.0)
    high = lane.submit(pipeline, 3, boost_ms=60_000.0, flags=FLAG_HIGH)
    worker = lane.worker(pipeline)
    for node in lane.graphs[pipeline].nodes:
        assert [i for _ in range(5) for i in worker.step(node.index, 2)] == high + medium + low


@pytest.mark.parametrize("way", ["fail", "fail later", "release", "reap", "retire"])
def test_rank_is_kept_when_a_job_comes_back(lane, chain, way):
    """A job that is retried, released, reaped or taken from a dead worker stands where it stood before."""
    first, second, third = lane.submit(chain, 3)
    worker = lane.worker(chain)
    grant = worker.claim(1, 1, lease_ms=1 if way == "reap" else 60_000)
    assert [e.job_id for e in grant.entries] == [first]
    if way == "fail":
        assert worker.fail(grant, 1) == "r"
    elif way == "fail later":
        assert worker.fail(grant, 1, delay_ms=1) == "r"
        lane.until(lambda: lane.run(lane.t.promote())[0])
    elif way == "release":
        assert worker.release(grant) == "r"
    elif way == "reap":
        lane.until(lambda: lane.run(lane.t.reap())[0])
    else:
        assert worker.die() == [1, 0]
    assert lane.ready(chain, 1) == [first, second, third]


def test_attempts_start_anew_at_each_node(lane, chain):
    """Attempts of one stage are not charged to the next."""
    lane.submit(chain)
    worker = lane.worker(chain)
    assert worker.fail(worker.claim(1), 1) == "r"
    grant = worker.claim(1)
    assert grant.entries[0].attempts == 1
    worker.commit(grant, 1)
    assert worker.claim(2).entries[0].attempts == 0


def test_replayed_submit_answers_as_the_first_time(lane, chain):
    """The same operation sent twice makes one job, and both answers are the same."""
    call = lane.submitting(chain, [lane.job(), lane.job()])
    assert lane.run(call) == lane.run(call)
    assert len(lane.ready(chain, 1)) == 2
    assert lane.load("p1@v/s1.ready_rows") == 2


def test_replayed_claim_returns_the_same_grant(lane, chain):
    """A claim whose answer was lost is given the same jobs under the same fence, not more."""
    lane.submit(chain, 4)
    worker = lane.worker(chain)
    call = worker.ask(1, 2)
    first, again = lane.run(call), lane.run(call)
    assert (again.fence, again.entries) == (first.fence, first.entries)
    assert len(lane.ready(chain, 1)) == 2
    worker.commit(again, 1, again.entries[:1])
    assert lane.run(call).entries == first.entries[1:]
    assert lane.redis.zcard(lane.keys.lease) == 1


def test_replayed_claim_of_a_fork_returns_the_same_inputs(lane, diamond):
    """A replayed claim at a join brings the branches' outputs again."""
    lane.submit(diamond, 2)
    worker = lane.worker(diamond)
    for node in (1, 2, 3):
        worker.step(node)
    call = worker.ask(4)
    assert lane.run(call).entries == lane.run(call).entries


def test_replayed_commit_answers_as_the_first_time(lane, chain):
    """A commit sent twice is 'k' twice, and advances the job once."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    call = worker.committing(grant, 1)
    assert [lane.run(call), lane.run(call)] == ["kk", "kk"]
    assert lane.load("p1@v/s1.committed") == 2
    assert worker.commit(grant, 1) == "ss"


@pytest.mark.parametrize("operation", ["fail", "release", "lost"])
def test_replayed_returns_answer_as_the_first_time(lane, chain, operation):
    """fail, release and lost sent twice write once."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    tokens = [e.packed for e in grant.entries]
    calls = {
        "fail": lambda: lane.t.fail(worker.session, grant.fence, chain, 1, [(tokens[0], 0, lane.WHY)], 3),
        "release": lambda: lane.t.release(worker.session, grant.fence, tokens),
        "lost": lambda: lane.t.lost(worker.session, grant.fence, tokens, lane.WHY),
    }
    call = calls[operation]()
    first = lane.run(call)
    before = lane.record(job)
    assert lane.run(call) == first
    assert lane.record(job) == before


def test_lower_operation_numbers_are_refused(lane, chain):
    """An operation older than its slot's is refused, with nothing written."""
    old = lane.submitting(chain, [lane.job()])
    for _ in range(15):
        lane.submit(chain)
    lane.submit(chain)
    before = lane.ready(chain, 1)
    with pytest.raises(StaleOperation):
        lane.run(old)
    assert lane.ready(chain, 1) == before


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_stale_fence_writes_nothing(lane, shape):
    """A worker whose lease ran out cannot commit, fail, release or lose what another one holds."""
    pipeline = lane.define(getattr(lane, shape))
    [job] = lane.submit(pipeline)
    slow, fast = lane.worker(pipeline), lane.worker(pipeline)
    stale = slow.claim(1, lease_ms=1)
    lane.until(lambda: lane.run(lane.t.reap())[0])
    held = fast.claim(1)
    before = (lane.record(job), lane.redis.hgetall(lane.keys.load), lane.redis.hgetall(lane.keys.grants))
    assert [slow.commit(stale, 1), slow.fail(stale, 1), slow.release(stale), slow.lost(stale)] == ["s"] * 4
    assert (lane.record(job), lane.redis.hgetall(lane.keys.load), lane.redis.hgetall(lane.keys.grants)) == before
    assert fast.commit(held, 1) == "k"


def test_forged_fence_and_generation_write_nothing(lane, chain):
    """A fence that was never given, a token of another generation, and a job of another grant are all stale."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    one, two = worker.claim(1, 1), worker.claim(1, 1)
    other_generation = [Output(one.entries[0].packed[:-1] + bytes([129]), b"\x92\x80\xc4\x00")]
    assert lane.run(lane.t.commit(worker.session, "forged-1", chain, 1, worker.outputs(1, one.entries))) == "s"
    assert lane.run(lane.t.commit(worker.session, one.fence, chain, 1, other_generation)) == "s"
    assert worker.commit(one, 1, two.entries) == "s"
    assert lane.run(lane.t.commit(worker.session, one.fence, chain, 2, worker.outputs(2, one.entries))) == "s"
    assert lane.load("p1@v/s1.committed") == 0
    assert [worker.commit(one, 1), worker.commit(two, 1)] == ["k", "k"]


def test_malformed_commit_is_refused_before_it_writes(lane, chain):
    """Fewer payloads than entries, or a node that does not exist, refuse the whole call."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    call = worker.committing(grant, 1)
    call.args.pop()
    with pytest.raises(Exception, match="TRARGS"):
        lane.run(call)
    with pytest.raises(Exception, match="TRARGS"):
        lane.run(lane.t.commit(worker.session, grant.fence, chain, 9, worker.outputs(1, grant.entries)))
    with pytest.raises(PipelineNotFound):
        lane.run(lane.t.commit(worker.session, grant.fence, 99, 1, worker.outputs(1, grant.entries)))
    assert worker.commit(grant, 1, []) == ""
    assert worker.commit(grant, 1) == "kk"


def test_the_same_entry_twice_in_one_commit_counts_once(lane, chain):
    """A doubled entry is committed once; its double is stale."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    doubled = [grant.entries[0], grant.entries[0]]
    assert worker.commit(grant, 1, doubled) == "ks"
    assert worker.commit(grant, 1, grant.entries[1:]) == "k"


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_a_grant_may_be_given_back_in_parts(lane, shape):
    """Parts of one grant can be committed, failed and released, in any order, each once."""
    pipeline = lane.define(getattr(lane, shape))
    jobs = lane.submit(pipeline, 6)
    worker = lane.worker(pipeline)
    grant = worker.claim(1)
    e = grant.entries
    assert worker.commit(grant, 1, [e[4], e[1]]) == "kk"
    assert worker.fail(grant, 1, [e[0]]) == "r"
    assert worker.release(grant, [e[5]]) == "r"
    assert worker.commit(grant, 1, [e[1], e[2]]) == "sk"
    assert lane.load(f"{lane.node_key(pipeline, 1)}.held_rows") == 1
    assert lane.ready(pipeline, 1) == [jobs[0], jobs[5]]
    lane.audit()
    assert worker.commit(grant, 1, [e[3]]) == "k"
    assert lane.redis.hlen(lane.keys.grants) == 0
    assert lane.ready(pipeline, 2) == [jobs[i] for i in (1, 2, 3, 4)]


def test_committed_rows_are_counted_at_the_next_node(lane, chain):
    """A commit may change a job's rows, or leave them; loads follow."""
    lane.submit(chain, 2, rows=3)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    made = worker.outputs(1, grant.entries[:1], rows=7) + worker.outputs(1, grant.entries[1:])
    assert lane.run(lane.t.commit(worker.session, grant.fence, chain, 1, made)) == "kk"
    assert lane.load("p1@v/s2.ready_rows") == 10
    assert sorted(e.rows for e in worker.claim(2).entries) == [3, 7]


def test_rows_of_a_branch_stay_with_the_branch(lane, diamond):
    """In a fork, a commit that leaves the rows keeps its own node's, not the input's."""
    lane.submit(diamond, rows=2)
    worker = lane.worker(diamond)
    worker.commit(worker.claim(1), 1, rows=5)
    grant = worker.claim(2)
    assert grant.entries[0].rows == 5
    worker.commit(grant, 2)
    assert worker.claim(3).entries[0].rows == 5


def test_claim_is_bounded_by_jobs_rows_and_bytes(lane, chain):
    """A claim stops at the first job that does not fit, and takes one that is too large alone when it is first."""
    big, *small = lane.submit(chain, rows=100) + lane.submit(chain, 5, rows=4)
    worker = lane.worker(chain)
    assert [e.job_id for e in worker.claim(1, rows=10).entries] == [big]
    assert [e.job_id for e in worker.claim(1, rows=10).entries] == small[:2]
    assert [e.job_id for e in worker.claim(1, 1).entries] == small[2:3]
    one_record = len(lane.record(small[3]))
    assert [e.job_id for e in worker.claim(1, nbytes=one_record + 1).entries] == small[3:4]


def test_claims_of_several_peeks_are_in_order(lane, chain):
    """A window over 64 jobs is one grant in rank order."""
    jobs = lane.submit(chain, 200)
    worker = lane.worker(chain)
    assert [e.job_id for e in worker.claim(1, 150).entries] == jobs[:150]
    assert worker.claim(1).left == 0


def test_late_claim_of_a_retired_worker_is_refused(lane, chain):
    """A claim that arrives after its worker was declared dead takes nothing."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    late = worker.ask(1)
    worker.die()
    with pytest.raises(WorkerRetired):
        lane.run(late)
    assert lane.ready(chain, 1) == [job]


def test_retiring_one_worker_leaves_others_alone(lane, chain):
    """An incarnation whose name begins like the dead one's keeps its grants."""
    lane.submit(chain, 2)
    worker, other = lane.worker(chain), lane.worker(chain)
    other.incarnation = worker.incarnation + "0"
    mine, its = worker.claim(1, 1), other.claim(1, 1)
    assert worker.die() == [1, 0]
    assert other.commit(its, 1) == "k"
    assert worker.commit(mine, 1) == "s"


def test_retire_is_safe_to_repeat(lane, chain):
    """A second retirement finds nothing to do."""
    lane.submit(chain, 3)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    assert worker.die(grant.entries[:1]) == [3, 0]
    assert worker.die(grant.entries[:1]) == [0, 0]


def test_renew_prolongs_a_lease_and_tells_what_is_void(lane, chain):
    """Renewal moves the expiry, names entries that were cancelled, and says when the grant is gone."""
    keep, drop = lane.submit(chain, 2)
    worker = lane.worker(chain)
    grant = worker.claim(1, lease_ms=1000)
    assert lane.run(lane.t.cancel([drop])) == "w"
    [[held, revoked]] = lane.run(lane.t.renew(3_600_000, [grant.fence]))
    assert (held, revoked) == (True, [e.packed for e in grant.entries if e.job_id == drop])
    assert lane.redis.zscore(lane.keys.lease, grant.fence) > grant.expires_ms + 3_000_000
    assert worker.commit(grant, 1) == "ks"
    assert lane.run(lane.t.renew(1000, [grant.fence, "forged-1"])) == [(False, []), (False, [])]
    assert lane.redis.zcard(lane.keys.lease) == 0
    assert lane.ready(chain, 2) == [keep]


def test_expired_leases_go_back_exactly_once(lane, diamond):
    """However many reapers look, an expired grant's jobs are ready again once, and nobody is a suspect."""
    lane.submit(diamond, 20)
    worker = lane.worker(diamond)
    worker.claim(1, 10, lease_ms=1)
    worker.claim(1, 10, lease_ms=60_000)
    lane.until(lambda: lane.redis.zcount(lane.keys.lease, "-inf", lane.server_ms()))
    pending = [lane.channel.send(lane.t.reap()) for _ in range(16)]
    assert sum(p.result()[0] for p in pending) == 10
    assert len(lane.ready(diamond, 1)) == 10
    assert not any(e.suspect or e.strikes for e in worker.claim(1).entries)


def test_submitting_a_live_or_ended_id_again_changes_nothing(lane, chain):
    """An id that is known, here or earlier in the same call, is named as such and not made anew."""
    job = lane.job()
    assert lane.push(chain, [job, job]).statuses == "nd"
    assert lane.push(chain, [job]).statuses == "d"
    lane.drain(chain)
    assert lane.push(chain, [job]).statuses == "t"
    assert lane.load("p1@v.k") == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 2.0**53])
@pytest.mark.parametrize("field", ["boost_ms", "delay_ms", "deadline_ms"])
def test_times_that_are_no_numbers_are_refused_before_a_write(lane, chain, field, number):
    """NaN, infinite and huge times refuse the whole call and leave no trace."""
    with pytest.raises(Exception, match="must be numbers"):
        lane.push(chain, [lane.job(), lane.job(**{field: number})])
    assert lane.ready(chain, 1) == []


def test_unknown_pipeline_is_refused(lane, chain):
    """A pipeline number that nobody defined is a PipelineNotFound for client and worker."""
    with pytest.raises(PipelineNotFound):
        lane.push(chain + 1, [lane.job()])
    with pytest.raises(PipelineNotFound):
        lane.worker(chain + 1).claim(1)


def test_versions_are_served_apart(lane):
    """Two versions at once: each job runs on its own version's nodes only."""
    old, new = lane.define(lane.CHAIN), lane.define(lane.CHAIN)
    first, second = lane.submit(old, 2), lane.submit(new, 2)
    old_worker, new_worker = lane.worker(old), lane.worker(new)
    for node in (1, 2, 3):
        assert new_worker.step(node) == second
        assert new_worker.step(node) == []
    for node in (1, 2, 3):
        assert old_worker.step(node) == first
    assert {lane.status(i) for i in first + second} == {"done"}


def test_two_clients_hear_of_their_own_jobs_only(lane, chain):
    """Each client's reply list holds its own jobs."""
    other = IdSource(0)
    theirs = lane.job(ids=other)
    [mine] = lane.submit(chain)
    assert lane.push(chain, [theirs], session=Session(other.client)).statuses == "n"
    lane.drain(chain)
    assert [i for i, _ in lane.replies()] == [mine]
    assert [i for i, _ in lane.replies(other.client)] == [theirs.id]


def test_scripts_may_vanish_between_any_two_calls(lane, chain):
    """SCRIPT FLUSH in mid-run fails nothing: calls carry on with their source."""
    jobs = lane.submit(chain, 5)
    worker = lane.worker(chain)
    for node in (1, 2, 3):
        lane.redis.script_flush()
        grant = worker.claim(node)
        lane.redis.script_flush()
        assert worker.commit(grant, node) == "kkkkk"
    assert {lane.status(i) for i in jobs} == {"done"}


def test_results_over_the_budget_stop_new_jobs_only(lane, chain):
    """Unread results count against a budget; acking them opens it again."""
    [job] = lane.submit(chain, flags=16)
    lane.drain(chain)
    with pytest.raises(QueueFull, match="results"):
        lane.push(chain, [lane.job()], budget=0)
    assert lane.run(lane.t.ack([job])) == 1
    assert lane.push(chain, [lane.job()], budget=0).statuses == "n"
