"""Where a worker claims: in each lane in turn, at all of its entrances at once."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from tests.queues.conftest import Lane
from torchrelay.config.spec import BatchSpec
from torchrelay.queues.channel import Channel
from torchrelay.queues.keys import new_token
from torchrelay.queues.transitions import Entrance, Grant, Session
from torchrelay.workers import claimer as claiming
from torchrelay.workers.claimer import Claimer

EMPTY = Grant("", 0, [], -1, 0, False)


class Clock:
    """Stands for `time` in the claimer; `now` is moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Server:
    """Two lanes and a worker with two entrances, as the claimer's context and its channel: notes each claim's lane.

    `ready` says at which entrance a lane gives a job.
    """

    def __init__(self, ready: dict[int, int]) -> None:
        self.ready = ready
        self.claims: list[int] = []
        self.asked: list[list[Entrance]] = []
        self.incarnation, self.number, self.lease_ms, self.key = "w", 1, 1000, "p/a"
        self.lanes = tuple(SimpleNamespace(claim_any=self._claim(i), keys=SimpleNamespace(wake=str)) for i in range(2))
        self.spec = SimpleNamespace(batch=BatchSpec(max_rows=1))
        self.nodes = (1, 2)
        self.waited: list[list[str]] = []

    def entrances(self) -> tuple[Any, ...]:
        return (self, SimpleNamespace(**vars(self) | {"number": 2, "nodes": (2, 2), "key": "p/b"}))

    def _claim(self, lane: int) -> Any:
        def claim(session: Any, fence: str, incarnation: str, entrances: list[Entrance], *args: Any, **kw: Any) -> int:
            self.asked.append(entrances)
            return lane

        return claim

    def send(self, lane: int) -> Any:
        self.claims.append(lane)
        entry: Any = SimpleNamespace(rows=1, suspect=False, packed=b"x", rank=0.0)
        grant = Grant("f", 0, [entry], -1, 1, False, entrance=self.ready[lane]) if lane in self.ready else EMPTY
        return SimpleNamespace(result=lambda: grant)

    def block_pop(self, keys: list[str], timeout_s: float) -> None:
        self.waited.append(keys)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(claiming, "time", made)
    return made


def claimer(server: Any) -> Claimer:
    return Claimer(server, server, SimpleNamespace(), lambda held: None)  # type: ignore[arg-type]


def test_every_lane_is_looked_at_before_a_wait(clock: Clock) -> None:
    """However long the last wait took: each lane once, all entrances in one claim; then it waits for all of them."""
    server = Server({})
    claims = claimer(server)
    for _ in range(4):
        server.claims.clear()
        while not claims.idle():
            assert not claims.top_up()
        assert sorted(server.claims) == [0, 1]
        claims.wait()
        clock.now += 1.0
    assert server.waited[0] == ["p/a", "p/b"] * 2
    assert {tuple(asked) for asked in server.asked} == {
        (Entrance(1, 1, 2, "p/a", 1, 1), Entrance(2, 2, 2, "p/b", 1, 1))
    }


def test_jobs_of_two_entrances_are_not_taken_together(clock: Clock) -> None:
    """A batch holds jobs that stand at one node of one pipeline."""
    server = Server({0: 0, 1: 1})
    claims = claimer(server)
    claims.top_up()
    claims.window_rows = 0
    claims.top_up()
    assert [held.entrance for held in claims.window] == [0, 1]
    assert [[held.entrance for held in claims.take(8)] for _ in range(2)] == [[0], [1]]


@pytest.mark.parametrize(
    ("batch", "rows_per_s", "at_once"),
    [
        ({}, 1e6, 8),
        ({"sorts": True}, 0.0, 32),
        ({"sorts": True}, 100.0, 32),
        ({"sorts": True}, 4000.0, 1000),
        ({"sorts": True, "in_flight_rows": 600}, 4000.0, 300),
        ({"sorts": True, "in_flight_rows": 32}, 4000.0, 32),
    ],
)
def test_rows_that_are_sorted_are_taken_by_the_quarter_of_a_second(
    batch: dict[str, Any], rows_per_s: float, at_once: int
) -> None:
    sorts = {"max_cost": {"column": "x", "total": 64}} if batch.pop("sorts", False) else {}
    server = Server({})
    server.spec = SimpleNamespace(batch=BatchSpec.model_validate({"max_rows": 8, **sorts, **batch}))
    claims = claimer(server)
    claims.rows_per_s = rows_per_s
    assert claims.rows_at_once() == at_once


def test_an_idle_worker_asks_another_host_for_what_it_can_take(redis_client: redis.Redis) -> None:
    """However long the copy of large columns takes: it does not ask for all that lies there meanwhile."""
    lane = Lane(redis_client, "q" + new_token(10))
    chain = lane.define(Lane.CHAIN)
    there, spiller = "b" * 16, lane.t.spilling("b" * 16, 64, 60_000)
    lane.run(spiller)
    lane.submit(chain, 200)
    maker = lane.worker(chain, there)
    grant = maker.claim(1)
    outputs = [
        o._replace(refs=f"{e.job_id}.1.{grant.fence}.y:0:5:2:{there},")
        for o, e in zip(maker.outputs(1, grant.entries), grant.entries, strict=True)
    ]
    lane.run(lane.t.commit(maker.session, grant.fence, chain, 1, outputs))
    entrance = SimpleNamespace(
        number=chain, nodes=(2, 2), key=lane.node_key(chain, 2), spec=SimpleNamespace(batch=BatchSpec(max_rows=1))
    )
    context: Any = SimpleNamespace(
        incarnation="w", lease_ms=60_000, lanes=(lane.t,), spec=entrance.spec, entrances=lambda: (entrance,)
    )
    channel = Channel(redis_client, patience_s=10.0)
    claims = Claimer(context, channel, Session("w"), lambda held: None, host="a" * 16)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        while not claims.idle():
            assert not claims.top_up()
        claims.wait(0.05)
    channel.close()
    lane.channel.close()
    assert redis_client.zcard(lane.keys.spill(there)) <= 8
