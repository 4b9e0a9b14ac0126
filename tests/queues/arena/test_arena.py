"""Writer and reader on real shared memory: what goes in comes out, comes back, and is never another block's bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.queues.arena.conftest import MIB, Server
from torchrelay.errors import ConfigError
from torchrelay.queues import codec
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.keeper import ArenaKeeper
from torchrelay.queues.arena.pool import BlockPool
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.segment import FIRST_RELEASE, READY, SLOT_WORDS, Segment, segments_in
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.job import Place


def put(writer: ArenaWriter, name: str, nbytes: int, fill: int = 1, edges: int = 1, *, cache: bool = False) -> Place:
    place = writer.put(name, 0, bytes([fill]) * nbytes, edges, cache=cache)
    assert place is not None
    return place


def test_arrays_of_any_layout_come_out_as_they_went_in(writer: ArenaWriter, reader: ArenaReader) -> None:
    """A frame is written with one copy, also of strided and odd-typed arrays, and decodes to equal read-only arrays."""
    value = {
        "a": np.arange(60_000, dtype=np.float32).reshape(100, 600)[::2, ::-1],
        "b": np.arange(5_000).astype(codec.DTYPES["bfloat16"]),
        "c": ["text", None, b"x" * 3000],
    }
    message = codec.message(value)
    place = writer.put("j.1.f.x", 3, message, 1)
    assert place is not None
    view = reader.view(place, len(message))
    assert view is not None
    assert bytes(view) == codec.encode(value)
    back = codec.decode(view)
    assert isinstance(back, dict)
    np.testing.assert_array_equal(back["a"], value["a"])
    assert not back["a"].flags.writeable
    assert back["c"] == value["c"]


def test_a_block_comes_back_when_every_edge_released_it(writer: ArenaWriter, reader: ArenaReader) -> None:
    """With two readers, the space is used again after both, and the ref is stale from then on."""
    places = [put(writer, f"j.1.f.{i}", MIB - 8192, edges=2) for i in range(4)]
    writer.publish(places)
    view = reader.view(places[0], MIB - 8192)
    assert view is not None
    reader.release(places[0], 0)
    assert writer.put("j.1.f.more", 0, bytes(MIB - 8192), 1) is None
    assert reader.intact(places[0])
    reader.release(places[0], 1)
    again = put(writer, "j.1.f.more", MIB - 8192, fill=2)
    assert (again.segment, again.offset) == (places[0].segment, places[0].offset)
    assert not reader.intact(places[0])
    assert reader.view(places[0], MIB - 8192) is None


def test_collecting_the_oldest_stops_where_blocks_are_still_read(home: ArenaHome) -> None:
    """The cheap look frees what was released among the oldest blocks, and leaves younger ones to the whole look."""
    segment = Segment.create(home.folder, "aaaaaaaa", 0, MIB)
    pool = BlockPool(home.folder)
    pool.add(segment)
    blocks = [block for _ in range(12) if (block := pool.take(100)) is not None]
    for number, block in enumerate(blocks):
        at = block.slot * SLOT_WORDS
        segment.words[at + 1] = READY | 1 << 16
        segment.words[at + FIRST_RELEASE] = block.generation if number in (0, 2, 11) else 0
    assert pool.collect_oldest() == 2
    assert pool.collect_oldest() == 0
    assert pool.collect() == 1
    assert len(pool.blocks()) == 9


def test_space_is_used_again_soon_although_older_blocks_stay(home: ArenaHome, reader: ArenaReader) -> None:
    """Long before its arena is full, a writer finds what was released behind blocks that nobody releases."""
    writer = ArenaWriter(home, ArenaLimits(16 * MIB, 16 * MIB, 16 * MIB), lambda lane, names: [True] * len(names))
    for number in range(8):
        put(writer, f"j.1.f.old{number}", 100)
    early = put(writer, "j.1.f.early", MIB)
    assert reader.view(early, MIB) is not None
    reader.release(early, 0)
    offsets = [put(writer, f"j.1.f.{number}", MIB).offset for number in range(5)]
    assert early.offset in offsets
    writer.close()


def test_a_late_release_frees_nothing_of_the_next_block(writer: ArenaWriter, reader: ArenaReader) -> None:
    """A reader that wakes after its block was reused releases an old generation, which counts for nothing."""
    old = put(writer, "j.1.f.a", 8192)
    assert reader.view(old, 8192) is not None
    writer.free([old])
    new = put(writer, "j.1.f.b", 8192, fill=7)
    assert (new.slot, new.offset) == (old.slot, old.offset)
    reader.release(old, 0)
    writer.publish([new])
    writer.tend()
    view = reader.view(new, 8192)
    assert view is not None
    assert bytes(view) == bytes([7]) * 8192


def test_what_redis_does_not_want_goes_when_room_is_needed(
    writer: ArenaWriter, reader: ArenaReader, server_of_blocks: Server
) -> None:
    """Blocks of ended jobs are taken back by asking; one that a living reader lists keeps its bytes meanwhile."""
    places = [put(writer, f"j{i}.1.f.x", MIB - 8192, fill=i + 1) for i in range(4)]
    writer.publish(places)
    view = reader.view(places[0], MIB - 8192)
    assert view is not None
    server_of_blocks.unwanted = {"j0.1.f.x", "j1.1.f.x"}
    third = put(writer, "j3.1.f.x", MIB - 8192, fill=9)
    assert (third.segment, third.offset) == (places[1].segment, places[1].offset)
    assert bytes(view[:4]) == b"\x01\x01\x01\x01"
    assert not reader.intact(places[0])
    reader.drop(places[0])
    fourth = put(writer, "j4.1.f.x", MIB - 8192)
    assert (fourth.segment, fourth.offset) == (places[0].segment, places[0].offset)


def test_unpublished_blocks_are_not_asked_about(writer: ArenaWriter, server_of_blocks: Server) -> None:
    """A block whose commit is on its way stays, whatever Redis says of it."""
    kept = [put(writer, f"j{i}.1.f.x", MIB - 8192) for i in range(4)]
    server_of_blocks.unwanted = {f"j{i}.1.f.x" for i in range(4)}
    assert writer.put("more", 0, bytes(MIB), 1) is None
    writer.free(kept)
    assert writer.put("more", 0, bytes(MIB - 8192), 1) is not None


def test_caches_make_room_for_what_has_no_other_place(writer: ArenaWriter, reader: ArenaReader) -> None:
    """A cache is evicted for a block without a copy in Redis, never for another cache, and not while it is read."""
    places = [put(writer, f"j{i}.0.in.x", MIB - 8192, cache=True) for i in range(4)]
    writer.publish(places)
    assert reader.view(places[0], MIB - 8192) is not None
    assert writer.put("j9.0.in.x", 0, bytes(MIB - 8192), 1, cache=True) is None
    place = put(writer, "j9.1.f.x", MIB - 8192)
    assert (place.segment, place.offset) == (places[1].segment, places[1].offset)
    assert reader.intact(places[0])


def test_what_is_too_large_or_has_too_many_readers_is_refused(writer: ArenaWriter) -> None:
    """Such a column has no place here, now or ever."""
    assert writer.put("x", 0, bytes(3 * MIB), 1) is None
    assert writer.put("x", 0, bytes(8192), 9) is None
    assert writer.arena == ""


def test_a_ref_of_another_host_is_never_mapped(writer: ArenaWriter, reader: ArenaReader) -> None:
    """Only the host that the ref names can read it, even where a segment of that name is here."""
    place = put(writer, "j.1.f.x", 8192)
    assert reader.view(place._replace(host=place.host ^ 1), 8192) is None
    assert reader.view(place, 8192) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 1 << 40},
        {"slot": 1},
        {"generation": 2},
        {"offset": 4096},
        {"offset": 1 << 62},
        {"segment": 5},
        {"arena": "../../ab"},
        {"arena": "Zzzzzzzz"},
    ],
)
def test_a_forged_ref_reads_nothing(writer: ArenaWriter, reader: ArenaReader, change: dict[str, object]) -> None:
    """Whatever a ref says, only a whole block of its generation, place and size is shown."""
    place = put(writer, "j.1.f.x", 8192)
    assert reader.view(place._replace(**change), 8192) is None
    assert reader.view(place, 8193) is None
    assert reader.view(place, -1) is None


def test_files_are_this_users_alone(home: ArenaHome, writer: ArenaWriter, reader: ArenaReader) -> None:
    """Folders have mode 0700 and files 0600; a link or a file that others can write is not mapped."""
    place = put(writer, "j.1.f.x", 8192)
    assert home.folder.stat().st_mode & 0o777 == 0o700
    data = next(home.folder.glob("*.data"))
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in home.folder.iterdir())
    data.chmod(0o666)
    assert reader.view(place, 8192) is None
    data.chmod(0o600)
    real = data.rename(home.folder / "elsewhere")
    data.symlink_to(real)
    assert reader.view(place, 8192) is None


def test_a_folder_that_others_can_write_is_refused(base: Path) -> None:
    """Its contents could be anybody's: the error says what to do."""
    root = base / f"torchrelay-{os.getuid()}"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(ConfigError, match="mode 0700"):
        ArenaHome.open(str(base), "ns")


def test_hosts_differ_by_their_token(base: Path, home: ArenaHome) -> None:
    """Two containers share a boot and a kernel, but not this folder: their ids differ."""
    assert ArenaHome.open(str(base), "other").host == home.host
    (base / f"torchrelay-{os.getuid()}" / "host").unlink()
    assert ArenaHome.open(str(base), "ns").host != home.host


def test_segments_grow_within_the_limit_and_go_when_empty(home: ArenaHome, writer: ArenaWriter) -> None:
    """1 MiB, then 2, then what is left of 4; when all is free, one segment stays, and none after the close."""
    places = [put(writer, f"j.1.f.{i}", MIB - 8192) for i in range(3)]
    sizes = sorted(p.stat().st_size for p in home.folder.glob("*.data"))
    assert sizes == [MIB, 2 * MIB]
    places.append(put(writer, "j.1.f.3", MIB - 8192))
    assert sum(p.stat().st_size for p in home.folder.glob("*.data")) == 4 * MIB
    writer.free(places)
    writer.tend()
    assert [p.stat().st_size for p in home.folder.glob("*.data")] == [MIB]
    writer.close()
    assert list(home.folder.iterdir()) == []


def test_no_segment_is_made_that_would_fill_the_file_system(
    home: ArenaHome, server_of_blocks: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment is as large as there is room for; where there is next to none, there is no arena, and nothing stays."""
    monkeypatch.setattr(ArenaHome, "free_bytes", lambda self: MIB // 16)
    writer = ArenaWriter(home, ArenaLimits(4 * MIB, MIB, 2 * MIB), server_of_blocks)
    assert writer.put("x", 0, bytes(8192), 1) is None
    assert list(home.folder.iterdir()) == []
    monkeypatch.setattr(ArenaHome, "free_bytes", lambda self: MIB // 2)
    writer = ArenaWriter(home, ArenaLimits(4 * MIB, MIB, 2 * MIB), server_of_blocks)
    assert writer.put("x", 0, bytes(8192), 1) is not None
    assert [p.stat().st_size for p in home.folder.glob("*.data")] == [MIB // 2]
    writer.close()


def test_a_closed_writers_wanted_blocks_live_on(
    home: ArenaHome, writer: ArenaWriter, reader: ArenaReader, server_of_blocks: Server
) -> None:
    """A keeper takes them over: they are read as before, and the files go with the last one."""
    wanted, ended, cached = (
        put(writer, "w.1.f.x", 8192, 3),
        put(writer, "e.1.f.x", 8192),
        put(writer, "c", 9, cache=True),
    )
    writer.publish([wanted, ended, cached])
    server_of_blocks.unwanted = {"e.1.f.x"}
    writer.close()
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    assert keeper.adopted == 1
    view = reader.view(wanted, 8192)
    assert view is not None
    assert bytes(view) == bytes([3]) * 8192
    assert reader.view(ended, 8192) is None
    assert reader.view(cached, 9) is None
    reader.release(wanted, 0)
    keeper.tick()
    assert keeper.adopted == 0
    assert segments_in(home.folder) == {}


def test_a_living_owner_is_left_alone(home: ArenaHome, writer: ArenaWriter, server_of_blocks: Server) -> None:
    """A keeper adopts nothing whose owner holds its lock, and asks nothing about it."""
    place = put(writer, "j.1.f.x", 8192)
    writer.publish([place])
    server_of_blocks.unwanted = {"j.1.f.x"}
    keeper = ArenaKeeper(home, server_of_blocks)
    keeper.tick()
    assert (keeper.adopted, server_of_blocks.asked) == (0, 0)
    keeper.close()
    assert segments_in(home.folder) == {writer.arena: [0]}
