"""Devices that fail under real workers. A stage that raises CUDA's errors stands for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workers, wait_until
from tests.workers.support import ForwardLog, WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry
from torchrelay.workers.device_deaths import DeviceDeaths

Obey = Callable[..., Path]
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def entries(*jobs: int) -> bytes:
    return b"".join(b"j%d\x80" % job for job in jobs)


@pytest.mark.parametrize(
    ("deaths", "bad"),
    [
        ([((1,), 0), ((2,), 0), ((3,), 0)], True),
        ([((1, 2, 3), 9), ((1,), 0), ((1,), 0), ((2,), 0), ((3,), 0)], True),
        ([((1, 2), 0), ((3, 4), 0), ((5, 6), 0)], True),
        ([((1, 2, 3), 0), ((1,), 0), ((1,), 0), ((1,), 0)], False),
        ([((1, 2, 3), 0), ((1,), 0), ((2,), 0)], False),
        ([((1,), 0), ((2,), 0), ((3,), 1)], False),
        ([((1,), 0), ((2,), 1), ((3,), 0), ((4,), 0)], True),
        ([((), 0), ((), 0), ((), 0)], False),
    ],
)
def test_when_the_device_is_to_blame(deaths: list[tuple[tuple[int, ...], int]], bad: bool) -> None:
    """When three jobs at least would have to be: each death is (jobs under way, forwards that passed before)."""
    record = DeviceDeaths()
    for jobs, forwards in deaths:
        record.note(entries(*jobs), forwards)
    assert record.bad_device is bad
    record.clear()
    assert not record.bad_device


def test_a_job_under_which_the_device_fails_goes_to_the_dead_letters_alone(
    relay: Relay, registry: Registry, spawn: Callable[..., WorkerProcess], obey: Obey, forward_log: ForwardLog
) -> None:
    """The process ends at once, without cleaning up; suspects run again alone; their neighbours get their results."""
    path = obey("batch: {max_rows: 4, max_wait_ms: 500}")
    relay.register(path)
    futures = relay.submit_many("obey", [{"n": n, "do": f"lose {ILLEGAL}" if n == "c" else ""} for n in "abcd"])
    worker = spawn(path)
    assert [f.result(60) for f in futures if f is not futures[2]] == [{"out": f"{n}!"} for n in "abd"]
    with pytest.raises(JobFailed, match="the worker died"):
        futures[2].result(60)
    (letter,) = dead.scan(registry)
    assert [f.error_type for f in letter.history] == ["WorkerDied"]
    # Once among others, then three times alone, each time in a new process.
    assert len(set(forward_log.pids("c"))) == 4
    assert "the worker ended with status 6" in worker.log
    assert worker.log.count("is of no more use to this process") == 4
    assert worker.process.poll() is None
    assert_settled(registry, {"work": 3})


def test_a_device_that_fails_under_every_job_stops_its_worker(
    relay: Relay, registry: Registry, spawn: Callable[..., WorkerProcess], obey: Obey, tmp_path: Path
) -> None:
    """The worker ends and names the device; the jobs that are left pass on another."""
    repaired = tmp_path / "repaired"
    path = obey("batch: {max_rows: 1}")
    relay.register(path)
    futures = relay.submit_many("obey", [{"n": str(i), "do": f"lose-until {repaired} {ILLEGAL}"} for i in range(6)])
    first = spawn(path)
    assert first.process.wait(60) == 1
    assert "device cpu at " in first.log
    assert "failed under several jobs in a row; check it" in first.log
    lost = {letter.job_id for letter in dead.scan(registry)}
    assert len(lost) <= 2
    repaired.touch()
    spawn(path)
    left = [f for f in futures if f.id not in lost]
    assert all(f.result(60)["out"] for f in left)
    wait_until(lambda: not registry.client.hlen(registry.lanes[0].keys.grants))
    assert_settled(registry, {"work": len(left)})


def test_memory_that_is_full_costs_nobody_a_strike(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """Batches shrink until they fit; a job that never does fails on its attempts, with its shapes, in one process."""
    path = obey("batch: {max_rows: 16, max_wait_ms: 500}", "retry: {attempts: 2, backoff_s: [0.01, 0.01]}")
    relay.register(path)
    rows = [{"n": str(i), "do": "room 5"} for i in range(15)] + [{"n": "x", "do": "room 0"}]
    futures = relay.submit_many("obey", rows)
    workers.start(path)
    assert [f.result(60)["out"] for f in futures[:15]] == [f"{i}!" for i in range(15)]
    with pytest.raises(JobFailed, match=r"CUDA out of memory.*of the row's columns: n str") as caught:
        futures[15].result(60)
    assert (caught.value.attempts, caught.value.error_type) == (2, "RuntimeError")
    assert len({pid for pid, _ in forward_log.forwards()}) == 1
    assert_settled(registry, {"work": 15})
