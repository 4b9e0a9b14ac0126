"""What a worker does with blocks when it ends, and when what it read changes while its output is copied."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.job import Place
from torchrelay.workers.compute import Failed
from torchrelay.workers.custody import Custody, Read, makers_of
from torchrelay.workers.rows_in_hand import RowsInHand
from torchrelay.workers.settling import Settler

MIB = 1 << 20
HELD: Any = SimpleNamespace(fence="f.1", lane=0, entrance=0, entry=SimpleNamespace(packed=b"a" * 16 + b"\x80"))


class Arena:
    """A writer, a reader and a custody over a folder of their own; `wanted` is what jobs wait for."""

    def __init__(self, folder: Path) -> None:
        self.wanted: set[str] = set()
        self.home = ArenaHome.open(str(folder), "ns")
        self.writer = ArenaWriter(self.home, ArenaLimits(4 * MIB, MIB, MIB), self._ask)
        self.reader = ArenaReader(self.home)
        self.custody = Custody(self.reader, self.writer)

    def _ask(self, lane: int, names: Any) -> list[bool]:
        return [name in self.wanted for name in names]

    def put(self, name: str) -> Place:
        place = self.writer.put(name, 0, name.encode() * 1000, 1)
        assert place is not None
        return place

    def keeper(self) -> ArenaKeeper:
        return ArenaKeeper(self.home, self._ask)


@pytest.fixture
def arena() -> Iterator[Arena]:
    folder = Path(tempfile.mkdtemp(prefix="trs-custody-", dir="/dev/shm"))
    made = Arena(folder)
    yield made
    made.custody.close()
    shutil.rmtree(folder)


def test_a_commit_whose_answer_never_came_keeps_its_blocks(arena: Arena) -> None:
    """The worker ends while the server is away: what it had accepted is read from the keeper, the rest is gone."""
    accepted, refused = arena.put("accepted"), arena.put("refused")
    arena.custody.makes(HELD, accepted)
    arena.custody.makes(HELD, refused)
    arena.wanted = {"accepted"}
    arena.custody.close()
    keeper = arena.keeper()
    keeper.tick()
    reader = ArenaReader(arena.home)
    view = reader.view(accepted, 8000)
    assert view is not None
    assert bytes(view[:8]) == b"accepted"
    assert reader.view(refused, 7000) is None
    reader.release(accepted, 0)
    reader.close()
    keeper.close()
    assert list(arena.home.folder.iterdir()) == []


def test_a_commit_of_fused_stages_releases_the_edges_of_all(arena: Arena) -> None:
    """A block that two stages of one worker read is free once their commit was accepted, with nobody asked."""
    place = arena.writer.put("both", 0, b"x" * 4000, 2)
    assert place is not None
    assert arena.reader.view(place, 4000) is not None
    arena.custody.reads(HELD, Read(place, (0, 1), 1, False))
    arena.wanted = {"both"}
    arena.custody.settle(HELD.fence, [HELD.entry.packed], "k")
    arena.writer.tend()
    assert not arena.reader.intact(place)


@pytest.mark.parametrize("had", [True, False])
def test_what_a_column_on_a_device_was_made_of_is_released_by_its_readers_alone(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, had: bool
) -> None:
    """A reader that could not have it has the job begin again at this node, which reads the same once more."""
    monkeypatch.setattr("torchrelay.queues.arena.writer._OLD_MS", -1)
    read, made = arena.put("read"), arena.writer.put("made", 0, b"a ticket", 1, keeps=object())
    assert made is not None
    assert arena.reader.view(read, 4000) is not None
    arena.custody.reads(HELD, Read(read, (0,), 1, False))
    arena.custody.makes(HELD, made, on_device=True)
    arena.wanted = {"read", "made"}
    arena.writer.publish([read])
    arena.custody.settle(HELD.fence, [HELD.entry.packed], "k")
    arena.writer.tend()
    assert arena.writer.keeping == 1
    if had:
        assert arena.reader.view(made, 8) is not None
        arena.reader.release(made, 0)
    else:
        arena.wanted = {"read"}
        monkeypatch.setattr(arena.writer, "_ask_again_ms", 0)
        monkeypatch.setattr(arena.writer, "_look_again_ms", 0)
    arena.writer.tend()
    assert arena.writer.keeping == 0
    arena.writer.collect()
    assert arena.reader.intact(read) is not had


def test_masks_of_makers_hold_whatever_a_ref_says() -> None:
    """`lost` takes 32 bits; the input and makers that cannot be count for nothing."""
    place = Place(1, "aaaaaaaa", 0, 0, 1, 0)
    reads = [Read(place, (0,), maker, False) for maker in (0, 1, 3, 32, 33, 999)]
    assert makers_of(reads) == 0b101 | 1 << 31


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("device", [False, True])
def test_an_output_copied_from_bytes_that_changed_is_not_committed(arena: Arena, large: bool, device: bool) -> None:
    """A stage may return views of its input. Its block is used again while they are copied, or written to Redis: the
    job is given back, since Redis may have the input too, or begins anew where it was on a device."""
    place = arena.put("input")
    assert arena.reader.view(place, 5000) is not None
    arena.custody.reads(HELD, Read(place, (0,), 1, False, "exporter" if device else ""))
    told: list[tuple[str, object]] = []

    def reuse() -> None:
        if place is not None and arena.reader.intact(place):
            arena.writer.free([place])

    def put(*_: object) -> tuple[str, dict[str, bytes]]:
        if not large:
            reuse()
        return "output", {"blob": b"x"} if large else {}

    given: dict[str, Any] = {
        "context": SimpleNamespace(entrances=lambda: [SimpleNamespace(node=SimpleNamespace(name="s"))], worker="w"),
        "assemblers": [SimpleNamespace(close=lambda work, outcome: "closed")],
        "storage": SimpleNamespace(place=put, write=lambda blobs: reuse()),
        "committer": SimpleNamespace(
            commit=lambda job, output: told.append(("commit", job)),
            release=lambda jobs: told.append(("release", jobs)),
            lose=lambda lost, why: told.append(("lose", lost)),
            fail=lambda failed: told.append(("fail", failed)),
        ),
        "custody": arena.custody,
        "claimer": SimpleNamespace(expect=lambda wait_s: None, in_hand=RowsInHand()),
    }
    settler = Settler(**given)
    work: Any = SimpleNamespace(job=HELD, riding=SimpleNamespace(meta=b""))
    settler.settle([(work, "outcome")])  # type: ignore[list-item]
    assert told == ([("lose", [(HELD, 1)])] if device else [("release", [HELD])])
    # Nor is what a stage raised over such bytes charged to the job.
    told.clear()
    settler.settle([(work, Failed(ValueError("nonsense")))])
    assert told == ([("lose", [(HELD, 1)])] if device else [("release", [HELD])])
