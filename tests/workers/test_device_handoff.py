"""`handoff: device` between workers: what is left on a device, how it comes back, and what its owner's death costs.

The device is a stand-in whose memory is files (`fake_gpu`); tests/integration/test_gpu.py does the same with GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import wait_until
from tests.workers.device_stages import HEIGHT, PIPELINE, Reads, Spreader, Totals, announce, total_of
from tests.workers.fake_gpu import FakeGpu
from tests.workers.in_process import InProcess
from torchrelay import Relay
from torchrelay.config import Pipeline
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.placement import HOSTS_EVERY_S
from torchrelay.queues.registry import Registry, run
from torchrelay.queues.tickets import Ticket
from torchrelay.workers.device_exporter import DeviceExporter
from torchrelay.workers.device_importer import DeviceImporter

JOBS = 12
ROW_BYTES = HEIGHT * 64 * 4


class Chain:
    """The chain's workers in this process, each with a device of its own; `spread` may be another process."""

    def __init__(self, registry: Registry, url: str, path: Path, folder: Path) -> None:
        self.registry, self.url, self.path, self.folder = registry, url, path, folder
        self.pipeline = Pipeline.load(path)
        self.reads, self.totals = Reads(), Totals()
        self.reader = FakeGpu(folder)
        self.running: list[InProcess] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.gpus: dict[str, tuple[int, ...]] = {"total": (7,)}
        self._over = threading.Event()
        from torchrelay.queues.arena.home import unsupported

        assert not unsupported()
        self.home = ArenaHome.open("/dev/shm", registry.namespace_id())
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def _beat(self) -> None:
        while True:
            announce(self.registry, self.pipeline, self.home, self.gpus)
            if self._over.wait(0.5):
                return

    def serve(self, stage: str, *, gpu: FakeGpu | None = None, **settings: Any) -> InProcess:
        runners: dict[str, Callable[[], Any]] = {
            "read": lambda: _runner(self.reads, "read"),
            "spread": Spreader,
            "total": lambda: _runner(self.totals, "total"),
        }
        number = self.pipeline.graph.node(stage).index - 1
        worker = InProcess(self.registry, self.url, self.path, runners[stage](), stage=number, gpu=gpu, **settings)
        worker.memory.placer._hosts_at = -HOSTS_EVERY_S
        self.running.append(worker.start())
        return worker

    def spawn(self) -> subprocess.Popen[bytes]:
        """A process that serves `spread`."""
        orders = {
            "url": self.url, "namespace": self.registry.control.namespace,
            "memory": str(self.folder), "pipeline": str(self.path),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.workers.device_stages", json.dumps(orders)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        return child

    def pause(self, stage: str, on: bool) -> None:
        for lane in self.registry.lanes:
            run(self.registry.client, lane.pause("wide", "", stage, on))

    def close(self) -> None:
        for worker in self.running:
            worker.stopping.set()
        for worker in self.running:
            worker.stop()
        for child in self.processes:
            child.kill()
            child.communicate()
        self._over.set()
        self._beats.join()
        keeper = ArenaKeeper(self.home, lambda lane, names: [False] * len(names))
        wait_until(lambda: (keeper.tick(), list(self.home.folder.glob("*.data")) == [])[1])
        keeper.close()
        assert list(self.home.folder.glob("*.gpu")) == []


def _runner(stage: Any, name: str) -> Any:
    from torchrelay.stages.runner import Runner

    return Runner(stage, name)


@pytest.fixture
def chain(registry: Registry, server_url: str, make_pipeline: Callable[..., Path], tmp_path: Path) -> Iterator[Chain]:
    folder = tmp_path / "gpu"
    folder.mkdir()
    made = Chain(registry, server_url, make_pipeline(PIPELINE, "class Nobody: pass\n"), folder)
    yield made
    made.totals.gate.set()
    made.close()


def images(count: int = JOBS) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 200, HEIGHT).astype(np.uint8) for _ in range(count)]


def submit(relay: Relay, chain: Chain, given: list[Any], **options: Any) -> list[Any]:
    relay.register(chain.path)
    return relay.submit_many("wide", [{"image": image} for image in given], **options)


def results(futures: list[Any]) -> list[float]:
    return [future.result(20)["total"] for future in futures]


def test_columns_stay_on_the_device_between_two_workers(relay: Relay, chain: Chain) -> None:
    """Exact, counted, and with nothing left: neither blocks of shared memory nor of the device."""
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    reader = chain.serve("total", gpu=chain.reader)
    chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    given = images()
    assert results(submit(relay, chain, given)) == [total_of(image) for image in given]
    counts = maker.memory.placer.counts
    assert counts["device"] == JOBS * ROW_BYTES
    assert counts["arena"] == counts["remote"] == counts["full"] == 0
    assert chain.reader.open_now == 1
    writer = maker.memory.placer.writer
    assert writer is not None
    wait_until(lambda: (writer.collect(), writer.keeping == 0)[1])
    (segment,) = maker.memory.exporter._segments  # type: ignore[union-attr]
    wait_until(lambda: segment.take(1 << 30) is None and segment.space.free_pages == segment.space.pages)
    assert reader.progress.gpus == (7,)


def test_what_a_stage_read_is_given_back_only_when_its_readers_have_what_it_made(relay: Relay, chain: Chain) -> None:
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    first = chain.serve("read")
    chain.serve("total", gpu=chain.reader)
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    chain.totals.gate.clear()
    # Rows of 1 KiB travel inline; together they are a block of shared memory.
    relay.register(chain.path)
    table = np.stack(images(4) * 2)
    future = relay.submit_table("wide", {"image": table[:4]})
    other = relay.submit_table("wide", {"image": table[4:]})
    writer = first.memory.placer.writer
    assert writer is not None
    wait_until(lambda: maker.memory.placer.counts["device"] == 8 * ROW_BYTES)
    wait_until(lambda: maker.parts.custody.empty)
    assert first.memory.placer.counts["arena"] > 8 * HEIGHT
    writer.collect()
    assert len(writer._pool.blocks()) == 2
    chain.totals.gate.set()
    expected = [total_of(image) for image in table[:4]]
    assert future.result(20)["total"].tolist() == other.result(20)["total"].tolist() == expected
    wait_until(lambda: (writer.collect(), not writer._pool.blocks())[1])


def test_the_owners_death_costs_its_own_work_and_no_more(relay: Relay, chain: Chain) -> None:
    """Also of a job whose input was in shared memory alone: what the dead worker had read was kept."""
    chain.serve("read")
    chain.serve("total", gpu=chain.reader)
    chain.totals.gate.clear()
    child = chain.spawn()
    relay.register(chain.path)
    given = np.stack(images(8))
    futures = [relay.submit_table("wide", {"image": given[a : a + 2]}, durable=False) for a in range(0, 8, 2)]
    # Committed by the process, and claimed by who waits at the gate or still ready there.
    committed = f"{chain.pipeline.ref}/spread.committed"
    wait_until(lambda: chain.registry.loads().get(committed) == 4)
    wait_until(lambda: chain.reader.open_now > 0)
    read = chain.reads.calls
    assert read == 8
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    chain.totals.gate.set()
    chain.serve("spread", gpu=FakeGpu(chain.folder))
    found = [future.result(30)["total"].tolist() for future in futures]
    assert found == [[total_of(image) for image in given[a : a + 2]] for a in range(0, 8, 2)]
    assert chain.reads.calls == read
    assert chain.registry.loads()[committed] == 8
    wait_until(lambda: chain.reader.open_now == 0)  # what the dead process had is closed


def test_a_worker_that_ends_waits_until_its_columns_are_read(relay: Relay, chain: Chain) -> None:
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    chain.serve("total", gpu=chain.reader)
    chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    chain.totals.gate.clear()
    given = images(4)
    futures = submit(relay, chain, given)
    wait_until(lambda: maker.memory.placer.counts["device"] == 4 * ROW_BYTES)
    maker.stopping.set()
    with pytest.raises(AssertionError):
        maker.ended(0.5)
    chain.totals.gate.set()
    assert results(futures) == [total_of(image) for image in given]
    maker.ended()
    chain.running.remove(maker)
    assert maker.error is None
    assert chain.registry.loads()[f"{chain.pipeline.ref}/spread.committed"] == 4


@pytest.mark.parametrize("why", ["cannot", "another", "none"])
def test_where_readers_do_not_copy_from_the_device_columns_go_through_the_host(
    relay: Relay, chain: Chain, why: str
) -> None:
    """A reader without such a device, one that does not reach this one, or no reader yet."""
    chain.gpus = {"cannot": {}, "another": {"total": (8,)}, "none": {}}[why]
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    chain.serve("read")
    given = images(4)
    futures = submit(relay, chain, given)
    if why != "none":
        chain.serve("total")
    else:
        wait_until(
            lambda: (
                maker.memory.placer.counts["arena"] == 4 * (ROW_BYTES + 128)
                or sum(maker.memory.placer.counts.values()) > 4 * ROW_BYTES
            )
        )
        chain.serve("total", gpu=chain.reader)
    assert results(futures) == [total_of(image) for image in given]
    assert maker.memory.placer.counts["device"] == 0


def test_a_reader_that_came_meanwhile_and_cannot_copy_has_the_column_made_again(relay: Relay, chain: Chain) -> None:
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    given = images(4)
    futures = submit(relay, chain, given)
    wait_until(lambda: maker.memory.placer.counts["device"] == 4 * ROW_BYTES)
    chain.serve("total")
    assert results(futures) == [total_of(image) for image in given]
    # What was lost once goes through Redis.
    assert maker.memory.placer.counts["result"] >= 4 * ROW_BYTES


def test_a_column_that_nobody_could_have_leaves_what_it_was_made_of(
    relay: Relay, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maker takes it back while its job waits to be run again, of an input that is nowhere else."""
    monkeypatch.setattr("torchrelay.queues.arena.writer._OLD_MS", 50)
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    first = chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    relay.register(chain.path)
    given = np.stack(images(8))
    futures = [relay.submit_table("wide", {"image": given[a : a + 4]}, durable=False) for a in (0, 4)]
    wait_until(lambda: maker.memory.placer.counts["device"] == 8 * ROW_BYTES)
    chain.pause("spread", True)
    chain.serve("total")
    mine, before = maker.memory.placer.writer, first.memory.placer.writer
    assert mine is not None
    assert before is not None
    wait_until(lambda: mine.keeping == 0)
    before.tend()
    chain.pause("spread", False)
    found = [future.result(20)["total"].tolist() for future in futures]
    assert found == [[total_of(image) for image in given[a : a + 4]] for a in (0, 4)]
    assert chain.reads.calls == 8


def test_a_worker_whose_files_were_removed_hands_over_again(
    relay: Relay, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody cleared the folder under living processes: what lay there may be made again, what comes then is not; and
    in the end nothing of either is left."""
    monkeypatch.setattr("torchrelay.queues.arena.writer._OLD_MS", 50)
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    given = images(4)
    futures = submit(relay, chain, given)
    wait_until(lambda: maker.memory.placer.counts["device"] == 4 * ROW_BYTES)
    for path in chain.home.folder.iterdir():
        path.unlink()
    writer, exporter = maker.memory.placer.writer, maker.memory.exporter
    assert writer is not None
    assert exporter is not None
    old = writer.arena
    wait_until(lambda: writer.arena != old)
    wait_until(lambda: list(chain.home.folder.glob("*.gpu")))
    chain.serve("total", gpu=chain.reader)
    assert results(futures) == [total_of(image) for image in given]
    committed = f"{chain.pipeline.ref}/spread.committed"
    before = chain.registry.loads()[committed]
    assert results(submit(relay, chain, given)) == [total_of(image) for image in given]
    assert chain.registry.loads()[committed] == before + 4
    assert maker.memory.placer.counts["device"] == 8 * ROW_BYTES
    (segment,) = exporter._segments
    wait_until(lambda: segment.take(1 << 30) is None and segment.space.free_pages == segment.space.pages)


def test_a_driver_that_refuses_is_asked_no_more(relay: Relay, chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder))
    chain.reader.refuses = "open"
    reader = chain.serve("total", gpu=chain.reader)
    chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    given = images(4)
    assert results(submit(relay, chain, given)) == [total_of(image) for image in given]
    assert reader.memory.gpus() == ()
    assert "cannot be opened" in caplog.text


def test_a_full_device_sends_columns_through_the_host(relay: Relay, chain: Chain) -> None:
    """Room for one batch of two; nothing waits for the device."""
    maker = chain.serve("spread", gpu=FakeGpu(chain.folder), device_arena_bytes=5 * ROW_BYTES)
    chain.serve("total", gpu=chain.reader)
    chain.serve("read")
    wait_until(lambda: maker.memory.placer.copies_from(7, [f"{chain.pipeline.ref}/total"]))
    chain.totals.gate.clear()
    given = images(16)
    futures = submit(relay, chain, given)
    wait_until(lambda: maker.memory.placer.counts["arena"] > 0)
    chain.totals.gate.set()
    assert results(futures) == [total_of(image) for image in given]
    assert 0 < maker.memory.placer.counts["device"] < 16 * ROW_BYTES


# The two ends alone.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_a_run_is_used_again_when_nothing_refers_to_it(folder: Path) -> None:
    exporter = DeviceExporter(FakeGpu(folder), folder, 1 << 20)
    first = exporter.take(1 << 20)
    assert first is not None
    assert exporter.take(1) is None
    del first
    again = exporter.take(1 << 19)
    assert again is not None
    assert again.offset == 0
    other = exporter.take(1 << 19)
    assert other is not None
    assert other.offset == 1 << 19
    exporter.close()


def test_a_device_without_memory_is_asked_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gpu = FakeGpu(folder, refuses="allocate")
    exporter = DeviceExporter(gpu, folder, 1 << 30)
    assert exporter.take(100) is None
    gpu.refuses = ""
    assert exporter.take(100) is None
    assert caplog.text.count("no device memory") == 1
    exporter.close()


def test_a_ticket_is_believed_only_within_what_was_opened(folder: Path) -> None:
    from torchrelay.config.device_rows import DeviceRows

    exporter = DeviceExporter(FakeGpu(folder), folder, 1 << 20)
    importer = DeviceImporter(FakeGpu(folder), folder)
    run = exporter.take(4096)
    assert run is not None
    data = np.arange(512, dtype=np.float64)
    run.write(data.ctypes.data, data.nbytes, 0)
    text = exporter.ticket(DeviceRows(run, 800, data.dtype, (4, 3)))
    assert text is not None
    ticket = Ticket.decode(text)
    rows = importer.rows(ticket)
    assert rows is not None
    np.testing.assert_array_equal(np.asarray(rows), data[100:112].reshape(4, 3))
    assert importer.rows(ticket._replace(offset=(1 << 20) - 8)) is None
    assert importer.rows(ticket._replace(exporter="nobody00")) is None
    exporter.close()
    assert not importer.is_there(exporter.name)
    assert importer.rows(ticket) is None
    importer.close()
