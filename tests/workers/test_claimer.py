"""Where a worker of fused stages claims: at its first stage, and at the later ones often enough."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchrelay.config.spec import BatchSpec
from torchrelay.queues.transitions import Grant
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
    """Two lanes of two nodes, as the claimer's context and its channel: notes each claim as (node, lane)."""

    def __init__(self, full: set[tuple[int, int]]) -> None:
        self.full = full
        self.claims: list[tuple[int, int]] = []
        self.incarnation, self.number, self.lease_ms, self.keys = "w", 1, 1000, ["p/a", "p/b"]
        self.lanes = tuple(SimpleNamespace(claim=self._claim(i), keys=SimpleNamespace(wake=str)) for i in range(2))
        self.spec = SimpleNamespace(batch=BatchSpec(max_rows=1))
        self.nodes = (1, 2)
        self.waited: list[list[str]] = []

    def entrances(self) -> tuple[Any, ...]:
        return (self, SimpleNamespace(**vars(self) | {"nodes": (2, 2)}))

    def _claim(self, lane: int) -> Any:
        return lambda session, fence, incarnation, number, nodes, limits: (nodes[0], lane)

    def send(self, place: tuple[int, int]) -> Any:
        self.claims.append(place)
        entry: Any = SimpleNamespace(rows=1, suspect=False, packed=b"x")
        grant = Grant("f", 0, [entry], -1, 1, False) if place in self.full else EMPTY
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


def test_every_place_is_looked_at_before_a_wait(clock: Clock) -> None:
    """However long the last wait took: each lane of each node once, then it waits for all of them."""
    server = Server(set())
    claims = claimer(server)
    for _ in range(4):
        server.claims.clear()
        while not claims.idle():
            assert not claims.top_up()
        assert sorted(server.claims) == [(1, 0), (1, 1), (2, 0), (2, 1)]
        claims.wait()
        clock.now += 1.0
    assert server.waited[0] == ["p/a", "p/b"] * 2


def test_later_nodes_are_looked_at_now_and_then(clock: Clock) -> None:
    """While jobs come to the first node, each lane of the later one is claimed at too, but seldom."""
    server = Server({(1, 0), (1, 1)})
    claims = claimer(server)
    for _ in range(400):
        claims.top_up()
        claims.window.clear()
        claims.window_rows = 0
        clock.now += 0.01
    assert 6 <= sum(node == 2 for node, _ in server.claims) <= 10
    assert {lane for node, lane in server.claims if node == 2} == {0, 1}


def test_jobs_of_two_nodes_are_not_taken_together(clock: Clock) -> None:
    """A batch holds jobs that stand at one node."""
    server = Server({(1, 0), (1, 1), (2, 0), (2, 1)})
    claims = claimer(server)
    claims.top_up()
    claims.window_rows = 0
    claims.top_up()
    assert [held.passed for held in claims.window] == [1, 0]
    assert [[held.passed for held in claims.take(8)] for _ in range(2)] == [[1], [0]]


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
    server = Server(full=set())
    server.spec = SimpleNamespace(batch=BatchSpec.model_validate({"max_rows": 8, **sorts, **batch}))
    claims = claimer(server)
    claims.rows_per_s = rows_per_s
    assert claims.rows_at_once() == at_once
