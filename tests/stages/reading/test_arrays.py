"""NumPy files: ranges of the first axis, of plain and of packed arrays, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stages.reading.support import read_all, types_of
from torchrelay.config.runs import ChunkSize
from torchrelay.errors import ConfigError
from torchrelay.producer.runs.planning import find_sources, plan_chunks
from torchrelay.stages.reading import read_raw

DATA = np.random.default_rng(3).normal(size=(1000, 3, 2)).astype(np.float32)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_npy_rows_in_chunks(tmp_path, order, dtype):
    """Either order of axes and of bytes gives the rows of the array, under any column's name."""
    np.save(tmp_path / "a.npy", np.asarray(DATA, dtype, order=order))
    read = read_all(tmp_path / "a.npy", types_of(x="float32[3, 2]"), size=ChunkSize(rows=64))
    assert np.array_equal(np.stack(read.columns["x"]), DATA)
    assert read.ids == [(0, i) for i in range(1000)]
    assert read.chunks == 16


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays_are_columns(tmp_path, save):
    """Also where the archive is compressed; chunks may be read in any order."""
    save(tmp_path / "a.npz", x=DATA, n=np.arange(1000), name=np.array([f"é{i}" for i in range(1000)]))
    types = types_of(x="float32[3, 2]", n="int32", name="str")
    read = read_all(tmp_path / "a.npz", types, size=ChunkSize(rows=128))
    assert np.array_equal(np.stack(read.columns["x"]), DATA)
    assert read.columns["n"] == list(range(1000))
    assert read.columns["name"][999] == "é999"
    chunks = list(plan_chunks(find_sources(tmp_path), ChunkSize(rows=300)))
    for chunk in reversed(chunks):
        assert read_raw(chunk).columns["n"].tolist() == list(range(chunk.start, chunk.end))


def test_a_structured_array_has_a_column_per_field(tmp_path):
    """Its fields are read by their names."""
    rows = np.array([(1, 2.5, b"ab"), (3, 4.5, b"c")], [("id", ">i8"), ("x", "f4"), ("tag", "S2")])
    np.save(tmp_path / "a.npy", rows)
    read = read_all(tmp_path, types_of(id="int64", x="float32", tag="bytes"))
    assert read.columns == {"id": [1, 3], "x": [2.5, 4.5], "tag": [b"ab", b"c"]}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "holds Python objects"),
        (lambda p: np.save(p, np.float32(3)), "is one value"),
        (lambda p: np.save(p, np.array(["2024-01-01"], "M8[D]")), "is not carried"),
        (lambda p: p.write_bytes(b"no array"), "no .npy array"),
        (lambda p: p.write_bytes(b""), "no .npy array"),
        (lambda p: (np.save(p, DATA), p.write_bytes(p.read_bytes()[:-1])), "was cut: .* are announced"),
    ],
)
def test_what_is_no_array_of_rows_is_refused_when_planned(tmp_path, make, says):
    """The message says what it is instead."""
    make(tmp_path / "a.npy")
    with pytest.raises(ConfigError, match=says):
        list(plan_chunks(find_sources(tmp_path)))


def test_an_npz_that_is_no_table_is_refused(tmp_path):
    """Arrays of different lengths, none, and a file that was cut."""
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(4))
    with pytest.raises(ConfigError, match="columns of the same rows"):
        list(plan_chunks(find_sources(tmp_path)))
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw[:-30])
    with pytest.raises(ConfigError, match=r"is no \.npz file, or was cut"):
        list(plan_chunks(find_sources(tmp_path)))


def test_an_array_of_no_rows_is_no_chunk(tmp_path):
    """It is in order, and there is nothing to do."""
    np.save(tmp_path / "a.npy", np.zeros((0, 4)))
    assert list(plan_chunks(find_sources(tmp_path))) == []
