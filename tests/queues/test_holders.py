"""Which blocks of shared memory jobs still want: what a writer asks before it takes one back."""

from __future__ import annotations

import pytest

from tests.queues.conftest import Lane, Worker
from tests.queues.test_lost import A, B, C, D
from torchrelay.queues.transitions import Output

HOST = "aaaaaaaaaaaaaaaa"


def advance(lane: Lane, worker: Worker, node: int, consumers: int = 0) -> tuple[str, str]:
    """The next job commits this node; with consumers, what it made for them lies in a host's memory alone."""
    grant = worker.claim(node, 1)
    [job] = [e.job_id for e in grant.entries]
    name = f"{job}.{node}.{grant.fence}.y"
    refs = f"{name}:0:5:{consumers}:{HOST}," if consumers else ""
    assert worker.commit(grant, node, refs=refs) == "k"
    return job, name


def test_holders_follow_a_blob_through_its_life(lane, diamond):
    """Unknown before its commit, wanted until its last reader is done, and unwanted from then on, or once copied."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    grant = worker.claim(1)
    name = f"{job}.1.{grant.fence}.y"
    wanted = lane.t.holders([name])
    assert lane.run(wanted) == [False]
    assert worker.commit(grant, 1, refs=f"{name}:0:5:{B | C}:{HOST},") == "k"
    assert lane.run(wanted) == [True]
    advance(lane, worker, 2)
    assert lane.run(wanted) == [True]
    advance(lane, worker, 3)
    assert lane.run(wanted) == [False]


@pytest.mark.parametrize("end", ["done", "cancelled", "dead", "redriven", "restarted"])
@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_what_nobody_can_read_any_more_is_not_wanted(lane, shape, end):
    """Ends, redrives and restarts give up a job's blocks; a dead letter's wait a minute for their copies."""
    pipeline = lane.define(getattr(lane, shape))
    [job] = lane.submit(pipeline)
    worker = lane.worker(pipeline)
    _, name = advance(lane, worker, 1, A << 1)
    assert lane.run(lane.t.holders([name])) == [True]
    if end == "done":
        lane.drain(pipeline)
    elif end == "cancelled":
        lane.run(lane.t.cancel([job]))
    elif end == "restarted":
        assert worker.lost(worker.claim(2), makers=A) == "g"
    else:
        assert worker.fail(worker.claim(2), 2, most=1) == "f"
        if end == "redriven":
            assert lane.run(lane.t.redrive([job])) == [f"{job}~1"]
            assert lane.run(lane.t.holders([f"{job}~1.1.f.y", name])) == [False, False]
    assert lane.run(lane.t.holders([name])) == [end == "dead"]


def test_a_surviving_branch_is_wanted_across_a_restart(lane, diamond):
    """Bytes of an older generation count as long as the record lists them, the input's too."""
    given = lane.job()
    source = lane.blob(f"{given.id}.0.in.x")
    assert lane.push(diamond, [given._replace(refs=f"{source}:1:5:1,")]).statuses == "n"
    worker = lane.worker(diamond)
    advance(lane, worker, 1)
    _, made = advance(lane, worker, 2, D)
    _, other = advance(lane, worker, 3, D)
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert lane.run(lane.t.holders([made, other, source])) == [False, True, True]


def test_holders_answer_in_the_order_of_the_question(lane, chain):
    """256 blobs of jobs in several buckets, unsorted, some of no live job: each bucket is read once."""
    ids = lane.submit(chain, 300)
    worker = lane.worker(chain)
    names = []
    while (grant := worker.claim(1)).entries:
        made = [f"{e.job_id}.1.{grant.fence}.größe{n}" for n, e in enumerate(grant.entries)]
        outputs = zip(worker.outputs(1, grant.entries), made, strict=True)
        refs = [Output(o.token, o.payload, refs=f"{name}:0:5:2:{HOST},") for o, name in outputs]
        assert set(lane.run(lane.t.commit(worker.session, grant.fence, chain, 1, refs))) == {"k"}
        names += made
    assert len({i[:14] for i in ids}) > 1
    ends = set(ids[::3])
    assert set(lane.run(lane.t.cancel(sorted(ends)))) == {"w"}
    strange = ["", ".", "no job", names[1][:-1], names[1] + "x", f"{ids[1]}:", f"{ids[4]}.1.", f"{ids[2]}~1.1.f.y"]
    asked = [name for pair in zip(names[:124], reversed(names[-124:]), strict=True) for name in pair] + strange
    expected = [name.split(".")[0] not in ends for name in asked[:248]] + [False] * len(strange)
    reads = lane.redis.info("commandstats")["cmdstat_hmget"]["calls"]
    assert lane.run(lane.t.holders(asked)) == expected
    buckets = {name[:14] for name in asked if len(name.split(".")[0]) > 14} | {"no"}
    assert lane.redis.info("commandstats")["cmdstat_hmget"]["calls"] - reads == len(buckets)
    assert lane.run(lane.t.holders([])) == []
