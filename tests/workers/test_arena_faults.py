"""Shared memory under attack: two hosts, a lost host, cancelled readers, forged refs, no room, killed clients."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakePipeline, Workers, wait_until
from tests.workers.support import WorkerProcess, assert_settled
from tests.workers.test_arena import CODE, YAML, images, moved, total
from torchrelay import Relay
from torchrelay.errors import JobCancelled, JobFailed
from torchrelay.producer import encoding
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.segment import HEADER_BYTES, SLOT_WORDS
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.job import Place, Ref, Terminal
from torchrelay.queues.job import encode_payload as real_encode_payload
from torchrelay.queues.registry import Registry

Spawn = Callable[..., WorkerProcess]


@pytest.fixture
def hosts() -> Iterator[list[Path]]:
    """Two hosts, as far as shared memory goes: a folder with a token of its own for each."""
    made = [Path(tempfile.mkdtemp(prefix="trs-host-", dir="/dev/shm")) for _ in range(2)]
    yield made
    left = [path for host in made for path in host.rglob("*.data")]
    for host in made:
        shutil.rmtree(host, ignore_errors=True)
    assert left == []


@pytest.fixture
def relay_on(
    hosts: list[Path], server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path], Relay]]:
    """`relay_on(host)` is a client there, closed before the hosts are looked at."""
    made: list[Relay] = []

    def make(host: Path) -> Relay:
        with monkeypatch.context() as patch:
            patch.setenv("TORCHRELAY_ARENA_DIR", str(host))
            made.append(Relay(server_url, namespace=namespace).__enter__())
        return made[-1]

    yield make
    for relay in made:
        relay.close()


def reports(relay: Relay, stage: str) -> dict[str, int]:
    """Bytes by where they went, of all workers of a stage together."""
    found: dict[str, int] = {}
    for report in relay.registry.workers():
        if report.node.endswith(f"/{stage}"):
            found = {k: found.get(k, 0) + v for k, v in report.moved.items()}
    return found


def restarts(relay: Relay, ids: list[str]) -> list[int]:
    """How often each of these ended jobs began anew."""
    keys = relay.registry.lanes[0].keys
    return [Terminal.decode(record).generation for record in relay.registry.client.hmget(keys.done, ids)]


@pytest.mark.parametrize("apart", [False, True])
def test_columns_go_where_all_their_readers_are(
    make_pipeline: MakePipeline, relay_on: Callable[[Path], Relay], spawn: Spawn, hosts: list[Path], apart: bool
) -> None:
    """While every reader is on the writer's host they lie in its memory; where one of two is elsewhere, half of them,
    and none is lost to the other."""
    path = make_pipeline(YAML, CODE)
    here, there = hosts
    relay = relay_on(here)
    relay.register(path)
    made = [spawn(path, stage=stage, arena_dir=str(here)) for stage in ("invert", "total")]
    if apart:
        made.append(spawn(path, stage="total", arena_dir=str(there)))
    for worker in made:
        worker.ready()
    given = images(20)
    futures = relay.submit_many("images", [{"image": i, "do": ""} for i in given], durable=False, keep_s=600)
    assert [f.result(timeout=20)["total"] for f in futures] == [total(i) for i in given]
    assert restarts(relay, [f.id for f in futures]) == [0] * 20
    wait_until(lambda: sum(reports(relay, "invert").values()) > 20 * 200_000)
    went = reports(relay, "invert")
    assert went["arena"] >= (200_000 if apart else 20 * 200_000)
    assert (went["remote"] >= 200_000) is apart
    drain(made)


def test_a_reader_on_another_host_costs_nothing_and_the_end_of_the_first_one_restart(
    make_pipeline: MakePipeline,
    relay_on: Callable[[Path], Relay],
    spawn: Spawn,
    hosts: list[Path],
    tmp_path: Path,
) -> None:
    """A worker appears elsewhere, while the only one here is busy: it gets what waits here, copied. Then the first host
    ends with its memory: what was under way there begins anew, once, on the second."""
    path = make_pipeline(YAML, CODE)
    here, there = hosts
    relay = relay_on(there)
    relay.register(path)
    first = [spawn(path, stage=stage, arena_dir=str(here), lease_ms="2000") for stage in ("invert", "total")]
    for worker in first:
        worker.ready()
    go = tmp_path / "go"
    given = images(30)
    orders = [f"total:wait {go}", *[""] * 29]
    rows = [{"image": i, "do": d} for i, d in zip(given, orders, strict=True)]
    futures = relay.submit_many("images", rows[:1], keep_s=600)
    wait_until(lambda: reports(relay, "invert")["arena"] > 200_000)
    futures += relay.submit_many("images", rows[1:], keep_s=600)
    wait_until(lambda: reports(relay, "invert")["arena"] >= 30 * 200_000)
    late = spawn(path, stage="total", arena_dir=str(there))
    (more,) = images(1, 150_000)
    while (report := late.report()) is None or report.state != "ready":
        # The first host has just looked where its readers are: for two seconds it does not know of the second.
        futures.append(relay.submit("images", {"image": more, "do": ""}, keep_s=600))
        given.append(more)
        time.sleep(0.02)
    assert [f.result(timeout=30)["total"] for f in futures[1:]] == [total(i) for i in given[1:]]
    assert set(restarts(relay, [f.id for f in futures[1:]])) == {0}
    for worker in first:
        worker.end()
    shutil.rmtree(here)
    go.touch()
    again = spawn(path, stage="invert", arena_dir=str(there)).ready()
    assert futures[0].result(timeout=30)["total"] == total(given[0])
    assert restarts(relay, [futures[0].id]) == [1]
    drain([late, again])


def drain(workers: list[WorkerProcess]) -> None:
    """Ends them as an operator does."""
    for worker in workers:
        worker.process.terminate()
    wait_until(lambda: all(w.process.poll() is not None for w in workers), 20.0)


def live_blocks(folder: Path) -> int:
    """Blocks under an odd generation, in whatever arena."""
    count = 0
    for control in folder.rglob("*.ctl"):
        words = np.fromfile(control, np.uint64)[HEADER_BYTES // 8 :].reshape(-1, SLOT_WORDS)
        count += int((words[:, 0] % 2).sum())
    return count


def test_memory_of_a_cancelled_job_comes_back_from_busy_and_idle_writers(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, tmp_path: Path, arena_dir: Path
) -> None:
    """A job is cancelled while a stage reads its column, and its client sleeps. Its blocks end within seconds, though
    the stage that wrote one has work all the time; the reader commits nothing, and goes on."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    (image,) = images(1)
    go, done = tmp_path / "go", threading.Event()
    future = relay.submit("images", {"image": image, "do": f"total:wait {go}"}, durable=False)
    wait_until(lambda: live_blocks(arena_dir) == 1)
    (report,) = [r for r in relay.registry.workers() if r.node.endswith("/total")]
    small: list[Any] = []

    def keep_busy() -> None:
        while not done.wait(0.02):
            small.append(relay.submit("images", {"image": np.ones(9, np.uint8), "do": ""}))

    busy = threading.Thread(target=keep_busy)
    busy.start()
    assert future.cancel()
    try:
        wait_until(lambda: live_blocks(arena_dir) == 0, 12.0)
    finally:
        done.set()
        busy.join()
        go.touch()
    with pytest.raises(JobCancelled):
        future.result(timeout=5)
    assert [f.result(timeout=20)["total"] for f in small] == [9 * 254] * len(small)
    (after,) = [r for r in relay.registry.workers() if r.node.endswith("/total")]
    assert after.pid == report.pid


def test_a_stopped_reader_wakes_to_memory_that_was_used_again(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, spawn: Spawn, tmp_path: Path
) -> None:
    """A worker is stopped in the middle of a column, past its lease. Another does the job, and its memory is used again
    many times; then the first wakes. It commits nothing, frees nothing, and goes on working."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path, stage="invert")
    zombie = spawn(path, stage="total", lease_ms="500").ready()
    go = tmp_path / "go"
    (image,) = images(1)
    future = relay.submit("images", {"image": image, "do": f"total:wait {go}"}, keep_s=600)
    wait_until(lambda: moved(relay, "invert")["arena"] >= 200_000 and future.status() == "running")
    zombie.signal(signal.SIGSTOP)
    child, other = zombie.child, spawn(path, stage="total").ready()
    go.touch()
    assert future.result(timeout=20)["total"] == total(image)
    given = images(40)
    for start in range(0, 40, 8):
        rows = [{"image": i, "do": ""} for i in given[start : start + 8]]
        found = [f.result(timeout=20)["total"] for f in relay.submit_many("images", rows)]
        assert found == [total(row["image"]) for row in rows]
    os.kill(child, signal.SIGCONT)
    zombie.process.send_signal(signal.SIGCONT)
    assert [r["total"] for r in relay.map("images", [{"image": i, "do": ""} for i in given])] == [
        total(i) for i in given
    ]
    assert restarts(relay, [future.id]) == [0]
    drain([zombie, other])
    assert (zombie.process.returncode, zombie.log.count("ready on")) == (0, 1), zombie.log


def forged(place: Place, **change: Any) -> Ref:
    return Ref("x" * 16 + ".0.in.image", 0, 9000, place._replace(**change))


FORGERIES: dict[str, Callable[[Place], Ref]] = {
    "another namespace's arena": lambda p: forged(p),
    "another host": lambda p: forged(p, host=p.host ^ 1),
    "a huge slot": lambda p: forged(p, slot=(1 << 64) - 1),
    "a huge offset": lambda p: forged(p, offset=(1 << 64) - 1),
    "a huge segment": lambda p: forged(p, segment=(1 << 64) - 1),
    "a negative slot": lambda p: forged(p, slot=-1),
    "a path": lambda p: forged(p, arena="../x"),
    "an absolute path": lambda p: forged(p, arena="/etc/pas"),
    "a NUL": lambda p: forged(p, arena="abc\0defg"),
    "no arena": lambda p: forged(p, arena=""),
    "a maker that is not": lambda p: Ref("x" * 16 + ".999.f.image", 0, 9000, p),
    "a hidden column": lambda p: Ref("x" * 16 + ".1.f.#zz", 0, 9000, p),
    "a short name": lambda p: Ref("x", 0, 9000, p),
    "a million chunks": lambda p: Ref("x" * 16 + ".0.in.image", 1 << 40, 9000),
    "eight exabytes": lambda p: Ref("x" * 16 + ".0.in.image", 1 << 43, 1 << 63),
}


def test_forged_refs_cost_their_own_job_alone(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, arena_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job record written by hand may say anything of where its bytes are: it ends with a named error, what it points
    at is as before, and the worker lives on."""
    relay.register(path := make_pipeline(YAML, CODE))
    supervisors = workers.start(path)
    pids = [s.child_pid for s in supervisors]
    foreign = ArenaHome.open(str(arena_dir), "foreign")
    writer = ArenaWriter(foreign, ArenaLimits(1 << 20, 1 << 20, 1 << 20), lambda lane, names: [True] * len(names))
    try:
        place = writer.put("x", 0, b"s" * 9000, 1)
        assert place is not None
        mine = writer_in(relay, arena_dir)
        for what, forge in FORGERIES.items():
            for target in (place, mine.put("j.1.f.image", 0, b"s" * 9000, 1)):
                assert target is not None
                ref = forge(target)
                if what == "another namespace's arena" and target is not place:
                    continue
                with monkeypatch.context() as patch:
                    patch.setattr(
                        encoding,
                        "encode_payload",
                        lambda columns, meta, ref=ref: real_encode_payload({**columns, "image": ref}, meta),
                    )
                    future = relay.submit("images", {"image": np.ones(9, np.uint8), "do": ""})
                with pytest.raises(JobFailed) as failed:
                    future.result(timeout=20)
                assert failed.value.error_type in ("BytesLost", "DecodeError"), what
        mine.close()
        (image,) = images(1)
        assert relay.infer("images", {"image": image, "do": ""})["total"] == total(image)
        assert [s.child_pid for s in supervisors] == pids
        assert writer.put("y", 0, b"t" * 9000, 1) is not None
    finally:
        writer.close()


def writer_in(relay: Relay, arena_dir: Path) -> ArenaWriter:
    """A writer of the relay's own namespace."""
    home = ArenaHome.open(str(arena_dir), relay.registry.namespace_id())
    return ArenaWriter(home, ArenaLimits(1 << 20, 1 << 20, 1 << 20), lambda lane, names: [False] * len(names))


def test_on_a_full_file_system_everything_goes_through_redis(
    make_pipeline: MakePipeline,
    server_url: str,
    namespace: str,
    workers: Workers,
    small_tmpfs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8 MiB hold no segment: nothing fails, and nothing is left."""
    monkeypatch.setenv("TORCHRELAY_ARENA_DIR", str(small_tmpfs))
    with Relay(server_url, namespace=namespace) as relay:
        relay.register(path := make_pipeline(YAML, CODE))
        workers.start(path)
        given = images(20)
        futures = relay.submit_many("images", [{"image": i, "do": ""} for i in given], durable=False)
        assert [f.result(timeout=20)["total"] for f in futures] == [total(i) for i in given]
        wait_until(lambda: moved(relay, "invert")["full"] > 20 * 200_000)
    workers.stop()
    assert not list(small_tmpfs.rglob("*.data"))


def test_a_folder_that_is_removed_under_living_processes_stops_nobody(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, arena_dir: Path
) -> None:
    """Somebody clears /dev/shm: what is mapped is used on, what is new goes through Redis, also after a worker died."""
    relay.register(path := make_pipeline(YAML, CODE))
    supervisors = workers.start(path)
    given = images(20)
    rows = [{"image": i, "do": ""} for i in given]
    expected = [{"total": total(i)} for i in given]
    assert list(relay.map("images", rows)) == expected
    shutil.rmtree(arena_dir / f"torchrelay-{os.getuid()}")
    assert list(relay.map("images", rows)) == expected
    for supervisor in supervisors:
        pid = supervisor.child_pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda supervisor=supervisor, pid=pid: supervisor.child_pid not in (pid, 0))  # type: ignore[misc]
    wait_until(lambda: relay._core.submitter._placer.writer.arena == "")  # type: ignore[union-attr]
    assert list(relay.map("images", rows, durable=False)) == expected


CLIENT = """
import sys
import numpy as np
from torchrelay import Relay

url, namespace, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng = np.random.default_rng(seed)
with Relay(url, namespace=namespace) as relay:
    for number in range(10_000):
        image = rng.integers(0, 256, int(rng.integers(50_000, 500_000)), np.uint8)
        future = relay.submit("images", {"image": image, "do": ""}, durable=False, keep_s=600, wait_s=60)
        print(future.id, int((255 - image).sum(dtype=np.int64)), flush=True)
"""


def test_random_kills_of_workers_and_clients_lose_and_double_nothing(
    make_pipeline: MakePipeline,
    relay: Relay,
    workers: Workers,
    registry: Registry,
    server_url: str,
    namespace: str,
) -> None:
    """Clients with inputs in their own memory alone are killed, and workers under them: each job that was acknowledged
    ends with its exact result, once, and every node commits it once."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    relay.register(path := make_pipeline(YAML, CODE))
    supervisors = workers.start(path) + workers.start(path)
    expected: dict[str, int] = {}
    kills = 0
    for number in range(5):
        command = [sys.executable, "-c", CLIENT, server_url, namespace, str(seed + number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            for count in range(60):
                job, result = client.stdout.readline().split()
                expected[job] = int(result)
                # Who dies again and again while it loads is no longer started.
                serving = {r.pid for r in registry.workers() if r.state == "ready"} if count % 12 == 11 else set()
                if living := [s.child_pid for s in supervisors if s.child_pid in serving]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rng.choice(living), signal.SIGKILL)
                        kills += 1
                    time.sleep(rng.random() * 0.2)
            client.kill()
            for line in client.stdout.read().split("\n"):
                if len(line.split()) == 2:
                    expected[line.split()[0]] = int(line.split()[1])
    futures = {job: relay.job(job) for job in expected}
    assert {job: f.result(timeout=60)["total"] for job, f in futures.items()} == expected
    ended = registry.client.hlen(registry.lanes[0].keys.done)
    # A client may have died before it heard of its last job.
    assert len(expected) <= ended <= len(expected) + 5
    assert restarts(relay, list(expected)) == [0] * len(expected)
    wait_until(lambda: sum(v for k, v in registry.loads().items() if k.endswith(".committed")) == 2 * ended)
    assert_settled(registry, {"invert": ended, "total": ended})
    print(f"{len(expected)} jobs, {kills} kills")
    assert kills >= 5
