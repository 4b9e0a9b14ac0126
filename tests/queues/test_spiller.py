"""Who copies a host's shared memory to Redis: whole, once, and past its death at any line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

import torchrelay.queues
from tests.conftest import wait_until
from tests.dying import deaths, die
from tests.queues.conftest import Lane
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.segment import OwnerLock
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.blobs import fetch_blobs
from torchrelay.queues.job import Place, Ref, encode_payload, host_text
from torchrelay.queues.keys import new_token
from torchrelay.queues.placement import wanted_by
from torchrelay.queues.registry import Registry
from torchrelay.queues.spiller import ANSWERS_MS, Spiller
from torchrelay.queues.transitions import Output

QUEUES = Path(torchrelay.queues.__file__).parent
FOLDERS = [str(QUEUES / name) for name in ("spiller.py", "blobs.py", "arena/reader.py")]
DATA = bytes(range(256)) * 9000  # three chunks
TTL_MS = 60_000


class Host:
    """A host with an arena: jobs pass a node there and leave a column in it."""

    def __init__(self, lane: Lane, url: str, folder: Path) -> None:
        self.lane = lane
        self.url = url
        self.home = ArenaHome.open(str(folder), new_token(8))
        self.name = host_text(self.home.host)
        self.registry = Registry(lane.redis, lane.keys.namespace, 1)
        self.writer = ArenaWriter(self.home, ArenaLimits(64 << 20), wanted_by(self.registry))
        self.refs: list[Ref] = []

    def makes(self, pipeline: int, data: bytes = DATA) -> Place:
        """One job passes node 1."""
        worker = self.lane.worker(pipeline, self.name)
        grant = worker.claim(1, 1)
        name = f"{grant.entries[0].job_id}.1.{grant.fence}.y"
        place = self.writer.put(name, 0, data, 1)
        assert place is not None
        ref = Ref.of(name, len(data), place, in_redis=False)
        output = Output(grant.entries[0].packed, encode_payload({"y": ref}), refs=ref.text(2))
        assert self.lane.run(self.lane.t.commit(worker.session, grant.fence, pipeline, 1, [output])) == "k"
        self.writer.publish([place])
        self.refs.append(ref)
        return place

    def answers(self) -> int:
        """Says that it does; how many jobs it is asked for."""
        return len(self.lane.run(self.lane.t.spilling(self.name, 64, TTL_MS))[1])

    def one_round(self) -> None:
        """All that is due is copied, over a connection of its own, as whoever holds the lock does it."""
        client = redis.Redis.from_url(self.url)
        spiller = Spiller(Registry(client, self.lane.keys.namespace, 1), self.home)
        spiller._stopping.set()
        lock, reader = OwnerLock(self.home.folder, "spiller"), ArenaReader(self.home)
        assert lock.take()
        spiller._serve(reader)
        reader.close()
        lock.give(remove=True)
        client.close()

    def copies(self) -> list[bytes | None]:
        """What Redis has of each column."""
        return fetch_blobs(self.lane.redis, self.lane.t, [ref.as_copied for ref in self.refs])


@pytest.fixture
def host(lane: Lane, server_url: str, arena_dir: Path) -> Iterator[Host]:
    made = Host(lane, server_url, arena_dir)
    yield made
    made.writer._wanted = lambda number, names: [False] * len(names)
    made.writer.close()


def asked_for_from_elsewhere(lane: Lane, chain: int) -> None:
    assert lane.worker(chain, "f" * 16).claim(2).entries == []


def test_what_is_asked_for_is_copied_whole_and_its_memory_comes_back(lane: Lane, chain: int, host: Host) -> None:
    """Two jobs with large columns; any host claims them then, and the blocks are wanted no more."""
    host.answers()
    ids = lane.submit(chain, 2)
    host.makes(chain)
    host.makes(chain, b"small")
    asked_for_from_elsewhere(lane, chain)
    assert host.answers() == 2
    host.one_round()
    assert host.copies() == [DATA, b"small"]
    assert lane.run(lane.t.holders([ref.name for ref in host.refs])) == [False, False]
    assert [e.job_id for e in lane.worker(chain).claim(2).entries] == ids


def test_a_block_that_is_gone_lets_its_job_restart(lane: Lane, chain: int, host: Host) -> None:
    """It was freed before it was copied: whoever claims the job next finds nothing, here or there."""
    host.answers()
    [job] = lane.submit(chain)
    place = host.makes(chain)
    asked_for_from_elsewhere(lane, chain)
    host.writer.free([place])
    host.one_round()
    assert host.copies() == [None]
    worker = lane.worker(chain)
    assert worker.lost(worker.claim(2), makers=1) == "g"
    assert worker.step(1) == [job]


def test_who_copies_may_die_at_any_line(lane: Lane, chain: int, host: Host) -> None:
    """The next one goes on: each job is there once, in its first generation, its bytes are whole, nothing is left."""
    lane.submit(chain, 1)
    host.answers()
    host.makes(chain)
    asked_for_from_elsewhere(lane, chain)
    places = deaths(host.one_round, FOLDERS)
    assert len(places) > 60
    lane.drain(chain)
    for at in places[::3]:
        host.refs.clear()
        host.answers()
        [job] = lane.submit(chain)
        host.makes(chain)
        asked_for_from_elsewhere(lane, chain)
        die(host.one_round, FOLDERS, at)
        host.answers()
        host.one_round()
        assert host.copies() == [DATA]
        left = {name for name, ttl in lane.blobs().items() if ttl == -1}
        assert left == {host.refs[0].name}
        worker = lane.worker(chain)
        [entry] = worker.claim(2).entries
        assert (entry.job_id, entry.restarted) == (job, False)
        worker.die()
        lane.drain(chain)
    lane.redis.delete(*lane.redis.scan_iter(match=f"{lane.keys.tag}blob:spill.*"), "x")


def test_one_of_a_host_is_at_work_and_the_next_takes_over(lane: Lane, chain: int, host: Host) -> None:
    """Two run; each job is copied within a moment of being due, and again once the first has left."""
    registry = host.registry
    spillers = [Spiller(registry, host.home), Spiller(registry, host.home)]
    for spiller in spillers:
        spiller.start()
    try:
        for round_ in range(2):
            lane.until(lambda: lane.redis.exists(lane.keys.present(host.name)))
            lane.submit(chain)
            host.makes(chain)
            asked_for_from_elsewhere(lane, chain)
            wait_until(lambda: host.copies()[-1] == DATA, 5.0)
            lane.drain(chain)
            if not round_:
                spillers[0].stop()
    finally:
        for spiller in spillers:
            spiller.stop()
    assert not lane.redis.exists(lane.keys.present(host.name))


def test_what_lay_there_for_long_is_copied_unasked(lane: Lane, chain: int, host: Host) -> None:
    """Only where its job waits; a block of a job that is held stays."""
    host.answers()
    lane.submit(chain, 2)
    host.makes(chain)
    host.makes(chain)
    lane.worker(chain, host.name).claim(2, 1)
    spiller = Spiller(host.registry, host.home, aged_ms=-1000)
    spiller._aged_at = 0.0
    spiller._ask_for_aged()
    host.one_round()
    assert host.copies() == [None, DATA]


def test_one_that_has_the_lock_and_is_stopped_is_stood_in_for(lane: Lane, chain: int, host: Host) -> None:
    """Its host goes on answering before others take it for dead."""
    lock = OwnerLock(host.home.folder, "spiller")
    assert lock.take()
    lane.run(lane.t.spilling(host.name, 64, ANSWERS_MS))
    spiller = Spiller(host.registry, host.home)
    spiller.start()
    try:
        lane.submit(chain)
        host.makes(chain)
        asked_for_from_elsewhere(lane, chain)
        wait_until(lambda: host.copies() == [DATA], 5.5)
    finally:
        spiller.stop()
        lock.give(remove=True)
