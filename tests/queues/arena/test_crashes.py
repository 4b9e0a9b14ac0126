"""Deaths at every line of the arena's code, of writer, reader and keeper: nothing published is lost, no file stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.dying import deaths, in_a_child, lines_of
from tests.queues.arena.conftest import MIB
from torchrelay.queues import arena
from torchrelay.queues.arena import keeper as keeper_module
from torchrelay.queues.arena import pool as pool_module
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.job import Place

LIMITS = ArenaLimits(MIB, MIB // 4, MIB // 2)
ROOT = Path(__file__).parents[3]
_FOLDER = str(Path(arena.__file__).parent)


class Wanted:
    """The blocks that jobs wait for, by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)

    def __call__(self, lane: int, names: Sequence[str]) -> list[bool]:
        return [name in self.names for name in names]


class Journal:
    """What a child did, in a file that outlives it: `tell` comes after the deed, as an answer of the server would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.write_bytes(b"")

    def tell(self, kind: str, name: str, place: Place) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{kind} {name} {' '.join(map(str, place))}\n".encode())
        os.close(descriptor)

    def places(self, kind: str) -> dict[str, Place]:
        found = {}
        for line in self.path.read_text().splitlines():
            told, name, host, block_arena, *numbers = line.split()
            if told == kind:
                found[name] = Place(int(host), block_arena, *map(int, numbers))
        return found


def fill_of(name: str) -> bytes:
    return bytes([sum(name.encode()) % 251]) * (9000 + 100 * len(name))


def write(home: ArenaHome, journal: Journal) -> None:
    """A writer's life: blocks put, published, freed, used again, a second segment, time to tend, and the end."""
    wanted = Wanted(["a", "b", "big"])
    writer = ArenaWriter(home, LIMITS, wanted)

    def put(name: str) -> Place:
        place = writer.put(name, 0, fill_of(name), 1)
        assert place is not None
        return place

    writer.free([put("gone")])
    a = put("a")
    journal.tell("accepted", "a", a)  # the server has it, and its answer is on the way
    writer.publish([a])
    big = writer.put("big", 0, bytes(MIB // 3), 1)
    assert big is not None
    b = put("b")
    journal.tell("accepted", "b", b)
    writer.publish([b, big, put("unwanted")])
    writer.tend()
    put("never told of")
    writer.close()


def die(act: Callable[[], object], at: int) -> None:
    """Runs the act in a child that ends at this line of the arena's code, if it comes there."""
    in_a_child(lambda: lines_of(act, [_FOLDER], at))


def in_a_small_process(body: Callable[[ArenaHome, Path], None], home: ArenaHome, folder: Path) -> None:
    """Runs it in a fresh process: this one may have loaded so much that each of a thousand forks takes long."""
    code = f"from tests.queues.arena import test_crashes; test_crashes.run_here(test_crashes.{body.__name__})"
    command = [sys.executable, "-c", code, str(home.folder), str(home.host), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_here(body: Callable[[ArenaHome, Path], None]) -> None:
    """What that process runs. Keepers ask and clean at once: what they would wait for is dead for certain."""
    keeper_module._ASK_EVERY_S, keeper_module._UNFINISHED_S = 0.0, -1.0
    folder, host, journals = sys.argv[1:]
    body(ArenaHome(Path(folder), int(host)), Path(journals))


def test_a_writer_may_die_at_any_line(home: ArenaHome, tmp_path: Path) -> None:
    """What the server accepted is read, to the byte, from the keeper that took over; then no file is left."""
    in_a_small_process(writers_die, home, tmp_path)


def test_a_reader_may_die_at_any_line(home: ArenaHome, tmp_path: Path) -> None:
    """What it had not released stays for the next one, what it held hinders nobody, and no list of it is left."""
    in_a_small_process(readers_die, home, tmp_path)


def test_a_keeper_may_die_at_any_line(home: ArenaHome, tmp_path: Path) -> None:
    """The next one takes over what it kept, with what was released meanwhile, and ends it the same way."""
    in_a_small_process(keepers_die, home, tmp_path)


def writers_die(home: ArenaHome, tmp_path: Path) -> None:
    points = deaths(lambda: write(home, Journal(tmp_path / "dry")), [_FOLDER])
    settle(home, Journal(tmp_path / "none"))
    assert len(points) > 150
    for at in points:
        journal = Journal(tmp_path / "journal")
        die(partial(write, home, journal), at)
        settle(home, journal)


def settle(home: ArenaHome, journal: Journal) -> None:
    """A keeper takes over, a reader reads what was accepted and releases it, and the folder is empty."""
    accepted = journal.places("accepted")
    wanted = Wanted([*accepted, "big"])
    keeper, reader = ArenaKeeper(home, wanted), ArenaReader(home)
    keeper.tick()
    for name, place in accepted.items():
        view = reader.view(place, len(fill_of(name)))
        assert view is not None, name
        assert bytes(view) == fill_of(name), name
        assert reader.intact(place)
        reader.release(place, 0)
        del view
    wanted.names.clear()
    reader.close()
    keeper.tick()
    assert keeper.adopted == 0
    keeper.close()
    assert sorted(p.name for p in home.folder.iterdir()) == []


def test_a_slot_that_was_just_taken_claims_nothing_of_a_living_block(
    home: ArenaHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies with a slot's new generation and its old words: they overlap with what lies there now."""
    monkeypatch.setattr(keeper_module, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(keeper_module, "_UNFINISHED_S", -1.0)
    journal = Journal(tmp_path / "journal")

    def life() -> None:
        writer = ArenaWriter(home, LIMITS, Wanted(()))
        x, y = (writer.put(name, 0, fill_of(name), 1) for name in "xy")
        assert x is not None
        assert y is not None
        writer.free([y])
        writer.free([x])
        # Where both were, in the slot of the one; the next block takes the slot of the other.
        wide = writer.put("w" * 60, 0, fill_of("w" * 60), 1)
        assert wide is not None
        journal.tell("accepted", "w" * 60, wide)
        monkeypatch.setattr(pool_module, "Block", lambda *_: os._exit(9))
        writer.put("z", 0, fill_of("z"), 1)

    in_a_child(life)
    settle(home, journal)


def read(home: ArenaHome, journal: Journal) -> None:
    """A reader's life: views, one of them twice, released or let go."""
    reader = ArenaReader(home)
    places = journal.places("accepted")
    for name, place in places.items():
        view = reader.view(place, len(fill_of(name)))
        assert view is not None
        assert reader.view(place, len(fill_of(name))) is not None
        assert reader.intact(place)
        reader.drop(place)
    reader.release(places["a"], 0)
    journal.tell("released", "a", places["a"])
    reader.tend()
    reader.close()


def readers_die(home: ArenaHome, tmp_path: Path) -> None:
    names = ("a", "b")
    journal = Journal(tmp_path / "journal")

    def lives() -> ArenaWriter:
        writer = ArenaWriter(home, LIMITS, Wanted(names))
        for name in names:
            place = writer.put(name, 0, fill_of(name), 1)
            assert place is not None
            journal.tell("accepted", name, place)
            writer.publish([place])
        return writer

    writer = lives()
    points = deaths(lambda: read(home, journal), [_FOLDER])
    writer.close()
    settle(home, Journal(tmp_path / "none"))
    assert len(points) > 100
    for at in points:
        journal = Journal(tmp_path / "journal")
        writer = lives()
        die(partial(read, home, journal), at)
        writer.tend()
        reader = ArenaReader(home)
        kept = {n: p for n, p in journal.places("accepted").items() if n not in journal.places("released")}
        for name, place in kept.items():
            view = reader.view(place, len(fill_of(name)))
            # It may have died right after the release: then its commit was accepted.
            assert (view is not None and bytes(view) == fill_of(name)) or name == "a", name
            reader.release(place, 0)
            del view
        reader.close()
        writer.close()
        settle(home, Journal(tmp_path / "none"))


def keepers_die(home: ArenaHome, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def dead_writer() -> None:
        def life() -> None:
            writer = ArenaWriter(home, LIMITS, Wanted(()))
            for name in ("a", "b", "c", "d"):
                place = writer.put(name, 0, fill_of(name), 1, cache=name == "d")
                assert place is not None
                journal.tell("accepted" if name < "c" else "left", name, place)
            os._exit(0)

        die(life, -1)

    def keep() -> None:
        keeper = ArenaKeeper(home, Wanted(("a", "b")))
        keeper.tick()
        reader = ArenaReader(home)
        c = journal.places("left")["c"]
        reader.view(c, len(fill_of("c")))
        keeper.tick()
        keeper.close()

    dead_writer()
    points = deaths(keep, [_FOLDER])
    settle(home, Journal(tmp_path / "none"))
    assert len(points) > 150
    for at in points:
        journal = Journal(tmp_path / "journal")
        dead_writer()
        die(keep, at)
        settle(home, journal)
