"""Faults in the middle of jobs of many rows: drains, cancels, leases, lost bytes, poison and kills. Real workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import wait_until
from tests.workers.support import WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobCancelled, JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry

MakePipeline = Callable[..., Path]
Spawn = Callable[..., WorkerProcess]

SLICES = """
    pipeline: slices
    input: {x: int64, do: str = ""}
    output: [y]
    stages:
      - name: work
        use: stages.py:work
        outputs: {y: int64}
        batch: {max_rows: 4}
        timeout_s: 1
        retry: {attempts: 2, backoff_s: [0, 0]}
"""
SLICES_CODE = """
    import os
    import time
    from pathlib import Path


    def work(batch):
        with Path(__file__).with_name("began").open("a") as file:
            file.write(f"{os.getpid()}:{batch['x'][0]} ")
        for i, (x, do) in enumerate(zip(batch["x"], batch["do"])):
            verb, _, rest = do.partition(" ")
            if verb == "sleep":
                time.sleep(float(rest))
            if verb == "slow-until" and not Path(rest).exists():
                time.sleep(0.25)
            if verb == "die" or (verb == "die-until" and not Path(rest).exists()):
                os._exit(7)
            if verb == "hang-until" and not Path(rest).exists():
                time.sleep(3600)
            if verb == "raise":
                raise ValueError(f"row {x}")
            if verb == "reject":
                batch.reject(i, f"row {x}")
        return {"y": batch["x"] * 2}
"""


@pytest.fixture
def slices(make_pipeline: MakePipeline, relay: Relay) -> Path:
    path = make_pipeline(SLICES, SLICES_CODE)
    relay.register(path)
    return path


def began(path: Path) -> list[tuple[int, int]]:
    """Every forward: (process, its first x)."""
    file = path.parent / "began"
    words = file.read_text().split() if file.exists() else []
    return [(int(pid), int(x)) for pid, x in (w.split(":") for w in words)]


def test_sigterm_between_slices_gives_the_job_back_unharmed(
    slices: Path, relay: Relay, registry: Registry, spawn: Spawn, tmp_path: Path
) -> None:
    """A job of many forwards does not hold up the drain; another worker does it, without a strike."""
    first = spawn(slices).ready()
    rows, gate = 4 * 60, tmp_path / "gate"
    future = relay.submit_table("slices", {"x": range(rows), "do": [f"slow-until {gate}", "", "", ""] * 60})
    wait_until(lambda: len(began(slices)) >= 2)
    began_at = time.monotonic()
    first.process.terminate()
    assert first.process.wait(20.0) == 0, first.log
    assert time.monotonic() - began_at < 10.0
    assert len(began(slices)) < 30
    assert registry.client.hlen(registry.lanes[0].keys.grants) == 0
    gate.touch()
    spawn(slices)
    assert np.asarray(future.result(60)["y"]).tolist() == [2 * i for i in range(rows)]
    assert_settled(registry, {"work": 1})


def test_a_cancelled_job_stops_between_slices(slices: Path, relay: Relay, registry: Registry, spawn: Spawn) -> None:
    """The worker is free for the next job long before all forwards of the cancelled one would have been done."""
    spawn(slices).ready()
    future = relay.submit_table("slices", {"x": range(400), "do": ["sleep 0.25", "", "", ""] * 100})
    wait_until(lambda: began(slices))
    assert future.cancel()
    assert relay.infer("slices", {"x": 1000}, deadline_s=15) == {"y": 2000}
    assert isinstance(future.exception(5), JobCancelled)
    assert len(began(slices)) < 50
    assert_settled(registry, {"work": 1})


def test_a_job_past_its_deadline_stops_between_slices(
    slices: Path, relay: Relay, registry: Registry, spawn: Spawn
) -> None:
    """Nobody waits for its rest."""
    spawn(slices).ready()
    relay.submit_table("slices", {"x": range(400), "do": ["sleep 0.25", "", "", ""] * 100}, deadline_s=1.0)
    wait_until(lambda: began(slices))
    assert relay.infer("slices", {"x": 1000}, deadline_s=20) == {"y": 2000}
    assert len(began(slices)) < 50


@pytest.mark.parametrize("order", ["sleep 0.02", "reject", "raise"])
def test_a_job_of_many_short_forwards_keeps_its_lease(
    slices: Path, relay: Relay, registry: Registry, spawn: Spawn, order: str
) -> None:
    """Several leases long, in slices or in halves: no other worker gets it meanwhile, and it is committed once."""
    for _ in range(2):
        spawn(slices, lease_ms="1500").ready()
    table: dict[str, Any] = {"x": range(240), "do": ["sleep 0.02"] * 240}
    expected = [2 * i for i in range(240)]
    if order != "sleep 0.02":
        table["do"][7::8] = [order] * 30
        expected = [2 * i for i in range(240) if i % 8 != 7]
    future = relay.submit_table("slices", table, on_error="keep")
    assert np.asarray(future.result(60)["y"]).tolist() == expected
    assert {pid for pid, _ in began(slices)}.__len__() == 1
    assert sorted(future.errors) == (list(range(7, 240, 8)) if order != "sleep 0.02" else [])
    assert_settled(registry, {"work": 1})


def test_a_slice_that_hangs_is_seen_and_the_job_starts_again(
    slices: Path, relay: Relay, registry: Registry, spawn: Spawn, tmp_path: Path
) -> None:
    """The time-out is that of one forward, wherever in the job it stands."""
    gate = tmp_path / "gate"
    spawn(slices).ready()
    orders = [""] * 40
    orders[22] = f"hang-until {gate}"
    future = relay.submit_table("slices", {"x": range(40), "do": orders})
    wait_until(lambda: (began(slices) or [(0, 0)])[-1][1] == 20)
    gate.touch()
    assert np.asarray(future.result(30)["y"]).tolist() == [2 * i for i in range(40)]
    assert len({pid for pid, _ in began(slices)}) == 2
    assert_settled(registry, {"work": 1})


def test_a_row_that_kills_its_worker_ends_its_table_and_a_redrive_keeps_what_it_is(
    slices: Path, relay: Relay, registry: Registry, spawn: Spawn, tmp_path: Path
) -> None:
    """Three strikes, then the dead letters; redriven, it is still a table that keeps what it can."""
    gate = tmp_path / "gate"
    spawn(slices).ready()
    orders = ["", "reject", "", "", "", "", f"die-until {gate}", ""]
    future = relay.submit_table("slices", {"x": range(8), "do": orders}, on_error="keep")
    error = future.exception(60)
    assert isinstance(error, JobFailed)
    assert error.error_type == "WorkerDied"
    [letter] = dead.scan(registry)
    gate.touch()
    [new] = dead.redrive(registry, [letter.job_id]).values()
    again = relay.job(new)
    assert np.asarray(again.result(30)["y"]).tolist() == [2 * i for i in range(8) if i != 1]
    assert again.source_rows.tolist() == [i for i in range(8) if i != 1]
    assert {i: e.message for i, e in again.errors.items()} == {1: "row 1"}
