"""Readers that are kept between chunks: a file is unpacked once, and nobody gets another's reader."""

from __future__ import annotations

import gzip
import os
import threading

import pytest

from tests.stages.reading.support import read_all, types_of
from torchrelay.config.runs import ChunkSize, ReadOptions
from torchrelay.producer.runs.planning import find_sources, plan_chunks
from torchrelay.stages.reading import read_chunk, texts
from torchrelay.stages.reading.cursors import CURSORS, Cursors


class Fake:
    def __init__(self, position: int = 0) -> None:
        self.position = position
        self.closed = False

    def close(self) -> None:
        self.closed = True


def borrow(cursors: Cursors, key: str, start: int, end: int) -> Fake:
    with cursors.borrow(key, start, Fake) as cursor:
        assert cursor.position <= start
        cursor.position = end
    return cursor


def test_the_nearest_reader_before_a_chunk_goes_on():
    """One that is further on is of no use, and one of another file is not taken."""
    cursors = Cursors()
    first = borrow(cursors, "a", 0, 10)
    assert borrow(cursors, "a", 10, 20) is first
    second = borrow(cursors, "a", 5, 8)
    assert second is not first
    assert borrow(cursors, "b", 30, 40) not in (first, second)
    assert borrow(cursors, "a", 25, 30) is first
    assert borrow(cursors, "a", 9, 12) is second


def test_the_oldest_is_closed_where_there_are_too_many():
    """And all are on `close`."""
    cursors = Cursors(most=2)
    made = [borrow(cursors, key, 0, 1) for key in "abc"]
    assert [c.closed for c in made] == [True, False, False]
    cursors.close()
    assert all(c.closed for c in made)


def test_a_reader_that_raised_is_not_kept():
    """Nobody knows where it stands."""
    cursors = Cursors()
    with pytest.raises(KeyError), cursors.borrow("a", 0, Fake) as cursor:
        raise KeyError
    assert cursor.closed
    assert borrow(cursors, "a", 0, 1) is not cursor


def test_two_threads_never_share_one():
    """While one is borrowed, another thread gets its own."""
    cursors = Cursors()
    borrow(cursors, "a", 0, 1)
    inside = threading.Barrier(2, timeout=20)
    got = []

    def use():
        with cursors.borrow("a", 5, Fake) as cursor:
            got.append(cursor)
            inside.wait()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(set(got)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_takes_none_of_its_parent_s():
    """They would move each other's place in the file."""
    cursors = Cursors()
    mine = borrow(cursors, "a", 0, 1)
    child = os.fork()
    if not child:
        os._exit(0 if borrow(cursors, "a", 5, 6) is not mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert borrow(cursors, "a", 5, 6) is mine


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv"])
def test_a_file_in_many_chunks_is_opened_once(tmp_path, monkeypatch, name):
    """Read in order by one worker, it is unpacked once and not once for each chunk."""
    lines = "text\n" + "".join(f"row {i}\n" for i in range(20_000))
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    CURSORS.close()
    texts._kept_header.cache_clear()
    opened = []
    monkeypatch.setattr(texts, "open_file", lambda *a, real=texts.open_file: opened.append(a) or real(*a))
    read = read_all(tmp_path / name, types_of(text="str"), size=ChunkSize(rows=1000))
    assert read.columns["text"][-20_000:] == [f"row {i}" for i in range(20_000)]
    assert read.chunks > 8
    # The header of CSV is looked at by itself.
    assert len(opened) == 1 + name.endswith(".csv")


def test_threads_read_one_file_together(tmp_path):
    """Chunks taken by several threads in any order have all rows, each once."""
    lines = "".join(f"row {i}\n" for i in range(30_000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines.encode()))
    chunks = list(plan_chunks(find_sources(tmp_path), ChunkSize(rows=700)))
    left, got = list(chunks), {}
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                if not left:
                    return
                chunk = left.pop(0)
            got[chunk.number] = read_chunk(chunk, ReadOptions(), types_of(text="str")).table["text"]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [t for number in sorted(got) for t in got[number]] == lines.splitlines()
