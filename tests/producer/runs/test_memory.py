"""Inputs in the driver's memory: any of them as chunks of rows, with the same ids every time."""

from __future__ import annotations

import io
from collections import namedtuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from tests.stages.reading.support import types_of
from torchrelay.config.runs import MEMORY, ChunkSize, ReadOptions
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.memory import is_in_memory, memory_source, push_chunks

XN = types_of(x="float32[2]", n="int64")
SIZE = ChunkSize(rows=4)


def gathered(data, types=None, options=None, size=SIZE, **more):
    """(chunks, ids, columns, bad) of all that is pushed."""
    chunks, ids, columns, bad = [], [], {}, []
    for chunk, read in push_chunks(data, options or ReadOptions(), types, size, **more):
        chunks.append(chunk)
        assert len(read) + len(read.bad) == chunk.end - chunk.start
        ids += zip(read.sources.tolist(), read.rows.tolist(), strict=True)
        for name, column in read.table.items():
            columns.setdefault(name, []).extend(column)
        bad += read.bad
    return chunks, ids, columns, bad


class Pairs(Dataset):
    """A map-style dataset that says which of its rows were asked for."""

    def __init__(self, rows=10, broken=()):
        self.rows, self.broken, self.asked = rows, broken, []

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        self.asked.append(i)
        if i in self.broken:
            raise OSError(f"no row {i}")
        return torch.full((2,), float(i)), i


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": torch.zeros(2), "n": i} for i in range(10)])

    def __len__(self):
        return 10


Point = namedtuple("Point", "x n")
X = np.repeat(np.arange(10, dtype=np.float32), 2).reshape(10, 2)
FRAME = pd.DataFrame({"x": list(X), "n": range(10)}, index=range(5, 15))
TABLE = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(X), "n": range(10)})


@pytest.mark.parametrize(
    "data",
    [
        Pairs(),
        [{"x": [i, i], "n": i} for i in range(10)],
        [Point(x, i) for i, x in enumerate(X)],
        ({"n": i, "x": x} for i, x in enumerate(X)),
        {"x": X, "n": np.arange(10)},
        {"x": torch.tensor(X), "n": list(range(10))},
        FRAME,
        TABLE,
        pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(max_chunksize=3)),
        zip(X, range(10), strict=True),
    ],
    ids=["dataset", "list", "namedtuples", "generator", "table", "tensors", "pandas", "arrow", "reader", "tuples"],
)
def test_every_kind_of_input_gives_the_same_rows(data):
    """Chunks of four rows, numbered through, whatever the rows lie in."""
    chunks, ids, columns, bad = gathered(data, XN)
    assert [(c.number, c.start, c.end, c.first_row, c.format) for c in chunks] == [
        (0, 0, 4, 0, MEMORY),
        (1, 4, 8, 4, MEMORY),
        (2, 8, 10, 8, MEMORY),
    ]
    assert ids == [(0, i) for i in range(10)]
    assert np.array_equal(np.stack(columns["x"]), X)
    assert columns["n"] == list(range(10))
    assert bad == []


def test_an_iterable_dataset_of_torch_is_iterated():
    """Its inherited index raises; it is not used."""
    assert gathered(Stream(), XN)[2]["n"] == list(range(10))


def test_rows_that_a_dataset_cannot_give_are_bad():
    """Their neighbours are read; the first row may be one of them."""
    _, ids, columns, bad = gathered(Pairs(broken=(0, 5)), XN)
    assert [r for _, r in ids] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [(b.row, b.error, b.text) for b in bad] == [(0, "OSError", "no row 0"), (5, "OSError", "no row 5")]
    assert columns["n"] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_rows_of_an_iterable_that_do_not_fit_are_bad():
    """A missing value, a wrong type, and what is no row."""
    rows = [{"n": 1}, {"n": "x"}, {"m": 1}, None, {"n": np.array([{}], object)}, {"n": 6}]
    _, ids, columns, bad = gathered(iter(rows), types_of(n="int64"))
    assert columns == {"n": [1, 6]}
    assert [r for _, r in ids] == [0, 5]
    assert [b.row for b in bad] == [1, 2, 3, 4]


def test_what_an_iterable_raises_goes_through():
    """It is the user's own error, and the end of the rows."""

    def rows():
        yield {"n": 1}
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gathered(rows(), types_of(n="int64"))


def test_done_chunks_are_left_out():
    """Numbers and ids of the others stay; a dataset is not asked for rows that are done."""
    data = Pairs()
    chunks, ids, _, _ = gathered(data, XN, done={0, 2})
    assert [c.number for c in chunks] == [1]
    assert [r for _, r in ids] == [4, 5, 6, 7]
    assert set(data.asked) == {0, 4, 5, 6, 7}
    for other in (TABLE, {"x": X, "n": np.arange(10)}, ({"x": x, "n": 0} for x in X)):
        assert [r for _, r in gathered(other, XN, done={0, 2})[1]] == [4, 5, 6, 7]


@pytest.mark.parametrize("limit", [0, 3, 6, 50])
def test_limit_takes_the_first_rows(limit):
    """Of every kind of input."""
    for data in (
        Pairs(),
        [{"x": x, "n": 0} for x in X],
        TABLE,
        {"x": X, "n": np.arange(10)},
        zip(X, X[:, 0], strict=True),
    ):
        types = XN if not hasattr(data, "__next__") else types_of(x="float32[2]", n="float32")
        assert [r for _, r in gathered(data, types, limit=limit)[1]] == list(range(min(limit, 10)))


def test_an_iterator_may_fill_one_buffer_again_and_again():
    """Its arrays and tensors are copied when they are drawn."""
    for buffer in (np.zeros(2, np.float32), torch.zeros(2)):

        def rows(buffer=buffer):
            for i in range(6):
                buffer[:] = i
                yield {"x": buffer, "n": i}

        assert [float(x[0]) for x in gathered(rows(), XN)[2]["x"]] == [0, 1, 2, 3, 4, 5]


def test_an_iterable_is_drawn_no_further_than_the_next_chunk():
    """So that the driver holds one chunk, however long the input."""
    drawn = []

    def rows():
        i = 0
        while True:
            drawn.append(i)
            yield {"n": i}
            i += 1

    pushed = push_chunks(rows(), ReadOptions(), types_of(n="int64"), SIZE)
    for number in range(3):
        next(pushed)
        assert len(drawn) <= (number + 1) * 4 + 1


def test_chunks_are_no_larger_than_their_bytes():
    """By the first row."""
    chunks, *_ = gathered({"x": np.zeros((100, 1000), np.uint8)}, None, size=ChunkSize(rows=64, nbytes=10_000))
    assert {c.end - c.start for c in chunks} == {10}
    chunks, *_ = gathered((np.zeros(1000, np.uint8) for _ in range(100)), size=ChunkSize(rows=64, nbytes=10_000))
    assert {c.end - c.start for c in chunks} == {10}


def test_names_of_values_and_tuples():
    """One value is the pipeline's only column; more values than columns are numbered, and may be mapped or kept."""
    assert gathered(["a", "b"], types_of(text="str"))[2] == {"text": ["a", "b"]}
    assert gathered(iter([1, 2]))[2] == {"value": [1, 2]}
    assert gathered(Pairs(2), types_of(x="float32[2]"))[2].keys() == {"x"}
    options = ReadOptions({"n": "1"}, keep=("0",))
    ((_, read),) = push_chunks(Pairs(2), options, types_of(n="int64"), SIZE)
    assert read.table["n"].tolist() == [0, 1]
    assert read.kept.column("0").to_pylist() == [[0, 0], [1, 1]]


def test_images_and_tensors_become_arrays():
    """Pillow's images are decoded; a tensor without a NumPy form is a bad row that says what to do."""
    image = Image.new("L", (3, 2), 7)
    assert gathered([image], types_of(image="uint8[H, W, 3]"))[2]["image"][0].shape == (2, 3, 3)
    out = io.BytesIO()
    image.save(out, "PNG")
    assert gathered([out.getvalue()], types_of(image="uint8[H, W, 3]"))[2]["image"][0].shape == (2, 3, 3)
    halves = [torch.tensor([0.5, -3.0], dtype=torch.bfloat16)]
    for kind in ("bfloat16[2]", "float32[2]"):
        assert [v.tolist() for v in gathered(halves, types_of(x=kind))[2]["x"]] == [[0.5, -3.0]]
    bad = gathered([torch.zeros(2).to_sparse()], types_of(x="float32[2]"))[3]
    assert "convert it in the dataset" in bad[0].text
    needs_grad = torch.ones(2, requires_grad=True)
    assert gathered([needs_grad], types_of(x="float32[2]"))[2]["x"][0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("data", "says"),
    [(3, "not int"), ("a.txt", "not str"), (b"x", "not bytes"), ({"a": [1], "b": []}, "differ in their length")],
)
def test_what_is_no_input_is_refused(data, says):
    """The message says what is expected, or what is wrong."""
    with pytest.raises(ConfigError, match=says):
        list(push_chunks(data, ReadOptions()))


def test_a_column_that_a_table_has_not_is_an_error():
    """Not one bad row for each of its rows."""
    for data in (TABLE, FRAME, {"m": [1]}):
        with pytest.raises(InputError, match="no column 'k'"):
            list(push_chunks(data, ReadOptions(), types_of(k="int64")))


def test_empty_inputs_have_no_chunks():
    """Of every kind."""
    for data in ([], iter([]), {}, {"n": []}, TABLE.slice(0, 0), FRAME[:0], Pairs(0)):
        assert list(push_chunks(data, ReadOptions(), types_of(n="int64"))) == []


def test_what_lies_in_memory_and_its_source():
    """Names of files are no rows; the fingerprint is kind and length."""
    assert [is_in_memory(d) for d in ("a", b"a", ["a", "b"], [], [{"a": 1}], {"a": [1]}, iter("a"), FRAME)] == [
        False,
        False,
        False,
        True,
        True,
        True,
        True,
        True,
    ]
    assert memory_source(Pairs(7)).fingerprint == "Pairs-7"
    assert memory_source({"x": X}).fingerprint == "dict-10"
    assert memory_source(iter([])).fingerprint == "list_iterator-?"
    assert memory_source(FRAME).path == MEMORY
