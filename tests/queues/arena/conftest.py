"""An arena in a folder of the test's own on the real tmpfs, gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter

MIB = 1 << 20


@pytest.fixture
def base() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="tr-arena-test-", dir="/dev/shm")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def home(base: Path) -> ArenaHome:
    return ArenaHome.open(str(base), "ns")


class Server:
    """Stands for the lanes: which blocks are wanted, and how often it was asked."""

    def __init__(self) -> None:
        self.unwanted: set[str] = set()
        self.asked = 0

    def __call__(self, lane: int, names: Sequence[str]) -> list[bool]:
        self.asked += 1
        return [name not in self.unwanted for name in names]


@pytest.fixture
def server_of_blocks() -> Server:
    return Server()


@pytest.fixture
def writer(home: ArenaHome, server_of_blocks: Server) -> Iterator[ArenaWriter]:
    made = ArenaWriter(home, ArenaLimits(4 * MIB, MIB, 2 * MIB), server_of_blocks)
    yield made
    made.close()


@pytest.fixture
def reader(home: ArenaHome) -> Iterator[ArenaReader]:
    made = ArenaReader(home)
    yield made
    made.close()
