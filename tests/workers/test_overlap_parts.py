"""What the overlapped loop is put together from: the hand-off, the status page, the rows in hand, copies of outputs."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from torchrelay.queues.placement import MOVED
from torchrelay.stages import Stage
from torchrelay.stages.runner import Runner
from torchrelay.workers.handoff import Handoff
from torchrelay.workers.progress import ProgressPage
from torchrelay.workers.rows_in_hand import RowsInHand
from torchrelay.workers.status import Status


def job(token: bytes) -> Any:
    return SimpleNamespace(entry=SimpleNamespace(packed=token))


@pytest.fixture
def page() -> Any:
    made = ProgressPage.create()
    yield made
    made.close(unlink=True)


@pytest.fixture
def status(page: ProgressPage) -> Status:
    return Status(page, lambda: ("f-1",), lambda: (0,) * len(MOVED), lambda: 0)


def test_a_closed_handoff_wakes_both_sides_and_keeps_what_is_there() -> None:
    """Who waits to put is refused, what was put can be taken out, and put_first still goes in front."""
    handoff: Handoff[int] = Handoff(1)
    assert handoff.put(1)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(handoff.put(2)))
    waiting.start()
    handoff.close()
    waiting.join(5)
    assert answers == [False]
    handoff.put_first(0)
    assert not handoff.over
    assert [handoff.get(), handoff.get(), handoff.get()] == [0, 1, None]
    assert handoff.over


def test_only_a_forward_that_somebody_waits_for_can_hang(status: Status, page: ProgressPage) -> None:
    """Launched ahead, its time begins when it is waited for; one that is in `forward` counts from its start."""
    first, second = status.started([job(b"a")]), status.started([job(b"b")])
    since = page.read().forward_since
    status.launched(first)
    status.launched(second)
    assert (page.read().forward_since, page.read().started) == (0.0, b"ab")
    status.awaited(first)
    assert page.read().forward_since > since > 0.0
    third = status.started([job(b"c")])
    waited = page.read().forward_since
    status.stopped(first, 1)
    assert page.read().forward_since > waited
    status.stopped(second, 1)
    status.stopped(third, 1)
    status.awaited(third)
    assert (page.read().forward_since, page.read().started) == (0.0, b"")


def test_a_job_of_several_forwards_is_one_suspect(status: Status, page: ProgressPage) -> None:
    """Else it would never be struck, as several are not."""
    status.started([job(b"a")])
    status.started([job(b"a")])
    assert page.read().started == b"a"


def test_rows_in_hand_let_a_waiter_go_on_once_there_is_room() -> None:
    """A job larger than the bound leaves less than none."""
    rows = RowsInHand(10)
    rows.took(12)
    assert rows.room == -2
    done = threading.Event()
    threading.Thread(target=lambda: (rows.wait(4, 5.0), done.set()), daemon=True).start()
    rows.left(5)
    assert not done.wait(0.02)
    rows.left(1)
    assert done.wait(5)
    assert RowsInHand(None).room > 2**40


class Thrifty(Stage):
    """Uses its output buffers again at each call."""

    def __init__(self) -> None:
        self.array = np.zeros((2, 3))
        self.nested: list[Any] = [{"n": [0]}, {"n": [0]}]
        self.raw = bytearray(2)

    def forward(self, batch: Any) -> Any:
        value = int(batch["x"][0])
        self.array[:] = value
        for row in self.nested:
            row["n"][0] = value
        self.raw[:] = bytes([value, value])
        return {"array": self.array, "nested": self.nested, "raw": [self.raw, self.raw]}


def test_results_of_an_overlapped_stage_are_its_own() -> None:
    """A stage that returns its buffers each time harms no result that is still on its way."""
    runner = Runner(Thrifty(), "s")
    runner.overlap()
    launched = [runner.launch(runner.prepare([{"x": np.full(2, i)}], [2])) for i in range(3)]
    for i, each in enumerate(launched):
        (made,) = runner.finish(each)
        assert np.array_equal(made.columns["array"], np.full((2, 3), i))
        assert made.columns["nested"] == [{"n": [i]}, {"n": [i]}]
        assert made.columns["raw"] == [bytes([i, i])] * 2


def test_a_batch_without_rows_is_launched_without_a_call() -> None:
    """Prepare, launch and finish of jobs that have no row give each its empty outputs."""
    runner = Runner(Thrifty(), "s")
    runner.overlap()
    made = runner.finish(runner.launch(runner.prepare([{"x": np.zeros(0)}] * 2, [0, 0])))
    assert [m.columns for m in made] == [{}, {}]
