"""Jobs whose bytes lie in one host's memory: who may claim them, how they are asked for, how copies are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.queues.conftest import Lane, Worker
from torchrelay.queues.job import HEAD, refs_of
from torchrelay.queues.keys import new_token
from torchrelay.queues.transitions import ClaimLimits, Copied, Output

HERE, THERE = "aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"
TTL_MS = 60_000


@pytest.fixture
def answer(lane: Lane) -> Callable[..., list[Any]]:
    """`answer(host)` says that the host answers, and lists what it was asked for."""
    return lambda host=HERE: lane.run(lane.t.spilling(host, 64, TTL_MS))[1]


def made_here(lane: Lane, worker: Worker, node: int, consumers: int, jobs: int = 256) -> list[str]:
    """Jobs pass this node on HERE, and leave a column in its memory; the blobs' names, in order."""
    grant = worker.claim(node, jobs)
    names = [f"{e.job_id}.{node}.{grant.fence}.y" for e in grant.entries]
    outputs = zip(worker.outputs(node, grant.entries), names, strict=True)
    commits = [Output(o.token, o.payload, refs=f"{name}:0:5:{consumers}:{HERE},") for o, name in outputs]
    answer = lane.run(lane.t.commit(worker.session, grant.fence, worker.pipeline, node, commits))
    assert answer == "k" * len(names)
    return names


def copied(lane: Lane, member: str, name: str, chunks: int = 1) -> Copied:
    """A copy that is not recorded yet."""
    return Copied(member, name, lane.blob(f"spill.{new_token(8)}", chunks), chunks)


def claimed(worker: Worker, node: int, jobs: int = 256) -> list[str]:
    return [e.job_id for e in worker.claim(node, jobs).entries]


def test_a_job_is_left_to_the_host_of_its_bytes_until_they_are_copied(lane, chain, answer):
    """Another host's worker passes it over and takes what is behind it; once the copy is recorded, it may have it."""
    answer()
    first, second = lane.submit(chain, 2)
    here, there = lane.worker(chain, HERE), lane.worker(chain, THERE)
    [name] = made_here(lane, here, 1, 2, 1)
    assert there.step(1) == [second]
    grant = there.claim(2)
    assert ([e.job_id for e in grant.entries], grant.elsewhere) == ([second], 1)
    there.release(grant)
    [asked] = answer()
    assert (asked.member, asked.refs) == (f"{first}|2|2", f"{name}:0:5:2:{HERE},")
    assert lane.run(lane.t.spill(HERE, [copied(lane, asked.member, name)])) == "k"
    assert refs_of(lane.record(first)).endswith(f"{name}:1:5:2,")
    assert lane.blobs()[name] == -1
    assert claimed(there, 2) == [first, second]
    assert answer() == []


def test_its_own_host_takes_it_meanwhile_and_the_copy_is_dropped(lane, chain, answer):
    """Who copies may be slower than a worker that became free there: nothing is recorded, nothing is left."""
    answer()
    [job] = lane.submit(chain)
    here = lane.worker(chain, HERE)
    [name] = made_here(lane, here, 1, 2)
    assert claimed(lane.worker(chain, THERE), 2) == []
    [asked] = answer()
    copy = copied(lane, asked.member, name)
    grant = here.claim(2)
    assert [e.job_id for e in grant.entries] == [job]
    assert lane.run(lane.t.spill(HERE, [copy])) == "s"
    assert lane.blobs() == {}
    assert here.commit(grant, 2) == "k"


def test_what_a_silent_host_has_is_claimed_and_found_lost(lane, chain, answer):
    """Nobody there answers: the job is anyone's, so that it can restart."""
    [job] = lane.submit(chain)
    here, there = lane.worker(chain, HERE), lane.worker(chain, THERE)
    made_here(lane, here, 1, 2)
    grant = there.claim(2)
    assert there.lost(grant, makers=1) == "g"
    assert there.step(1) == [job]


def test_bytes_that_are_gone_bind_their_job_to_no_host(lane, chain, answer):
    """The host answers, and has nothing any more: whoever claims the job restarts it."""
    answer()
    [job] = lane.submit(chain)
    [name] = made_here(lane, lane.worker(chain, HERE), 1, 2)
    there = lane.worker(chain, THERE)
    assert claimed(there, 2) == []
    [asked] = answer()
    assert lane.run(lane.t.spill(HERE, [Copied(asked.member, name, "", 1)])) == "u"
    assert there.lost(there.claim(2), makers=1) == "g"
    assert there.step(1) == [job]


def test_wakes_go_to_those_who_may_claim(lane, chain, answer):
    """A worker that woke for another host's job hands the wake on; the record of a copy wakes anyone."""
    answer()
    lane.submit(chain)
    here, there = lane.worker(chain, HERE), lane.worker(chain, THERE)
    [name] = made_here(lane, here, 1, 2)
    key = lane.node_key(chain, 2)
    assert lane.redis.lpop(lane.keys.wake(key)) is not None
    assert claimed(there, 2) == []
    assert lane.redis.lpop(lane.keys.wake(f"{key}@{HERE}")) is not None
    assert lane.redis.lpop(lane.keys.wake(f"@{HERE}")) is not None
    assert lane.redis.llen(lane.keys.wake(key)) == 0
    [asked] = answer()
    lane.run(lane.t.spill(HERE, [copied(lane, asked.member, name)]))
    assert lane.redis.llen(lane.keys.wake(key)) == 1


def test_each_idle_worker_asks_for_twice_what_it_takes(lane, chain, answer):
    """Ten wait there: one worker asks for twice the two that it takes, and wakes the next, which does as well."""
    answer()
    jobs = lane.submit(chain, 10)
    made_here(lane, lane.worker(chain, HERE), 1, 2)
    key = lane.keys.wake(lane.node_key(chain, 2))
    for asked in (4, 8, 10):
        lane.redis.delete(key)
        assert claimed(lane.worker(chain, THERE), 2, 2) == []
        assert [a.member.split("|")[0] for a in answer()] == jobs[:asked]
        assert lane.redis.llen(key) == (asked < 10)


def test_a_worker_that_found_enough_asks_only_for_what_waits_much_longer(lane, chain, answer):
    """Hosts that all have work leave each other's alone; but what is a second better in rank must have its turn."""
    answer()
    here, there = lane.worker(chain, HERE), lane.worker(chain, THERE)
    [soon] = lane.submit(chain, boost_ms=60_000.0)
    made_here(lane, here, 1, 2)
    [job] = lane.submit(chain)
    made_here(lane, here, 1, 2)
    others = lane.submit(chain, 3)
    there.step(1)
    assert claimed(there, 2, 2) == others[:2]
    assert [a.member.split("|")[0] for a in answer()] == [soon]
    assert claimed(there, 2, 2) == others[2:]
    assert {a.member.split("|")[0] for a in answer()} == {soon, job}


def test_a_column_that_rides_along_binds_nobody_before_its_reader(lane, chain, answer):
    """Stage 3 reads what stage 1 made: stage 2 runs anywhere, a worker that fuses 2 and 3 does not."""
    answer()
    [job] = lane.submit(chain)
    made_here(lane, lane.worker(chain, HERE), 1, 4)
    there = lane.worker(chain, THERE)
    fused = lane.run(
        lane.t.claim(
            there.session, "f-1", there.incarnation, chain, (2, 3), ClaimLimits(8, 100, 1 << 20, TTL_MS), there.reader
        )
    )
    assert (fused.entries, fused.elsewhere) == ([], 1)
    assert there.step(2) == [job]
    assert claimed(there, 3) == []


def test_dead_letters_and_long_delays_ask_by_themselves(lane, chain, answer):
    """A dead letter's bytes are copied and a redrive reads them; its block is wanted until then, and no longer."""
    answer()
    dead, late = lane.submit(chain, 2)
    here = lane.worker(chain, HERE)
    names = made_here(lane, here, 1, 2)
    assert here.fail(here.claim(2, 1), 2, most=1) == "f"
    assert here.fail(here.claim(2, 1), 2, delay_ms=60_000) == "r"
    assert lane.run(lane.t.holders(names)) == [True, True]
    asked = {a.member: a for a in answer()}
    assert set(asked) == {f"{dead}|0|0", f"{late}|2|2"}
    copies = [copied(lane, f"{dead}|0|0", names[0]), copied(lane, f"{late}|2|2", names[1])]
    assert lane.run(lane.t.spill(HERE, copies)) == "kk"
    assert lane.run(lane.t.holders(names)) == [False, False]
    [again] = lane.run(lane.t.redrive([dead]))
    assert claimed(lane.worker(chain, THERE), 2) == [again]


def test_what_has_grown_old_is_asked_for_where_its_jobs_wait(lane, chain, answer):
    """By name; of a job that somebody holds nothing is asked."""
    answer()
    lane.submit(chain, 2)
    here = lane.worker(chain, HERE)
    names = made_here(lane, here, 1, 2)
    here.claim(2, 1)
    assert lane.run(lane.t.aged(HERE, [*names, "no job", ""])) == 1
    assert [a.refs for a in answer()] == [f"{names[1]}:0:5:2:{HERE},"]


def test_a_cut_copy_is_not_recorded_and_is_made_again(lane, chain, answer):
    """Fewer chunks than announced: the job stays asked for."""
    answer()
    lane.submit(chain)
    [name] = made_here(lane, lane.worker(chain, HERE), 1, 2)
    claimed(lane.worker(chain, THERE), 2)
    [asked] = answer()
    cut = copied(lane, asked.member, name)._replace(chunks=3)
    assert lane.run(lane.t.spill(HERE, [cut])) == "s"
    assert lane.blobs() == {}
    lane.redis.zadd(lane.keys.spill(HERE), {asked.member: 1})
    assert answer() == [asked]


def test_one_host_makes_a_claim_no_dearer(lane, chain, answer):
    """Claim and commit of a host's own jobs run as many commands as of jobs that lie in Redis."""
    answer()
    counts = []
    for refs in ("", "", f":{HERE}"):  # the first loads the scripts
        lane.submit(chain)
        here = lane.worker(chain, HERE)
        grant = here.claim(1)
        [output] = here.outputs(1, grant.entries)
        name = f"{grant.entries[0].job_id}.1.{grant.fence}.y"
        if not refs:
            lane.blob(name)
        ref = f"{name}:{0 if refs else 1}:5:2{refs},"
        call = lane.t.commit(here.session, grant.fence, chain, 1, [output._replace(refs=ref)])
        before = calls(lane)
        assert lane.run(call) == "k"
        claim = here.claim(2)
        counts.append(calls(lane) - before)
        assert here.commit(claim, 2) == "k"
    assert counts[1] == counts[2]


def calls(lane: Lane) -> int:
    """Commands that the server has run but for this question, those of scripts included."""
    return sum(v["calls"] for k, v in lane.redis.info("commandstats").items() if k != "cmdstat_info")


def test_the_rank_is_kept(lane, chain, answer):
    """A copy changes a job's refs and nothing else of it."""
    answer()
    [job] = lane.submit(chain, boost_ms=12_345.0)
    [name] = made_here(lane, lane.worker(chain, HERE), 1, 2)
    before = HEAD.unpack_from(lane.record(job))
    claimed(lane.worker(chain, THERE), 2)
    [asked] = answer()
    lane.run(lane.t.spill(HERE, [copied(lane, asked.member, name)]))
    assert HEAD.unpack_from(lane.record(job))[:-1] == before[:-1]
