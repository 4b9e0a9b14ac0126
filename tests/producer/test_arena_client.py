"""Clients with large columns in shared memory: what they may do with their arrays, and how they may end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakePipeline, Workers, wait_until
from torchrelay import AsyncRelay, Relay
from torchrelay.errors import JobFailed, QueueFull, RunConflict
from torchrelay.producer.submitter import Submitter
from torchrelay.queues.arena import writer as writer_module
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.writer import ArenaWriter
from torchrelay.queues.placement import open_home, wanted_by

YAML = """
pipeline: sums
input: {image: "uint8[*]", do: "str"}
stages:
  - name: total
    use: stages.py:Total
    outputs: {total: int64}
    queue: {max_rows: 20}
output: [total]
"""
CODE = """
import time
from pathlib import Path

from torchrelay import Stage


class Total(Stage):
    def forward(self, batch):
        for path in batch["do"]:
            while path and not Path(path).exists():
                time.sleep(0.01)
        return {"total": [int(image.sum(dtype="int64")) for image in batch["image"]]}
"""
NBYTES = 100_000


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, NBYTES, np.uint8)


def sums(count: int) -> list[int]:
    return [int(image(n).sum(dtype=np.int64)) for n in range(count)]


def one_buffer(count: int) -> Iterator[Mapping[str, Any]]:
    """Rows whose array is the same one, filled anew for each."""
    buffer = np.empty(NBYTES, np.uint8)
    for number in range(count):
        buffer[:] = image(number)
        yield {"image": buffer, "do": ""}


async def one_buffer_async(count: int) -> AsyncIterator[Mapping[str, Any]]:
    for row in one_buffer(count):
        await asyncio.sleep(0)
        yield row


def blocks(relay: Relay | AsyncRelay) -> int:
    """How many blocks of its arena a client still counts as live."""
    core = relay._core if isinstance(relay, Relay) else relay._core.core
    writer: ArenaWriter = core.submitter._placer.writer  # type: ignore[assignment]  # there is one here
    return len(writer._pool.blocks())


@pytest.mark.parametrize("durable", [True, False])
def test_rows_from_a_generator_may_share_one_buffer(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, server_url: str, namespace: str, durable: bool
) -> None:
    """Each row is as it was when it was drawn, in whatever way it is submitted."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    assert [r["total"] for r in relay.map("sums", one_buffer(40), durable=durable)] == sums(40)
    futures = relay.submit_many("sums", one_buffer(20), durable=durable)
    assert [f.result(timeout=20)["total"] for f in futures] == sums(20)

    async def act() -> list[list[int]]:
        async with AsyncRelay(server_url, namespace=namespace) as client:
            found = [[r["total"] async for r in client.map("sums", one_buffer(20), durable=durable)]]
            found.append([r["total"] async for r in client.map("sums", one_buffer_async(20), durable=durable)])
            many = await client.submit_many("sums", one_buffer(20), durable=durable)
            found.append([(await f.result())["total"] for f in many])
            return found

    assert asyncio.run(act()) == [sums(20)] * 3


def test_rows_of_a_list_are_not_copied_before_they_are_sent(
    make_pipeline: MakePipeline, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller waits for the call, and its arrays with it."""
    relay.register(make_pipeline(YAML, CODE))
    shared: list[bool] = []
    send = Submitter.send

    def look(self: Submitter, encoder: Any, drafts: list[Any], options: Any) -> Any:
        parts = [array for d in drafts for _, array in d.columns["image"]._tail]
        shared.extend(any(np.shares_memory(array, row["image"]) for row in rows) for array in parts)
        return send(self, encoder, drafts, options)

    monkeypatch.setattr(Submitter, "send", look)
    rows = [{"image": image(n), "do": ""} for n in range(3)]
    relay.submit_many("sums", rows, keep_s=0)
    relay.submit_many("sums", iter(rows), keep_s=0)
    assert shared == [True, True, True, False, False, False]


def test_a_key_stands_for_its_job_without_a_durable_copy(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, tmp_path: Path
) -> None:
    """The same content gives the same job and leaves one block; other content is refused and leaves none."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    row = {"image": image(1), "do": str(tmp_path / "go")}
    first = relay.submit("sums", row, key="k", durable=False)
    again = relay.submit("sums", row, key="k", durable=False)
    assert again.id == first.id
    with pytest.raises(RunConflict):
        relay.submit("sums", {**row, "image": image(2)}, key="k", durable=False)
    assert blocks(relay) == 1
    (tmp_path / "go").touch()
    assert again.result(timeout=20) == first.result(timeout=20)
    assert relay.submit("sums", row, key="k", durable=False).result(timeout=5) == first.result()


def test_an_input_that_is_gone_says_what_to_do(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, arena_dir: Path
) -> None:
    """No other copy was asked for: the job fails once, and its error names the remedy."""
    relay.register(path := make_pipeline(YAML, CODE))
    supervisors = workers.start(path)
    (pid,) = [s.child_pid for s in supervisors]
    hold = arena_dir / "hold"
    first = relay.submit("sums", {"image": image(0), "do": str(hold)}, durable=False)
    wait_until(lambda: relay.registry.loads() and first.status() == "running")
    lost = relay.submit("sums", {"image": image(1), "do": ""}, durable=False)
    writer = relay._core.submitter._placer.writer
    assert writer is not None
    writer.free([writer_place(relay, lost.id)])
    hold.touch()
    with pytest.raises(JobFailed, match="the bytes of a column of the input are gone; submit the job again") as failed:
        lost.result(timeout=20)
    assert failed.value.error_type == "BytesLost"
    assert first.result(timeout=20)["total"] == sums(1)[0]
    assert [s.child_pid for s in supervisors] == [pid]
    hold.unlink()


def writer_place(relay: Relay, job_id: str) -> Any:
    """Where the column of a waiting job lies."""
    writer = relay._core.submitter._placer.writer
    assert writer is not None
    (block,) = [b for b in writer._pool.blocks() if b.name.startswith(job_id)]
    from torchrelay.queues.job import Place

    segment = block.part.segment
    return Place(writer.host, segment.arena, segment.number, block.slot, block.generation, block.offset)


def test_what_finds_no_room_in_the_queue_leaves_no_block(make_pipeline: MakePipeline, relay: Relay) -> None:
    """A refused submit gives its room back at once, also when a part of it went in."""
    relay.register(make_pipeline(YAML, CODE))
    # Without workers nothing is placed: as if there were one.
    relay._core.start().submitter._placer._is_for_here = lambda name, readers: True  # type: ignore[method-assign]
    rows = [{"image": image(n), "do": ""} for n in range(40)]
    accepted = [relay.submit("sums", row, durable=False) for row in rows[:20]]
    with pytest.raises(QueueFull):
        relay.submit("sums", rows[20], durable=False)
    assert blocks(relay) == 20
    with pytest.raises(QueueFull):
        relay.submit_many("sums", rows, durable=False)
    assert blocks(relay) == 20
    assert relay.cancel([f.id for f in accepted]) == [True] * 20


def test_caches_of_jobs_that_nobody_reads_any_more_go(
    make_pipeline: MakePipeline, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that submits and cancels all day, and has no other use for its arena, does not fill it for good."""
    monkeypatch.setattr(writer_module, "_OLD_MS", 200)
    relay.register(make_pipeline(YAML, CODE))
    relay._core.start().submitter._placer._is_for_here = lambda name, readers: True  # type: ignore[method-assign]
    futures = relay.submit_many("sums", [{"image": image(n), "do": ""} for n in range(5)])
    assert blocks(relay) == 5
    relay.cancel([f.id for f in futures[1:]])
    wait_until(lambda: blocks(relay) == 1, 5.0)
    relay.cancel([futures[0].id])


@pytest.mark.alone
def test_who_waits_for_room_in_the_arena_holds_up_nobody(
    make_pipeline: MakePipeline, server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread whose column finds no room waits for `wait_s`; another submits meanwhile, and closing ends the wait."""
    monkeypatch.setenv("TORCHRELAY_ARENA_BYTES", "1MiB")
    ended: list[BaseException] = []
    with Relay(server_url, namespace=namespace) as relay:
        relay.register(make_pipeline(YAML, CODE))
        relay._core.start().submitter._placer._is_for_here = lambda name, readers: True  # type: ignore[method-assign]
        rows = [{"image": image(n), "do": ""} for n in range(10)]
        accepted = relay.submit_many("sums", rows, durable=False)

        def wait() -> None:
            try:
                relay.submit("sums", rows[0], durable=False, wait_s=60)
            except BaseException as error:
                ended.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: relay._core.submitter._placer.writer._ask_again_ms > 0)  # type: ignore[union-attr]
        started = time.monotonic()
        accepted.append(relay.submit("sums", {"image": np.ones(9, np.uint8), "do": ""}))
    assert time.monotonic() - started < 1.0
    waiting.join(5.0)
    assert "closed while a submit waited for room" in str(ended[0])
    with Relay(server_url, namespace=namespace) as relay:
        assert relay.cancel([f.id for f in accepted]) == [True] * 11
        home = open_home(relay.registry, relay._core.settings)
        assert home is not None
        ArenaKeeper(home, wanted_by(relay.registry)).close()


def test_cancelled_submits_of_a_full_arena_leave_nothing(
    make_pipeline: MakePipeline,
    server_url: str,
    namespace: str,
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks of an AsyncRelay that are cancelled while there is no room, in the arena or in the queue: the others end
    with their results, and the memory of all comes back."""
    monkeypatch.setenv("TORCHRELAY_ARENA_BYTES", "1MiB")
    monkeypatch.setattr(writer_module, "_OLD_MS", 500)
    go = tmp_path / "go"

    async def act() -> None:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            await relay.register(path := make_pipeline(YAML, CODE))
            await asyncio.to_thread(workers.start, path)

            async def one(number: int) -> int:
                row = {"image": image(number), "do": str(go)}
                return int((await relay.infer("sums", row, durable=False, wait_s=30))["total"])

            tasks = [asyncio.create_task(one(n)) for n in range(60)]
            await asyncio.sleep(0.3)
            for task in tasks[1::2]:
                task.cancel()
            await asyncio.gather(*tasks[1::2], return_exceptions=True)
            assert all(task.cancelled() for task in tasks[1::2])
            go.touch()
            assert await asyncio.gather(*tasks[::2]) == sums(60)[::2]
            async with asyncio.timeout(15):
                while blocks(relay):
                    await asyncio.sleep(0.05)

    asyncio.run(act())


@pytest.mark.parametrize("orderly", [True, False])
def test_jobs_of_a_client_that_left_find_their_columns(
    make_pipeline: MakePipeline,
    relay: Relay,
    workers: Workers,
    server_url: str,
    namespace: str,
    tmp_path: Path,
    orderly: bool,
) -> None:
    """It closed, or its interpreter ended without: what waits in its memory is read, and then its files are gone."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    code = f"""
import sys
import numpy as np
from torchrelay import Relay

relay = Relay({server_url!r}, namespace={namespace!r}).__enter__()
for number in range(10):
    image = np.random.default_rng(number).integers(0, 256, {NBYTES}, np.uint8)
    row = {{"image": image, "do": {str(tmp_path / "go")!r}}}
    print(relay.submit("sums", row, durable=False, keep_s=600).id)
if {orderly}:
    relay.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ids = done.stdout.split()
    assert not list(relay.registry.client.scan_iter(f"*{namespace}*blob*"))
    (tmp_path / "go").touch()
    assert [relay.job(i).result(timeout=20)["total"] for i in ids] == sums(10)


def test_a_machine_without_an_arena_is_a_producer_all_the_same(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers, server_url: str, namespace: str
) -> None:
    """As on Windows: no fcntl, no uid, none of the calls that an arena needs. Columns go through Redis."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    code = f"""
import asyncio, os, subprocess, sys, tempfile, threading, zoneinfo
import ml_dtypes, msgpack, numpy as np, pydantic, redis, yaml

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "pwd", "grp", "resource", "termios"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules.pop(name, None)
import mmap
for name in ("getuid", "fork", "register_at_fork", "posix_fallocate", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
    delattr(os, name)
for name in ("PROT_READ", "PROT_WRITE", "MAP_SHARED"):
    delattr(mmap, name)
sys.platform = "win32"

import torchrelay
from torchrelay import AsyncRelay, Relay

image = np.random.default_rng(0).integers(0, 256, {NBYTES}, np.uint8)
with Relay({server_url!r}, namespace={namespace!r}) as relay:
    print(relay.infer("sums", {{"image": image, "do": ""}}, durable=False, deadline_s=20.0)["total"])

async def main():
    async with AsyncRelay({server_url!r}, namespace={namespace!r}) as relay:
        print((await relay.infer("sums", {{"image": image, "do": ""}}, durable=False, deadline_s=20.0))["total"])

asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.stdout.split() == [str(sums(1)[0])] * 2, done.stderr
