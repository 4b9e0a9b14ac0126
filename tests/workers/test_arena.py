"""Large columns between real processes of one host: through shared memory, through Redis, and past deaths of both."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import MakePipeline, Workers, wait_until
from torchrelay import Relay
from torchrelay.errors import InputError, JobFailed
from torchrelay.terminal import status_of

YAML = """
pipeline: images
input: {image: "uint8[*]", do: "str"}
stages:
  - name: invert
    use: stages.py:Invert
    inputs: [image, do]
    outputs: {image: "uint8[*]"}
    retry: {backoff_s: [0, 0]}
  - name: total
    use: stages.py:Total
    inputs: [image, do]
    outputs: {total: int64}
    retry: {backoff_s: [0, 0]}
output: [total]
"""
CODE = """
import os
import time
from pathlib import Path

from torchrelay import Stage


def obey(batch, stage):
    for order in batch["do"]:
        who, _, rest = order.partition(":")
        verb, _, path = rest.partition(" ")
        if who == stage and verb == "wait":
            while not Path(path).exists():
                time.sleep(0.01)
        if who == stage and verb == "die-unless" and not Path(path).exists():
            Path(path).touch()
            os._exit(9)


class Invert(Stage):
    def forward(self, batch):
        obey(batch, "invert")
        return {"image": [255 - image for image in batch["image"]]}


class Total(Stage):
    def forward(self, batch):
        obey(batch, "total")
        return {"total": [int(image.sum(dtype="int64")) for image in batch["image"]]}
"""


def images(count: int, nbytes: int = 200_000) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, nbytes, np.uint8) for _ in range(count)]


def total(image: np.ndarray) -> int:
    return int((255 - image).sum(dtype=np.int64))


def moved(relay: Relay, stage: str) -> dict[str, int]:
    (report,) = [r for r in relay.registry.workers() if r.node.endswith(f"/{stage}")]
    return report.moved


def blobs(relay: Relay) -> list[bytes]:
    return list(relay.registry.client.scan_iter(f"*{relay.registry.control.namespace}*blob*"))


@pytest.mark.parametrize("durable", [True, False])
def test_columns_between_workers_of_a_host_never_meet_redis(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, durable: bool
) -> None:
    """Intermediate columns go through shared memory alone, and the input unless it is durable; results are exact."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    given = images(40)
    futures = relay.submit_many("images", ({"image": i, "do": ""} for i in given), durable=durable)
    if not durable:
        assert not [name for name in blobs(relay) if b".0.in." in name]
    assert [f.result(timeout=20)["total"] for f in futures] == [total(i) for i in given]
    wait_until(lambda: moved(relay, "invert")["arena"] > 40 * 200_000)
    assert {where: n for where, n in moved(relay, "invert").items() if n and where != "arena"} == {}
    shown = {n["node"].rpartition("/")[2]: n["moved_bytes"] for n in status_of(relay.registry)["nodes"]}
    assert shown["invert"] == moved(relay, "invert")
    wait_until(lambda: not blobs(relay))


def test_without_an_arena_everything_goes_through_redis(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TORCHRELAY_ARENA_BYTES=0 in the workers: the client sees that they cannot read its memory, and all is exact."""
    relay.register(path := make_pipeline(YAML, CODE))
    monkeypatch.setenv("TORCHRELAY_ARENA_BYTES", "0")
    workers.start(path)
    monkeypatch.delenv("TORCHRELAY_ARENA_BYTES")
    given = images(5)
    futures = relay.submit_many("images", ({"image": i, "do": ""} for i in given), durable=False)
    assert [f.result(timeout=20)["total"] for f in futures] == [total(i) for i in given]
    wait_until(lambda: moved(relay, "invert")["remote"] > 5 * 200_000)
    assert moved(relay, "invert")["arena"] == 0


def test_a_full_arena_falls_back_to_redis(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While the next stage stands still, what finds no room in 1 MiB goes to Redis; nothing fails or stops."""
    relay.register(path := make_pipeline(YAML, CODE))
    monkeypatch.setenv("TORCHRELAY_ARENA_BYTES", "1MiB")
    workers.start(path)
    given = images(20)
    orders = [f"total:wait {tmp_path / 'go'}", *[""] * 19]
    futures = relay.submit_many("images", ({"image": i, "do": d} for i, d in zip(given, orders, strict=True)))
    wait_until(lambda: moved(relay, "invert")["full"] > 5 * 200_000, 20.0)
    (tmp_path / "go").touch()
    assert [f.result(timeout=20)["total"] for f in futures] == [total(i) for i in given]
    wait_until(lambda: not blobs(relay))


@pytest.mark.parametrize("victim", ["invert", "total"])
def test_kill_of_a_writer_or_a_reader_loses_nothing(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, tmp_path: Path, victim: str
) -> None:
    """kill -9 while the second stage works: the dead writer's blocks are read, and the dead reader's read again."""
    relay.register(path := make_pipeline(YAML, CODE))
    supervisors = workers.start(path)
    given = images(30)
    orders = [f"total:wait {tmp_path / 'go'}", *[""] * 29]
    futures = relay.submit_many(
        "images", ({"image": i, "do": d} for i, d in zip(given, orders, strict=True)), durable=False
    )
    wait_until(lambda: moved(relay, "invert")["arena"] >= 30 * 200_000)
    (supervisor,) = [s for s in supervisors if victim in s.name]
    pid = supervisor.child_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: supervisor.child_pid not in (pid, 0))
    (tmp_path / "go").touch()
    assert [f.result(timeout=30)["total"] for f in futures] == [total(i) for i in given]
    for future in futures:
        assert future.status() == "done"


def test_a_stage_that_dies_once_reads_its_input_again(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, tmp_path: Path
) -> None:
    """A job whose worker died under it finds its columns where they were: nobody released them."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    (image,) = images(1)
    future = relay.submit("images", {"image": image, "do": f"total:die-unless {tmp_path / 'died'}"}, durable=False)
    assert future.result(timeout=30)["total"] == total(image)


def test_lost_memory_restarts_a_durable_job_and_ends_another(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, tmp_path: Path, arena_dir: Path
) -> None:
    """When the host's memory is gone, a job starts anew from its durable input; without one it fails with BytesLost."""
    relay.register(path := make_pipeline(YAML, CODE))
    supervisors = workers.start(path)
    hold, durable, fleeting = images(3)
    go = tmp_path / "go"
    first = relay.submit("images", {"image": hold, "do": f"total:wait {go}"})
    # Only after it: the second stage is busy when these come, and they wait there in shared memory.
    wait_until(lambda: moved(relay, "invert")["arena"] >= 200_000)
    kept = relay.submit("images", {"image": durable, "do": ""})
    lost = relay.submit("images", {"image": fleeting, "do": ""}, durable=False)
    wait_until(lambda: moved(relay, "invert")["arena"] >= 3 * 200_000)
    (writer,) = [s for s in supervisors if "invert" in s.name]
    pid = writer.child_pid
    for file in arena_dir.rglob("*.data"):
        file.unlink()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: writer.child_pid not in (pid, 0))
    os.kill(next(s for s in supervisors if "total" in s.name).child_pid, signal.SIGKILL)
    go.touch()
    assert first.result(timeout=30)["total"] == total(hold)
    assert kept.result(timeout=30)["total"] == total(durable)
    with pytest.raises(JobFailed, match="BytesLost"):
        lost.result(timeout=30)


def test_durable_must_be_a_truth_value(relay: Relay, make_pipeline: MakePipeline) -> None:
    """A word in its place is an error that says so, before anything is sent."""
    relay.register(make_pipeline(YAML, CODE))
    with pytest.raises(InputError, match="durable 'no' must be True or False"):
        relay.submit("images", {"image": images(1)[0], "do": ""}, durable="no")  # type: ignore[arg-type]
