"""A server at its maxmemory: new jobs wait outside, and everything that drains the lane passes (rule 5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.conftest import private_server
from tests.queues.conftest import Lane
from tests.queues.test_spiller import Host
from torchrelay.config import Pipeline
from torchrelay.errors import QueueFull
from torchrelay.queues.blobs import read_blobs, write_blobs
from torchrelay.queues.job import FLAG_UNTIL_ACK, Ref, encode_payload
from torchrelay.queues.keys import ControlKeys, new_token
from torchrelay.queues.registry import Registry
from torchrelay.queues.scripts import Call, script
from torchrelay.queues.spiller import Spiller


@pytest.fixture(scope="module")
def small_server() -> Iterator[str]:
    with private_server("--maxmemory-policy", "noeviction") as made:
        yield made.url


@pytest.fixture
def full_lane(small_server: str) -> Iterator[Lane]:
    client = redis.Redis.from_url(small_server)
    lane = Lane(client, "q" + new_token(10))
    yield lane
    client.config_set("maxmemory", 0)
    lane.audit()
    lane.channel.close()
    client.close()


@contextmanager
def out_of_memory(lane: Lane) -> Iterator[None]:
    """Whatever may be refused for want of memory is refused."""
    lane.redis.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        lane.redis.set(lane.keys.tag + "probe", "x")
    yield
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        lane.redis.set(lane.keys.tag + "probe", "x")
    lane.redis.config_set("maxmemory", 0)


@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_every_operation_but_submit_passes_out_of_memory(full_lane, shape):
    """submit is QueueFull and writes nothing; what claims, gives back, ends and repairs jobs passes."""
    lane = full_lane
    pipeline = lane.define(getattr(lane, shape))
    lane.submit(pipeline, 12)
    lane.submit(pipeline, delay_ms=1)
    lane.submit(pipeline, deadline_ms=1)
    [late] = lane.submit(pipeline, delay_ms=3_600_000)
    worker, other = lane.worker(pipeline), lane.worker(pipeline)
    with out_of_memory(lane):
        with pytest.raises(QueueFull, match="maxmemory"):
            lane.push(pipeline, [lane.job()])
        lane.until(lambda: lane.run(lane.t.expire()))
        grant = worker.claim(1, 8)
        a, b, c, d, *rest = grant.entries
        assert worker.fail(grant, 1, [a]) == "r"
        assert worker.fail(grant, 1, [b], delay_ms=60_000) == "r"
        assert worker.fail(grant, 1, [c], most=1) == "f"
        assert worker.release(grant, [d]) == "r"
        assert lane.run(lane.t.renew(60_000, [grant.fence]))[0][0]
        assert worker.commit(grant, 1, rest) == "kkkk"
        assert worker.lost(worker.claim(2, 1)) == ("f" if shape == "CHAIN" else "g")
        other.claim(1, 1)
        assert other.die() == [1, 0]
        lane.worker(pipeline).claim(1, 1, lease_ms=1)
        lane.until(lambda: lane.run(lane.t.reap())[0])
        assert lane.run(lane.t.cancel([b.job_id])) == "w"
        assert lane.run(lane.t.purge({pipeline: 1}, [late])) == 1
        assert len(lane.run(lane.t.pause("p1", "", "", True))) == len(getattr(lane, shape))
        assert worker.claim(1).paused
        assert lane.run(lane.t.pause("p1", "", "", False))
        assert lane.run(lane.t.census(0, 10))[1]
        assert lane.run(lane.t.holders([f"{late}.1.f.y"])) == [False]
        assert lane.run(lane.t.redrive([c.job_id])) == [f"{c.job_id}~1"]
        assert lane.run(lane.t.promote())[0] >= 0
        lane.define(lane.CHAIN)
        lane.drain(pipeline)
        assert lane.run(lane.t.recount(mend=True)) == []
    assert lane.load(f"p{pipeline}@v.k") >= 9


def test_heartbeats_pass_out_of_memory(full_lane):
    """A worker stays alive for others while memory is short."""
    control = ControlKeys("q" + new_token(10))
    beat = Call(script("heartbeat"), (control.alive, control.workers), ["w", 6000, "{}"], int)
    with out_of_memory(full_lane):
        assert full_lane.run(beat) == 1
        assert full_lane.run(beat) == 1


def test_a_worker_that_starts_registers_out_of_memory(full_lane, make_pipeline):
    """It is there to drain what fills the memory."""
    lane = full_lane
    pipeline = Pipeline.load(
        make_pipeline("pipeline: p\nstages: [{name: s, use: 'stages.py:f'}]\n", "def f(batch): ...")
    )
    registry = Registry(lane.redis, lane.keys.namespace, 1)
    with out_of_memory(lane):
        registry.open()
        number = registry.register(pipeline, current=False).number
        assert (registry.find("p").pipeline.ref, registry.find("p").number) == (pipeline.ref, number)


def test_blobs_of_workers_pass_and_those_of_producers_do_not(full_lane):
    """A worker's blob falls back to a script; a producer's is QueueFull."""
    lane = full_lane
    data = os.urandom(3 << 20)
    with out_of_memory(lane):
        with pytest.raises(QueueFull):
            write_blobs(lane.redis, lane.t, {"x.0.in.c": data})
        write_blobs(lane.redis, lane.t, {"x.1.f.c": data}, must_pass=True)
        ref = Ref.of("x.1.f.c", len(data))
        assert ref == Ref("x.1.f.c", 3, len(data))
        assert read_blobs(lane.redis, lane.t, [ref]) == [data]
        assert 0 < lane.blobs()["x.1.f.c"] <= 600_000


def test_a_full_server_drains_and_takes_jobs_again(full_lane):
    """Filled until QueueFull, it loses nothing, drains by claims, commits and acks, and lets new jobs in."""
    lane = full_lane
    pipeline = lane.define(lane.CHAIN)
    lane.redis.config_set("maxmemory", lane.redis.info("memory")["used_memory"] + (8 << 20))
    payload = encode_payload({"x": os.urandom(4000)})
    accepted: list[str] = []

    def fill() -> None:
        while len(accepted) < 100_000:
            jobs = [lane.job(payload=payload, flags=FLAG_UNTIL_ACK) for _ in range(64)]
            assert lane.push(pipeline, jobs).statuses == "n" * 64
            accepted.extend(j.id for j in jobs)

    with pytest.raises(QueueFull):
        fill()
    assert len(accepted) > 500
    lane.drain(pipeline)
    assert {i for i, ended in lane.replies() if ended.status == "done"} == set(accepted)
    for at in range(0, len(accepted), 256):
        lane.run(lane.t.ack(accepted[at : at + 256]))
    lane.redis.delete(lane.keys.reply(lane.ids.client))
    assert lane.push(pipeline, [lane.job()]).statuses == "n"
    assert lane.load("results.bytes") == 0


def test_what_only_another_host_can_do_is_copied_out_of_memory_too(
    full_lane: Lane, small_server: str, arena_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without a worker any more has the first 128 jobs, and what Redis is full of stands behind them: who could
    drain it gets to it only once they are copied."""
    monkeypatch.setattr("torchrelay.queues.spiller._FULL_S", 0.5)
    lane = full_lane
    chain = lane.define(lane.CHAIN)
    host = Host(lane, small_server, arena_dir)
    client = redis.Redis.from_url(small_server)
    spiller = Spiller(Registry(client, lane.keys.namespace, 1), host.home)
    spiller.start()
    lane.until(lambda: host.answers() == 0)
    lane.submit(chain, 128)
    for _ in range(128):
        host.makes(chain, b"small")
    lane.submit(chain, 4)
    there = lane.worker(chain, "f" * 16)
    there.step(1)
    with out_of_memory(lane):
        assert there.claim(2, 4).entries == []
        found = lane.until(lambda: there.step(2, 4), 20.0)
    assert found
    spiller.stop()
    host.writer._wanted = lambda number, names: [False] * len(names)
    host.writer.close()
    client.close()
