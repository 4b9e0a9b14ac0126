"""Asking for runs: what a request says and refuses, when it is due, and what becomes of schedules."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rq.job import JobStatus

from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs import timetable
from torchrelay.producer.runs.detached import RunRequest, enqueue, level_of, runs_queues
from torchrelay.producer.runs.overview import Overview
from torchrelay.producer.runs.timetable import Schedule, Timetable
from torchrelay.queues.registry import Registry

REQUEST = RunRequest("embed@12345678", ("/in",), "/out", {"key": "id"})


def test_a_request_is_plain_values_and_comes_back(tmp_path: Path) -> None:
    """Relative paths are those of whoever asks; what nobody gave is left out."""
    options = {"columns": {"text": "body"}, "keep": ["a"], "key": None, "resume": False, "limit": 0, "priority": "high"}
    asked = RunRequest.make("embed@12345678", ["d/*.parquet", "s3://b/x"], "out", options, str(tmp_path))
    assert asked.input == (f"{tmp_path}/d/*.parquet", "s3://b/x")
    assert asked.output == f"{tmp_path}/out"
    assert asked.options == {"columns": {"text": "body"}, "keep": ["a"], "limit": 0, "priority": "high"}
    assert RunRequest.parse(json.loads(json.dumps(asked.arguments()))) == asked
    found = asked.run_options("r1")
    assert (found.run_id, found.read.keep, found.priority, asked.level) == ("r1", ("a",), 100, "high")


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": 5},
        {"pipeline": ""},
        {"input": []},
        {"input": "/in"},
        {"input": ["a\0b"]},
        {"input": ["x" * 5000]},
        {"input": ["x"] * 10_001},
        {"output": None},
        {"options": []},
        {"options": {"on_progress": "os.system"}},
        {"options": {"run_id": "other"}},
        {"options": {"limit": -1}},
        {"options": {"limit": "5"}},
        {"options": {"columns": "a=b"}},
        {"options": {"keep": [1]}},
        {"options": {"keep": 7}},
        {"options": {"priority": "urgent"}},
        {"options": {"format": 5}},
        {"more": 1},
    ],
)
def test_a_request_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((InputError, ConfigError)):
        RunRequest.parse({**REQUEST.arguments(), **change})


def test_the_level_is_the_nearest() -> None:
    assert [level_of(p) for p in (0, 24, 25, 50, 74, 75, 100, "low", "high")] == (
        ["low", "low", "medium", "medium", "medium", "high", "high", "low", "high"]
    )


def test_a_run_is_asked_for_once(registry: Registry, namespace: str) -> None:
    """A second job of its id changes nothing."""
    run = f"once-{namespace[-12:].replace('.', '-')}"
    assert enqueue(registry.client, namespace, REQUEST, run, retries=2)
    assert not enqueue(registry.client, namespace, REQUEST.into("/other"), run)
    (queue,) = (q for q in runs_queues(registry.client, namespace) if q.count)
    assert (queue.name, queue.count) == (f"{namespace}:runs-low", 1)
    job = queue.find(run)
    assert job is not None
    assert json.loads(job.data) == ["torchrelay.run", None, [], REQUEST.arguments()]
    assert (job.retries_left, job.timeout, job.get_status()) == (2, -1, JobStatus.QUEUED)
    assert job.get_retry_interval() == 5
    job.retries_left = 1
    assert job.get_retry_interval() == 30
    job.delete()


def test_when_a_run_is_due() -> None:
    """Seconds from the last time, or the next time of a rule, in local time."""
    after = datetime(2026, 3, 5, 12, 0, tzinfo=UTC).timestamp()
    assert timetable.next_time(90, after) == after + 90
    due = datetime.fromtimestamp(timetable.next_time("30 4 * * *", after))
    assert (due.hour, due.minute) == (4, 30)
    assert 0 < due.timestamp() - after <= 24 * 3600
    assert timetable.first_time(60, None, after) == after
    assert timetable.first_time("* * * * *", None, after) == after + 60
    assert timetable.moment("2026-03-05T13:00Z", after) == after + 3600
    assert timetable.parse_every("90") == 90
    assert timetable.folders("/out/") == "/out/{started}"
    assert timetable.with_started("/x/{started}/y", after) == "/x/20260305-120000/y"


@pytest.mark.parametrize("every", [0, -5, 1.5, True, "", "x", "* * * *", "99 * * * *", "0 0 30 2 *", "* " * 500, None])
def test_a_rule_that_is_none_is_refused(every: Any) -> None:
    with pytest.raises(InputError, match="--every"):
        timetable.next_time(every, time.time())


def scheduled(registry: Registry, every: int | str, due: float, made: bool = False) -> Schedule:
    tag = registry.control.namespace[-12:].replace(".", "-")
    schedule = Schedule(f"s-{tag}", registry.control.namespace, REQUEST, every, due, made=made)
    registry.client.hset(registry.control.schedules, schedule.id, schedule.encode())
    return schedule


def test_a_schedule_makes_each_job_once_and_misses_what_is_past(registry: Registry) -> None:
    """Whoever keeps the timetable; one repetition for the time in which nobody did."""
    client, control = registry.client, registry.control
    now = time.time()
    scheduled(registry, 3600, now - 100_000)
    first, second = (Timetable(client, control, name) for name in ("a", "b"))
    for keeper in (first, second, first, second):
        keeper.tick()
    views = Overview(client, control).all()
    states = sorted(v.state for v in views)
    assert states == ["queued", "repeating", "scheduled"]
    (waits,) = (v for v in views if v.state == "scheduled")
    assert waits.due is not None
    assert now + 3500 < waits.due <= now + 3601
    first.release()
    second.tick()
    assert len(Overview(client, control).all()) == 3


def test_a_schedule_that_is_cancelled_is_gone_with_what_waits_of_it(registry: Registry) -> None:
    """Also while a keeper has it in hand."""
    client, control = registry.client, registry.control
    saved = timetable.save(client, control, replace(scheduled(registry, 3600, time.time() + 1800), made=False))
    overview = Overview(client, control)
    assert sorted(v.state for v in overview.all()) == ["repeating", "scheduled"]
    assert overview.cancel(saved.id) == "cancelled"
    timetable._change(client, control, saved)
    Timetable(client, control, "a").tick()
    assert [v.state for v in overview.all()] == ["cancelled"]
    with pytest.raises(InputError, match="no run"):
        overview.find(saved.id)


def test_what_is_no_schedule_is_passed_over(registry: Registry) -> None:
    client, control = registry.client, registry.control
    good = scheduled(registry, 3600, time.time() + 60)
    junk = ["", "{", "[]", good.encode().replace("3600", '"x"'), good.encode().replace('"/in"', "5"), "[" * 100_000]
    client.hset(control.schedules, mapping={f"junk-{n}": text for n, text in enumerate(junk)})
    assert [s.id for s in timetable.schedules(client, control)] == [good.id]
    Timetable(client, control, "a").tick()
    assert sorted(v.state for v in Overview(client, control).all()) == ["repeating", "scheduled"]
