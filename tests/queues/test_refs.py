"""Columns that travel out of band: when blobs become permanent, when they are freed, and what if they are lost."""

from __future__ import annotations

import msgpack
import pytest

from torchrelay.errors import BrokerMisconfigured, InputError
from torchrelay.queues.job import FLAG_UNTIL_ACK, Ref
from torchrelay.queues.transitions import Output


def ref(name, consumers, chunks=1):
    return f"{name}:{chunks}:{5 * chunks}:{consumers},"


def submit_with_input(lane, pipeline, consumers=7, **options):
    """A job with one input blob; returns the job's id and the blob's name."""
    job = lane.job(**options)
    name = lane.blob(f"{job.id}.0.in.x")
    job = job._replace(refs=ref(name, consumers))
    assert lane.push(pipeline, [job]).statuses == "n"
    return job.id, name


def commit_with_blob(lane, worker, node, consumers, *, column="y", chunks=1):
    """Claims one job, writes one blob for it, and commits; returns the blob's name."""
    grant = worker.claim(node, 1)
    entry = grant.entries[0]
    name = lane.blob(f"{entry.job_id}.{node}.{grant.fence}.{column}", chunks)
    assert worker.commit(grant, node, refs=ref(name, consumers, chunks)) == "k"
    return name


def commit_plain(lane, worker, node):
    assert len(worker.step(node, 1)) == 1


def test_submit_refuses_incomplete_blobs(lane, chain):
    """A job whose blob misses a chunk is 'b' and leaves no trace; the others of its call are made."""
    whole, cut, good = lane.job(), lane.job(), lane.job()
    name = lane.blob(f"{cut.id}.0.in.x", 1)
    cut = cut._replace(refs=ref(name, 1, chunks=2))
    lane.blob(f"{whole.id}.0.in.x", 2)
    whole = whole._replace(refs=ref(f"{whole.id}.0.in.x", 1, chunks=2))
    assert lane.push(chain, [whole, cut, good]).statuses == "nbn"
    assert lane.record(cut.id) is None
    assert lane.blobs()[name] > 0
    assert lane.blobs()[f"{whole.id}.0.in.x"] == -1


def test_commit_refuses_incomplete_blobs_and_keeps_the_job(lane, chain):
    """A commit whose blob is incomplete is 'b' for that job only; it stays in the grant and can be committed again."""
    lane.submit(chain, 2)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    one, two = grant.entries
    name = lane.blob(f"{one.job_id}.1.{grant.fence}.y", 1)
    made = [
        *worker.outputs(1, [one], refs=ref(name, 2, chunks=2)),
        *worker.outputs(1, [two]),
    ]
    assert lane.run(lane.t.commit(worker.session, grant.fence, chain, 1, made)) == "bk"
    assert lane.load("p1@v/s1.held_rows") == 1
    lane.audit()
    lane.blob(name, 2)
    assert worker.commit(grant, 1, [one], refs=ref(name, 2, chunks=2)) == "k"
    assert lane.blobs() == {name: -1}


def test_refused_commit_leaves_its_blobs_to_expire(lane, chain):
    """A stale commit makes nothing permanent."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    lane.run(lane.t.cancel([job]))
    name = lane.blob(f"{job}.1.{grant.fence}.y")
    assert worker.commit(grant, 1, refs=ref(name, 2)) == "s"
    assert lane.blobs()[name] > 0


def test_commit_past_the_deadline_frees_its_blobs(lane, chain):
    """An output that came too late is freed at once."""
    lane.submit(chain, deadline_ms=20)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    name = lane.blob(f"{grant.entries[0].job_id}.1.{grant.fence}.y")
    lane.until(lambda: lane.server_ms() > grant.entries[0].deadline_ms)
    assert worker.commit(grant, 1, refs=ref(name, 2)) == "d"
    assert lane.blobs() == {}


def test_last_consumer_frees_an_intermediate_blob(lane, chain):
    """A blob read by the next stage goes when that stage commits, one read by the last goes at the end."""
    lane.submit(chain)
    worker = lane.worker(chain)
    near = commit_with_blob(lane, worker, 1, 0b010)
    far = commit_with_blob(lane, worker, 2, 0b100)
    assert lane.blobs() == {far: -1}
    assert near != far
    commit_plain(lane, worker, 3)
    assert lane.blobs() == {}


def test_both_branches_must_read_before_a_blob_is_freed(lane, diamond):
    """A blob with two consumers stays until the second commits."""
    lane.submit(diamond)
    worker = lane.worker(diamond)
    name = commit_with_blob(lane, worker, 1, 0b0110)
    commit_plain(lane, worker, 2)
    assert lane.blobs() == {name: -1}
    commit_plain(lane, worker, 3)
    assert lane.blobs() == {}


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_the_input_is_kept_until_the_end(lane, shape):
    """The durable input stays through every stage, read or not, and goes with the terminal record."""
    pipeline = lane.define(getattr(lane, shape))
    _, name = submit_with_input(lane, pipeline, consumers=1)
    worker = lane.worker(pipeline)
    for node in lane.graphs[pipeline].nodes:
        assert lane.blobs() == {name: -1}
        commit_plain(lane, worker, node.index)
    assert lane.blobs() == {}


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
@pytest.mark.parametrize("end", ["ack", "sweep"])
def test_result_blobs_live_as_long_as_the_result(lane, shape, end):
    """Blobs of result columns outlive the job and are freed by ack or sweep."""
    pipeline = lane.define(getattr(lane, shape))
    job, given = submit_with_input(lane, pipeline, consumers=0, flags=FLAG_UNTIL_ACK)
    worker = lane.worker(pipeline)
    early = commit_with_blob(lane, worker, 1, 0)
    last = len(lane.graphs[pipeline].nodes)
    for node in range(2, last):
        commit_plain(lane, worker, node)
    made = commit_with_blob(lane, worker, last, 0, chunks=3)
    assert lane.blobs() == {given: -1, early: -1, made: -1}
    assert lane.terminal(job).has_refs
    if end == "ack":
        assert lane.run(lane.t.ack([job])) == 1
    else:
        lane.redis.zadd(lane.keys.tag + "doneq", {job: 1})
        assert lane.run(lane.t.sweep()) == 1
    assert lane.blobs() == {}


@pytest.mark.parametrize("end", ["cancel", "expire", "fire and forget"])
def test_every_end_frees_blobs(lane, chain, end):
    """Cancelled, expired and fire-and-forget jobs leave no blob."""
    options = {"expire": {"deadline_ms": 50}, "fire and forget": {"keep_s": 0}}.get(end, {})
    job, _ = submit_with_input(lane, chain, consumers=0, **options)
    worker = lane.worker(chain)
    commit_with_blob(lane, worker, 1, 0)
    if end == "cancel":
        assert lane.run(lane.t.cancel([job])) == "w"
    elif end == "expire":
        lane.until(lambda: lane.run(lane.t.expire()))
    else:
        commit_plain(lane, worker, 2)
        commit_with_blob(lane, worker, 3, 0)
    assert lane.blobs() == {}


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
@pytest.mark.parametrize("then", ["redrive", "drop"])
def test_dead_letters_own_their_blobs(lane, shape, then):
    """A dead job's blobs stay for its redrive, pass on to the redriven job, and go with a drop."""
    pipeline = lane.define(getattr(lane, shape))
    job, given = submit_with_input(lane, pipeline)
    worker = lane.worker(pipeline)
    made = commit_with_blob(lane, worker, 1, 0b110)
    assert worker.fail(worker.claim(2), 2, most=1) == "f"
    assert lane.blobs() == {given: -1, made: -1}
    lane.audit()
    if then == "drop":
        assert lane.run(lane.t.drop_dead([job])) == [job]
    else:
        [again] = lane.run(lane.t.redrive([job]))
        assert lane.run(lane.t.drop_dead([job])) == [job]
        assert lane.blobs() == {given: -1, made: -1}
        lane.drain(pipeline)
        assert lane.status(again) == "done"
    assert lane.blobs() == {}


def test_lost_bytes_restart_a_chain_from_its_last_whole_form(lane, chain):
    """A job whose intermediate blob is gone reruns from the stage that made it, as the next generation."""
    job, given = submit_with_input(lane, chain, rows=2)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    worker.commit(grant, 1, rows=4)
    inputs = worker.claim(2)
    name = lane.blob(f"{job}.2.{inputs.fence}.y")
    assert worker.commit(inputs, 2, rows=8, refs=ref(name, 0b100)) == "k"
    lane.redis.delete(lane.keys.blob(name))
    lane.lost_blobs = True
    assert worker.lost(worker.claim(3)) == "g"
    assert lane.blobs() == {given: -1}
    lane.audit()
    again = worker.claim(2)
    assert (again.entries[0].rows, again.entries[0].payloads) == (4, inputs.entries[0].payloads)
    assert worker.commit(inputs, 2) == "s"
    assert worker.commit(again, 2) == "k"
    commit_plain(lane, worker, 3)
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 1)


def test_lost_bytes_restart_a_fork_from_its_input(lane, diamond):
    """A restarted fork runs anew from its input; what siblings hold or have waiting is stale."""
    job, given = submit_with_input(lane, diamond)
    worker, sibling = lane.worker(diamond), lane.worker(diamond)
    name = commit_with_blob(lane, worker, 1, 0b0110)
    held = sibling.claim(3)
    lane.redis.delete(lane.keys.blob(name))
    assert worker.lost(worker.claim(2)) == "g"
    assert lane.blobs() == {given: -1}
    assert [lane.ready(diamond, n) for n in (1, 2, 3, 4)] == [[job], [], [], []]
    assert sibling.commit(held, 3) == "s"
    assert sibling.fail(held, 3) == "s"
    lane.drain(diamond)
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 1)


def test_a_waiting_sibling_leaves_the_queues_of_a_restarted_job(lane, diamond):
    """Ready and delayed entries of the old generation do not survive a restart."""
    lane.submit(diamond, 2)
    worker = lane.worker(diamond)
    worker.step(1)
    assert worker.fail(worker.claim(3, 1), 3, delay_ms=3_600_000) == "r"
    assert worker.lost(worker.claim(2)) == "gg"
    assert lane.redis.zcard(lane.keys.delayed) == 0
    lane.drain(diamond)
    assert lane.load("p1@v.k") == 2


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_a_lost_input_fails_the_job(lane, shape):
    """When the input itself is gone at the first stage, there is nothing to restart from."""
    pipeline = lane.define(getattr(lane, shape))
    job, name = submit_with_input(lane, pipeline)
    lane.redis.delete(lane.keys.blob(name))
    lane.lost_blobs = True
    worker = lane.worker(pipeline)
    assert worker.lost(worker.claim(1)) == "f"
    assert lane.status(job) == "failed"
    assert lane.run(lane.t.drop_dead([job])) == [job]


def test_restarts_are_bounded(lane, diamond):
    """A job that loses its bytes a hundred times fails for good."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    answers = []
    while lane.status(job) is None:
        worker.step(1)
        answers.append(worker.lost(worker.claim(2)))
    assert answers == ["g"] * 100 + ["f"]
    assert lane.terminal(job).generation == 100


def test_a_foreign_key_in_a_blobs_place_stops_a_commit_before_it_writes(lane, diamond):
    """A blob's key that holds another type refuses the whole commit; nothing of it was written."""
    lane.submit(diamond, 2)
    worker = lane.worker(diamond)
    grant = worker.claim(1)
    made = [Output(e.packed, msgpack.packb(({}, b"")), refs=ref(f"{e.job_id}.1.f.y", 6)) for e in grant.entries]
    names = [lane.blob(o.refs.split(":")[0]) for o in made]
    lane.redis.delete(lane.keys.blob(names[1]))
    lane.redis.set(lane.keys.blob(names[1]), "foreign")
    with pytest.raises(BrokerMisconfigured):
        lane.run(lane.t.commit(worker.session, grant.fence, diamond, 1, made))
    lane.redis.delete(lane.keys.blob(names[1]))
    lane.audit()
    assert worker.commit(grant, 1) == "kk"


def test_refs_that_do_not_fit_a_record_are_refused(lane, chain):
    """A commit whose refs would overflow the record's length field is refused whole."""
    lane.submit(chain)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    names = [lane.blob(f"{grant.entries[0].job_id}.1.{grant.fence}.column{i:040d}") for i in range(800)]
    with pytest.raises(Exception, match="65535"):
        worker.commit(grant, 1, refs="".join(ref(n, 2) for n in names))
    assert worker.commit(grant, 1) == "k"


def test_names_that_the_list_of_refs_cannot_hold_are_refused():
    """A large column whose name has a separator in it is an InputError that says so."""
    for name in ("a:b", "a,b", "a;b"):
        with pytest.raises(InputError, match="has one of"):
            Ref.of(f"0000000000000000.0.in.{name}", 5).text(1)


def test_refs_of_any_script_are_recorded_and_freed(lane, chain):
    """A column name outside ASCII names its blob like any other."""
    job = lane.job()
    name = lane.blob(f"{job.id}.0.in.größe文")
    assert lane.push(chain, [job._replace(refs=ref(name, 1))]).statuses == "n"
    assert lane.blobs() == {name: -1}
    lane.drain(chain)
    assert lane.blobs() == {}


def test_huge_byte_counts_do_not_drift(lane, chain):
    """Bytes over 4 GiB count as 4 GiB, alike in the record and in the load."""
    lane.submit(chain, nbytes=2**40)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    name = lane.blob(f"{grant.entries[0].job_id}.1.{grant.fence}.y")
    assert worker.commit(grant, 1, refs=f"{name}:1:{2**40}:0,") == "k"
    lane.audit()
    lane.drain(chain)
    assert lane.load("results.bytes") == 2**32 - 1
