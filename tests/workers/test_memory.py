"""A device whose memory is full: smaller batches, back to large ones, and rows that fit nowhere. Real runners."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from torchrelay.config.spec import BatchSpec
from torchrelay.errors import DeviceError
from torchrelay.queues.job import Payload
from torchrelay.queues.levels import Levels
from torchrelay.stages import Batch, Runner, Stage, StageContext, TorchStage
from torchrelay.workers.batching import Planner
from torchrelay.workers.compute import Failed, GivenUp, compute
from torchrelay.workers.row_cap import RowCap
from torchrelay.workers.work import Incoming, Output, Work

HUGE = 1000


class Blob:
    """What a forward holds on the device."""


class Small(Stage):
    """Doubles x, `room` rows at a time; a row of HUGE fits nowhere. Each forward's blob must be freed by the next."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.forwards: list[int] = []
        self.blobs: list[weakref.ref[Blob]] = []
        self.fails_once = False

    def forward(self, batch: Batch) -> dict[str, Any]:
        self.forwards.append(len(batch))
        assert not [blob for blob in self.blobs if blob() is not None], "what a failed forward held is still held"
        blob = Blob()
        self.blobs.append(weakref.ref(blob))
        if len(batch) > self.room or HUGE in batch["x"] or self.fails_once:
            self.fails_once = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return {"y": batch["x"] * 2}


class Quiet:
    def __init__(self, forwards: int = 10**9) -> None:
        self.left = forwards

    def started(self, works: Sequence[Work[int]]) -> None:
        self.left -= 1

    def stopped(self, rows: int) -> None: ...
    def ended(self, works: Sequence[Work[int]]) -> list[bool]:
        return [False] * len(works)

    def goes_on(self, works: Sequence[Work[int]]) -> bool:
        return self.left > 0


def job(number: int, xs: list[int], *, keep: bool = False, last: bool = False) -> Work[int]:
    incoming = Incoming(number, [], len(xs), keep, last)
    return Work(incoming, {"x": np.array(xs, np.int64)}, len(xs), len(xs), Payload({}), {}, Levels({}))


def run(works: Sequence[Work[int]], stage: Stage, planner: Planner[int], meter: Quiet | None = None) -> dict[int, Any]:
    done: dict[int, Any] = {}
    for group in compute(works, Runner(stage, "small"), planner, meter or Quiet()):
        done |= {w.job: outcome for w, outcome in group}
    return done


def planner_of(max_rows: int) -> Planner[int]:
    return Planner(BatchSpec(max_rows=max_rows))


def test_a_batch_that_does_not_fit_is_tried_again_then_halved_and_remembered() -> None:
    """Every job gets its result; the next window starts with what fitted."""
    stage, planner = Small(10), planner_of(32)
    done = run([job(i, [i]) for i in range(32)], stage, planner)
    assert [done[i].columns["y"].tolist() for i in range(32)] == [[2 * i] for i in range(32)]
    assert stage.forwards == [32, 32, 16, 8, 8, 16, 8, 8]
    assert planner.max_rows == 8
    stage.forwards.clear()
    run([job(i, [i]) for i in range(32)], stage, planner)
    assert stage.forwards == [8, 8, 8, 8]


def test_memory_that_was_only_fragmented_costs_one_forward() -> None:
    """Freed and tried again whole, with no cap left behind."""
    stage, planner = Small(32), planner_of(32)
    stage.fails_once = True
    done = run([job(i, [i]) for i in range(20)], stage, planner)
    assert len(done) == 20
    assert stage.forwards == [20, 20]
    assert planner.max_rows == 32


def test_the_rest_of_a_window_is_cut_smaller_too() -> None:
    """What was planned before memory was full is planned anew."""
    stage, planner = Small(4), planner_of(8)
    done = run([job(i, [i]) for i in range(24)], stage, planner)
    assert len(done) == 24
    assert stage.forwards == [8, 8, 4, 4, 4, 4, 4, 4]


def test_a_job_of_many_rows_is_cut_into_what_fits() -> None:
    """Its pieces are joined; only the first is tried too large."""
    stage, planner = Small(5), planner_of(8)
    done = run([job(0, list(range(30)))], stage, planner)
    assert done[0].columns["y"].tolist() == [2 * i for i in range(30)]
    assert stage.forwards == [8, 8, 4, 4, 4, 4, 4, 4, 4, 2]
    assert planner.max_rows == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_fits_nowhere_fails_its_job_alone(rows: int) -> None:
    """With its shape and a printable traceback; others pass, and their batches stay large."""
    works = [job(i, [i]) for i in range(15)] + [job(15, [HUGE] + [1] * (rows - 1))]
    stage, planner = Small(16 + rows), planner_of(32)
    done = run(works, stage, planner)
    failed = done.pop(15)
    assert isinstance(failed, Failed)
    assert not failed.final
    assert (failed.error_type, "int64" in failed.message) == ("OutOfMemoryError", True)
    assert "CUDA out of memory" in failed.message
    assert failed.error is not None
    assert "in forward" in "".join(traceback.format_exception(failed.error))
    assert all(isinstance(outcome, Output) for outcome in done.values())
    assert planner.max_rows >= 8


def test_of_a_table_that_keeps_what_it_can_only_that_row_is_rejected() -> None:
    """It becomes a rejected row with its shape."""
    done = run([job(0, [1, 2, HUGE, 4, 5], keep=True, last=True)], Small(100), planner_of(8))
    assert done[0].columns["y"].tolist() == [2, 4, 8, 10]
    (row,) = done[0].rejected
    assert (row, done[0].rejected[2].error_type) == (2, "OutOfMemoryError")
    assert "of the row's columns: x int" in done[0].rejected[2].message


def test_a_table_of_rows_that_all_fit_nowhere_fails_as_a_whole_until_its_last_attempt() -> None:
    """The stage may be at fault, or the device be shared."""
    done = run([job(0, [HUGE] * 9, keep=True)], Small(100), planner_of(32))
    assert isinstance(done[0], Failed)
    done = run([job(0, [HUGE] * 9, keep=True, last=True)], Small(100), planner_of(32))
    assert len(done[0].rejected) == 9


def test_jobs_are_given_up_between_two_forwards_of_a_batch_that_did_not_fit() -> None:
    """After SIGTERM the halves are not computed."""
    done = run([job(i, [i]) for i in range(8)], Small(4), planner_of(8), Quiet(3))
    assert [type(done[i]) for i in range(8)] == [Output] * 4 + [GivenUp] * 4


def test_larger_batches_are_tried_again_after_a_while_ever_later() -> None:
    """The cap doubles after good batches at it; each time that was too soon, it takes longer."""
    cap = RowCap(32)

    def fails_at(rows: int) -> None:
        cap.too_many(rows)
        cap.fitted(rows // 2)
        cap.settle()

    def passes(limit: int = 10_000) -> int:
        """How many batches pass until it grows."""
        start = cap.rows
        return next(i for i in range(1, limit) if [cap.fitted(cap.rows)] and cap.rows > start)

    fails_at(32)
    assert cap.rows == 16
    cap.fitted(3)  # a small batch proves nothing
    first = passes()
    assert cap.rows == 32
    fails_at(32)
    assert passes() == 2 * first
    fails_at(32)
    fails_at(16)
    assert cap.rows == 8
    passes()
    passes()
    assert cap.rows == 32


def test_a_lost_device_ends_everything() -> None:
    """Nothing is halved, and no further forward begins."""

    class Lost(Stage):
        calls = 0

        def forward(self, batch: Batch) -> Any:
            self.calls += 1
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stage = Lost()
    ways: list[Callable[[], list[Work[int]]]] = [
        lambda: [job(0, [0]), job(1, [1])],
        lambda: [job(0, [0, 1], keep=True)],
    ]
    for works in ways:
        with pytest.raises(DeviceError):
            run(works(), stage, planner_of(8))
    assert stage.calls == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_whose_memory_is_full() -> None:
    """The real error is recognised, what failed is freed, and all jobs pass in batches that fit."""

    class Eats(TorchStage):
        def load(self, context: StageContext) -> None:
            self.row_bytes = torch.cuda.mem_get_info(0)[0] // 6
            self.forwards: list[int] = []

        def forward(self, batch: Batch) -> dict[str, Any]:
            self.forwards.append(len(batch))
            eaten = torch.empty((len(batch), self.row_bytes), dtype=torch.uint8, device="cuda:0")
            return {"y": batch["x"] + eaten.shape[0] * 0}

    stage, planner = Eats(), planner_of(16)
    runner = Runner(stage, "eats")
    runner.load(StageContext(device="cuda:0"))
    done: dict[int, Any] = {}
    for group in compute([job(i, [i]) for i in range(16)], runner, planner, Quiet()):
        done |= {w.job: outcome for w, outcome in group}
    assert [int(done[i].columns["y"][0]) for i in range(16)] == list(range(16))
    assert stage.forwards == [16, 16, 8, 4, 4, 8, 4, 4]
    assert planner.max_rows == 4
