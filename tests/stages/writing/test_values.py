"""Values of every carried type, written and read again in every format."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from pyarrow import parquet

from tests.stages.writing.support import FORMATS, output_at, read_back, rows_of, same, visible, write
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import NUMERIC, parse_type
from torchrelay.errors import InputError

DTYPES = sorted(NUMERIC)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def arrays(dtype: str, shape: Any) -> st.SearchStrategy[Any]:
    """Arrays of any carried dtype; hypothesis knows those of numpy alone, so the others are read from their bits."""
    kind = NUMERIC[dtype]
    if dtype in ("bfloat16",) or dtype.startswith("float8"):
        bits = nps.arrays(f"u{kind.itemsize}", shape)
        return bits.map(lambda a: a.view(kind))
    return nps.arrays(kind, shape)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Any, str | None]:
    """(a column of 3 rows, its declared type or None)."""
    dtype, declared = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    what = draw(st.sampled_from(["number", "fixed", "ragged", "nullable", "text", "bytes", "json"]))
    dims = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    if what == "number":
        return draw(arrays(dtype, 3)), dtype if declared else None
    if what == "fixed":
        text = f"{dtype}[{', '.join(map(str, dims))}]"
        return draw(arrays(dtype, (3, *dims))), text if declared else None
    if what in ("ragged", "nullable"):
        least = draw(st.sampled_from([0, 1])) if len(dims) == 1 else 1
        shape = nps.array_shapes(min_dims=len(dims), max_dims=len(dims), min_side=least, max_side=3)
        rows: list[Any] = [draw(shape.flatmap(lambda s: arrays(dtype, s))) for _ in range(3)]
        if what == "nullable":
            rows[draw(st.integers(0, 2))] = None
        text = f"{dtype}[{', '.join('*' for _ in dims)}]{'?' if what == 'nullable' else ''}"
        return rows, text if declared else None
    values: dict[str, Any] = {
        "text": TEXT | st.none(),
        "bytes": st.binary() | st.none(),
        "json": st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**63)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=2),
            max_leaves=5,
        ),
    }
    kind = {"text": "str?", "bytes": "bytes?", "json": "json"}[what]
    return draw(st.lists(values[what], min_size=3, max_size=3)), kind if declared or what == "json" else None


@pytest.mark.parametrize("kind", FORMATS)
@given(given_=columns())
@settings(max_examples=150)
def test_values_come_back_as_they_were_written(kind: str, given_: tuple[Any, str | None]) -> None:
    """Each value, with its dtype and shape, whether its type is declared or not."""
    column, declared = given_
    types = {} if declared is None else {"x": parse_type(declared)}
    with tempfile.TemporaryDirectory() as folder:
        output = output_at(folder, kind)
        write(output, {"x": column}, types=types)
        back = read_back(output)
    assert len(back["x"]) == 3
    for came, wanted in zip(back["x"], column, strict=True):
        assert same(came, wanted), (came, wanted)
    assert [int(n) for n in back["_row"]] == [0, 1, 2]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_carried_with_all_its_values(tmp_path: Path, kind: str, dtype: str) -> None:
    """Of 8-bit types each bit pattern, of wider ones the limits; NaN, infinities and minus zero where there are any."""
    kind_of = NUMERIC[dtype]
    if kind_of.itemsize == 1 and dtype != "bool":
        values = np.arange(256, dtype=np.uint8).view(kind_of)
    elif dtype == "bool":
        values = np.array([True, False])
    elif kind_of.kind in "iu":
        values = np.array([np.iinfo(kind_of).min, 0, np.iinfo(kind_of).max], kind_of)
    else:
        info = ml_dtypes.finfo(kind_of) if kind_of.kind != "c" else np.finfo(kind_of)
        values = np.array([np.nan, np.inf, -np.inf, -0.0, info.max, info.tiny, 1 / 3], np.float64).astype(kind_of)
    output = output_at(tmp_path, kind)
    write(output, {"x": values, "pair": np.stack([values, values], axis=1)})
    back = read_back(output)
    x = np.stack(back["x"])
    assert x.dtype == kind_of
    wide = np.complex128 if kind_of.kind == "c" else np.float64 if kind_of.kind not in "biu" else kind_of
    assert np.array_equal(x.astype(wide), values.astype(wide), equal_nan=wide in (np.float64, np.complex128))
    if wide is np.float64:
        finite = ~np.isnan(values.astype(wide))
        assert np.array_equal(np.signbit(x.astype(wide))[finite], np.signbit(values.astype(wide))[finite])
    assert np.stack(back["pair"]).shape == (len(values), 2)


@pytest.mark.parametrize("kind", FORMATS)
def test_ragged_rows_are_written_from_one_array(tmp_path: Path, kind: str) -> None:
    """RaggedRows whose rows lie in any order come back row by row."""
    flat = np.arange(20, dtype=np.int32).reshape(10, 2)
    column = RaggedRows(flat, np.array([6, 0, 3]), np.array([4, 3, 0]))
    output = output_at(tmp_path, kind)
    write(output, {"x": column})
    back = read_back(output)["x"]
    assert [a.tolist() for a in back] == [flat[6:10].tolist(), flat[:3].tolist(), []]
    assert [a.shape for a in back] == [(4, 2), (3, 2), (0, 2)]


def test_tensors_are_arrows_own_and_any_reader_takes_the_folder(tmp_path: Path) -> None:
    """Vectors are fixed-size lists, images fixed-shape tensors; pyarrow and pandas read the folder as a dataset."""
    output = output_at(tmp_path)
    for chunk in range(3):
        image = np.full((2, 4, 5, 3), chunk, np.uint8)
        write(output, {"v": np.ones((2, 8), np.float32), "image": image, "text": ["a", "b"]}, chunk)
    table = pyarrow.dataset.dataset(tmp_path).to_table()
    assert table.schema.field("v").type == pa.list_(pa.float32(), 8)
    assert table["image"].combine_chunks().to_numpy_ndarray().shape == (6, 4, 5, 3)
    frame = pandas.read_parquet(tmp_path)
    assert len(frame) == 6
    assert frame["text"].tolist() == ["a", "b"] * 3
    assert [len(v) for v in frame["v"]] == [8] * 6


def test_what_arrow_lacks_is_carried_by_its_nearest_and_named(tmp_path: Path) -> None:
    """bfloat16 becomes float32 in the file; the field's metadata names the dtype that it was."""
    write(output_at(tmp_path), {"x": np.array([1.5, 2], ml_dtypes.bfloat16)})
    (name,) = visible(tmp_path)
    field = parquet.read_schema(tmp_path / name).field("x")
    assert field.type == pa.float32()
    assert json.loads(field.metadata[b"torchrelay.column"])["dtype"] == "bfloat16"


def test_the_schema_does_not_depend_on_what_a_chunk_happens_to_hold(tmp_path: Path) -> None:
    """Ragged rows that are equally long in one chunk, and, where types are declared, a chunk without any value."""
    output = output_at(tmp_path)
    types = {"boxes": parse_type("float32[*, 4]"), "label": parse_type("str?"), "score": parse_type("float32?")}
    same_size = [np.ones((2, 4), np.float32)] * 2
    other = [np.ones((1, 4), np.float32), np.ones((0, 4), np.float32)]
    write(output, {"boxes": same_size, "label": [None, None], "score": [None, None]}, 0, types=types)
    write(output, {"boxes": other, "label": ["a", None], "score": [1.5, None]}, 1, types=types)
    first, second = (parquet.read_schema(tmp_path / name) for name in visible(tmp_path))
    assert first.equals(second)
    assert pyarrow.dataset.dataset(tmp_path).to_table()["score"].to_pylist() == [None, None, 1.5, None]


def test_json_lines_are_json_and_npy_files_need_no_pickle(tmp_path: Path) -> None:
    """Each line is strict JSON, NaN too; each .npy file opens memory-mapped with the values of its column."""
    values = {"x": np.array([math.nan, math.inf, 1.5]), "j": [{"a": math.nan}, [1], "t"], "b": [b"\xff", b"", b"1"]}
    write(output_at(tmp_path / "lines", "jsonl"), values)
    lines = (tmp_path / "lines/part-00000000.jsonl").read_text().splitlines()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[0] == {"_source": 0, "_row": 0, "_part": 0, "x": "NaN", "j": {"a": None}, "b": "/w=="}
    write(output_at(tmp_path / "npy", "npy"), {"v": np.arange(12.0).reshape(3, 4)})
    mapped = np.load(tmp_path / "npy/part-00000000.v.npy", mmap_mode="r")
    assert mapped.tolist() == np.arange(12.0).reshape(3, 4).tolist()


def test_names_of_columns_may_be_anything(tmp_path: Path) -> None:
    """Kept columns have the names of the dataset: slashes, dots, spaces, other scripts."""
    names = ("a/b", "x.shapes", "../up", "Überschrift 1", "x")
    for kind in FORMATS:
        output = output_at(tmp_path / kind, kind, keep=names)
        extra = {name: [name, name] for name in names}
        write(output, {"v": [np.zeros(1), np.zeros(2)]}, extra=extra)
        back = read_back(output)
        assert {name: back[name] for name in names} == extra
    assert not (tmp_path / "up").exists()


def test_a_value_that_does_not_fit_names_its_column(tmp_path: Path) -> None:
    """Half of a surrogate pair is no text that Parquet can hold; nothing is left of the part."""
    output = output_at(tmp_path)
    with pytest.raises(InputError, match="column 'x' cannot be written as text"):
        write(output, {"x": ["\ud800"]})
    assert visible(tmp_path) == []
    assert rows_of({"x": [1]}).rows.tolist() == [0]


def test_text_is_packed_tight_and_numbers_fast(tmp_path: Path) -> None:
    columns = {"text": ["one", "two"], "vector": np.zeros((2, 3), np.float32), "json": [{"a": 1}, None]}
    write(output_at(tmp_path), columns)
    (path,) = tmp_path.glob("part-*")
    group = pq.read_metadata(path).row_group(0)
    found = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert (found["text"], found["json"], found["vector.list.element"]) == ("ZSTD", "ZSTD", "SNAPPY")
