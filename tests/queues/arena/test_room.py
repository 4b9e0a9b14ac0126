"""Where there is no room: a full file system, a control group's limit, a full list of blocks in use, a full arena."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.queues.arena.conftest import MIB, Server
from torchrelay.config.settings import Settings
from torchrelay.errors import ConfigError
from torchrelay.queues.arena import holds as holds_module
from torchrelay.queues.arena import home as home_module
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.placement import open_writer
from torchrelay.queues.registry import Registry

LIMITS = ArenaLimits(16 * MIB, MIB, 2 * MIB)


def fill_up(folder: Path) -> Path:
    """Takes every page that is left."""
    path = folder / "filler"
    with path.open("wb", 0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return path


def test_a_part_of_the_file_system_stays_free(small_tmpfs: Path, server_of_blocks: Server) -> None:
    """Segments are made while nine tenths are not taken; then `put` says that there is no room, and it drains."""
    home = ArenaHome.open(str(small_tmpfs), "ns")
    writer = ArenaWriter(home, LIMITS, server_of_blocks)
    places = []
    while (place := writer.put(f"j{len(places)}.1.f.x", 0, bytes(MIB // 2), 1)) is not None:
        places.append(place)
    assert 8 <= len(places) < 16
    found = os.statvfs(small_tmpfs)
    assert found.f_bavail >= found.f_blocks // 10
    writer.free(places[:1])
    assert writer.put("again", 0, bytes(MIB // 2), 1) is not None
    writer.close()
    assert not list(home.folder.iterdir())


@pytest.mark.parametrize(("size", "most"), [(64 << 20, 1 << 30), (32 << 30, 1 << 30), (256 << 30, 8 << 30)])
def test_a_large_host_gives_a_process_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, most: int
) -> None:
    """Where nobody says how much, it is a 32nd of the tmpfs, and 1 GiB at least; `free_bytes` bounds it everywhere."""
    home = ArenaHome.open(str(tmp_path), "ns")
    found = os.statvfs_result((4096, 4096, size // 4096, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    assert home.usual_bytes() == most


@pytest.mark.parametrize(("told", "most"), [(None, 3 * MIB), (2 * MIB, 2 * MIB)])
def test_a_process_takes_the_usual_part_unless_it_is_told(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int | None, most: int
) -> None:
    monkeypatch.setattr(ArenaHome, "usual_bytes", lambda home: 3 * MIB)
    writer = open_writer(registry, Settings(arena_dir=str(tmp_path), arena_bytes=told))
    assert writer is not None
    assert writer.max_bytes == most - 4096
    writer.close()


def test_a_full_file_system_kills_nobody(
    small_tmpfs: Path, server_of_blocks: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the last page between the look and the segment: nothing is made, and nothing stays; who reads
    goes on without a list; keepers drain what is there."""
    home = ArenaHome.open(str(small_tmpfs), "ns")
    writer, reader = ArenaWriter(home, LIMITS, server_of_blocks), ArenaReader(home)
    place = writer.put("j.1.f.x", 0, b"\7" * 9000, 1)
    assert place is not None
    writer.publish([place])
    fill_up(small_tmpfs)
    monkeypatch.setattr(ArenaHome, "free_bytes", lambda self: 1 << 40)
    assert writer.put("big", 0, bytes(MIB), 1) is None
    other = ArenaWriter(home, LIMITS, server_of_blocks)
    assert other.put("j.1.f.y", 0, bytes(9000), 1) is None
    other.close()
    before = sorted(p.name for p in home.folder.iterdir())
    view = reader.view(place, 9000)
    assert view is not None
    assert bytes(view) == b"\7" * 9000
    del view
    assert sorted(p.name for p in home.folder.iterdir()) == before
    reader.release(place, 0)
    reader.close()
    writer.close()
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    keeper.close()
    assert list(home.folder.iterdir()) == []


def test_no_room_for_the_host_token_is_an_error_that_names_the_place(small_tmpfs: Path) -> None:
    """Then there is no arena, and no half of a token."""
    fill_up(small_tmpfs)
    with pytest.raises(ConfigError, match=r"no arena in .*No space left"):
        ArenaHome.open(str(small_tmpfs), "ns")
    assert [p.name for p in small_tmpfs.glob("torchrelay-*/*")] == []


def group(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_tightest_control_group_above_a_process_counts(tmp_path: Path) -> None:
    """Its own has no limit, the one above has: a tenth of it stays free, files that can be dropped do not count."""
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/worker\n")
    root = tmp_path / "fs"
    group(root / "pod/worker", "max", 0)
    group(root / "pod", str(1000 * MIB), 300 * MIB, 100 * MIB)
    assert home_module._control_group_headroom(root, own) == 700 * MIB
    group(root / "pod/worker", str(200 * MIB), 170 * MIB)
    assert home_module._control_group_headroom(root, own) == 10 * MIB
    group(root / "pod/worker", str(200 * MIB), 190 * MIB)
    assert home_module._control_group_headroom(root, own) < 0


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    """The path that it is told of is not there: what is mounted at the root is its group."""
    own = tmp_path / "cgroup"
    own.write_text("0::/../../docker/abc\n")
    group(tmp_path / "fs", str(100 * MIB), 50 * MIB)
    assert home_module._control_group_headroom(tmp_path / "fs", own) == 40 * MIB


@pytest.mark.parametrize("text", ["", "12:memory:/old\n11:cpu:/old\n", "0::/\n", "0::" + "x" * 5000])
def test_control_groups_that_say_nothing_set_no_limit(tmp_path: Path, text: str) -> None:
    """No version 2, no files, or names that cannot be: the file system's bound is the only one."""
    own = tmp_path / "cgroup"
    own.write_text(text)
    assert home_module._control_group_headroom(tmp_path / "fs", own) > 1 << 60


def test_a_group_at_its_limit_gets_no_arena(
    home: ArenaHome, writer: ArenaWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory counts against the group: a segment more would have somebody killed."""
    monkeypatch.setattr(home_module, "_control_group_headroom", lambda: -5)
    assert home.free_bytes() == 0
    assert writer.put("x", 0, bytes(9000), 1) is None


def test_more_blocks_in_use_than_the_list_has_room_for_are_still_read(
    home: ArenaHome, server_of_blocks: Server, reader: ArenaReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of thousands of blocks is no loss of bytes; those beyond the list may only be taken back sooner."""
    monkeypatch.setattr(holds_module, "MAX_HOLDS", 4)
    writer = ArenaWriter(home, LIMITS, server_of_blocks)
    places = [writer.put(f"j{i}.1.f.x", 0, bytes([i]) * 9000, 1) for i in range(6)]
    writer.publish([p for p in places if p is not None])
    for number, place in enumerate(places):
        assert place is not None
        view = reader.view(place, 9000)
        assert view is not None
        assert bytes(view) == bytes([number]) * 9000
    for place in places:
        assert place is not None
        assert reader.intact(place)
        reader.release(place, 0)
    writer.close()
    assert list(home.folder.glob("*.data")) == []
