"""The end of a run: its rows in order, its errors, its summary, one merged file; all of it memory-flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.dying import deaths_that_differ, die
from tests.producer.runs.support import opened, put, sources
from tests.stages.writing.support import unfinished, visible
from torchrelay.config.runs import WriteOptions
from torchrelay.errors import ConfigError, DecodeError, InputError
from torchrelay.producer import runs
from torchrelay.producer.runs import keys as keys_of
from torchrelay.producer.runs.finishing import ChunkFailure, RunSummary, finish
from torchrelay.producer.runs.folder import RunFolder
from torchrelay.producer.runs.merging import merge
from torchrelay.producer.runs.reading import rows, rows_of
from torchrelay.stages import writing
from torchrelay.stages.writing import PartRows, open_output, write_part
from torchrelay.stages.writing.stores import open_store

ROOT = Path(__file__).parents[3]
DONE = RunSummary("done", 2.0, 3, {"encode": {"rows": 10, "service_s": 1.5}}, {"bottleneck": "encode"})


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out"


def errors_of(folder: str) -> list[dict[str, Any]]:
    with open_store(folder).open("_run/errors.parquet") as file:
        found: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return found


def test_the_end_of_a_run_says_what_became_of_its_rows(folder: str) -> None:
    """run.json has the sums over all parts; errors.parquet each failed row, and a line per failed chunk."""
    with opened(folder, sources("a", "b"), key="id") as run:
        put(run, 0, [0, 2], failed=[1])
        put(run, 2, [], failed=[7])
        gone = ChunkFailure(1, 1, 4, "encode", "WorkerDied", "it killed its workers", 3)
        content = finish(run, DONE, [gone, ChunkFailure(0, 0, 3, "encode", "E", "but a part is there")])
    with open_store(folder).open("_run/run.json") as file:
        assert json.load(file) == json.loads(json.dumps(content))
    assert (content["status"], content["rows"], content["errors"], content["error_lines"]) == ("done", 2, 6, 3)
    assert (content["chunks"], content["chunks_done"], content["failed_chunks"]) == (3, 2, 1)
    assert (content["seconds"], content["rows_per_s"], content["bottleneck"]) == (2.0, 1.0, "encode")
    assert content["stages"]["encode"]["service_s"] == 1.5
    assert content["bytes"] > 0
    first, second, third = errors_of(folder)
    assert first == {
        "_source": 0,
        "_path": "/data/a",
        "_row": 1,
        "key": "key-1",
        "chunk": 0,
        "rows": 1,
        "stage": "encode",
        "error": "ValueError",
        "text": "row 1",
        "attempts": 1,
    }
    assert (second["_row"], second["rows"], second["_path"], second["error"]) == (None, 4, "/data/b", "WorkerDied")
    assert (third["_row"], third["chunk"]) == (7, 2)


def test_without_errors_the_file_says_so(folder: str) -> None:
    """It has no rows, and replaces one that had."""
    with opened(folder) as run:
        put(run, 0, [0], failed=[1])
        finish(run, DONE)
        assert len(errors_of(folder)) == 1
        put(run, 0, [1], round_=1)
        content = finish(run, DONE)
    assert errors_of(folder) == []
    assert (content["rows"], content["errors"]) == (2, 0)


def test_a_finished_folder_still_reads_as_a_dataset(tmp_path: Path) -> None:
    """Neither the errors nor the summary are among what readers of the folder meet."""
    with opened(tmp_path) as run:
        put(run, 0, [0], failed=[1])
        finish(run, DONE)
    assert parquet.read_table(tmp_path)["x"].to_pylist() == [0]
    assert visible(tmp_path) == ["part-00000000.parquet"]
    assert parquet.read_table(tmp_path / "_run/errors.parquet")["_row"].to_pylist() == [1]


def test_strays_go_at_the_end_and_not_before(tmp_path: Path) -> None:
    """Files of a writer that died before its record was there, where names hold fences; other files stay."""
    folder = f"memory://{uuid.uuid4().hex}/out"
    with opened(folder, format="jsonl") as run:
        put(run, 0, [0])
        store = run.output.store
        store.write("part-00000000-fw-9.jsonl", b"half")
        store.write("notes.txt", b"mine")
        run.look()
        assert "part-00000000-fw-9.jsonl" in store.sizes("")
        finish(run, RunSummary("cancelled", 1.0))
        assert "part-00000000-fw-9.jsonl" in store.sizes("")
        finish(run, DONE)
        assert list(store.sizes("")) == ["notes.txt", "part-00000000-fw-1.jsonl"]


def chunk_plan(draw: st.DrawFn) -> list[tuple[list[int], list[list[int]]]]:
    """Per chunk its rows, and which of them came through at each round."""
    chunks, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        numbers = list(range(start, start + draw(st.integers(0, 5))))
        start += len(numbers)
        rounds, left = [], numbers
        for _ in range(draw(st.integers(1, 3))):
            came = [n for n in left if draw(st.booleans())]
            rounds.append(came)
            left = [n for n in left if n not in came]
        chunks.append((numbers, rounds))
    return chunks


def fill(run: RunFolder, chunks: Sequence[tuple[list[int], list[list[int]]]]) -> list[int]:
    done = []
    for number, (numbers, rounds) in reversed(list(enumerate(chunks))):
        left = numbers
        for round_, came in enumerate(rounds):
            left = [n for n in left if n not in came]
            put(run, number, came, failed=left, round_=round_)
            done += came
    return sorted(done)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "npy"])
@pytest.mark.parametrize("key", [None, "id"])
@given(data=st.data())
@settings(max_examples=25)
def test_rows_come_in_the_order_of_the_input(
    tmp_path_factory: pytest.TempPathFactory, kind: str, key: str | None, data: st.DataObject
) -> None:
    """Whatever the order of writing and the rounds in which they came through, also where no column says it."""
    chunks = data.draw(st.composite(chunk_plan)())
    base = tmp_path_factory.mktemp("run")
    with opened(base / "out", format=kind, key=key) as run:
        expected = fill(run, chunks)
        run.look()
        assert [row["x"] for row in rows_of(run)] == expected
        assert [row["text"] for row in rows(str(base / "out"), ["text"])] == [f"row {n}" for n in expected]
        failed = {n for numbers, rounds in chunks for n in numbers} - set(expected)
        content = finish(run, DONE)
        assert (content["rows"], content["errors"]) == (len(expected), len(failed))
        assert {e["_row"] for e in errors_of(str(base / "out"))} == failed
        if kind != "npy":
            assert merged_x(merge(run)) == expected
    assert unfinished(base / "out") == []


def merged_x(path: str) -> list[int]:
    if path.endswith(".jsonl"):
        return [json.loads(line)["x"] for line in Path(path).read_text().splitlines()]
    table = parquet.read_table(path)
    return table["x"].to_pylist() if table.num_rows else []


def test_the_merged_file_lies_beside_the_folder(tmp_path: Path) -> None:
    """Readers of the folder meet no row twice; a target among the parts is refused, one elsewhere is taken."""
    with opened(tmp_path / "vectors") as run:
        put(run, 0, [0, 1])
        run.look()
        assert merge(run) == str(tmp_path / "vectors.parquet")
        with pytest.raises(ConfigError, match="lies among the parts"):
            merge(run, str(tmp_path / "vectors/all.parquet"))
        assert merge(run, str(tmp_path / "new/all.parquet")) == str(tmp_path / "new/all.parquet")
    assert parquet.read_table(tmp_path / "vectors").num_rows == 2
    assert parquet.read_table(tmp_path / "new/all.parquet").num_rows == 2
    assert sorted(os.listdir(tmp_path)) == ["new", "vectors", "vectors.parquet"]


def test_a_remote_run_merges_into_one_remote_file() -> None:
    """Beside its folder, behind the same URL."""
    folder = f"memory://{uuid.uuid4().hex}/out"
    with opened(folder) as run:
        put(run, 1, [2])
        put(run, 0, [0, 1])
        run.look()
        target = merge(run)
    assert target == f"{folder}.parquet"
    with open_store(folder.rpartition("/")[0]).open("out.parquet") as file:
        assert parquet.read_table(file)["x"].to_pylist() == [0, 1, 2]


def test_parts_of_different_schemas_merge_where_they_can(tmp_path: Path) -> None:
    """All null in one, numbers in another; text against numbers is an error that names the part."""
    output = open_output(WriteOptions(str(tmp_path / "out")))

    def add(run: RunFolder, chunk: int, column: Any) -> None:
        ids = np.arange(2)
        assert write_part(output, run.part(chunk), "w", PartRows({"x": column}, ids, ids, ids), lambda: True)

    with opened(tmp_path / "out") as run:
        add(run, 0, [None, None])
        add(run, 1, np.array([1.5, 2.5]))
        run.look()
        assert parquet.read_table(merge(run))["x"].to_pylist() == [None, None, 1.5, 2.5]
        # Whoever reads the folder itself gets the first part's guess.
        assert parquet.read_table(tmp_path / "out")["x"].to_pylist() == [None, None, "1.5", "2.5"]
        add(run, 2, ["a", "b"])
        run.look()
        with pytest.raises(InputError, match=r"part-00000002.parquet does not fit the other parts"):
            merge(run)
    assert unfinished(tmp_path / "out") == []


def test_tensors_and_small_floats_survive_merging(tmp_path: Path) -> None:
    """Columns of Arrow's tensor type, lists and nulls; over several row groups."""
    output = open_output(WriteOptions(str(tmp_path / "out")))
    with opened(tmp_path / "out") as run:
        for chunk in range(3):
            ids = np.arange(2) + 2 * chunk
            columns = {"image": np.full((2, 2, 3, 3), chunk, np.uint8), "tokens": [np.arange(chunk), np.arange(3)]}
            write_part(output, run.part(chunk), "w", PartRows(columns, ids * 0, ids, ids * 0), lambda: True)
        run.look()
        table = parquet.read_table(merge(run))
    assert isinstance(table.schema.field("image").type, pa.FixedShapeTensorType)
    assert table["image"].combine_chunks().to_numpy_ndarray()[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert [len(t) for t in table["tokens"].to_pylist()] == [0, 3, 1, 3, 2, 3]


def test_columns_that_are_not_there_and_parts_that_are_gone_are_named(tmp_path: Path) -> None:
    """An unknown column; a part that somebody deleted while it is read."""
    with opened(tmp_path) as run:
        put(run, 0, [0])
        put(run, 1, [1])
    with pytest.raises(ConfigError, match="the output has no column 'y'; it has _source, _row, _part, x, text"):
        next(rows(str(tmp_path), ["y"]))
    left = rows(str(tmp_path))
    next(left)
    (tmp_path / "part-00000001.parquet").unlink()
    with pytest.raises(DecodeError, match=r"part-00000001.parquet is gone"):
        next(left)


@pytest.mark.slow
def test_ends_may_die_at_any_line(tmp_path: Path) -> None:
    """The next driver finds the same rows, and ends the run as if nothing had been."""
    code = "import sys; from tests.producer.runs import test_ends; test_ends.ends_die(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def ends_die(base: str) -> None:
    def end(where: Path) -> None:
        with opened(where, resume=True) as run:
            finish(run, DONE)
            merge(run)

    def prepared(name: str) -> Path:
        where = Path(base) / name / "out"
        with opened(where) as run:
            put(run, 0, [0, 2], failed=[1])
            put(run, 0, [1], round_=1)
            put(run, 1, [3], failed=[4])
        return where

    code = [str(Path(m.__file__ or "").parent) for m in (runs, writing)]
    end(prepared("first"))
    dry = prepared("dry")
    points = deaths_that_differ(lambda: end(dry), code, dry.parent)
    assert len(points) > 10
    for at in points:
        where = prepared(f"at-{at}")
        die(lambda where=where: end(where), code, at)
        assert parquet.read_table(where).num_rows == 4
        merged = Path(f"{where}.parquet")
        assert not merged.exists() or parquet.read_table(merged).num_rows == 4
        with opened(where, resume=True) as run:
            assert unfinished(where) == []
            content = finish(run, DONE)
            assert (content["rows"], content["errors"]) == (4, 1)
            assert merged_x(merge(run)) == [0, 1, 2, 3]
        assert sorted(os.listdir(where.parent)) == ["out", "out.parquet"]


FLAT = """
    import sys, resource
    import numpy as np
    from torchrelay.config.runs import WriteOptions
    from torchrelay.producer.runs import merging
    from torchrelay.producer.runs.reading import rows_of
    from torchrelay.stages.writing import PartRows, write_part
    from tests.producer.runs.support import opened
    merging.GROUP_BYTES = 8 << 20
    run = opened(sys.argv[1], format=sys.argv[2])
    chunks, count = int(sys.argv[3]), 500
    values = np.random.default_rng(1).random((count, 512), np.float32)
    for chunk in range(chunks):
        ids = np.arange(count) + chunk * count
        write_part(run.output, run.part(chunk), "w", PartRows({"v": values}, ids, ids, ids), lambda: True)
        if chunk == 2:
            run.look()
            merging.merge(run)
            assert sum(1 for _ in rows_of(run)) == 3 * count
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run.look()
    merging.merge(run)
    assert sum(1 for _ in rows_of(run)) == chunks * count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("kind", "parts"), [("parquet", 200), ("jsonl", 30)])
def test_merging_and_reading_take_no_more_memory_for_more_parts(tmp_path: Path, kind: str, parts: int) -> None:
    """Parts of 200 MB, or of 150 MB of text, where all of them together would be seen."""
    command = [sys.executable, "-c", textwrap.dedent(FLAT), str(tmp_path / "out"), kind, str(parts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 90 << 10  # KiB


@pytest.mark.parametrize("format", ["parquet", "jsonl", "npy"])
def test_keys_that_several_rows_have_are_counted(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits in memory at a time; rows that a stage made of one row have one key."""
    folder = opened(tmp_path / "out", format=format, key="id")
    for chunk in range(4):
        numbers = np.repeat(np.arange(100), 2)
        keys = [f"k{(100 * chunk + n) % 350}" for n in numbers.tolist()]
        rows = PartRows({"x": numbers}, numbers * 0, numbers, np.tile([0, 1], 100), extra={"id": keys})
        assert write_part(folder.output, folder.part(chunk), "w-1", rows, lambda: True) is not None
    folder.look()
    for most in (1000, 30):
        monkeypatch.setattr(keys_of, "MOST_KEYS", most)
        found = keys_of.duplicates(folder)
        assert found is not None
        assert found.rows == 50
        assert set(found.examples) < {f"k{n}" for n in range(50)}
        assert len(found.examples) == 3
    assert finish(folder, RunSummary("done", 1.0))["duplicate_keys"] == 50
    folder.close()
