"""Who owns a block: many threads of one writer, a forked child, a closed writer, a copy that fails half way."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import wait_until
from tests.queues.arena.conftest import MIB, Server
from torchrelay.queues import codec
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.job import Place

_ROUNDS = 400


def test_no_block_is_handed_out_twice(home: ArenaHome, server_of_blocks: Server) -> None:
    """Threads put, publish, free and tend on one writer, others view and release on one reader, in a random order: what
    is read is what was put there, to the last byte, and in the end everything is free."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    writer, reader = ArenaWriter(home, ArenaLimits(4 * MIB, MIB, 2 * MIB), server_of_blocks), ArenaReader(home)
    waiting: list[tuple[Place, int, int, int]] = []
    mapping, failed = threading.Lock(), []
    live: set[tuple[int, int]] = set()
    done = threading.Event()

    def put(rng: random.Random) -> None:
        for _ in range(_ROUNDS):
            nbytes, fill, edges = rng.choice((1000, 9000, 60_000, 300_000)), rng.randrange(256), rng.choice((1, 1, 2))
            place = writer.put("j.1.f.x", 0, bytes([fill]) * nbytes, edges, cache=rng.random() < 0.2)
            if place is None:
                writer.tend()
                continue
            if rng.random() < 0.2:
                writer.free([place])
                continue
            writer.publish([place])
            waiting.append((place, nbytes, fill, edges))

    def read(rng: random.Random) -> None:
        while not done.is_set() or waiting:
            try:
                place, nbytes, fill, edges = waiting.pop(rng.randrange(4) - 4)
            except IndexError:
                if done.is_set() and waiting:
                    place, nbytes, fill, edges = waiting.pop()
                else:
                    continue
            with mapping:  # one thread calls `view`; the other calls come from any
                view = reader.view(place, nbytes)
                if view is not None:
                    key = (place.segment, place.slot)
                    assert key not in live
                    live.add(key)
            if view is None:
                continue  # a cache that made room
            same = bool((np.frombuffer(view, np.uint8) == fill).all())
            assert same or not reader.intact(place), "changed under a reader that was told that it is intact"
            with mapping:
                live.discard((place.segment, place.slot))
            for edge in range(edges):
                reader.release(place, edge)

    def run(act: object, number: int) -> None:
        try:
            act(random.Random(seed + number))  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)
            done.set()

    writers = [threading.Thread(target=run, args=(put, i)) for i in range(4)]
    readers = [threading.Thread(target=run, args=(read, 10 + i)) for i in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join(60.0)
    done.set()
    for thread in readers:
        thread.join(60.0)
    if failed:
        raise failed[0]
    writer.tend()
    assert [b for b in writer._pool.blocks() if b.kind == 0] == []
    reader.close()
    writer.close()
    assert list(home.folder.iterdir()) == []


def in_a_forked_child(act: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            act()  # type: ignore[operator]
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_touches_nothing_of_its_parents_arena(
    home: ArenaHome, writer: ArenaWriter, reader: ArenaReader
) -> None:
    """It has copies of writer and reader, in which putting, freeing and closing do nothing."""
    place = writer.put("j.1.f.x", 0, b"\3" * 9000, 1)
    assert place is not None

    def act() -> None:
        assert writer.put("j.1.f.y", 0, bytes(9000), 1) is None
        writer.publish([place])
        writer.free([place])
        writer.tend()
        writer.close()

    assert in_a_forked_child(act) == 0
    view = reader.view(place, 9000)
    assert view is not None
    assert bytes(view) == b"\3" * 9000
    assert writer.put("j.1.f.z", 0, bytes(9000), 1) is not None


def test_a_forked_child_does_not_keep_a_dead_arena_alive(home: ArenaHome, server_of_blocks: Server) -> None:
    """The lock goes with the process that took it, though a child of it lives on (a data loader's, say)."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = ArenaWriter(home, ArenaLimits(MIB, MIB, MIB), server_of_blocks)
        writer.put("j.1.f.x", 0, bytes(9000), 1)
        if os.fork() == 0:
            os.close(write_end)
            os.read(read_end, 1)
        os._exit(0)
    os.waitpid(pid, 0)
    keeper = ArenaKeeper(home, server_of_blocks)

    def adopts() -> bool:
        keeper.tick()  # the grandchild gives its copy back when it first runs
        return keeper.adopted == 1

    wait_until(adopts, 5.0)
    server_of_blocks.unwanted = {"j.1.f.x"}
    keeper.close()
    os.close(write_end)
    os.close(read_end)
    assert list(home.folder.iterdir()) == []


def test_nothing_is_put_into_an_arena_that_was_closed(
    home: ArenaHome, writer: ArenaWriter, server_of_blocks: Server
) -> None:
    """What is left of it is its keeper's; a writer that goes on starts another."""
    first = writer.put("j.1.f.x", 0, bytes(9000), 1)
    assert first is not None
    writer.publish([first])
    writer.close()
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    second = writer.put("j.1.f.y", 0, bytes(9000), 1)
    assert second is not None
    assert second.arena != first.arena
    writer.free([first])
    reader = ArenaReader(home)
    assert reader.view(first, 9000) is not None
    reader.close()
    server_of_blocks.unwanted = {"j.1.f.x"}
    keeper.close()


@pytest.mark.parametrize("pattern", ["*.data", "*.lock", "*"])
def test_a_writer_whose_files_were_removed_begins_another_arena(
    home: ArenaHome, writer: ArenaWriter, reader: ArenaReader, server_of_blocks: Server, pattern: str
) -> None:
    """No keeper may take over what a living process writes to; who mapped the old one reads on."""
    place = writer.put("j.1.f.x", 0, b"\3" * 9000, 1)
    assert place is not None
    view = reader.view(place, 9000)
    assert view is not None
    for path in home.folder.glob(pattern):
        path.unlink()
    writer.tend()
    assert bytes(view) == b"\3" * 9000
    assert reader.intact(place)
    writer.publish([place])
    writer.free([place])
    assert reader.intact(place)
    again = writer.put("j.1.f.y", 0, b"\4" * 9000, 1)
    assert again is not None
    assert again.arena != place.arena
    fresh = ArenaReader(home)
    assert fresh.view(again, 9000) is not None
    fresh.close()
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    assert keeper.adopted == 0
    keeper.close()


def test_an_arena_that_was_given_up_ends_with_its_blocks(
    home: ArenaHome, writer: ArenaWriter, reader: ArenaReader, server_of_blocks: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was released by who had mapped it, one ended with its job, one was refused: its memory is free again."""
    monkeypatch.setattr("torchrelay.queues.arena.writer._OLD_MS", -1)
    places = [writer.put(f"j.1.f.{name}", 0, b"\3" * 9000, 1, keeps=object()) for name in "xyz"]
    read, ended, refused = (place for place in places if place is not None)
    assert reader.view(read, 9000) is not None
    for path in home.folder.glob("*.lock"):
        path.unlink()
    writer.tend()
    assert writer.keeping == 3
    gone: list[bool] = []
    writer.publish([read, ended])
    writer.when_gone([read, ended], gone.append)
    writer.free([refused])
    reader.release(read, 0)
    server_of_blocks.unwanted = {"j.1.f.y", "j.1.f.z"}
    monkeypatch.setattr(writer, "_look_again_ms", 0)
    monkeypatch.setattr(writer, "_ask_again_ms", 0)
    writer.tend()
    assert (writer.keeping, writer._renounced, gone) == (0, {}, [True, False])


def test_a_writer_without_its_host_puts_nothing(base: Path, home: ArenaHome, writer: ArenaWriter) -> None:
    """Everything was cleared, and another process made a new token: readers of now are on another host."""
    assert writer.put("j.1.f.x", 0, bytes(9000), 1) is not None
    shutil.rmtree(home.folder.parent)
    assert ArenaHome.open(str(base), "ns").host != home.host
    writer.tend()
    assert writer.put("j.1.f.y", 0, bytes(9000), 1) is None
    assert list(home.folder.iterdir()) == []


def test_a_copy_that_fails_leaves_no_block(
    home: ArenaHome, writer: ArenaWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it half way, Ctrl-C too: its room is free again at once."""
    frame = codec.message(np.zeros(300_000, np.uint8))

    def interrupted(self: object, room: memoryview) -> None:
        room[:1000] = bytes(1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(codec.Frame, "copy_into", interrupted)
    for _ in range(50):
        with pytest.raises(KeyboardInterrupt):
            writer.put("j.1.f.x", 0, frame, 1)
    assert sum(p.stat().st_size for p in Path(home.folder).glob("*.data")) == MIB
