"""Files and words that nobody of ours wrote: nothing of them is mapped, followed or believed, and nothing hangs."""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.queues.arena.conftest import MIB, Server
from torchrelay.errors import ConfigError
from torchrelay.queues.arena import keeper as keeper_module
from torchrelay.queues.arena.holds import blocks_in_use
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.segment import HEADER_BYTES, MAGIC, SLOT_BYTES, Segment, lock_path
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.job import Place


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers ask and clean at once."""
    monkeypatch.setattr(keeper_module, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(keeper_module, "_UNFINISHED_S", -1.0)


def dead_arena(home: ArenaHome, server: Server) -> tuple[Path, Path, Place]:
    """(data, control, a published block) of a writer that is gone."""
    writer = ArenaWriter(home, ArenaLimits(MIB, MIB // 4, MIB // 4), server)
    place = writer.put("j.1.f.x", 0, b"\5" * 9000, 1)
    assert place is not None
    writer.publish([place])
    writer.close()
    return home.folder / f"{place.arena}.0.data", home.folder / f"{place.arena}.0.ctl", place


def test_random_control_words_hurt_no_keeper_and_no_reader(
    home: ArenaHome, reader: ArenaReader, server_of_blocks: Server
) -> None:
    """Whatever a dead process left in its control slots: the keeper believes only blocks within the segment, frees
    each once, and removes the files when nobody waits for them."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for round_ in range(150):
        data, control, place = dead_arena(home, server_of_blocks)
        words = np.fromfile(control, np.uint64)
        slots = words[HEADER_BYTES // 8 :].reshape(-1, SLOT_BYTES // 8)
        noise = rng.integers(0, 1 << 64, slots.shape, np.uint64, endpoint=False)
        if round_ % 3 == 1:
            # As a reader would take it for a block, nearly: small numbers, ready, some of them off the page or the end.
            noise[:, 0] = rng.choice(np.array([0, 1, 3, (1 << 64) - 1], np.uint64), len(noise))
            noise[:, 1] = 1 | rng.integers(0, 3, len(noise)).astype(np.uint64) << np.uint64(16)
            noise[:, 2:5] = rng.integers(0, MIB // 4 + 4096, (len(noise), 3)) // 512 * 512
            noise[:, 4] %= np.uint64(64)
        if round_ % 3 == 2:
            noise = np.where(rng.random(noise.shape) < 0.02, noise, slots)
        slots[:] = noise
        words.tofile(control)
        reader.view(place, 9000)
        keeper = ArenaKeeper(home, lambda lane, names: [False] * len(names))
        keeper.tick()
        reader.drop(place)
        keeper.tick()
        keeper.close()
        reader.tend()
        assert not data.exists()
        assert not control.exists()


@pytest.mark.parametrize("keep", [0, 8, HEADER_BYTES - 8, HEADER_BYTES, HEADER_BYTES + SLOT_BYTES, -1])
def test_a_cut_control_file_is_refused_by_all(
    home: ArenaHome, reader: ArenaReader, server_of_blocks: Server, keep: int
) -> None:
    """One that is shorter than its header says is not mapped, so that nobody is killed by touching its end."""
    data, control, place = dead_arena(home, server_of_blocks)
    os.truncate(control, keep if keep >= 0 else control.stat().st_size - 1)
    assert reader.view(place, 9000) is None
    ArenaKeeper(home, server_of_blocks).tick()
    assert not data.exists()


def test_files_with_holes_are_refused(home: ArenaHome, reader: ArenaReader, server_of_blocks: Server) -> None:
    """Their pages would come into being when they are touched, and on a full file system kill whoever does."""
    data, control, place = dead_arena(home, server_of_blocks)
    size = data.stat().st_size
    data.unlink()
    data.touch(0o600)
    os.truncate(data, size)
    assert reader.view(place, 9000) is None
    os.truncate(data, 1 << 44)
    header = np.array([MAGIC, 64, 1 << 44], np.uint64).tobytes()
    control.write_bytes(header + bytes(HEADER_BYTES - len(header) + 64 * SLOT_BYTES))
    assert Segment.attach(home.folder, place.arena, 0) is None
    ArenaKeeper(home, server_of_blocks).tick()
    assert not data.exists()


def test_a_segment_without_slots_is_refused(home: ArenaHome, server_of_blocks: Server) -> None:
    """A header that says so describes no segment."""
    _, control, place = dead_arena(home, server_of_blocks)
    words = np.fromfile(control, np.uint64)[: HEADER_BYTES // 8]
    words[1] = 0
    words.tofile(control)
    assert Segment.attach(home.folder, place.arena, 0) is None


def in_time(act: Callable[[], object]) -> None:
    """Runs it in a thread: opening a pipe that nobody writes to would wait for ever."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5.0)
    assert not thread.is_alive(), "it hangs"
    if failed:
        raise failed[0]


def make_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path, 0o600)


def make_folder(path: Path, _: Path) -> None:
    path.mkdir(0o700)


def make_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("suffix", ["0.data", "0.ctl", "lock", "held", "new", "orphan"])
@pytest.mark.parametrize("make", [make_pipe, make_folder, make_link])
def test_what_is_no_file_is_left_alone_and_stops_nobody(
    home: ArenaHome,
    reader: ArenaReader,
    server_of_blocks: Server,
    tmp_path: Path,
    suffix: str,
    make: Callable[[Path, Path], None],
) -> None:
    """A pipe, a folder or a link in the place of any of our files: beside it, a dead arena is drained as ever."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 8192)
    data, control, place = dead_arena(home, server_of_blocks)
    strange = home.folder / (f"Strange1.{suffix}")
    make(strange, precious)
    other = home.folder.parent / "other"
    other.mkdir(0o700)
    make(other / f"Strange1.{suffix}", precious)
    keeper = ArenaKeeper(home, server_of_blocks)

    def act() -> None:
        assert reader.view(place._replace(arena="Strange1"), 9000) is None
        assert reader.view(place, 9000) is not None
        keeper.tick()
        server_of_blocks.unwanted = {"j.1.f.x"}
        keeper.tick()
        reader.drop(place)
        keeper.tick()

    in_time(act)
    assert keeper.adopted == 0
    assert not data.exists()
    assert not control.exists()
    assert precious.read_bytes() == b"x" * 8192
    keeper.close()


@pytest.mark.parametrize("make", [make_pipe, make_folder, make_link])
def test_a_host_token_that_is_no_file_of_ours_is_an_error(
    base: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    """Whose host this is cannot be told then: the error names the token, and columns go through Redis."""
    root = base / f"torchrelay-{os.getuid()}"
    root.mkdir(0o700)
    (tmp_path / "elsewhere").write_bytes(b"0" * 32)
    make(root / "host", tmp_path / "elsewhere")

    def act() -> None:
        with pytest.raises(ConfigError, match=f"{root}"):
            ArenaHome.open(str(base), "ns")

    in_time(act)


def test_half_a_host_token_is_an_error(base: Path) -> None:
    """Two hosts that both read half of one would take each other's memory for their own."""
    root = base / f"torchrelay-{os.getuid()}"
    root.mkdir(0o700)
    (root / "host").write_bytes(b"")
    with pytest.raises(ConfigError, match="no host token; remove it"):
        ArenaHome.open(str(base), "ns")


@pytest.mark.alone
def test_thousands_of_stray_files_are_cleared_or_passed_by(home: ArenaHome, server_of_blocks: Server) -> None:
    """Locks and control files of the dead go; what has another name stays; a look stays quick."""
    for number in range(3000):
        lock_path(home.folder, f"S{number:07}").touch(0o600)
        (home.folder / f"S{number:07}.0.ctl").touch(0o600)
        (home.folder / f"note-{number}").touch(0o600)
    keeper = ArenaKeeper(home, server_of_blocks)
    started = time.monotonic()
    keeper.tick()
    assert time.monotonic() - started < 3.0
    assert {p.name.partition("-")[0] for p in home.folder.iterdir()} == {"note"}
    keeper.close()


def test_arenas_of_a_namespace_without_keepers_go_after_an_hour(
    base: Path, home: ArenaHome, server_of_blocks: Server
) -> None:
    """Keepers of other namespaces note when they found it without an owner, and remove it an hour later."""
    other = ArenaHome.open(str(base), "other")
    data, _, _ = dead_arena(other, server_of_blocks)
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    (note,) = other.folder.glob("*.orphan")
    hour_ago = time.time() - 3700
    keeper.tick()
    assert data.exists()
    os.utime(note, (hour_ago, hour_ago))
    keeper.tick()
    assert list(other.folder.iterdir()) == []
    os.utime(other.folder, (hour_ago, hour_ago))
    keeper.tick()
    assert not other.folder.exists()


def test_an_idle_namespaces_folder_stays_while_it_has_a_keeper(
    base: Path, home: ArenaHome, server_of_blocks: Server
) -> None:
    """Nothing may lie there for hours; it is not taken for an abandoned one, and comes back if somebody removed it."""
    hour_ago = time.time() - 3700
    os.utime(home.folder, (hour_ago, hour_ago))
    own, other = ArenaKeeper(home, server_of_blocks), ArenaKeeper(ArenaHome.open(str(base), "other"), server_of_blocks)
    own.tick()
    other.tick()
    assert home.folder.exists()
    home.folder.rmdir()
    own.tick()
    assert home.folder.exists()


def test_what_dead_processes_of_an_abandoned_namespace_left_goes_with_its_folder(
    base: Path, home: ArenaHome, server_of_blocks: Server
) -> None:
    """The lists of readers and the signs of workers with device memory: no keeper of that namespace ever comes."""
    other = ArenaHome.open(str(base), "other")
    for name in ("AAAAAAAA.held", "BBBBBBBB.gpu"):
        (other.folder / name).touch(0o600)
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    assert len(list(other.folder.iterdir())) == 2
    hour_ago = time.time() - 3700
    os.utime(other.folder, (hour_ago, hour_ago))
    keeper.tick()
    assert not other.folder.exists()


def test_a_list_of_odd_length_is_read_as_far_as_it_goes(home: ArenaHome, server_of_blocks: Server) -> None:
    """Somebody alive holds it; it says nothing, and hinders nothing."""
    with (home.folder / "CCCCCCCC.held").open("wb") as file:
        file.write(b"x" * 13)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert blocks_in_use(home.folder) == set()
    ArenaKeeper(home, server_of_blocks).tick()
    assert list(home.folder.iterdir()) == []


def test_unfinished_lists_and_files_of_the_dead_go(home: ArenaHome, server_of_blocks: Server) -> None:
    """A reader that died while it made its list, and one that died with it."""
    (home.folder / "AAAAAAAA.new").touch(0o600)
    (home.folder / "BBBBBBBB.held").touch(0o600)
    ArenaKeeper(home, server_of_blocks).tick()
    assert list(home.folder.iterdir()) == []
