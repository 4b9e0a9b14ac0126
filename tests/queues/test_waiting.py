"""What is ready, told apart by priority from ranks alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis

from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import Registry
from torchrelay.queues.waiting import ReadyClass, standings

BOOST = 600.0


def test_each_priority_is_counted_in_its_class(lane: Any, chain: int) -> None:
    """Jobs of three priorities at one node: counted apart, beside the load counters; idle nodes are left out."""
    for jobs, priority in ((3, 100), (5, 50), (7, 0), (2, 80)):
        lane.submit(chain, jobs, boost_ms=priority * BOOST, rows=2)
    found = standings(Registry(lane.redis, lane.keys.namespace, 1), BOOST)
    key = lane.node_key(chain, 1)
    # 80 points go behind a new high job and before a new medium one.
    assert {name: c.jobs for name, c in found.ready[key].items()} == {"high": 3, "medium": 7, "low": 7}
    assert found.counters[f"{key}.ready_rows"] == 34
    assert list(found.ready) == [key]
    assert abs(found.at_s - lane.server_ms() / 1000.0) < 10.0


def test_the_oldest_of_a_class_is_told_by_its_rank(lane: Any, chain: int) -> None:
    """A job that stands 20 s ahead of a new one of its class waits 20 s; one that is older than the boost counts as
    what it overtook."""
    lane.submit(chain, boost_ms=50 * BOOST + 20_000)
    lane.submit(chain, boost_ms=0)
    found = standings(Registry(lane.redis, lane.keys.namespace, 1), BOOST).ready[lane.node_key(chain, 1)]
    assert found["high"] == ReadyClass()
    assert found["medium"].jobs == 1
    assert 20_000 <= found["medium"].oldest_ms < 25_000
    assert 0 <= found["low"].oldest_ms < 5_000
    lane.submit(chain, boost_ms=110 * BOOST)
    found = standings(Registry(lane.redis, lane.keys.namespace, 1), BOOST).ready[lane.node_key(chain, 1)]
    assert found["high"].jobs == 1
    assert 6_000 <= found["high"].oldest_ms < 11_000


def test_what_is_not_due_by_this_clock_is_of_the_last_class(lane: Any, chain: int) -> None:
    """A rank ahead of now, as tenants' turns or a clock that jumped make it, is counted and has no age."""
    lane.submit(chain, 4, boost_ms=-3_600_000)
    found = standings(Registry(lane.redis, lane.keys.namespace, 1), BOOST).ready[lane.node_key(chain, 1)]
    assert found["low"] == ReadyClass(4, 0.0)


def test_an_empty_namespace_has_nothing(redis_client: redis.Redis) -> None:
    """No lane was opened yet: no counters, no nodes."""
    found = standings(Registry(redis_client, "q" + new_token(10), 2), BOOST)
    assert (found.counters, found.ready) == ({}, {})


def test_it_takes_two_round_trips_whatever_the_namespace(lane: Any, make_lane: Callable[[], Any]) -> None:
    """Thirty nodes with jobs are read by as many sends as one is."""
    numbers = [lane.define(lane.CHAIN) for _ in range(10)]
    for number in numbers:
        lane.submit(number)
    registry, sends = Registry(lane.redis, lane.keys.namespace, 1), 0
    pipeline = registry.client.pipeline

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal sends
        sends += 1
        return pipeline(*args, **kwargs)

    registry.client.pipeline = counting  # type: ignore[method-assign]
    try:
        assert len(standings(registry, BOOST).ready) == 10
    finally:
        del registry.client.pipeline
    assert sends == 2
