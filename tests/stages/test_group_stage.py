"""What rank 0 makes of the reports of its group: whose fault it was, and whether the group can go on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from torchrelay.queues import codec
from torchrelay.stages import Stage
from torchrelay.stages.batch import Batch
from torchrelay.stages.group_line import Line, Switchboard
from torchrelay.stages.group_stage import Codec, GroupStage, RankFailed, RankOutOfMemory, Report, follow

CODEC = Codec(codec.encode, codec.decode)
TOKEN = "t" * 64
GONE = "gone"


class Zero(Stage):
    """Rank 0's own: raises this, None for nothing, once the others have done what they do."""

    _takes_tensors = False

    def __init__(self, error: Exception | None, others: threading.Barrier) -> None:
        self.error, self.others = error, others

    def forward(self, batch: Batch) -> dict[str, Any]:
        self.others.wait(10)
        if self.error is not None:
            raise self.error
        return {"y": batch["x"]}


def infer(zero: Exception | None, *others: str, rows: int = 1) -> tuple[Any, list[tuple[int, str, int, bool]]]:
    """What comes of a batch, and how the group broke. The other ranks report errors of these kinds, '' for none, with
    `room` of memory; or are gone."""
    board, broken = Switchboard("127.0.0.1", TOKEN), []
    barrier = threading.Barrier(len(others) + 1)

    def other(rank: int, kind: str) -> Line:
        line = Line.to("127.0.0.1", board.port, TOKEN, rank, 5.0)
        head = codec.decode(line.receive())
        if kind != GONE:
            line.send(codec.encode([head["number"], kind, "said", "", kind == "room", False]))
        else:
            line.close()
        barrier.wait(10)
        return line

    def on_broken(rank: int, report: Any, count: int, at_once: bool) -> None:
        broken.append((rank, report.kind, count, at_once))

    with ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(other, rank, kind) for rank, kind in enumerate(others, 1)]
        stage = GroupStage(Zero(zero, barrier), board.lines(len(others) + 1, 10.0), CODEC, on_broken)
        stage.begin()
        try:
            made: Any = stage.infer(Batch({"x": [1] * rows}, (rows,)))
        except Exception as error:
            made = error
        told = list(broken)
        for one in running:
            one.result(10).close()
    return made, told


def test_what_all_computed_is_returned() -> None:
    made, broken = infer(None, "", "")
    assert isinstance(made, Mapping)
    assert (made["y"], broken) == ([1], [])


def test_what_all_raise_alike_is_the_stages_own_error() -> None:
    error = ValueError("no such word")
    made, broken = infer(error, "ValueError", "ValueError")
    assert made is error
    assert broken == []


@pytest.mark.parametrize(("rows", "at_once"), [(1, False), (3, True)])
def test_what_one_rank_raises_alone_ends_the_group(rows: int, at_once: bool) -> None:
    """Of several rows nobody knows which one it was: the process ends, and they run again alone."""
    made, broken = infer(None, "", "KeyError", rows=rows)
    assert isinstance(made, RankFailed)
    assert "rank 2 alone raised KeyError of its group: said" in str(made)
    assert broken == [(2, "KeyError", rows, at_once)]
    assert isinstance(infer(None, "room", rows=rows)[0], RankOutOfMemory)


@pytest.mark.parametrize("others", [(GONE,), ("RuntimeError", GONE), (GONE, "RuntimeError")])
def test_what_a_collective_says_of_a_rank_that_is_gone_is_no_error_of_the_job(others: tuple[str, ...]) -> None:
    """The others raise since their peer died: as if all had raised alike. It ends the process, which charges nothing
    to the job but that a process died with it."""
    made, broken = infer(RuntimeError("Connection closed by peer"), *others)
    gone = others.index(GONE) + 1
    assert isinstance(made, RankFailed)
    assert f"rank {gone} is gone" in str(made)
    assert {(rank, kind, at_once) for rank, kind, _, at_once in broken} == {(gone, "LineClosed", True)}


class Raises(Stage):
    def __init__(self, text: str) -> None:
        self.text = text

    def forward(self, batch: Batch) -> dict[str, Any]:
        raise ValueError(self.text)


def two_ranks() -> tuple[Line, Line]:
    """The lines of rank 0 to rank 1, and back."""
    board = Switchboard("127.0.0.1", TOKEN)
    back = Line.to("127.0.0.1", board.port, TOKEN, 1, 5.0)
    return board.lines(2, 10.0)[0], back


def test_a_batch_of_which_a_rank_that_is_gone_cannot_be_told_is_not_charged() -> None:
    """Whether the line was found closed by what is sent or by what is heard: the process is to end at once."""
    line, back = two_ranks()
    broken: list[tuple[int, str, bool]] = []
    stage = GroupStage(
        Raises("no peer"), [line], CODEC, lambda rank, report, _, once: broken.append((rank, report.kind, once))
    )
    stage.begin()
    back.close()
    with pytest.raises(RankFailed, match="rank 1 is gone"):
        stage.infer(Batch({"x": [1]}, (1,)))
    assert set(broken) == {(1, "LineClosed", True)}


def test_text_that_cannot_be_sent_is_reported_all_the_same() -> None:
    """Half a character, as in a name of a file that is no UTF-8: the follower lives on, and the error is all ranks'."""
    line, back = two_ranks()
    broken: list[Any] = []
    told = "name \udcff of a file"
    stage = GroupStage(Raises(told), [line], CODEC, lambda *what: broken.append(what))
    stage.begin()
    follower = threading.Thread(target=follow, args=(Raises(told), back, CODEC, "cpu", lambda *_: None))
    follower.start()
    for _ in range(2):
        with pytest.raises(ValueError, match="of a file"):
            stage.infer(Batch({"x": [1, 2]}, (2,)))
    stage.close()
    follower.join(10)
    assert not broken
    assert Report.of(ValueError("\udcff")).text == "?"
