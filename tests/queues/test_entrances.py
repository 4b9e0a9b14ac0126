"""One claim over all the places at which a worker claims: nodes of one pipeline, and of several."""

from __future__ import annotations

from typing import Any

import pytest

from torchrelay.errors import TorchrelayError
from torchrelay.queues.transitions import Entrance


class Both:
    """A worker that claims at the first and second node of one pipeline, and at the first of another."""

    def __init__(self, lane: Any, one: int, two: int) -> None:
        self.lane, self.worker = lane, lane.worker(one)
        self.places = [(one, 1, 2), (one, 2, 2), (two, 1, 1)]
        self.numbers = iter(range(1, 100))

    def asking(self, jobs: int = 8, rows: int = 100, better_than: float | None = None, key: str | None = None) -> Any:
        places = [
            Entrance(number, node, last, self.lane.node_key(number, node) if key is None else key, jobs, rows)
            for number, node, last in self.places
        ]
        worker = self.worker
        return self.lane.t.claim_any(
            worker.session, f"f{next(self.numbers)}", worker.incarnation, places, 60_000, better_than=better_than
        )

    def claim(self, **options: Any) -> tuple[int, list[str]]:
        """(which entrance, ids)."""
        grant = self.lane.run(self.asking(**options))
        return grant.entrance, [e.job_id for e in grant.entries]


@pytest.fixture
def two(lane: Any) -> int:
    number: int = lane.define({"t1": (0,), "t2": (1,)})
    return number


@pytest.fixture
def both(lane: Any, chain: int, two: int) -> Both:
    return Both(lane, chain, two)


def wakes(lane: Any, pipeline: int, node: int) -> int:
    return int(lane.redis.llen(lane.keys.wake(lane.node_key(pipeline, node))))


def test_the_best_first_job_decides(lane: Any, chain: int, two: int, both: Both) -> None:
    """Whatever pipeline and node it stands at; of each claim all jobs stand at one. Of equals, the first place."""
    low = lane.submit(two, 2)
    high = lane.submit(chain, boost_ms=60_000)
    assert both.claim() == (0, high)
    assert both.claim() == (2, low)
    assert both.claim() == (0, [])
    middle = lane.submit(chain, boost_ms=10_000)
    other = lane.worker(chain)
    other.step(1)
    last = lane.submit(two, boost_ms=70_000)
    assert [both.claim(), both.claim()] == [(2, last), (1, middle)]


def test_what_others_wait_for_is_told_on(lane: Any, chain: int, two: int, both: Both) -> None:
    """The token that woke this worker may have been that of a place where it did not claim."""
    lane.submit(chain, boost_ms=60_000)
    lane.submit(two)
    lane.redis.delete(lane.keys.wake(lane.node_key(two, 1)), lane.keys.wake(lane.node_key(chain, 1)))
    assert both.claim()[0] == 0
    assert (wakes(lane, chain, 1), wakes(lane, two, 1)) == (0, 1)
    both.claim()
    assert wakes(lane, two, 1) == 1  # nobody took it yet, and a second one would be of no use


@pytest.mark.parametrize("why", ["full", "paused"])
def test_a_place_that_gives_nothing_is_passed_over(lane: Any, chain: int, two: int, both: Both, why: str) -> None:
    """Its jobs stay, and are the first again once it is open."""
    first, second = lane.submit(chain, 2, boost_ms=60_000), lane.submit(two, 2)
    if why == "paused":
        lane.run(lane.t.pause(f"p{chain}", "v", "s2", True))
    else:
        lane.mark(chain, {"s3": (1, 10**9)})
        waiting = lane.submit(chain)
        ahead = lane.worker(chain)
        lane.redis.zrem(lane.keys.ready(lane.node_key(chain, 1)), *first)
        assert ahead.step(1) == ahead.step(2) == waiting
        lane.redis.zadd(lane.keys.ready(lane.node_key(chain, 1)), dict.fromkeys(first, 0.0))
    grant = lane.run(both.asking())
    assert (grant.entrance, [e.job_id for e in grant.entries], grant.gated) == (2, second, False)
    grant = lane.run(both.asking())
    assert (grant.entrance, grant.entries, grant.gated, grant.paused) == (0, [], True, why == "paused")
    if why == "paused":
        lane.run(lane.t.pause(f"p{chain}", "v", "s2", False))
    else:
        lane.worker(chain).step(3)
    assert both.claim() == (0, first)


def test_only_what_is_better_may_be_asked_for(lane: Any, chain: int, two: int, both: Both) -> None:
    """Of each place as far as it goes; the rest waits where it is."""
    held = lane.submit(two, boost_ms=5_000)
    grant = lane.run(both.asking())
    rank = grant.entries[0].rank
    worse = lane.submit(chain)
    assert both.claim(better_than=rank) == (0, [])
    better = lane.submit(chain, 2, boost_ms=60_000)
    assert both.claim(better_than=rank) == (0, better)
    assert both.claim(better_than=rank) == (0, [])
    assert lane.ready(chain, 1) == worse
    assert [e.job_id for e in grant.entries] == held


def test_a_replay_gives_the_same_grant_of_the_same_place(lane: Any, chain: int, two: int, both: Both) -> None:
    [job] = lane.submit(two)
    call = both.asking()
    first, again = lane.run(call), lane.run(call)
    assert (first.fence, first.entrance, [e.job_id for e in first.entries]) == ("f1", 2, [job])
    assert (again.fence, again.entrance, [e.job_id for e in again.entries]) == ("f1", 2, [job])


def test_each_place_takes_as_much_as_it_asks_for(lane: Any, chain: int, two: int, both: Both) -> None:
    lane.submit(chain, 5, rows=3)
    assert len(both.claim(rows=7)[1]) == 2
    assert len(both.claim(jobs=1)[1]) == 1


def test_a_key_that_is_not_the_nodes_is_refused(lane: Any, chain: int, two: int, both: Both) -> None:
    """Before anything is written."""
    lane.submit(chain)
    with pytest.raises(TorchrelayError, match="is not"):
        both.claim(key="p9@v/other")
    assert len(lane.ready(chain, 1)) == 1


def test_a_foreign_key_in_the_place_of_one_does_not_stop_the_others(
    lane: Any, chain: int, two: int, both: Both
) -> None:
    """Whoever put it there harms the jobs of that node alone."""
    jobs = lane.submit(chain)
    lane.redis.set(lane.keys.ready(lane.node_key(two, 1)), "foreign")
    assert both.claim() == (0, jobs)
    lane.redis.delete(lane.keys.ready(lane.node_key(two, 1)))
