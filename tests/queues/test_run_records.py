"""Records of runs: what a driver writes is what others read; one that fell silent is lost; what is none is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis

from torchrelay.queues.registry import Registry
from torchrelay.queues.run_records import LOST, RunRecord, RunRecords

RECORD = RunRecord("r1", "embed@12345678", "in/", "/out", "host", 7, 1000.0)


@pytest.fixture
def records(registry: Registry) -> RunRecords:
    return RunRecords(registry.client, registry.control)


def test_what_a_driver_writes_is_read_by_others(records: RunRecords) -> None:
    """The latest first; the last word of a driver stays."""
    records.begin(RECORD)
    records.begin(replace(RECORD, run="r2", began=2000.0))
    assert not records.write(replace(RECORD, rows=5, total_rows=9, eta_s=1.5))
    assert [(r.run, r.rows, r.state) for r in records.all()] == [("r2", 0, "running"), ("r1", 5, "running")]
    records.write(replace(RECORD, state="done", rows=9))
    found = records.find("r1")
    assert found is not None
    assert (found.state, found.rows) == ("done", 9)
    assert records.find("r3") is None


def test_a_driver_that_fell_silent_has_lost_its_run(records: RunRecords, registry: Registry) -> None:
    """Until somebody takes it up again."""
    records.begin(replace(RECORD, eta_s=3.0))
    assert 0 < registry.client.ttl(registry.control.run_alive("r1")) <= 15
    registry.client.delete(registry.control.run_alive("r1"))
    found = records.find("r1")
    assert found is not None
    assert (found.state, found.eta_s) == (LOST, None)
    records.begin(RECORD)
    assert [r.state for r in records.all()] == ["running"]


def test_a_driver_hears_that_its_run_is_to_end(records: RunRecords) -> None:
    """And one that takes the run up again later does not."""
    records.begin(RECORD)
    records.cancel("r1")
    assert records.cancel_asked("r1")
    assert records.write(RECORD)
    records.begin(RECORD)
    assert not records.write(RECORD)


@pytest.mark.parametrize(
    "junk", ["", "[]", "{", '{"run": 1}', RECORD.encode().replace('"rows": 0', '"rows": "x"'), "[" * 100_000]
)
def test_what_is_no_record_is_shown_nowhere(records: RunRecords, registry: Registry, junk: str) -> None:
    """And harms no other."""
    records.begin(RECORD)
    records.begin(replace(RECORD, run="r2"))
    registry.client.set(registry.control.run("r1"), junk)
    assert [r.run for r in records.all()] == ["r2"]
    assert records.find("r1") is None


def test_no_more_than_a_thousand_are_kept(records: RunRecords, registry: Registry, redis_client: redis.Redis) -> None:
    """The oldest go."""
    key = registry.control.runs
    redis_client.zadd(key, {f"old-{n}": n for n in range(1200)})
    records.begin(replace(RECORD, began=5000.0))
    assert redis_client.zcard(key) == 1000
    assert redis_client.zscore(key, "r1") is not None
