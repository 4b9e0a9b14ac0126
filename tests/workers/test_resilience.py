"""What a fleet must live through besides kills: large batches, outages under its display, files edited beneath it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workers, private_server, wait_until
from tests.workers.support import ForwardLog, WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.errors import ConfigError
from torchrelay.queues.registry import Registry
from torchrelay.up import Fleet

Obey = Callable[..., Path]


def test_one_forward_may_hold_thousands_of_jobs(
    relay: Relay, registry: Registry, workers: Workers, obey: Obey, forward_log: ForwardLog
) -> None:
    """A batch far larger than one claim is put together, computed once and committed."""
    path = obey("batch: {max_rows: 5000, max_wait_ms: 3000}")
    relay.register(path)
    futures = relay.submit_many("obey", [{"n": str(i)} for i in range(5000)])
    workers.start(path)
    assert [f.result(60)["out"] for f in futures] == [f"{i}!" for i in range(5000)]
    assert max(len(names) for _, names in forward_log.forwards()) > 3800
    wait_until(lambda: not registry.client.hlen(registry.lanes[0].keys.grants))
    assert_settled(registry, {"work": 5000})


def test_a_worker_outlives_an_outage_that_its_display_meets(namespace: str, obey: Obey) -> None:
    """The server is away when the plain status line is due; the worker says so, and goes on when it is back."""
    with private_server() as server, Relay(server.url, namespace=namespace) as relay:
        path = obey()
        relay.register(path)
        worker = WorkerProcess(relay.registry, server.url, path)
        try:
            worker.ready()
            server.kill()
            wait_until(lambda: "the server is away" in worker.log, 20.0)
            server.start()
            assert relay.infer("obey", {"n": "a"}, deadline_s=20) == {"out": "a!"}
            assert worker.process.poll() is None
        finally:
            worker.end()


def test_a_child_whose_files_changed_does_not_serve_another_version(
    relay: Relay, registry: Registry, spawn: Callable[..., WorkerProcess], obey: Obey
) -> None:
    """The stage file is edited and the child killed: the worker ends, naming both versions."""
    path = obey()
    ref = relay.register(path)
    worker = spawn(path).ready()
    stages = path.parent / "stages.py"
    stages.write_text(stages.read_text() + "\nEDITED = True\n")
    os.kill(worker.child, signal.SIGKILL)
    assert worker.process.wait(30) == 1
    assert "changed since this worker was started" in worker.log
    assert ref in worker.log
    assert registry.workers() == []


def test_ctrl_c_does_not_wait_for_a_model_that_loads(
    make_pipeline: Callable[..., Path], server_url: str, registry: Registry
) -> None:
    """A child that still loads holds no jobs: it is ended at once."""
    code = """
        import time
        from torchrelay import Stage

        class Slow(Stage):
            def load(self, context):
                time.sleep(600)

            def forward(self, batch):
                return {}
    """
    path = make_pipeline("pipeline: slow\nstages: [{name: work, use: 'stages.py:Slow'}]\n", code)
    worker = WorkerProcess(registry, server_url, path)
    try:
        wait_until(lambda: worker.report() is not None, 20.0)
        worker.process.send_signal(signal.SIGINT)
        assert worker.process.wait(10) == 0
    finally:
        worker.end()


@pytest.mark.parametrize("device", ["bananas", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_refused_before_anything_starts(obey: Obey, device: str) -> None:
    """By name, as a ConfigError."""
    from torchrelay import Pipeline

    with pytest.raises(ConfigError, match="device"):
        Fleet("unix:///nowhere.sock").add(Pipeline.load(obey()), device=device)
