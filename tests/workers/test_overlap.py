"""The overlapped loop: who is suspected, what keeps its lease, how it ends; no schedule of its threads loses a job."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workers, wait_until
from tests.workers.in_process import YAML, Act, Device, InProcess, jitter
from tests.workers.support import ForwardLog, WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.errors import BrokerUnavailable, JobFailed
from torchrelay.queues import dead
from torchrelay.queues.job import Failure
from torchrelay.queues.registry import Registry, run
from torchrelay.queues.scripts import WorkerRetired
from torchrelay.queues.transitions import ClaimLimits, Session
from torchrelay.stages.runner import Runner

Obey = Callable[..., Path]
Spawn = Callable[..., WorkerProcess]
Serve = Callable[..., InProcess]


@pytest.fixture
def serve(
    registry: Registry, server_url: str, make_pipeline: Callable[..., Path]
) -> Iterator[Callable[..., InProcess]]:
    """`serve(runner, "batch: {max_rows: 2}", ahead=2)` puts the loop together; `start()` it."""
    interval, made = sys.getswitchinterval(), []

    def make(runner: Runner, *options: str, ahead: int = 2) -> InProcess:
        path = make_pipeline(YAML.format(options="\n        ".join(options)), "class Nobody: pass\n")
        made.append(InProcess(registry, server_url, path, runner, ahead))
        return made[-1]

    yield make
    for one in made:
        one.stopping.set()
    sys.setswitchinterval(interval)


# Deaths.


def test_of_a_worker_that_is_killed_only_what_was_computed_is_suspected(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog, tmp_path: Path
) -> None:
    """kill -9 while one batch runs and others are ready: its jobs rerun alone, the others in batches, all once."""
    path = obey("batch: {max_rows: 2, ahead: 2}")
    relay.register(path)
    gate = tmp_path / "gate"
    futures = relay.submit_many("obey", [{"n": str(i), "do": f"wait {gate}"} for i in range(8)])
    workers.start(path)
    wait_until(lambda: sum(len(names) for _, names in forward_log.forwards()) == 2)
    wait_until(lambda: [v for k, v in registry.loads().items() if k.endswith("held_rows")] == [8])
    (pid,) = set(forward_log.pids("0"))
    gate.touch()
    os.kill(pid, signal.SIGKILL)
    assert [f.result(20) for f in futures] == [{"out": f"{i}!"} for i in range(8)]
    after = [names for at, names in forward_log.forwards() if at != pid]
    assert [names for names in after if {"0", "1"} & set(names)] == [["0"], ["1"]]
    assert {len(names) for names in after if not {"0", "1"} & set(names)} == {2}
    assert not list(dead.scan(registry))
    assert_settled(registry, {"work": 8})


@pytest.mark.parametrize("order", ["die", "hang"])
def test_poison_among_others_is_struck_three_times_alone(
    order: str, relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog
) -> None:
    """Whether it ends the process or hangs: once among others, three times alone, and nobody else is harmed."""
    path = obey("batch: {max_rows: 4, ahead: 2, max_wait_ms: 200}", "timeout_s: 0.4")
    relay.register(path)
    futures = relay.submit_many("obey", [{"n": str(i), "do": order if i == 5 else ""} for i in range(16)])
    spawn(path)
    with pytest.raises(JobFailed, match="died"):
        futures[5].result(40)
    assert [f.result(10) for i, f in enumerate(futures) if i != 5] == [{"out": f"{i}!"} for i in range(16) if i != 5]
    runs = [names for _, names in forward_log.forwards() if "5" in names]
    assert [len(names) for names in runs] == [4, 1, 1, 1]
    (letter,) = dead.scan(registry)
    assert [f.error_type for f in letter.history] == ["WorkerDied"]
    assert_settled(registry, {"work": 15})


def test_a_suspect_has_the_device_to_itself(relay: Relay, registry: Registry, serve: Serve) -> None:
    """Two suspects are never launched together: if they killed the process, neither could be struck for it."""
    started: list[bytes] = []
    stage = Act({"look": lambda: started.append(worker.progress.started)})
    worker = serve(Device(stage, lambda: time.sleep(0.005)), "batch: {max_rows: 4}")
    futures = relay.submit_many("act", [{"n": str(i), "do": "look"} for i in range(6)])
    lane, graph_number = registry.lanes[0], 1
    session = Session("dead")
    limits = ClaimLimits(2, 2, 1 << 20, 15_000)
    grant = run(registry.client, lane.claim(session, "dead-1", "dead", graph_number, 1, limits))
    entries = b"".join(e.packed for e in grant.entries)
    run(registry.client, lane.retire("dead", entries, Failure("work", "WorkerDied", "", "", "w")))
    worker.start()
    assert [f.result(10) for f in futures] == [{"out": f"{i}!"} for i in range(6)]
    worker.stop()
    assert [names for names in stage.forwards if {"0", "1"} & set(names)] == [["0"], ["1"]]
    tokens = [e.packed for e in grant.entries]
    assert [page for page in started if any(t in page for t in tokens)] == tokens
    assert_settled(registry, {"work": 6})


def test_claims_asked_ahead_keep_their_lease_during_a_long_forward(
    relay: Relay, registry: Registry, spawn: Spawn, obey: Obey, forward_log: ForwardLog
) -> None:
    """What is in the window, asked for and prepared while a forward outlasts the lease is not taken from the worker."""
    path = obey("batch: {max_rows: 1, ahead: 2}")
    relay.register(path)
    worker = spawn(path, lease_ms="600").ready()
    relay.infer("obey", {"n": "first"})
    futures = relay.submit_many("obey", [{"n": str(i), "do": "sleep 2.0" if i == 0 else ""} for i in range(6)])
    assert [f.result(20) for f in futures] == [{"out": f"{i}!"} for i in range(6)]
    assert set(forward_log.runs().values()) == {1}
    assert "lease ran out" not in worker.log
    assert_settled(registry, {"work": 7})


def test_every_granted_fence_is_on_the_page_at_every_moment(
    relay: Relay, registry: Registry, serve: Serve, redis_client: Any
) -> None:
    """The server's grants, looked at before the page is: each is still listed, or was ended meanwhile."""
    rng = random.Random(7)
    worker = serve(Device(Act(), jitter(rng)), "batch: {max_rows: 3}")
    relay.register(Path(worker.parts.around.context.pipeline.source))
    worker.start()
    grants, unlisted = registry.lanes[0].keys.grants, []
    futures = []
    for wave in range(60):
        futures += relay.submit_many("act", [{"n": f"{wave}.{i}"} for i in range(rng.randint(1, 20))])
        for _ in range(20):
            granted = set(redis_client.hkeys(grants))
            listed = {f.encode() for f in worker.progress.fences}
            missing = granted - listed
            unlisted += list(missing & set(redis_client.hkeys(grants))) if missing else []
    assert [f.result(10)["out"] for f in futures]
    worker.stop()
    assert unlisted == []


def test_a_worker_that_waits_for_the_server_does_not_look_hung(
    relay: Relay, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the device has computed while the output thread is held up is not past its time."""
    worker = serve(Device(Act()), "batch: {max_rows: 1}")
    held, go_on = threading.Event(), threading.Event()
    settle = worker.parts.settler.settle

    def slow(group: Any) -> None:
        held.set()
        assert go_on.wait(10)
        settle(group)

    monkeypatch.setattr(worker.parts.settler, "settle", slow)
    futures = relay.submit_many("act", [{"n": str(i)} for i in range(5)])
    worker.start()
    assert held.wait(10)
    wait_until(lambda: len(worker.progress.started) > 17)
    wait_until(lambda: worker.progress.forward_since == 0.0)
    go_on.set()
    assert [f.result(10) for f in futures] == [{"out": f"{i}!"} for i in range(5)]
    worker.stop()


# Errors on each thread.


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("claimer.collect", WorkerRetired("w")),
        ("planner.batches", KeyboardInterrupt()),
        ("status.started", SystemExit(3)),
        ("status.started", BrokerUnavailable("away")),
        ("settler.settle", BrokerUnavailable("away")),
        ("committer.flush", WorkerRetired("w")),
    ],
)
def test_whatever_ends_one_thread_ends_the_worker(
    place: str, error: BaseException, relay: Relay, registry: Registry, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the input, device or output thread: the others end, the error is told, and no job is a suspect."""
    worker = serve(Device(Act(), lambda: time.sleep(0.001)), "batch: {max_rows: 2}")
    futures = relay.submit_many("act", [{"n": str(i)} for i in range(30)])
    part, _, name = place.partition(".")
    owner = worker.parts.planner([]) if part == "planner" else getattr(worker.parts, part)
    monkeypatch.setattr(owner, name, _after(5, getattr(owner, name), error))
    worker.start()
    worker.ended()
    assert worker.error is error
    run(registry.client, registry.lanes[0].retire(worker.incarnation, b"", Failure("work", "x", "", "", "w")))
    second = serve(Device(Act()), "batch: {max_rows: 2}").start()
    assert [f.result(10) for f in futures] == [{"out": f"{i}!"} for i in range(30)]
    second.stop()
    assert_settled(registry, {"work": 30})


def _after(calls: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The real thing for so many calls, then the error."""
    left = [calls]

    def act(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args, **kwargs)

    return act


class _Full(RuntimeError):
    """CUDA out of memory, as a library says it."""

    def __init__(self) -> None:
        super().__init__("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_loses_or_doubles_a_job(seed: int, relay: Relay, registry: Registry, serve: Serve) -> None:
    """Stage and device raise and take their time at random, jobs are cancelled meanwhile: each ends as it must."""
    rng = random.Random(seed)
    acts = {"raise": lambda: int("no number"), "leave": lambda: sys.exit(0), "wait": jitter(rng)}

    def computes() -> None:
        time.sleep(rng.random() * 0.003)
        if rng.random() < 0.05:
            raise rng.choice([_Full(), ValueError("of the device")])

    stage = Act(acts)
    worker = serve(
        Device(stage, computes),
        f"batch: {{max_rows: {rng.randint(1, 6)}, max_wait_ms: {rng.choice([0, 2])}, in_flight_rows: 40}}",
        "retry: {attempts: 4, backoff_s: [0.0, 0.0]}",
        ahead=rng.randint(1, 3),
    )
    orders = [rng.choice([""] * 8 + ["wait", "wait", "raise", "leave"]) for _ in range(200)]
    futures = [relay.submit("act", {"n": str(i), "do": do}) for i, do in enumerate(orders[:50])]
    worker.start()
    futures += relay.submit_many("act", [{"n": str(i + 50), "do": do} for i, do in enumerate(orders[50:])])
    relay.cancel([futures[i].id for i in range(100, 110)])
    for i, (future, do) in enumerate(zip(futures, orders, strict=True)):
        if 100 <= i < 110:
            continue
        if do in ("raise", "leave"):
            with pytest.raises(JobFailed):
                worker.result(future)
        else:
            assert worker.result(future) == {"out": f"{i}!"}
    wait_until(lambda: worker.parts.claimer.in_hand.room == 40)
    worker.stop()
    left = registry.loads()
    assert {k: v for k, v in left.items() if k.endswith(("ready_rows", "held_rows")) and v} == {}


def test_thirty_drains_under_load_lose_and_strike_nothing(relay: Relay, registry: Registry, serve: Serve) -> None:
    """What was launched is committed, what was ready is given back, and nothing runs twice."""
    rng = random.Random(3)
    stage = Act({"wait": jitter(rng, 0.001)})
    names = [str(i) for i in range(1500)]
    serve(Device(stage))  # registers
    futures = relay.submit_many("act", [{"n": n, "do": "wait"} for n in names])
    for _ in range(30):
        before = len(stage.forwards)
        worker = serve(Device(stage, jitter(rng, 0.001)), "batch: {max_rows: 4}").start()
        wait_until(lambda at=before: len(stage.forwards) > at)  # type: ignore[misc]
        time.sleep(rng.random() * 0.01)
        worker.stop()
        assert registry.client.hlen(registry.lanes[0].keys.grants) == 0
    last = serve(Device(stage), "batch: {max_rows: 64}").start()
    assert [f.result(20) for f in futures] == [{"out": n + "!"} for n in names]
    last.stop()
    assert sorted(n for forward in stage.forwards for n in forward) == sorted(names)
    assert_settled(registry, {"work": 1500})


# Bounds, order and memory.


def test_no_more_rows_are_in_flight_than_allowed(relay: Relay, registry: Registry, serve: Serve) -> None:
    """What the server counts as held stays within the bound, a larger job apart, and all is computed."""
    held: list[int] = []

    def look() -> None:
        held.append(max([v for k, v in registry.loads().items() if k.endswith("held_rows")], default=0))

    worker = serve(Device(Act({"look": look}), jitter(random.Random(1))), "batch: {max_rows: 4, in_flight_rows: 9}")
    futures = relay.submit_many("act", [{"n": str(i), "do": "look"} for i in range(120)])
    worker.start()
    assert [worker.result(f) for f in futures] == [{"out": f"{i}!"} for i in range(120)]
    # Commits that are not answered yet count at the server, and no longer here.
    assert max(held) <= 9 + 8 * 4
    large = relay.submit_table("act", {"n": [str(i) for i in range(50)]})
    assert worker.result(large)["out"] == [f"{i}!" for i in range(50)]
    wait_until(lambda: worker.parts.claimer.in_hand.room == 9)
    worker.stop()


def test_a_batch_that_raises_is_halved_and_never_run_again_as_a_whole(relay: Relay, serve: Serve) -> None:
    """Whether `forward` raised or the device: what the whole raised is known."""
    stage = Act({"raise": lambda: int("no number")})
    worker = serve(Device(stage), "batch: {max_rows: 4, max_wait_ms: 500}", "retry: {attempts: 1}")
    futures = relay.submit_many("act", [{"n": str(i), "do": "raise" if i == 2 else ""} for i in range(4)])
    worker.start()
    with pytest.raises(JobFailed, match="no number"):
        worker.result(futures[2])
    assert [worker.result(futures[i]) for i in (0, 1, 3)] == [{"out": f"{i}!"} for i in (0, 1, 3)]
    worker.stop()
    assert stage.forwards == [["0", "1", "2", "3"], ["0", "1"], ["2", "3"], ["2"], ["3"]]


def test_a_job_of_high_priority_waits_for_few_forwards(relay: Relay, serve: Serve, tmp_path: Path) -> None:
    """It is computed before all that the worker did not hold: what is launched, ready, in the window and asked for."""
    gate = tmp_path / "gate"
    stage = Act({"wait": lambda: wait_until(gate.exists)})
    worker = serve(Device(stage), "batch: {max_rows: 1}")
    futures = relay.submit_many("act", [{"n": str(i), "do": "wait"} for i in range(40)], priority="low")
    worker.start()
    wait_until(lambda: stage.forwards)
    wait_until(lambda: worker.parts.claimer.asked_fences)
    high = relay.submit("act", {"n": "high"}, priority="high")
    gate.touch()
    assert worker.result(high) == {"out": "high!"}
    assert stage.forwards.index(["high"]) <= 8
    assert [worker.result(f) for f in futures]
    worker.stop()
