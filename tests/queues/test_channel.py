"""The replaying channel on a bad line: answers that are lost, connections that are killed, servers that restart."""

from __future__ import annotations

import gc
import random
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import PrivateServer, private_server, wait_until
from tests.queues.conftest import Lane
from torchrelay.errors import BrokerMisconfigured, BrokerUnavailable, PipelineNotFound
from torchrelay.queues.channel import Channel
from torchrelay.queues.keys import new_token
from torchrelay.workers.stop import Stop


class Line:
    """A Unix socket in front of the server's that cuts connections on demand: `cut` sees (to server?, bytes)."""

    def __init__(self, server: Path, here: Path) -> None:
        self.path, self._server = here, server
        self.cut: Callable[[bool, bytes], bool] = lambda to_server, data: False
        self.cuts = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(here))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._server))
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    try:
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        if self.cut(source is client, data):
                            self.cuts += 1
                            return
                        (server if source is client else client).sendall(data)
                    except OSError:
                        return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def line(server: PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    made = Line(server.socket, tmp_path_factory.mktemp("l") / "s")
    yield made
    made.close()


@pytest.fixture
def bad_lane(line: Line, redis_client: redis.Redis) -> Iterator[Lane]:
    """A lane whose transitions go over the line, while its audit reads the server directly."""
    lane = Lane(redis_client, "q" + new_token(10))
    lane.channel.close()
    lane.channel = Channel(redis.Redis(unix_socket_path=str(line.path)), patience_s=10.0)
    yield lane
    line.cut = lambda to_server, data: False
    lane.audit()
    lane.channel.close()


def cut_once(line: Line, to_server: bool) -> None:
    """Cuts at the next transition that goes to the server, or at the next answer that comes back."""
    armed = [True]

    def cut(toward: bool, data: bytes) -> bool:
        if armed and toward is to_server and (b"EVAL" in data or not toward):
            armed.clear()
            return True
        return False

    line.cut = cut


LOST = pytest.mark.parametrize("to_server", [True, False], ids=["before it was executed", "after it was executed"])


@LOST
@pytest.mark.parametrize("shape", ["CHAIN", "DIAMOND"])
def test_each_operation_is_executed_once_when_the_line_is_cut(bad_lane, line, shape, to_server):
    """submit, claim and commit whose connection dies are sent again, and do nothing twice."""
    lane = bad_lane
    pipeline = lane.define(getattr(lane, shape))
    cut_once(line, to_server)
    jobs = lane.submit(pipeline, 3)
    worker = lane.worker(pipeline)
    for node in lane.graphs[pipeline].nodes:
        cut_once(line, to_server)
        grant = worker.claim(node.index)
        assert [e.job_id for e in grant.entries] == jobs
        cut_once(line, to_server)
        assert worker.commit(grant, node.index) == "kkk"
    assert line.cuts == lane.channel.reconnects == 1 + 2 * len(lane.graphs[pipeline].nodes)
    assert lane.load("p1@v.k") == 3
    assert sorted(i for i, _ in lane.replies()) == jobs


@LOST
def test_returns_are_executed_once_when_the_line_is_cut(bad_lane, line, to_server):
    """fail, release, lost and redrive count once."""
    lane = bad_lane
    chain = lane.define(lane.CHAIN)
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    grant = worker.claim(1)
    cut_once(line, to_server)
    assert worker.fail(grant, 1) == "r"
    grant = worker.claim(1)
    assert grant.entries[0].attempts == 1
    cut_once(line, to_server)
    assert worker.release(grant) == "r"
    grant = worker.claim(1)
    cut_once(line, to_server)
    assert worker.lost(grant) == "f"
    cut_once(line, to_server)
    assert lane.run(lane.t.redrive([job])) == [f"{job}~1"]
    assert lane.load("p1@v/s1.failed") == 1
    assert line.cuts == 4


def test_a_pipelined_window_survives_a_line_that_is_cut_at_random(bad_lane, line):
    """Sixteen operations in flight, one in thirty packets lost: no job twice, none lost, no false error."""
    lane = bad_lane
    chain = lane.define(lane.CHAIN)
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    # Not each by its own dice: a run of luck would test nothing. The first soon, as packets may be few and large.
    passing = [dice.randrange(3, 7)]

    def cut(to_server: bool, data: bytes) -> bool:
        passing[0] -= 1
        if passing[0] < 0:
            passing[0] = dice.randrange(20, 40)
            return True
        return False

    line.cut = cut
    sent, jobs = [], []
    for _ in range(60):
        batch = [lane.job() for _ in range(5)]
        jobs += [j.id for j in batch]
        sent.append(lane.channel.send(lane.submitting(chain, batch)))
        while len(sent) > 15:
            assert sent.pop(0).result().statuses == "nnnnn"
    assert [p.result().statuses for p in sent] == ["nnnnn"] * len(sent)
    worker = lane.worker(chain)
    for node in (1, 2, 3):
        claims = [lane.channel.send(worker.ask(node, 40)) for _ in range(8)]
        grants = [p.result() for p in claims]
        # Their order may differ: a call that meets a server new to its script is sent again behind the others.
        assert sorted(e.job_id for g in grants for e in g.entries) == jobs
        commits = [lane.channel.send(worker.committing(g, node)) for g in grants]
        assert "".join(p.result() for p in commits) == "k" * len(jobs)
    assert line.cuts > 0
    assert sorted(i for i, _ in lane.replies()) == jobs
    assert [lane.load(f"p1@v/s{n}.committed") for n in (1, 2, 3)] == [len(jobs)] * 3


def test_client_kill_in_mid_flight(lane, chain):
    """Connections that the server itself kills, again and again, cost nothing."""
    worker = lane.worker(chain)
    jobs = []
    for turn in range(40):
        pending = [lane.channel.send(lane.submitting(chain, [job])) for job in (lane.job(), lane.job())]
        asked = lane.channel.send(worker.ask(1))
        if turn % 2:
            for client in lane.redis.client_list():
                if client["cmd"].startswith("eval"):
                    lane.redis.client_kill_filter(_id=client["id"])
        assert [p.result().statuses for p in pending] == ["n", "n"]
        grant = asked.result()
        jobs += [e.job_id for e in grant.entries]
        if grant.entries:
            assert worker.commit(grant, 1) == "k" * len(grant.entries)
    assert lane.channel.reconnects > 0
    assert sorted(lane.ready(chain, 2)) == sorted(jobs)
    assert len(set(jobs)) == len(jobs) == lane.load("p1@v/s1.committed")


def test_scripts_flushed_with_a_window_in_flight(lane, chain):
    """NOSCRIPT answers are sent again with the source, each to its own caller."""
    jobs = lane.submit(chain, 60)
    worker = lane.worker(chain)
    seen = []
    for _ in range(6):
        lane.redis.script_flush()
        claims = [lane.channel.send(worker.ask(1, 2)) for _ in range(5)]
        lane.redis.script_flush()
        grants = [p.result() for p in claims]
        commits = [lane.channel.send(worker.committing(g, 1)) for g in grants]
        assert [p.result() for p in commits] == ["kk"] * 5
        seen += [e.job_id for g in grants for e in g.entries]
    assert sorted(seen) == jobs


def test_a_script_that_was_missing_keeps_nothing_that_its_caller_has(lane, chain):
    """A worker that is idle from then on runs no collector: a dead worker's device memory stayed in use as long."""

    class Rows:
        pass

    def step() -> Any:
        rows = Rows()
        lane.run(lane.t.reap())
        return weakref.ref(rows)

    lane.run(lane.t.reap())
    lane.redis.script_flush()
    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()


def test_refusals_reach_their_own_caller(lane, chain):
    """An error in the middle of a window belongs to one call; its neighbours are answered."""
    good = lane.channel.send(lane.submitting(chain, [lane.job()]))
    bad = lane.channel.send(lane.submitting(99, [lane.job()]))
    after = lane.channel.send(lane.submitting(chain, [lane.job()]))
    assert after.result().statuses == "n"
    with pytest.raises(PipelineNotFound):
        bad.result()
    with pytest.raises(PipelineNotFound):
        bad.result()
    assert good.result().statuses == "n"


def test_waiting_ends_with_a_token_a_time_out_or_a_clear_error(lane, chain):
    """block_pop returns the token, None after its time, and names a key of another type."""
    wake = lane.keys.wake("p1@v/s1")
    assert lane.channel.block_pop([wake], 0.001) is None
    lane.submit(chain)
    assert lane.channel.block_pop([wake], 5.0) == [wake.encode(), b"1"]
    lane.redis.set(wake, "foreign")
    with pytest.raises(BrokerMisconfigured, match="another type"):
        lane.channel.block_pop([wake], 0.001)
    lane.redis.delete(wake)
    assert lane.run(lane.t.reap())[0] == 0


def test_waiting_survives_a_killed_connection(lane, chain):
    """A connection that dies while it waits is made anew, and the caller looks for work again."""
    wake = lane.keys.wake("p1@v/s1")

    def kill() -> None:
        waiting = [c for c in lane.redis.client_list() if c["cmd"] == "blpop"]
        wait_until(lambda: waiting or waiting.extend(c for c in lane.redis.client_list() if c["cmd"] == "blpop"))
        lane.redis.client_kill_filter(_id=waiting[0]["id"])

    killer = threading.Thread(target=kill)
    killer.start()
    assert lane.channel.block_pop([wake], 30.0) is None
    killer.join()
    assert lane.channel.reconnects == 1
    lane.submit(chain)


def test_waiting_ends_when_its_owner_is_to_end(lane, chain, server_url):
    """A wait is cut short in the middle, a later one does not begin, and what the channel sends then is answered."""
    stop = Stop()
    channel = Channel(redis.Redis.from_url(server_url), until=stop)
    wake = lane.keys.wake("p1@v/s1")

    def end() -> None:
        wait_until(lambda: [c for c in lane.redis.client_list() if c["cmd"] == "blpop"])
        stop.set()

    ender = threading.Thread(target=end)
    ender.start()
    began = time.monotonic()
    assert channel.block_pop([wake], 30.0) is None
    ender.join()
    assert channel.block_pop([wake], 30.0) is None
    assert time.monotonic() - began < 20.0
    assert channel.run(lane.submitting(chain, [lane.job()])).statuses == "n"
    assert lane.channel.block_pop([wake], 5.0) == [wake.encode(), b"1"]
    channel.close()


@pytest.fixture
def own_server() -> Iterator[PrivateServer]:
    with private_server("--appendfsync", "always") as made:
        yield made


def test_server_killed_and_restarted_in_mid_run(own_server):
    """kill -9 of the server with calls in flight: with appendfsync always nothing is lost or done twice."""
    client = redis.Redis.from_url(own_server.url)
    lane = Lane(client, "q" + new_token(10))
    chain = lane.define(lane.CHAIN)

    def restart() -> None:
        own_server.kill()
        own_server.start()

    jobs = [[lane.job() for _ in range(20)] for _ in range(8)]
    pending = [lane.channel.send(lane.submitting(chain, batch)) for batch in jobs]
    restart()
    assert [p.result().statuses for p in pending] == ["n" * 20] * 8
    ids = [j.id for batch in jobs for j in batch]
    worker = lane.worker(chain)
    for node in (1, 2, 3):
        claims = [lane.channel.send(worker.ask(node, 20)) for _ in range(8)]
        restart()
        grants = [p.result() for p in claims]
        assert sorted(e.job_id for g in grants for e in g.entries) == ids
        commits = [lane.channel.send(worker.committing(g, node)) for g in grants]
        restart()
        assert [p.result() for p in commits] == ["k" * 20] * 8
    assert lane.channel.reconnects >= 7
    assert sorted(i for i, _ in lane.replies()) == ids
    assert [lane.load(f"p1@v/s{n}.committed") for n in (1, 2, 3)] == [160] * 3
    lane.audit()
    lane.channel.close()


def test_a_server_that_stays_away_fails_every_call_and_may_come_back(own_server):
    """After patience_s each call in flight raises BrokerUnavailable; when the server is back the channel works."""
    client = redis.Redis.from_url(own_server.url)
    lane = Lane(client, "q" + new_token(10))
    chain = lane.define(lane.CHAIN)
    channel = Channel(client, patience_s=0.2)
    pending = [channel.send(lane.submitting(chain, [lane.job()])) for _ in range(3)]
    channel.drain()
    own_server.stop()
    with pytest.raises(BrokerUnavailable, match="is it running"):
        channel.run(lane.submitting(chain, [lane.job()]))
    assert [p.result().statuses for p in pending] == ["n"] * 3
    own_server.start()
    assert channel.run(lane.submitting(chain, [lane.job()])).statuses == "n"
    own_server.process.send_signal(signal.SIGSTOP)
    pending = [channel.send(lane.submitting(chain, [lane.job()])) for _ in range(3)]
    own_server.kill()
    # Each is refused, as often as it is asked for.
    for late in [*pending, *pending]:
        with pytest.raises(BrokerUnavailable):
            late.result()
    assert channel.in_flight == 0
    own_server.start()
    assert channel.run(lane.submitting(chain, [lane.job()])).statuses == "n"
    lane.audit()
    channel.close()
    lane.channel.close()


def test_a_read_only_server_is_waited_for(own_server):
    """While the server is a replica (a failover is under way) calls wait; then they are executed once."""
    client = redis.Redis.from_url(own_server.url)
    lane = Lane(client, "q" + new_token(10))
    chain = lane.define(lane.CHAIN)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    promoted = threading.Timer(0.2, lambda: client.execute_command("REPLICAOF", "NO", "ONE"))
    promoted.start()
    assert len(lane.submit(chain, 3)) == 3
    promoted.join()
    assert lane.channel.reconnects > 0
    lane.drain(chain)
    assert lane.load("p1@v.k") == 3
    lane.audit()
    lane.channel.close()
