"""Parquet and Arrow files: ranges of rows, Arrow types as columns, and damage."""

from __future__ import annotations

import datetime
import decimal
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.stages.reading.support import read_all, types_of
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.runs import ChunkSize, ReadOptions
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.planning import find_sources, plan_chunks
from torchrelay.stages.reading import read_chunk, read_raw
from torchrelay.stages.reading.arrow import column_of_arrow
from torchrelay.stages.reading.raw import Unreadable


def test_parquet_rows_by_chunk(tmp_path):
    """Several files with row groups of several sizes give each row once, in order, with its number in its file."""
    for i, rows in enumerate([1000, 0, 7]):
        pq.write_table(pa.table({"n": range(i * 1000, i * 1000 + rows)}), tmp_path / f"{i}.parquet", row_group_size=300)
    read = read_all(tmp_path, types_of(n="int64"), size=ChunkSize(rows=64))
    assert read.columns["n"] == [*range(1000), *range(2000, 2007)]
    assert read.ids == [(0, i) for i in range(1000)] + [(2, i) for i in range(7)]


@given(
    groups=st.lists(st.integers(0, 30), max_size=5), rows=st.integers(1, 40), nbytes=st.integers(1, 900), data=st.data()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_parquet_rows_once_for_every_chunk_size(tmp_path, groups, rows, nbytes, data):
    """Any row groups and any size of chunk, read in any order: each row exactly once, no chunk over its rows."""
    path = tmp_path / "a.parquet"
    table = pa.table({"n": pa.array(range(sum(groups)), pa.int64())})
    with pq.ParquetWriter(path, table.schema) as writer:
        at = 0
        for count in groups:
            writer.write_table(table.slice(at, count))
            at += count
    chunks = list(plan_chunks(find_sources(path), ChunkSize(rows, nbytes)))
    assert all(0 < c.end - c.start <= rows for c in chunks)
    assert [c.start for c in chunks[1:]] == [c.end for c in chunks[:-1]]
    got = {}
    for chunk in data.draw(st.permutations(chunks)):
        got[chunk.number] = read_chunk(chunk, ReadOptions(), types_of(n="int64")).table["n"].tolist()
    assert [n for number in sorted(got) for n in got[number]] == list(range(sum(groups)))


def test_only_wanted_columns_are_unpacked(tmp_path):
    """What the pipeline, the key and `keep` do not name is not read."""
    pq.write_table(pa.table({"a": [1], "b": ["x"], "c": [b"y" * 999], "d": [2]}), tmp_path / "a.parquet")
    (chunk,) = plan_chunks(find_sources(tmp_path / "a.parquet"))
    assert set(read_raw(chunk, frozenset({"a", "d"})).columns) == {"a", "d"}
    read = read_all(tmp_path, types_of(n="int64"), ReadOptions({"n": "a"}, "d", ("b",)))
    assert (read.columns, read.key, read.keep) == ({"n": [1]}, [2], {"b": ["x"]})


def test_a_file_that_is_cut_or_none_is_refused_when_it_is_planned(tmp_path):
    """The message names the file; a folder with one such file is refused too."""
    good = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(10_000)}), good)
    for content in (good.read_bytes()[:500], b"", b"PAR1", b"PAR1 not a PAR1"):
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(ConfigError, match=r"b\.parquet' is no Parquet file, or was cut"):
            list(plan_chunks(find_sources(tmp_path)))


def test_a_damaged_page_is_an_error_of_its_chunk_alone(tmp_path):
    """Chunks of other row groups are read."""
    path = tmp_path / "a.parquet"
    table = pa.table({"n": np.random.default_rng(0).integers(0, 2**60, 3000)})
    pq.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    begin = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(raw)
    first, second, third = plan_chunks(find_sources(path), ChunkSize(rows=1000))
    assert len(read_chunk(first, ReadOptions())) == 1000
    with pytest.raises(InputError, match="rows 1000 to 2000: cannot be read"):
        read_chunk(second, ReadOptions())
    assert len(read_chunk(third, ReadOptions())) == 1000


def test_arrow_types_as_columns():
    """Each type as the column that a pipeline gets."""
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    assert column_of_arrow(tensor).shape == (2, 2, 3)
    assert column_of_arrow(pa.chunked_array([tensor, tensor])).shape == (4, 2, 3)
    fixed = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int16(), 2))
    assert column_of_arrow(fixed).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert column_of_arrow(fixed.slice(1)).tolist() == [[3, 4], [5, 6]]
    assert column_of_arrow(fixed).dtype == np.int16
    nested = pa.array([[[1, 2], [3, 4]]] * 3, pa.list_(pa.list_(pa.float64(), 2), 2))
    assert column_of_arrow(nested.slice(1)).shape == (2, 2, 2)
    assert [
        None if v is None else v.tolist() for v in column_of_arrow(pa.array([[1, 2], None], pa.list_(pa.int8(), 2)))
    ] == [
        [1, 2],
        None,
    ]
    ragged = column_of_arrow(pa.array([[1], [], [2, 3], [4], [5]], pa.list_(pa.int32())).slice(1))
    assert isinstance(ragged, RaggedRows)
    assert [v.tolist() for v in ragged] == [[], [2, 3], [4], [5]]
    assert [v.tolist() for v in column_of_arrow(pa.array([[[1], [2]], [[3]]]))] == [[[1], [2]], [[3]]]
    assert column_of_arrow(pa.array([[["a"]], [[]]])) == [[["a"]], [[]]]
    assert column_of_arrow(pa.array(["a", None])) == ["a", None]
    assert column_of_arrow(pa.array(["a", "b", "a"]).dictionary_encode()) == ["a", "b", "a"]
    assert column_of_arrow(pa.array([b"a", None], pa.large_binary())) == [b"a", None]
    assert column_of_arrow(pa.array([True, False])).dtype == np.bool_
    some = column_of_arrow(pa.array([1.5, None], pa.float32()))
    assert (some[1], type(some[0])) == (None, np.float32)
    assert column_of_arrow(pa.array([{"a": 1}])) == [{"a": 1}]
    assert column_of_arrow(pa.array([None, None])) == [None, None]
    assert column_of_arrow(pa.array([decimal.Decimal("1.50")])) == ["1.50"]
    moment = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
    assert column_of_arrow(pa.array([moment, None])) == ["2024-05-06T07:08:09+00:00", None]
    assert column_of_arrow(pa.array([1_000_001], pa.timestamp("ns"))) == ["1970-01-01T00:00:00.001000001"]
    assert column_of_arrow(pa.array([datetime.date(2024, 1, 2)])) == ["2024-01-02"]
    assert column_of_arrow(pa.array([datetime.timedelta(seconds=2)], pa.duration("ms"))).tolist() == [2000]
    assert column_of_arrow(pa.array([], pa.string())) == []
    assert column_of_arrow(pa.chunked_array([], pa.float32())).shape == (0,)


def test_text_that_is_no_utf8_costs_its_row(tmp_path):
    """Parquet files of careless writers hold such; neighbours are read."""
    raw = pa.array([b"good", b"\xff\xfe", b"fine"])
    texts = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert isinstance(column_of_arrow(texts)[1], Unreadable)
    read = read_all(tmp_path, types_of(text="str"))
    assert read.columns == {"text": ["good", "fine"]}
    assert [(b.row, b.error) for b in read.bad] == [(1, "UnicodeDecodeError")]


def test_a_file_s_numbers_fit_the_declared_type_where_their_values_do(tmp_path):
    """float64 is read as float32, int64 as uint8; a value that does not fit costs its row, another kind all rows."""
    table = pa.table({"x": [0.1, 1e300, 2.5], "n": [1, 2, 300], "v": [[1.0], [2.0, 3.0], [4.0]], "t": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_all(tmp_path, types_of(x="float32", n="uint8", v="float32[*]"))
    assert (read.columns["x"][0].dtype, read.columns["n"][0].dtype) == (np.float32, np.uint8)
    assert read.columns["v"][0].tolist() == [1.0]
    assert [(b.row, b.error) for b in read.bad] == [(1, "InputError"), (2, "InputError")]
    assert "does not fit float32" in read.bad[0].text
    assert "does not fit uint8" in read.bad[1].text
    assert len(read_all(tmp_path, types_of(t="float32")).bad) == 3


def test_rows_of_a_wrong_shape_are_bad(tmp_path):
    """A fixed shape is asked of lists; the row that has another is bad, and one with a null."""
    pq.write_table(pa.table({"v": [[1.0, 2.0], [3.0], None, [4.0, None], [5.0, 6.0]]}), tmp_path / "a.parquet")
    read = read_all(tmp_path, types_of(v="float64[2]"))
    assert [v.tolist() for v in read.columns["v"]] == [[1, 2], [5, 6]]
    assert [b.row for b in read.bad] == [1, 2, 3]


def save_to_disk(folder, tables, names=None):
    """What `datasets.Dataset.save_to_disk` writes: Arrow streams and state.json."""
    folder.mkdir(parents=True)
    files = []
    for i, table in enumerate(tables):
        name = f"data-{i:05d}-of-{len(tables):05d}.arrow"
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
        files.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x", "_format_type": None}))
    (folder / "dataset_info.json").write_text("{}")


def png(shade: int, size: tuple[int, int] = (4, 3)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def test_a_hugging_face_dataset_on_disk(tmp_path):
    """Its Arrow files are read in its own order, images decoded, in chunks of any size."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": png(i), "path": None} for i in range(199)] + [{"bytes": None, "path": "deep/x.png"}]
    first = pa.table({"image": pa.array(images[:120], kind), "label": range(120)})
    second = pa.table({"image": pa.array(images[120:], kind), "label": range(120, 200)})
    save_to_disk(tmp_path / "ds", [first, second])
    (tmp_path / "ds" / "deep").mkdir()
    (tmp_path / "ds" / "deep" / "x.png").write_bytes(png(9))
    read = read_all(tmp_path / "ds", types_of(image="uint8[H, W, 3]", label="int64"), size=ChunkSize(rows=33))
    assert read.columns["label"] == list(range(200))
    assert [int(v[0, 0, 0]) for v in read.columns["image"]] == [*range(199), 9]
    assert read.ids == [(0, i) for i in range(120)] + [(1, i) for i in range(80)]
    undeclared = read_all(tmp_path / "ds", None, ReadOptions({"image": "image"}))
    assert undeclared.columns["image"][3].shape == (3, 4, 3)
    encoded = read_all(tmp_path / "ds", types_of(image="bytes"))
    assert encoded.columns["image"][3] == png(3)


def test_a_dataset_names_no_files_outside_its_folder(tmp_path):
    """Neither by an absolute path, nor by .., nor through a link: such rows are bad."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "ds" / "own").write_text("own")
    paths = [str(tmp_path / "secret"), "../secret", "link", "/proc/self/mem", "own", "gone"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": p} for p in paths], kind)})
    pq.write_table(table, tmp_path / "ds" / "a.parquet")
    read = read_all(tmp_path / "ds" / "a.parquet", types_of(image="bytes"))
    assert read.columns == {"image": [b"own"]}
    assert [b.row for b in read.bad] == [0, 1, 2, 3, 5]
    assert "not below its folder" in read.bad[0].text


def test_two_columns_of_one_name_are_refused(tmp_path):
    """It cannot be told which is meant; others of the file can be read."""
    table = pa.table([[1], [2], [3]], names=["a", "a", "b"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_all(tmp_path, types_of(b="int64")).columns == {"b": [3]}
    with pytest.raises(InputError, match="two columns 'a'"):
        read_all(tmp_path, types_of(a="int64"))


def test_splits_and_selections_of_a_hugging_face_dataset(tmp_path):
    """A dictionary of one split is read, of several one has to be named; a selection must be flattened first."""
    table = pa.table({"text": ["a"]})
    save_to_disk(tmp_path / "d" / "train", [table])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert read_all(tmp_path / "d", types_of(text="str")).columns == {"text": ["a"]}
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds the splits train, test; give one, .*/d/train"):
        find_sources(tmp_path / "d")
    state = json.loads((tmp_path / "d" / "train" / "state.json").read_text())
    (tmp_path / "d" / "train" / "state.json").write_text(
        json.dumps(state | {"_indices_data_files": [{"filename": "i"}]})
    )
    with pytest.raises(ConfigError, match="flatten_indices"):
        find_sources(tmp_path / "d" / "train")
    (tmp_path / "d" / "train" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json' is no JSON"):
        find_sources(tmp_path / "d" / "train")


def test_arrow_files_with_a_footer_and_what_is_none(tmp_path):
    """Both of Arrow's forms are read; another file, or one that was cut, is refused."""
    table = pa.table({"n": range(500)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)
    assert read_all(tmp_path, types_of(n="int64"), size=ChunkSize(rows=100)).columns["n"] == list(range(500))
    raw = (tmp_path / "a.arrow").read_bytes()
    with pa.OSFile(str(tmp_path / "b"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)
    stream = (tmp_path / "b").read_bytes()
    (tmp_path / "b").unlink()
    for content in (b"", b"hello there", raw[:700], stream[:50], stream[: len(stream) // 2]):
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(ConfigError, match="is no Arrow file, or was cut"):
            list(plan_chunks(find_sources(tmp_path)))
