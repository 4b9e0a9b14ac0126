"""One part: under which name, adopted when it is there, refused when it must be, and nothing left of a failed one."""

from __future__ import annotations

import os
import textwrap
import uuid
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from pyarrow import parquet

from tests.stages.writing.support import (
    FORMATS,
    RUN,
    output_at,
    part,
    read_back,
    rows_of,
    unfinished,
    visible,
    write,
)
from torchrelay.errors import ConfigError, DecodeError, InputError, RunConflict, WorkerError
from torchrelay.stages.writing import PartId, PartRows, RowError, check_names, write_part
from torchrelay.stages.writing.found import load, scan
from torchrelay.stages.writing.record import MAX_TEXT, PartRecord, parse_name
from torchrelay.stages.writing.stores import LocalStore

VALUES = {"x": np.arange(5, dtype=np.float32)}


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}/out"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_second_writer_adopts_what_the_first_wrote(folder: str, kind: str) -> None:
    """Its own values go nowhere, and it reports the counts of what is there."""
    output = output_at(folder, kind)
    errors = [RowError(0, 9, "encode", "ValueError", "no", 2)]
    first = write(output, VALUES, fence="w-1", errors=errors)
    second = write(output, {"x": np.zeros(7, np.float32)}, fence="w-2")
    assert (first.rows, first.failed, first.adopted) == (5, 1, False)
    assert second == first._replace(adopted=True)
    assert [float(x) for x in read_back(output)["x"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", FORMATS)
def test_without_the_lease_nothing_is_written(folder: str, kind: str) -> None:
    """The writer is asked at the last moment, when the files are ready; its no leaves nothing behind."""
    output = output_at(folder, kind)
    asked: list[int] = []
    gone = write_part(output, part(), "w-1", rows_of(VALUES), lambda: bool(asked.append(1)))
    assert gone is None
    assert asked == [1]
    assert scan(output, RUN) == ({}, {}, {})
    if isinstance(output.store, LocalStore):
        assert visible(Path(folder)) == unfinished(Path(folder)) == []


def test_a_server_that_cannot_be_asked_is_not_the_disks_fault(tmp_path: Path) -> None:
    """Whatever asking raises comes out as it is, and nothing is written."""

    def away() -> bool:
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError, match="no answer"):
        write_part(output_at(tmp_path), part(), "w-1", rows_of(VALUES), away)
    assert visible(tmp_path) == unfinished(tmp_path) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_the_errors_of_a_chunk_lie_with_its_part(folder: str, kind: str) -> None:
    """Row, stage, class, text, attempts and key come back; a text of any length and content is kept to a limit."""
    output = output_at(folder, kind)
    errors = [
        RowError(0, 3, "decode", "UnidentifiedImageError", "cannot identify \N{SNOWMAN} \ud800 \x00", 1, "doc-3"),
        RowError(2, 2**40, "encode", "ValueError", "x" * 10_000, 3, 17),
    ]
    write(output, VALUES, errors=errors)
    (found,) = scan(output, RUN).parts[0, 0]
    first, second = load(output, found).record.errors()
    assert (first.row, first.stage, first.error, first.attempts, first.key) == (
        *(3, "decode", "UnidentifiedImageError", 1),
        "doc-3",
    )
    assert first.text.startswith("cannot identify \N{SNOWMAN} ")
    assert (second.source, second.row, second.key) == (2, 2**40, 17)
    assert len(second.text) < MAX_TEXT + 50


@pytest.mark.parametrize("kind", FORMATS)
def test_a_part_without_rows_is_kept_from_readers_of_the_folder(folder: str, kind: str) -> None:
    """It is found, with its errors, and does not decide what a dataset's schema is."""
    output = output_at(folder, kind)
    written = write(output, {"x": []}, 0, errors=[RowError(0, 0, "s", "E", "t", 1)])
    assert (written.rows, written.failed) == (0, 1)
    write(output, VALUES, 1)
    assert sorted(scan(output, RUN).parts) == [(0, 0), (1, 0)]
    assert write(output, VALUES, 0, fence="w-2").adopted
    if isinstance(output.store, LocalStore) and kind == "parquet":
        assert visible(Path(folder)) == ["part-00000001.parquet"]
        assert pyarrow.dataset.dataset(folder).to_table()["x"].to_pylist() == [0, 1, 2, 3, 4]


def test_rows_are_known_by_their_ids_or_by_the_users_key(tmp_path: Path) -> None:
    """Without a key three columns say where a row comes from; with one it stands there alone, beside what is kept."""
    places = {"sources": np.array([4, 4]), "rows": np.array([7, 7]), "parts": np.array([0, 1])}
    rows = PartRows({"x": [1, 2]}, **places, extra={"id": ["a", "a"], "url": ["u", "u"]})
    plain, keyed = output_at(tmp_path / "a", keep=("url",)), output_at(tmp_path / "b", key="id", keep=("id", "url"))
    for output in (plain, keyed):
        write_part(output, part(), "w-1", rows, lambda: True)
    assert read_back(plain) == {"_source": [4, 4], "_row": [7, 7], "_part": [0, 1], "url": ["u", "u"], "x": [1, 2]}
    assert read_back(keyed) == {"id": ["a", "a"], "url": ["u", "u"], "x": [1, 2]}
    (found,) = scan(keyed, RUN).parts[0, 0]
    places_of_keyed = load(keyed, found).record.places()
    assert places_of_keyed is not None
    assert places_of_keyed.tolist() == [[4, 4], [7, 7], [0, 1]]


def test_names_that_clash_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A result named like an id, like the key, or like a kept column."""
    clashes = [
        ({"_row": [1]}, {}, "'_row' has the name of a column that identifies rows"),
        ({"id": [1]}, {"key": "id"}, "'id' has the name of the key column"),
        ({"url": [1]}, {"keep": ("url",)}, "'url' has the name of a kept column"),
        ({"x": [1]}, {"keep": ("_part",)}, "kept column '_part'"),
    ]
    for columns, options, message in clashes:
        output = output_at(tmp_path / "out", **options)
        with pytest.raises(ConfigError, match=message):
            write_part(output, part(), "w-1", rows_of(columns), lambda: True)
    assert not (tmp_path / "out").exists()
    check_names(["x", "_row"], "id", ["url"])


def test_columns_of_unequal_length_are_refused(tmp_path: Path) -> None:
    """The message names the column, and what came."""
    rows = PartRows({"x": [1, 2]}, np.zeros(3), np.arange(3), np.zeros(3))
    with pytest.raises(InputError, match="column 'x' has 2 rows, 3 are to be written"):
        write_part(output_at(tmp_path / "out"), part(), "w-1", rows, lambda: True)
    with pytest.raises(InputError, match="column 'url' did not come along"):
        write_part(output_at(tmp_path / "out", keep=("url",)), part(), "w-1", rows_of({"x": [1]}), lambda: True)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_part_of_another_run_is_in_the_way(tmp_path: Path, kind: str) -> None:
    """It is neither adopted nor replaced."""
    output = output_at(tmp_path, kind)
    other = write_part(output, PartId("other", 0), "w-1", rows_of(VALUES), lambda: True)
    assert other is not None
    before = {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)}
    with pytest.raises(RunConflict, match="belongs to run other"):
        write(output, VALUES)
    assert before == {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)}
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_part_is_never_adopted(tmp_path: Path, kind: str) -> None:
    """Cut at any of many places, it is named as what is in the way, and a scan calls it broken."""
    output = output_at(tmp_path, kind)
    write(output, VALUES)
    path = tmp_path / next(n for n in visible(tmp_path) if kind != "npy" or ".x." in n)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises((RunConflict, DecodeError)):
            write(output, VALUES, fence="w-2")
        found = scan(output, RUN)
        assert not found.parts
        assert len(found.broken) == 1


def test_a_full_disk_is_named_and_leaves_nothing(small_tmpfs: Path) -> None:
    """Neither a final name nor a temporary file; with room again the same part is written."""
    big = {"x": np.random.default_rng(7).random((2_000_000,))}
    for kind in FORMATS:
        folder = small_tmpfs / kind
        output = output_at(folder, kind)
        with pytest.raises(WorkerError, match=r"no space is left .* free some, then go on with --resume"):
            write(output, big)
        assert visible(folder) == unfinished(folder) == []
        assert write(output, VALUES).rows == 5


def test_a_folder_that_cannot_be_written_is_a_named_error(tmp_path: Path) -> None:
    """A file in place of the folder, and a folder below a file."""
    (tmp_path / "file").write_text("")
    for where in ("file", "file/below"):
        with pytest.raises((ConfigError, WorkerError), match=f"output {tmp_path}/{where}"):
            write(output_at(tmp_path / where), VALUES)


def test_without_hard_links_names_hold_the_fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that have none: parts are whole, of two writers both may lie there, and a third adopts one."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    for kind in FORMATS:
        output = output_at(tmp_path / kind, kind)
        assert not output.store.links
        late = output_at(tmp_path / kind, kind)

        def slower(late=late) -> bool:
            assert write_part(late, part(), "w-2", rows_of(VALUES), lambda: True) is not None
            return True

        first = write_part(output, part(), "w-1", rows_of(VALUES), slower)
        assert first is not None
        assert len(scan(output, RUN).parts[0, 0]) == 2
        assert write(output, VALUES, fence="w-3").adopted
        stems = {name.partition(".")[0] for name in visible(tmp_path / kind)}
        assert stems == {"part-00000000-fw-1", "part-00000000-fw-2"}
        assert unfinished(tmp_path / kind) == []


WRITER = """
    import json
    class Lines:
        suffix = ".txt"
        def write(self, path, columns):
            with open(path, "w") as file:
                for row in zip(*columns.values()):
                    file.write(json.dumps([str(v) for v in row]) + "\\n")
        def read(self, path):
            rows = [json.loads(line) for line in open(path)]
            return {"_source": [r[0] for r in rows], "x": [r[-1] for r in rows]}
    class NoSuffix:
        def write(self, path, columns): ...
    class Raises:
        suffix = ".txt"
        def write(self, path, columns):
            open("/nowhere/at/all")
    class Forgets:
        suffix = ".txt"
        def write(self, path, columns):
            import os
            os.unlink(path)
"""


def test_a_class_of_the_users_writes_parts_with_the_same_promise(tmp_path: Path) -> None:
    """It gets a path and the columns; the record lies beside, and a second writer adopts."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(WRITER))
    from torchrelay.config.runs import WriteOptions
    from torchrelay.stages.writing import open_output

    output = open_output(WriteOptions(str(tmp_path / "out"), "mine.py:Lines"), tmp_path)
    assert write(output, VALUES).rows == 5
    assert write(output, VALUES, fence="w-2").adopted
    assert visible(tmp_path / "out") == ["part-00000000.txt"]
    assert read_back(output)["x"] == ["0.0", "1.0", "2.0", "3.0", "4.0"]
    with pytest.raises(ConfigError, match=r"a writer has a `suffix` and a method write"):
        open_output(WriteOptions(str(tmp_path / "out"), "mine.py:NoSuffix"), tmp_path)
    with pytest.raises(ConfigError, match=r"there is no such file"):
        open_output(WriteOptions(str(tmp_path / "out"), "yours.py:Lines"), tmp_path)
    failing = open_output(WriteOptions(str(tmp_path / "other"), "mine.py:Raises"), tmp_path)
    with pytest.raises(WorkerError, match=r"mine.py:Raises.*write\(\) raised FileNotFoundError"):
        write(failing, VALUES)
    forgetful = open_output(WriteOptions(str(tmp_path / "other"), "mine.py:Forgets"), tmp_path)
    with pytest.raises(ConfigError, match=r"left no file"):
        write(forgetful, VALUES)
    assert visible(tmp_path / "other") == unfinished(tmp_path / "other") == []


def test_names_of_parts_are_read_as_they_are_made() -> None:
    """Chunk, round and fence; other files are none."""
    for id_ in (part(), part(12, 3), part(123_456_789)):
        assert parse_name(id_.stem) == (id_.chunk, id_.round, "")
        assert parse_name(id_.fenced_stem("w_1-f-2a")) == (id_.chunk, id_.round, "w_1-f-2a")
    assert [parse_name(n) for n in ("part", "part-1", "part-00000001 (copy)", "merged")] == [None] * 4
    for fence in ("", "../x", "a/b", "a.b", "x" * 101):
        with pytest.raises(ConfigError, match="a fence is"):
            part().fenced_stem(fence)


def test_a_damaged_record_is_a_decode_error(tmp_path: Path) -> None:
    """Whatever the texts of a footer hold, the error is ours."""
    write(output_at(tmp_path), VALUES, errors=[RowError(0, 1, "s", "E", "t", 1)])
    texts = {
        k.decode(): v.decode()
        for k, v in parquet.read_metadata(tmp_path / "part-00000000.parquet").metadata.items()
        if k.startswith(b"torchrelay")
    }
    assert PartRecord.decode(texts).errors()[0].row == 1
    for text in ("", "{}", "[]", "null", '{"run": 1}', texts["torchrelay.part"].replace("number", "pickle")):
        with pytest.raises(DecodeError):
            PartRecord.decode(texts | {"torchrelay.part": text})
    for text in ("!", "AAAA", "eJw="):
        with pytest.raises(DecodeError):
            PartRecord.decode(texts | {"torchrelay.errors": text}).errors()
