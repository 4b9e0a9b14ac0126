"""From an input's text to its sources and chunks: what is found, in what order, how it is cut, what is refused."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import textwrap

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.reading.support import read_all, read_chunks, types_of
from torchrelay.config.runs import Chunk, ChunkSize, ReadOptions, Source
from torchrelay.errors import ConfigError
from torchrelay.producer.runs.planning import (
    check_columns,
    find_sources,
    input_fingerprint,
    measure,
    plan_chunks,
    root_of,
)

TEXT = types_of(text="str")


def write(folder, *names: str, content: str = "x\n") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def names_of(sources: list[Source], folder) -> list[str]:
    return [os.path.relpath(s.path, folder) for s in sources]


def test_a_folder_is_read_at_any_depth_in_order(tmp_path):
    """Sorted by path, hidden names left out, links followed once, spaces and other scripts kept."""
    write(tmp_path, "b.txt", "a/ü ñ.txt", "a/b/日本.txt", ".git/x.txt", "_old/x.txt", "a/_tmp.txt", "a/.x.txt")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "z.txt").symlink_to(tmp_path / "b.txt")
    sources = find_sources(tmp_path)
    assert names_of(sources, tmp_path) == sorted(["a/b/日本.txt", "a/ü ñ.txt", "b.txt", "z.txt"])
    assert [s.number for s in sources] == [0, 1, 2, 3]
    assert {s.format for s in sources} == {"text"}
    assert read_all(tmp_path, TEXT).columns == {"text": ["x"] * 4}


def test_file_names_that_are_no_utf8(tmp_path):
    """They pass JSON on their way to the worker."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / os.fsdecode(b"\xff.txt")).write_text("x\n")
    assert read_all(tmp_path / "d", TEXT).columns == {"text": ["x"]}


def test_globs_files_and_several_inputs(tmp_path, monkeypatch):
    """A glob, a relative path, file:// and a list of inputs; a file whose name looks like a glob is that file."""
    write(tmp_path, "a/1.txt", "a/2.txt", "b/3.txt", "b/4.csv", "c[1].txt")
    assert names_of(find_sources(f"{tmp_path}/*/*.txt"), tmp_path) == ["a/1.txt", "a/2.txt", "b/3.txt"]
    assert names_of(find_sources(f"{tmp_path}/**/*.txt"), tmp_path) == ["a/1.txt", "a/2.txt", "b/3.txt", "c[1].txt"]
    assert names_of(find_sources(tmp_path / "c[1].txt"), tmp_path) == ["c[1].txt"]
    assert names_of(find_sources(f"file://{tmp_path}/b/3.txt"), tmp_path) == ["b/3.txt"]
    monkeypatch.chdir(tmp_path)
    assert names_of(find_sources(["b/3.txt", "a"]), tmp_path) == ["b/3.txt", "a/1.txt", "a/2.txt"]
    assert root_of(f"{tmp_path}/a/*.txt") == str(tmp_path / "a")
    assert root_of(tmp_path / "a") == root_of(tmp_path / "a" / "1.txt") == str(tmp_path / "a")
    assert root_of(f"{tmp_path}/**/*.txt") == root_of(tmp_path / "c[1].txt") == str(tmp_path)
    assert root_of([tmp_path / "a", tmp_path / "b"]) == str(tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("nothing", "does not exist; is the path right"),
        ("*.parquet", r"'.*\*\.parquet' matches no file"),
        ("empty", "holds no files"),
        ("mixed", "several formats, 1 csv, 1 text; give a glob, or .* --input-format csv"),
        ("strange", "'x.bin' tells no format; known are .parquet"),
        ("partly", "'x.bin' tells no format"),
        ("packed.parquet.gz", "tells no format"),
        ("pipe.txt", "is no regular file"),
        ("dead", "is a link to nothing"),
        ("", "is a path, a glob or a URL"),
        ("a\0b", "is a path, a glob or a URL"),
        ([], "needs an input"),
        ([3], "is a path, a glob or a URL, not 3"),
        (["mixed/a.txt", "mixed/a.txt"], "is named twice"),
        (["mixed/a.txt", "mixed/b.csv"], "one run reads one format"),
        ("nosuch://bucket/x", "cannot be opened"),
    ],
)
def test_what_is_no_input_is_refused(tmp_path, monkeypatch, data, says):
    """The message says what was looked for, what is there, and what to do."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mixed/a.txt", "mixed/b.csv", "strange/x.bin", "partly/x.bin", "partly/a.txt", "packed.parquet.gz")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "a.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match=says):
        find_sources(data)


def test_the_format_may_be_said(tmp_path):
    """Where names tell nothing, or several formats lie side by side; a wrong word is refused."""
    write(tmp_path, "mixed/a.txt", "mixed/b.csv", "logs/x.log", "logs/y")
    assert names_of(find_sources(tmp_path / "mixed", "csv"), tmp_path) == ["mixed/b.csv"]
    assert names_of(find_sources(tmp_path / "logs", "text"), tmp_path) == ["logs/x.log", "logs/y"]
    with pytest.raises(ConfigError, match="format 'xlsx' is none of parquet"):
        find_sources(tmp_path, "xlsx")
    with pytest.raises(ConfigError, match="holds no parquet files; it holds 1 csv, 1 text"):
        find_sources(tmp_path / "mixed", "parquet")


def test_what_lies_beside_data_is_no_data(tmp_path):
    """README, LICENSE, checksums and the like are passed over without a word."""
    write(tmp_path, "a.jsonl", "README.md", "LICENSE", "dataset_infos.json", "a.jsonl.md5", "_SUCCESS")
    assert names_of(find_sources(tmp_path), tmp_path) == ["a.jsonl"]


def test_photos_lie_beside_what_file_managers_leave(tmp_path):
    """Hidden files and what only tells of the others are passed over; of strangers the first are named, and a way."""
    photos = ["a.jpg", "b/c.png"]
    write(tmp_path, *photos, "README.txt", ".DS_Store", "b/Thumbs.db", "b/desktop.ini", "b/._c.png", "LICENSE.txt")
    assert names_of(find_sources(tmp_path), tmp_path) == photos
    # Alone, such a file is what is meant.
    assert names_of(find_sources(tmp_path / "README.txt"), tmp_path) == ["README.txt"]
    write(tmp_path, "b/1.xmp", "b/2.xmp", "b/3.xmp", "b/4.aae", "b/5.aae")
    with pytest.raises(
        ConfigError, match=r"'1.xmp', '2.xmp', '3.xmp' and 2 more tell no .*--input-format image, which"
    ):
        find_sources(tmp_path)
    assert names_of(find_sources(tmp_path, "image"), tmp_path) == photos


def test_a_fifo_in_place_of_a_planned_file_does_not_hang(tmp_path):
    """The reader opens without waiting, and refuses it."""
    from torchrelay.errors import InputError

    write(tmp_path, "a.txt")
    chunks = list(plan_chunks(find_sources(tmp_path)))
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(InputError, match="no regular file"):
        read_chunks(iter(chunks), TEXT)


def test_fingerprints_tell_what_changed(tmp_path):
    """Of one file by size and time, of the input also by what was added, removed or renamed."""
    write(tmp_path, "a.txt", "b.txt")
    before = find_sources(tmp_path)
    assert input_fingerprint(before) == input_fingerprint(find_sources(tmp_path))
    seen = {input_fingerprint(before)}
    (tmp_path / "b.txt").write_text("y\nz\n")
    after = find_sources(tmp_path)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]
    for change in (
        lambda: None,
        lambda: write(tmp_path, "c.txt"),
        lambda: (tmp_path / "a.txt").rename(tmp_path / "d.txt"),
    ):
        change()
        now = input_fingerprint(find_sources(tmp_path))
        assert now not in seen
        seen.add(now)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    """Such as one that others own."""
    from torchrelay.producer.runs import cutting

    def denied(path, fingerprint):
        raise PermissionError(13, "Permission denied", path)

    write(tmp_path, "a.txt", "b.csv")
    monkeypatch.setattr(cutting, "open_file", denied)
    for limit in (None, 5):
        with pytest.raises(ConfigError, match=r"a\.txt' cannot be planned: .*Permission denied"):
            list(plan_chunks(find_sources(tmp_path / "a.txt"), limit=limit))


def test_chunks_are_the_same_every_time_and_numbered_on(tmp_path):
    """Numbers follow each other over sources; a second call continues behind a first."""
    for i in range(3):
        pq.write_table(pa.table({"n": range(1000)}), tmp_path / f"{i}.parquet", row_group_size=128)
    sources = find_sources(tmp_path)
    size = ChunkSize(rows=300)
    chunks = list(plan_chunks(sources, size))
    assert chunks == list(plan_chunks(find_sources(tmp_path), size))
    assert [c.number for c in chunks] == list(range(len(chunks)))
    assert all(c.first_row == c.start and c.unit == "rows" for c in chunks)
    first = list(plan_chunks(sources[:2], size))
    assert first + list(plan_chunks(sources[2:], size, first_number=len(first))) == chunks
    assert measure(plan_chunks(sources, size)).rows == 3000
    assert measure(plan_chunks(sources, size)).chunks == len(chunks)


def test_chunks_hold_about_the_rows_and_bytes_that_are_asked_for(tmp_path):
    """Also of packed lines, by what the head of the file says."""
    rng = np.random.default_rng(1)
    lines = "".join(" ".join(rng.choice(["alpha", "beta", "gamma"], 20)) + "\n" for _ in range(20_000))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(lines.encode()))
    np.save(tmp_path / "c.npy", np.zeros((1000, 1000), np.uint8))
    for name in ("a.txt", "b.txt.gz"):
        read = read_all(tmp_path / name, TEXT, size=ChunkSize(rows=500))
        assert 30 <= read.chunks <= 60
        read = read_all(tmp_path / name, TEXT, size=ChunkSize(10**6, len(lines) // 10))
        assert 8 <= read.chunks <= 14
    chunks = list(plan_chunks(find_sources(tmp_path / "c.npy"), ChunkSize(nbytes=100_000)))
    assert [c.end - c.start for c in chunks] == [100] * 10


def test_images_are_cut_by_rows_and_bytes(tmp_path):
    """A chunk holds images that follow each other; of added ones it holds no old ones."""
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(b"x" * 1000)
    sources = find_sources(tmp_path)
    chunks = list(plan_chunks(sources, ChunkSize(rows=4)))
    assert [(c.source, c.options["files"]) for c in chunks] == [
        (0, ["0.png", "1.png", "2.png", "3.png"]),
        (4, ["4.png", "5.png", "6.png", "7.png"]),
        (8, ["8.png", "9.png"]),
    ]
    assert len(list(plan_chunks(sources, ChunkSize(nbytes=16_000)))) == 5
    assert [c.options["files"] for c in plan_chunks([sources[0], sources[2]])] == [["0.png"], ["2.png"]]
    (limited,) = plan_chunks(sources, limit=3)
    assert limited.options["files"] == ["0.png", "1.png", "2.png"]
    with pytest.raises(ConfigError, match="does not lie in '/elsewhere'"):
        list(plan_chunks(sources, root="/elsewhere"))


@pytest.mark.parametrize("limit", [-1, 1.5, True, "3"])
def test_a_wrong_limit_is_refused(tmp_path, limit):
    """It is a number of rows."""
    write(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match="limit is a number of rows"):
        plan_chunks(find_sources(tmp_path), limit=limit)


@pytest.mark.parametrize("limit", [0, 1, 300, 301, 999, 5000])
def test_limit_over_several_parquet_files(tmp_path, limit):
    """The first rows in order, over files."""
    for i in range(3):
        pq.write_table(pa.table({"n": range(i * 300, i * 300 + 300)}), tmp_path / f"{i}.parquet")
    read = read_all(tmp_path, types_of(n="int64"), size=ChunkSize(rows=70), limit=limit)
    assert read.columns.get("n", []) == list(range(min(limit, 900)))


def test_columns_are_checked_before_a_run(tmp_path):
    """A column that no file can have is an error with those that there are; rows that lack one are not."""
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    write(tmp_path, "b.csv", content="body,id\nx,1\n")
    write(tmp_path, "c.jsonl", content='{"body": "x"}\n{"id": 1, "bo')
    write(tmp_path, "empty.jsonl", content="")
    for name in ("a.parquet", "b.csv", "c.jsonl"):
        sources = find_sources(tmp_path / name)
        check_columns(sources, ReadOptions({"text": "body"}), TEXT)
        with pytest.raises(ConfigError, match=rf"{name}': the dataset has no column 'text'; it has body"):
            check_columns(sources, ReadOptions(), TEXT)
        with pytest.raises(ConfigError, match="no column 'nr'"):
            check_columns(sources, ReadOptions({"text": "body"}, key="nr"), TEXT)
    check_columns(find_sources(tmp_path / "c.jsonl"), ReadOptions({"text": "body"}, keep=("rare",)), TEXT)
    check_columns(find_sources(tmp_path / "empty.jsonl"), ReadOptions(), TEXT)


@pytest.fixture
def memory() -> str:
    """A folder of fsspec's memory filesystem."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    return "memory://data/in"


def test_urls_are_listed_and_read(memory):
    """A folder, a glob and a file of a filesystem that is no disk; every format that is read through a URL."""
    filesystem = fsspec.filesystem("memory")
    rows = range(500)
    with filesystem.open(f"{memory}/p/a.parquet", "wb") as file:
        pq.write_table(pa.table({"n": rows}), file, row_group_size=90)
    with (
        filesystem.open(f"{memory}/f/a.arrow", "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"n": pa.int64()})) as out,
    ):
        out.write_table(pa.table({"n": rows}), max_chunksize=64)
    with filesystem.open(f"{memory}/n/a.npy", "wb") as file:
        np.save(file, np.arange(500))
    for name, text in (("c/a.csv", "n\n"), ("j/a.jsonl", "")):
        lines = text + "".join(f"{i}\n" if text else f'{{"n": {i}}}\n' for i in rows)
        filesystem.pipe(f"{memory}/{name}", lines.encode())
        filesystem.pipe(f"{memory}/{name[0]}z/{name[2:]}.gz", gzip.compress(lines.encode()))
    for folder in ("p", "f", "n", "c", "j", "cz", "jz"):
        read = read_all(f"{memory}/{folder}", types_of(n="int64"), size=ChunkSize(rows=60))
        assert read.columns["n"] == list(rows), folder
        assert read.chunks > 2, folder
    assert [s.path for s in find_sources(f"{memory}/*/*.csv")] == ["memory:///data/in/c/a.csv"]
    assert find_sources(f"{memory}/c/a.csv") == find_sources(f"{memory}/c")
    for missing, says in (("x", "does not exist"), ("*.csv", "matches no file")):
        with pytest.raises(ConfigError, match=says):
            find_sources(f"{memory}/{missing}")


def test_a_folder_of_images_behind_a_url(memory):
    """Paths are given below the folder."""
    from tests.stages.reading.test_images import encoded

    filesystem = fsspec.filesystem("memory")
    for name in ("a.png", "d/b.png", ".x.png"):
        filesystem.pipe(f"{memory}/{name}", encoded())
    read = read_all(memory, types_of(image="uint8[H, W, 3]"), ReadOptions(key="path"))
    assert read.key == ["a.png", "d/b.png"]
    assert {root_of(f"{memory}{below}") for below in ("", "/", "/*.png", "/a.png")} == {"memory:///data/in"}


def test_a_url_s_file_that_changed_is_not_read(memory):
    """Its store says that it is another."""
    from torchrelay.errors import InputError

    filesystem = fsspec.filesystem("memory")
    filesystem.pipe(f"{memory}/a.txt", b"x\n")
    chunks = list(plan_chunks(find_sources(memory)))
    filesystem.pipe(f"{memory}/a.txt", b"y\n")
    with pytest.raises(InputError, match="has changed"):
        read_chunks(iter(chunks), TEXT)


def test_passwords_of_urls_are_not_shown():
    """A message names the URL without what stands before the @."""
    with pytest.raises(ConfigError) as caught:
        find_sources("nosuch://me:secret@host/x")
    assert "secret" not in str(caught.value)


def test_planning_keeps_no_rows(tmp_path):
    """Chunks of a file of 5,000,000 lines come one by one, and its lines are not read."""
    with open(tmp_path / "a.txt", "wb") as file:
        for _ in range(50):
            file.write(b"x\n" * 100_000)
    code = """
        import resource, sys
        from torchrelay.config.runs import ChunkSize
        from torchrelay.producer.runs.planning import find_sources, plan_chunks
        list(plan_chunks(find_sources(sys.argv[1]), limit=10))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(1 for _ in plan_chunks(find_sources(sys.argv[1]), ChunkSize(rows=100)))
        print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        print("torch" in sys.modules, "redis" in sys.modules, "pyarrow" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    counted, modules = done.stdout.splitlines()
    count, grown_kib = map(int, counted.split())
    assert count == 50_000
    assert grown_kib < 8 << 10
    assert modules.split()[0] == "False"


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "a.parquet"), ("fsspec", "memory://x/a.txt")])
def test_a_missing_extra_names_itself(tmp_path, module, name):
    """Where a library is not installed, the error says what to install."""
    code = """
        import sys
        class Without:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == sys.argv[1]:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Without())
        from torchrelay.errors import ConfigError
        from torchrelay.producer.runs.planning import find_sources, plan_chunks
        try:
            list(plan_chunks(find_sources(sys.argv[2])))
        except ConfigError as error:
            print(error)
    """
    (tmp_path / "a.parquet").write_bytes(b"x" * 50)
    where = name if "//" in name else str(tmp_path / name)
    command = [sys.executable, "-c", textwrap.dedent(code), module, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f'need {module}: pip install "torchrelay[runs]"' in done.stdout, done.stderr


def test_a_chunk_of_an_unknown_format_is_refused():
    """Such as one that a newer version planned."""
    from torchrelay.errors import InputError

    with pytest.raises(InputError, match="format 'orc' is not known here"):
        read_chunks(iter([Chunk(0, 0, "/x", "orc", 0, 1, "rows")]))
