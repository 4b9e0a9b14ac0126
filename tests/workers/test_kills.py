"""Workers that are killed, stopped or drained: no job is lost, none is committed twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workers, wait_until
from tests.workers.support import ForwardLog, WorkerProcess, alive, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry

Obey = Callable[..., Path]
Spawn = Callable[..., WorkerProcess]


def start_two(workers: Workers, path: Path, registry: Registry) -> None:
    workers.start(path)
    wait_until(lambda: [w.state for w in registry.workers()] == ["ready", "ready"], 30.0)


@pytest.mark.alone
def test_a_job_whose_worker_is_killed_in_mid_batch_starts_again_within_a_second_and_commits_once(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog, tmp_path: Path
) -> None:
    """kill -9 of the computing process: its supervisor gives the job back at once, another worker takes it."""
    path = obey("replicas: 2")
    relay.register(path)
    start_two(workers, path, registry)
    gate = tmp_path / "gate"
    future = relay.submit("obey", {"n": "a", "do": f"wait {gate}"})
    wait_until(lambda: forward_log.pids("a"))
    os.kill(forward_log.pids("a")[0], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: len(forward_log.pids("a")) == 2)
    assert time.monotonic() - killed < 1.0
    gate.touch()
    assert future.result(10) == {"out": "a!"}
    assert forward_log.runs() == {"a": 2}
    assert_settled(registry, {"work": 1})


def test_random_kills_lose_nothing_and_double_nothing(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """Children of two workers are killed every few batches; each job ends once, with its own result."""
    path = obey("replicas: 2", "batch: {max_rows: 16}")
    relay.register(path)
    start_two(workers, path, registry)
    names = [str(i) for i in range(400)]
    futures = relay.submit_many("obey", [{"n": n, "do": "sleep 0.001"} for n in names])
    for kill in range(1, 5):
        wait_until(lambda at=kill * 60: len(forward_log.runs()) >= at)
        os.kill(forward_log.forwards()[-1][0], signal.SIGKILL)
    assert [f.result(30) for f in futures] == [{"out": n + "!"} for n in names]
    assert_settled(registry, {"work": 400})
    assert not list(dead.scan(registry))


@pytest.mark.alone
def test_another_worker_takes_over_when_the_lease_of_a_killed_worker_runs_out(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog, tmp_path: Path
) -> None:
    """kill -9 of supervisor and child together: nobody retires them, their lease ends."""
    path = obey()
    relay.register(path)
    first, second = spawn(path, lease_ms="1000").ready(), spawn(path, lease_ms="1000").ready()
    gate = tmp_path / "gate"
    future = relay.submit("obey", {"n": "a", "do": f"wait {gate}"})
    wait_until(lambda: forward_log.pids("a"))
    victim = first if forward_log.pids("a")[0] == first.child else second
    victim.signal(signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: len(forward_log.pids("a")) == 2)
    assert 0.3 < time.monotonic() - killed < 1.0 + 2.0
    gate.touch()
    assert future.result(10) == {"out": "a!"}
    assert_settled(registry, {"work": 1})


def test_sigterm_drains_with_exit_status_0_and_charges_nothing(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog
) -> None:
    """The batch under way is finished, the rest is given back; another worker completes it; nothing runs twice."""
    path = obey("batch: {max_rows: 4}")
    relay.register(path)
    first = spawn(path).ready()
    names = [str(i) for i in range(120)]
    futures = relay.submit_many("obey", [{"n": n, "do": "sleep 0.005"} for n in names])
    wait_until(lambda: len(forward_log.forwards()) >= 3)
    first.process.terminate()
    assert first.process.wait(10.0) == 0, first.log
    assert 0 < len(forward_log.runs()) < 120
    assert registry.client.hlen(registry.lanes[0].keys.grants) == 0
    assert registry.workers() == []
    spawn(path)
    assert [f.result(20) for f in futures] == [{"out": n + "!"} for n in names]
    assert set(forward_log.runs().values()) == {1}
    assert_settled(registry, {"work": 120})


def test_a_worker_stopped_past_its_lease_commits_nothing_when_it_wakes(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog, tmp_path: Path
) -> None:
    """SIGSTOP in mid-batch, SIGCONT after another worker has committed: the late commit is refused, and it lives on."""
    path = obey()
    relay.register(path)
    first, second = spawn(path, lease_ms="1000").ready(), spawn(path, lease_ms="1000").ready()
    gate = tmp_path / "gate"
    future = relay.submit("obey", {"n": "a", "do": f"wait {gate}"})
    wait_until(lambda: forward_log.pids("a"))
    zombie, other = (first, second) if forward_log.pids("a")[0] == first.child else (second, first)
    child = zombie.child
    os.kill(zombie.pid, signal.SIGSTOP)
    os.kill(child, signal.SIGSTOP)
    wait_until(lambda: len(forward_log.pids("a")) == 2)
    gate.touch()
    assert future.result(10) == {"out": "a!"}
    other.process.terminate()
    assert other.process.wait(10.0) == 0
    os.kill(child, signal.SIGCONT)
    os.kill(zombie.pid, signal.SIGCONT)
    wait_until(lambda: "not committed" in zombie.log)
    assert_settled(registry, {"work": 1})
    assert relay.infer("obey", {"n": "b"}) == {"out": "b!"}
    assert forward_log.pids("b") == [child]


def test_a_job_that_kills_its_worker_dies_after_three_solo_strikes_and_harms_no_neighbour(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """A batch of 8 dies; its jobs run again alone; the one that kills three times more goes to the dead letters."""
    path = obey("batch: {max_rows: 8}")
    relay.register(path)
    rows = [{"n": str(i), "do": "die" if i == 5 else ""} for i in range(8)]
    futures = relay.submit_many("obey", rows)
    workers.start(path)
    with pytest.raises(JobFailed, match="the worker died") as raised:
        futures[5].result(30)
    assert raised.value.error_type == "WorkerDied"
    assert [futures[i].result(10) for i in range(8) if i != 5] == [{"out": f"{i}!"} for i in range(8) if i != 5]
    assert [names for _, names in forward_log.forwards() if "5" in names] == [
        [str(i) for i in range(8)], ["5"], ["5"], ["5"]]  # fmt: skip
    assert [d.job_id for d in dead.scan(registry)] == [futures[5].id]
    assert_settled(registry, {"work": 7})


@pytest.mark.alone
def test_a_forward_past_its_timeout_is_shown_killed_and_done_again_by_a_fresh_process(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog, tmp_path: Path
) -> None:
    """The stack of the hung forward goes to the log before the process is ended."""
    path = obey("timeout_s: 0.5")
    relay.register(path)
    worker = spawn(path).ready()
    future = relay.submit("obey", {"n": "a", "do": f"hang-until {tmp_path / 'gate'}"})
    wait_until(lambda: forward_log.pids("a"))
    began = time.monotonic()
    (tmp_path / "gate").touch()
    assert future.result(15) == {"out": "a!"}
    assert time.monotonic() - began < 0.5 + 2.0 + 2.0
    assert len(set(forward_log.pids("a"))) == 2
    assert "timeout_s (0.5 s)" in worker.log
    assert re_frame(worker.log), worker.log
    assert worker.process.poll() is None
    assert_settled(registry, {"work": 1})


def re_frame(log: str) -> bool:
    """Whether faulthandler's dump names the stage's own line."""
    return any("stages.py" in line and "in forward" in line for line in log.splitlines())


def test_the_child_of_a_killed_supervisor_gives_its_work_back_and_ends(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog
) -> None:
    """An orphan must not go on computing for nobody."""
    path = obey("batch: {max_rows: 1}")
    relay.register(path)
    worker = spawn(path).ready()
    child = worker.child
    futures = relay.submit_many("obey", [{"n": str(i), "do": "sleep 0.05"} for i in range(100)])
    wait_until(lambda: len(forward_log.forwards()) >= 2)
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not alive(child), 8.0)
    assert len(forward_log.runs()) < 100
    assert registry.client.hlen(registry.lanes[0].keys.grants) == 0
    assert sum(f.done() for f in futures) == len(forward_log.runs())
    assert relay.cancel([f.id for f in futures if not f.done()]) == [True] * (100 - len(forward_log.runs()))


def test_a_hung_child_of_a_killed_supervisor_ends_too(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog
) -> None:
    """It cannot drain, so it is ended after a short grace."""
    path = obey()
    relay.register(path)
    worker = spawn(path).ready()
    child = worker.child
    relay.submit("obey", {"n": "a", "do": "hang"})
    wait_until(lambda: forward_log.pids("a"))
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not alive(child), 8.0)


def test_a_forward_longer_than_the_lease_keeps_the_jobs_that_were_claimed_ahead(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog
) -> None:
    """Leases of claims under way are renewed too; else every job behind a slow one would run twice, for ever."""
    path = obey("batch: {max_rows: 1}")
    relay.register(path)
    spawn(path, lease_ms="800").ready()
    futures = relay.submit_many("obey", [{"n": str(i), "do": "sleep 1.7"} for i in range(2)])
    assert [f.result(20) for f in futures] == [{"out": f"{i}!"} for i in range(2)]
    assert set(forward_log.runs().values()) == {1}
    assert_settled(registry, {"work": 2})
