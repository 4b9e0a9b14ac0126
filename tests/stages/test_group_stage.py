"""Rank 0's end of a group, with what the others send, or no longer send, played by sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from torchrelay import Batch, Stage
from torchrelay.queues import codec
from torchrelay.stages.group_line import Line
from torchrelay.stages.group_stage import Codec, GroupStage, RankFailed, Report, follow

CODEC = Codec(codec.encode, codec.decode)
Broken = list[tuple[int, str, int, bool]]


class Told(Stage):
    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def forward(self, batch: Batch) -> dict[str, Any]:
        self.do()
        return {"y": batch["x"]}


def lines() -> tuple[Line, Line]:
    """Of rank 0 to rank 1, and back."""
    here, there = socket.socketpair(socket.AF_INET if not hasattr(socket, "AF_UNIX") else socket.AF_UNIX)
    return _line(here, 1), _line(there, 0)


def _line(link: socket.socket, rank: int) -> Line:
    line = Line.__new__(Line)
    line.rank, line._link = rank, link
    return line


def rank_0(do: Callable[[], object], line: Line) -> tuple[GroupStage, Broken]:
    broken: Broken = []
    stage = GroupStage(
        Told(do), [line], CODEC, lambda rank, report, rows, once: broken.append((rank, report.kind, rows, once))
    )
    stage.begin()
    return stage, broken


def batch(rows: int = 2) -> Batch:
    return Batch({"x": np.zeros(rows, np.float32)}, (rows,))


@pytest.mark.parametrize("when", ["before", "amid"])
def test_what_a_forward_raises_since_a_rank_is_gone_is_no_error_of_its_jobs(when: str) -> None:
    """The collective fails on this rank; whoever notices first, the process is to end at once, also for one row."""
    here, there = lines()

    def lost() -> None:
        there._link.close()
        raise RuntimeError("Connection closed by peer")

    stage, broken = rank_0(lost, here)
    if when == "before":
        there._link.close()
    with pytest.raises(RankFailed, match="rank 1 alone raised LineClosed of its group: rank 1 is gone"):
        stage.infer(batch(1))
    assert {(rank, kind, once) for rank, kind, _, once in broken} == {(1, "LineClosed", True)}


def test_text_that_cannot_be_sent_is_reported_all_the_same() -> None:
    """A follower lives on, and the error is that of all ranks."""
    here, there = lines()

    def surrogate() -> None:
        raise ValueError("name \udcff of a file")

    stage, broken = rank_0(surrogate, here)
    follower = threading.Thread(target=follow, args=(Told(surrogate), there, CODEC, "cpu", lambda *_: None))
    follower.start()
    for _ in range(2):
        with pytest.raises(ValueError, match="of a file"):
            stage.infer(batch())
    stage.close()
    follower.join(10)
    assert not broken
    assert Report.of(ValueError("\udcff")).text == "?"
