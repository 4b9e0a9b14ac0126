"""The values of a run: they survive JSON unchanged, and what is no such value is refused with a word on why."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.runs import Chunk, ChunkSize, ReadOptions, Source, WriteOptions
from torchrelay.errors import ConfigError, DecodeError

CHUNK = Chunk(3, 1, "/data/ä b.jsonl", "jsonl", 10, 20, "bytes", None, {"compression": "gz"})
VALUES = [
    Source(0, "s3://bucket/part 1.parquet", "parquet", 12, "12-34"),
    CHUNK,
    ChunkSize(5, 6),
    ReadOptions({"text": "body"}, "doc_id", ("url", "title")),
    WriteOptions("/out", "writers.py:Mine", None, ("url",)),
]

numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_value_survives_json(value):
    """`decode` gives back what `encode` wrote, which is one line of JSON."""
    text = value.encode()
    assert "\n" not in text
    assert type(value).decode(text) == value


@given(numbers, numbers, texts, numbers, numbers, st.none() | numbers, st.dictionaries(texts, texts | numbers))
def test_any_chunk_survives_json(number, source, path, at, more, first_row, options):
    """Whatever a chunk holds, `decode` gives the same chunk."""
    end = min(at + more, 2**63 - 1)
    chunk = Chunk(number, source, path, "text", at, end, "bytes", first_row, options)
    assert Chunk.decode(chunk.encode()) == chunk


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"number": -1}, "number is an integer from 0"),
        ({"number": True}, "number is an integer from 0"),
        ({"source": 1.0}, "source is an integer"),
        ({"start": 2**63}, "start is an integer"),
        ({"end": 9}, "end is an integer from its start"),
        ({"unit": "lines"}, "unit is rows or bytes"),
        ({"first_row": -1}, "first_row is null or an integer"),
        ({"options": 3}, "options are a mapping"),
        ({"path": ""}, "path is a text"),
        ({"format": None}, "format is a text"),
        ({"more": 1}, "has the fields"),
    ],
)
def test_a_wrong_chunk_does_not_decode(change, says):
    """A field that is missing, unknown or of a wrong type is named."""
    text = json.dumps(json.loads(CHUNK.encode()) | change)
    with pytest.raises(DecodeError, match=says):
        Chunk.decode(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"number": 1}'])
def test_what_is_no_chunk_does_not_decode(text):
    """Other JSON, half of it, or none is a DecodeError with its length."""
    with pytest.raises(DecodeError, match=rf"\({len(text)} bytes"):
        Chunk.decode(text)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ChunkSize(rows=0), "rows is an integer from 1"),
        (lambda: ChunkSize(nbytes="1MiB"), "nbytes is an integer from 1"),
        (lambda: Source(0, "", "csv", 1, ""), "a path and a format"),
        (lambda: ReadOptions({"text": ""}), "maps a pipeline column"),
        (lambda: ReadOptions(key=""), "key is the name"),
        (lambda: ReadOptions(image_side=0), "image_side is a number of pixels from 1"),
        (lambda: ReadOptions(keep="url"), "keep is a tuple"),
        (lambda: ReadOptions(keep=("a", "b", "a")), "keep names 'a' twice"),
        (lambda: WriteOptions(""), "folder is a text"),
        (lambda: WriteOptions("/out", "xlsx"), "none of parquet, jsonl, npy"),
    ],
)
def test_wrong_options_are_refused(make, says):
    """Each says what is expected and what came."""
    with pytest.raises(ConfigError, match=says):
        make()
