"""Commits of a worker that ran several nodes one behind the other: all of them are done, in one script, or none."""

from __future__ import annotations

from typing import Any

import pytest

from torchrelay.errors import TorchrelayError
from torchrelay.queues.transitions import ClaimLimits


def committed(lane: Any, pipeline: int) -> list[int]:
    return [lane.load(f"{lane.node_key(pipeline, n.index)}.committed") for n in lane.graphs[pipeline].nodes]


def test_one_commit_ends_a_chain(lane, chain):
    """A commit of all three nodes ends its jobs; each node counts them; a replay answers as the first time."""
    jobs = lane.submit(chain, 3)
    worker = lane.worker(chain)
    call = worker.committing(worker.claim(1), 1, last=3)
    assert [lane.run(call), lane.run(call)] == ["kkk", "kkk"]
    assert [lane.status(j) for j in jobs] == ["done"] * 3
    assert lane.result(jobs[0]) == {"o3": b"\x03"}
    assert committed(lane, chain) == [3, 3, 3]


def test_the_next_node_gets_what_the_last_one_left(lane, chain):
    """After a commit of the first two, the job stands at the third alone, with its payload."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    assert worker.commit(worker.claim(1), 1, last=2) == "k"
    assert [lane.ready(chain, n) for n in (1, 2, 3)] == [[], [], [job]]
    assert worker.step(3) == [job]
    assert committed(lane, chain) == [1, 1, 1]


def test_a_stale_fence_commits_none_of_the_nodes(lane, chain):
    """What the reaper took back is not committed, at any node."""
    [job] = lane.submit(chain)
    worker, other = lane.worker(chain), lane.worker(chain)
    late = worker.claim(1)
    worker.die()
    assert other.step(1) == [job]
    assert worker.commit(late, 1, last=3) == "s"
    assert lane.ready(chain, 2) == [job]
    assert committed(lane, chain) == [1, 0, 0]


@pytest.mark.parametrize(("node", "last"), [(2, 1), (1, 9), (1, 4), (3, 4)])
def test_nodes_that_do_not_follow_each_other_are_refused(lane, node, last):
    """Neither over a fork or a join nor backwards; nothing is written."""
    sides = lane.define(lane.SIDES)
    lane.submit(sides)
    worker = lane.worker(sides)
    if node == 2:
        worker.step(1)
    grant = worker.claim(node)
    assert grant.entries
    with pytest.raises(TorchrelayError, match=r"is not fused to|node 9 of"):
        worker.commit(grant, node, last=last)
    assert worker.commit(grant, node) == "k"


def test_a_join_gets_the_last_payload(lane):
    """In a fork the node behind fused ones gets the last one's payload, beside that of the other branch."""
    sides = lane.define(lane.SIDES)
    [job] = lane.submit(sides)
    worker = lane.worker(sides)
    assert worker.commit(worker.claim(1), 1, last=2) == "k"
    assert worker.step(3) == [job]
    [entry] = worker.claim(4).entries
    assert [b"o2" in entry.payloads[0], b"o3" in entry.payloads[1]] == [True, True]


@pytest.mark.parametrize("alone", [False, True])
def test_what_was_done_as_one_is_undone_as_one(lane, alone):
    """Bytes of fused nodes are lost: the first of them runs again from its own input, and not the last alone, which has
    nothing to start from; where it had run alone, it does. The other branch keeps what it did."""
    sides = lane.define(lane.SIDES)
    [job] = lane.submit(sides)
    worker = lane.worker(sides)
    if alone:
        worker.step(1)
    grant = worker.claim(2 if alone else 1)
    name = lane.blob(f"{job}.2.{grant.fence}.y")
    first = 2 if alone else 1
    assert worker.commit(grant, first, last=2, refs=f"{name}:1:5:8,") == "k"
    assert worker.step(3) == [job]
    assert worker.lost(worker.claim(4), makers=0b10) == "g"
    assert [lane.ready(sides, n) for n in (1, 2, 3, 4)] == [[] if alone else [job], [job] if alone else [], [], []]
    [again] = worker.claim(first).entries
    assert b"o1" in again.payloads[0] if alone else b"input" in again.payloads[0]
    worker.die()
    lane.drain(sides)
    assert (lane.status(job), lane.terminal(job).generation) == ("done", 1)


def test_a_worker_of_several_nodes_is_gated_by_what_stands_behind_them(lane):
    """A full queue behind the last node stops its claims, one between its nodes does not; room wakes it."""
    pipeline = lane.define(lane.CHAIN, marks={"s2": (1, 10**9), "s3": (2, 10**9)})
    lane.submit(pipeline, 6)
    worker = lane.worker(pipeline)
    limits = ClaimLimits(1, 10**6, 1 << 20, 60_000)

    def claim() -> Any:
        worker.fences += 1
        fence = f"{worker.incarnation}-{worker.fences:x}"
        return lane.run(lane.t.claim(worker.session, fence, worker.incarnation, pipeline, (1, 2), limits))

    worker.step(1, 1)
    for _ in range(2):
        assert worker.commit(claim(), 1, last=2) == "k"
    refused = claim()
    assert (refused.gated, refused.entries) == (True, [])
    lane.redis.delete(lane.keys.wake(lane.node_key(pipeline, 2)))
    worker.step(3, 2)
    assert lane.tokens(pipeline, 2) == 1
    assert len(claim().entries) == 1


def test_a_pause_of_any_of_its_nodes_stops_a_worker(lane, chain):
    """Nothing starts at a paused stage, also by way of the one before."""
    lane.submit(chain)
    worker = lane.worker(chain)
    ref, _, _ = lane.node_key(chain, 2).partition("/")
    name, _, version = ref.partition("@")
    limits = ClaimLimits(1, 10**6, 1 << 20, 60_000)
    lane.run(lane.t.pause(name, version, "s2", True))
    call = lane.t.claim(worker.session, "f-1", worker.incarnation, chain, (1, 2), limits)
    assert lane.run(call).paused
    lane.run(lane.t.pause(name, version, "s2", False))
    call = lane.t.claim(worker.session, "f-2", worker.incarnation, chain, (1, 2), limits)
    assert len(lane.run(call).entries) == 1
