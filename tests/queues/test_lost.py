"""Restarts of forking jobs whose intermediate bytes are gone: what reruns, what stays, what is stale."""

from __future__ import annotations

import pytest

from torchrelay.errors import BrokerError
from torchrelay.queues.job import refs_of

A, B, C, D = 1, 2, 4, 8
# a -> b -> e -> d, a -> c -> d
SLOW_JOIN = {"a": (0,), "b": (1,), "c": (1,), "e": (2,), "d": (3, 4)}


def advance(lane, worker, node, consumers=None, *, rows=None):
    """Claims one job, commits a blob for these consumers (None: no blob); returns (what was claimed, the blob)."""
    grant = worker.claim(node, 1)
    [entry] = grant.entries
    name, refs = "", ""
    if consumers is not None:
        name = lane.blob(f"{entry.job_id}.{node}.{grant.fence}.y")
        refs = f"{name}:1:5:{consumers},"
    assert worker.commit(grant, node, refs=refs, rows=rows) == "k"
    return entry, name


def lose(lane, *names):
    """These bytes are gone, as with their host."""
    lane.lost_blobs = True
    lane.redis.delete(*(lane.keys.blob(name) for name in names))


def committed(lane, pipeline):
    """How often each node committed."""
    return [lane.load(f"{lane.node_key(pipeline, n.index)}.committed") for n in lane.graphs[pipeline].nodes]


def places(lane, pipeline):
    """How many jobs are ready at each node."""
    return [len(lane.ready(pipeline, n.index)) for n in lane.graphs[pipeline].nodes]


def test_only_the_lost_branch_reruns(lane, diamond):
    """The other branch's output survives, with its blob; the maker reads the same input again."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    _, shared = advance(lane, worker, 1, B | C | D)
    first, made = advance(lane, worker, 2, D)
    _, other = advance(lane, worker, 3, D)
    join = worker.claim(4)
    lose(lane, made)
    assert worker.lost(join, makers=B) == "g"
    assert lane.blobs() == {shared: -1, other: -1}
    assert places(lane, diamond) == [0, 1, 0, 0]
    lane.audit()
    again, remade = advance(lane, worker, 2, D)
    assert again.payloads == first.payloads
    assert lane.blobs() == {shared: -1, other: -1, remade: -1}
    [entry] = worker.claim(4).entries
    assert entry.payloads[1] == join.entries[0].payloads[1]
    lane.run(lane.t.retire(worker.incarnation, b"", lane.WHY))
    lane.drain(diamond)
    assert committed(lane, diamond) == [1, 2, 1, 1]
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 1)
    assert lane.blobs() == {}


def test_a_freed_input_walks_the_restart_back(lane, diamond):
    """The maker's own input was freed when its readers were done: its claim finds that out, and the restart goes on."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    advance(lane, worker, 1, B | C)
    _, made = advance(lane, worker, 2, D)
    _, other = advance(lane, worker, 3, D)
    assert set(lane.blobs()) == {made, other}
    lose(lane, made)
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert worker.lost(worker.claim(2), makers=A) == "g"
    assert lane.blobs() == {}
    assert places(lane, diamond) == [1, 0, 0, 0]
    lane.drain(diamond)
    assert committed(lane, diamond) == [2, 2, 2, 1]
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 2)


def test_a_kept_input_is_freed_when_its_readers_are_done_again(lane, diamond):
    """A ref whose consumers are no longer all done stays, and goes with the last of them."""
    lane.submit(diamond)
    worker = lane.worker(diamond)
    _, shared = advance(lane, worker, 1, B | D)
    _, made = advance(lane, worker, 2, D)
    advance(lane, worker, 3)
    lose(lane, made)
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert lane.blobs() == {shared: -1}
    advance(lane, worker, 2, 0)
    assert shared in lane.blobs()
    advance(lane, worker, 4)
    assert shared not in lane.blobs()


def test_a_branch_in_flight_is_stale_and_ready_again(lane):
    """The sibling's commit of the old generation writes nothing; its entry waits anew, and counters stay exact."""
    pipeline = lane.define(SLOW_JOIN)
    [job] = lane.submit(pipeline)
    worker, sibling = lane.worker(pipeline), lane.worker(pipeline)
    _, shared = advance(lane, worker, 1, B | C, rows=3)
    _, made = advance(lane, worker, 2, D)
    held = sibling.claim(3)
    lose(lane, made)
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert places(lane, pipeline) == [0, 1, 1, 0, 0]
    lane.audit()
    late = lane.blob(f"{job}.3.{held.fence}.y")
    assert sibling.commit(held, 3, refs=f"{late}:1:5:16,") == "s"
    assert [sibling.fail(held, 3), sibling.release(held), sibling.lost(held, makers=A)] == ["s"] * 3
    lane.audit()
    assert {name for name, ttl in lane.blobs().items() if ttl == -1} == {shared}
    lane.drain(pipeline)
    assert committed(lane, pipeline) == [1, 2, 1, 1, 1]
    assert lane.status(job) == "done"


@pytest.mark.parametrize("delay_ms", [0, 3_600_000])
def test_a_branch_that_waits_keeps_its_place(lane, delay_ms):
    """A ready sibling is ready once, a delayed one keeps its delay, both their charged attempt."""
    pipeline = lane.define(SLOW_JOIN)
    lane.submit(pipeline)
    worker = lane.worker(pipeline)
    advance(lane, worker, 1)
    advance(lane, worker, 2)
    assert worker.fail(worker.claim(3), 3, delay_ms=delay_ms) == "r"
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert lane.redis.zcard(lane.keys.delayed) == (delay_ms > 0)
    lane.audit()
    lane.redis.zadd(lane.keys.delayed, dict.fromkeys(lane.redis.zrange(lane.keys.delayed, 0, -1), 1) or {"x": 1})
    lane.run(lane.t.promote())
    grant = worker.claim(3)
    assert [e.attempts for e in grant.entries] == [1]
    assert worker.commit(grant, 3) == "k"
    lane.drain(pipeline)
    assert committed(lane, pipeline) == [1, 2, 1, 1, 1]


def test_branches_inside_an_expansion_count_their_rows(lane):
    """A node that is opened again counts its predecessor's rows, inside the expansion and at its start."""
    pipeline = lane.define({"a": (0,), "cut": (1,), "one": (2,), "two": (2,), "join": (3, 4)})
    lane.submit(pipeline, rows=2)
    worker = lane.worker(pipeline)
    advance(lane, worker, 1, rows=3)
    advance(lane, worker, 2, rows=50)
    advance(lane, worker, 3, 16)
    advance(lane, worker, 4, 16)
    assert worker.lost(worker.claim(5), makers=C) == "g"
    assert [lane.load(f"p1@v/{n}.ready_rows") for n in ("cut", "one", "two", "join")] == [0, 50, 0, 0]
    lane.audit()
    grant = worker.claim(3)
    assert grant.entries[0].rows == 50
    assert worker.lost(grant, makers=B) == "g"
    assert [lane.load(f"p1@v/{n}.ready_rows") for n in ("cut", "one", "two", "join")] == [3, 0, 0, 0]
    lane.drain(pipeline)
    assert committed(lane, pipeline) == [1, 2, 2, 2, 1]


def test_what_a_volatile_node_made_is_made_again_from_what_it_read(lane):
    """A chain goes back by that one node, though its last whole form is the input; what the node read was kept."""
    chain = lane.define({"a": (0,), "b": (1,), "c": (2,), "d": (3,)}, volatile={"b"})
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    _, read = advance(lane, worker, 1, B | C, rows=3)
    first, made = advance(lane, worker, 2, C, rows=5)
    assert set(lane.blobs()) == {read, made}
    lane.audit()
    lose(lane, made)
    assert worker.lost(worker.claim(3), makers=B) == "g"
    assert places(lane, chain) == [0, 1, 0, 0]
    lane.audit()
    again, remade = advance(lane, worker, 2, C, rows=5)
    assert (again.payloads, again.rows) == (first.payloads, 3)
    assert set(lane.blobs()) == {read, remade}
    advance(lane, worker, 3)
    assert lane.blobs() == {}
    lane.audit()
    lane.drain(chain)
    assert committed(lane, chain) == [1, 2, 1, 1]
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 1)


def test_a_restart_behind_a_volatile_node_walks_back_to_the_last_whole_form(lane):
    """What the node had read is gone as well, with its host: its claim finds that out."""
    chain = lane.define({"a": (0,), "b": (1,), "c": (2,)}, volatile={"b"})
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    _, read = advance(lane, worker, 1, B | C)
    _, made = advance(lane, worker, 2, C)
    lose(lane, made, read)
    assert worker.lost(worker.claim(3), makers=B) == "g"
    assert worker.lost(worker.claim(2), makers=A) == "g"
    assert places(lane, chain) == [1, 0, 0]
    lane.audit()
    lane.drain(chain)
    assert committed(lane, chain) == [2, 2, 1]
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 2)


def test_a_volatile_node_behind_the_input_needs_no_other_form(lane):
    """Its own input is the last whole form; later nodes go back there, as ever."""
    chain = lane.define({"a": (0,), "b": (1,), "c": (2,)}, volatile={"a"})
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    _, made = advance(lane, worker, 1, B)
    lose(lane, made)
    assert worker.lost(worker.claim(2)) == "g"
    assert places(lane, chain) == [1, 0, 0]
    _, made = advance(lane, worker, 1, B | C)
    _, other = advance(lane, worker, 2, C)
    lose(lane, made, other)
    assert worker.lost(worker.claim(3)) == "g"
    assert places(lane, chain) == [1, 0, 0]
    lane.audit()
    lane.drain(chain)
    assert lane.status(job) == "done"


def test_jobs_that_end_behind_a_volatile_node_leave_nothing(lane):
    """Cancelled, failed or buried: no form of them stays."""
    chain = lane.define({"a": (0,), "b": (1,), "c": (2,)}, volatile={"b"})
    jobs = lane.submit(chain, 2)
    worker = lane.worker(chain)
    for _ in jobs:
        advance(lane, worker, 1, B | C)
        advance(lane, worker, 2, C)
    lane.run(lane.t.cancel([jobs[0]]))
    for _ in range(3):
        lane.until(lambda: lane.ready(chain, 3))
        worker.fail(worker.claim(3), 3)
    assert [lane.status(job) for job in jobs] == ["cancelled", "failed"]
    lane.audit()


def test_bytes_made_before_a_volatile_node_are_not_waited_for_behind_it(lane):
    """What c lacks is a's: b, which does not read it, would run for ever without anybody noticing."""
    chain = lane.define({"a": (0,), "b": (1,), "c": (2,)}, volatile={"b"})
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    _, read = advance(lane, worker, 1, C)
    advance(lane, worker, 2, C)
    lose(lane, read)
    assert worker.lost(worker.claim(3), makers=A) == "g"
    assert places(lane, chain) == [1, 0, 0]
    lane.audit()
    lane.drain(chain)
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 1)


def test_a_form_before_a_node_that_is_volatile_no_more_leaves_with_the_checkpoint(lane):
    """`handoff` is tuning: the graph may change while jobs are under way."""
    chain = lane.define({"a": (0,), "b": (1,), "c": (2,), "d": (3,)}, volatile={"b"})
    jobs = lane.submit(chain, 2)
    worker = lane.worker(chain)
    for _ in jobs:
        advance(lane, worker, 1, B | C)
        advance(lane, worker, 2, C)
    lane.redefine(chain, volatile=())
    advance(lane, worker, 3)
    lane.audit()
    _, made = advance(lane, worker, 3, D)
    lose(lane, made)
    grant = worker.claim(4)
    assert worker.lost(grant, [e for e in grant.entries if e.job_id == jobs[1]], makers=C) == "g"
    lane.audit()
    assert worker.commit(grant, 4, [e for e in grant.entries if e.job_id == jobs[0]]) == "k"
    lane.drain(chain)
    assert [lane.status(job) for job in jobs] == ["done", "done"]


def test_two_makers_of_several_jobs_in_one_call(lane, diamond):
    """Each job has a mask of its own; two lost branches leave only what they started from."""
    lane.submit(diamond, 3)
    worker = lane.worker(diamond)
    for node in (1, 2, 3):
        assert len(worker.step(node)) == 3
    grant = worker.claim(4)
    tokens = [e.packed for e in grant.entries]
    call = lane.t.lost(worker.session, grant.fence, tokens, lane.WHY, [B, B | C, 0])
    assert lane.run(call) == "ggg"
    ids = [e.job_id for e in grant.entries]
    assert [lane.ready(diamond, n) for n in (1, 2, 3, 4)] == [[ids[2]], ids[:2], [ids[1]], []]
    lane.drain(diamond)
    assert committed(lane, diamond) == [4, 6, 5, 3]


def test_an_entry_beside_the_makers_is_left_alone(lane):
    """Of two entry nodes, the one that did not run yet keeps its place, whatever is said of the other."""
    pipeline = lane.define({"a": (0,), "b": (0,), "c": (1,), "d": (2, 3)})
    lane.submit(pipeline, 2)
    worker, sibling = lane.worker(pipeline), lane.worker(pipeline)
    assert len(worker.step(1)) == 2
    held = sibling.claim(2, 1)
    assert worker.lost(worker.claim(3), makers=A) == "gg"
    assert places(lane, pipeline) == [2, 2, 0, 0]
    assert sibling.commit(held, 2) == "s"
    lane.drain(pipeline)
    assert committed(lane, pipeline) == [4, 2, 2, 2]


def test_results_of_other_branches_stay(lane, diamond):
    """A result column's blob goes with its maker, and only with its maker."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    _, early = advance(lane, worker, 1, 0)
    advance(lane, worker, 2, 0)
    _, other = advance(lane, worker, 3, 0)
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert lane.blobs() == {early: -1, other: -1}
    _, made = advance(lane, worker, 2, 0)
    advance(lane, worker, 4)
    assert lane.blobs() == {early: -1, other: -1, made: -1}
    assert lane.status(job) == "done"


def test_restarts_of_one_branch_are_bounded(lane, diamond):
    """A job that loses the same branch a hundred times fails for good, its other branch having run once."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    worker.step(1)
    worker.step(3)
    answers = []
    while lane.status(job) is None:
        worker.step(2)
        answers.append(worker.lost(worker.claim(4), makers=B))
    assert answers == ["g"] * 100 + ["f"]
    assert committed(lane, diamond) == [1, 101, 1, 0]
    assert lane.terminal(job).generation == 100


def test_a_replay_restarts_once(lane, diamond):
    """The same operation sent again answers as the first time, also after the branch ran anew."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    for node in (1, 2, 3):
        worker.step(node)
    grant = worker.claim(4)
    call = lane.t.lost(worker.session, grant.fence, [grant.entries[0].packed], lane.WHY, [B])
    assert [lane.run(call), lane.run(call)] == ["g", "g"]
    worker.step(2)
    before = lane.record(job)
    assert lane.run(call) == "g"
    assert lane.record(job) == before
    assert worker.lost(grant, makers=B) == "s"
    lane.drain(diamond)
    assert committed(lane, diamond) == [1, 2, 1, 1]


def test_a_redriven_job_restarts_by_the_names_of_its_first_life(lane, diamond):
    """Blobs keep the old id in their names; the maker in them is what counts."""
    [job] = lane.submit(diamond)
    worker = lane.worker(diamond)
    advance(lane, worker, 1)
    _, made = advance(lane, worker, 2, D)
    _, other = advance(lane, worker, 3, D)
    assert worker.fail(worker.claim(4), 4, most=1) == "f"
    [again] = lane.run(lane.t.redrive([job]))
    assert worker.lost(worker.claim(4), makers=B) == "g"
    assert lane.blobs() == {other: -1}
    assert made not in refs_of(lane.record(again))
    lane.drain(diamond)
    assert lane.status(again) == "done"


@pytest.mark.parametrize("makers", [0, D, 1 << 31])
def test_makers_that_cannot_be_told_mean_everything(lane, diamond, makers):
    """No mask, nodes that did not commit, or nodes that there are not: the job starts from its input."""
    lane.submit(diamond)
    worker = lane.worker(diamond)
    for node in (1, 2, 3):
        worker.step(node)
    assert worker.lost(worker.claim(4), makers=makers) == "g"
    assert places(lane, diamond) == [1, 0, 0, 0]
    lane.drain(diamond)
    assert committed(lane, diamond) == [2, 2, 2, 1]


def test_masks_that_do_not_match_are_refused(lane, diamond):
    """A call with fewer masks than jobs is refused whole, with nothing written."""
    lane.submit(diamond, 2)
    worker = lane.worker(diamond)
    worker.step(1)
    grant = worker.claim(2)
    tokens = [e.packed for e in grant.entries]
    with pytest.raises(BrokerError, match="2 entries do not match 4 bytes of masks"):
        lane.run(lane.t.lost(worker.session, grant.fence, tokens, lane.WHY, [A]))
    assert worker.commit(grant, 2) == "kk"
