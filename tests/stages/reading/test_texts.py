"""Text, JSONL and CSV files: what comes out of real ones, and which rows are bad."""

from __future__ import annotations

import codecs
import csv
import gzip
import json

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stages.reading.support import read_all, types_of
from torchrelay.config.runs import ChunkSize, ReadOptions
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.planning import check_columns, find_sources, plan_chunks
from torchrelay.stages.reading import read_chunk

TEXT = types_of(text="str")


def test_lines_of_a_text_file(tmp_path):
    """Every line is a row, empty ones too; CRLF, a BOM and a last line without its break are no part of it."""
    path = tmp_path / "a b ü.txt"
    path.write_bytes(codecs.BOM_UTF8 + "één\r\n\nlast".encode())
    read = read_all(path, TEXT)
    assert read.columns == {"text": ["één", "", "last"]}
    assert read.ids == [(0, 0), (0, 10), (0, 11)]
    assert read.bad == []


def test_the_one_column_of_text_serves_a_column_of_any_name(tmp_path):
    """A pipeline whose only input is `query` takes the lines."""
    (tmp_path / "a.txt").write_text("x\ny\n")
    assert read_all(tmp_path / "a.txt", types_of(query="str", lang="str = en")).columns == {
        "query": ["x", "y"],
        "lang": ["en", "en"],
    }


def test_invalid_utf8_costs_its_line(tmp_path):
    """The row's id and the reason are told; its neighbours are read."""
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\nfine\n")
    read = read_all(tmp_path / "a.txt", TEXT)
    assert read.columns == {"text": ["good", "fine"]}
    assert [(b.source, b.row, b.error) for b in read.bad] == [(0, 5, "UnicodeDecodeError")]


def test_jsonl_rows_and_what_is_none(tmp_path):
    """Broken JSON, other JSON than an object, a missing value and a wrong type cost their rows."""
    path = tmp_path / "rows.jsonl"
    rows = [
        b'{"text": "a", "n": 1}',
        b"{",
        b"[1]",
        b'{"text": "b"}',
        b'{"text": 5, "n": 1}',
        b'{"text": "c", "n": "x"}',
        b'{"text": "\xff", "n": 1}',
        b"[" * 100_000,
        b'{"text": null, "n": 4}',
        b"",
        b'  {"n": 2.0, "text": "d"}  ',
        b'{"text": "e", "n": 7, "more": {}}',
    ]
    path.write_bytes(b"\n".join(rows))
    read = read_all(path, types_of(text="str", n="int64"))
    assert read.columns == {"text": ["a", "e"], "n": [1, 7]}
    assert [b.error for b in read.bad] == [
        "JSONDecodeError",
        "InputError",
        "InputError",
        "InputError",
        "InputError",
        "UnicodeDecodeError",
        "RecursionError",
        "InputError",
        "InputError",
    ]
    assert "a JSON object is expected" in read.bad[1].text
    assert "column 'n' has no value in this row" in read.bad[2].text
    at = np.cumsum([0] + [len(r) + 1 for r in rows]).tolist()
    assert [b.row for b in read.bad] == [at[i] for i in (1, 2, 3, 4, 5, 6, 7, 8, 10)]


def test_jsonl_defaults_and_nulls(tmp_path):
    """A missing value is the default, null where allowed, and a JSON null is no missing value."""
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n{"t": "b", "lang": "nl", "n": 3}\n{"t": "c", "lang": null}\n')
    read = read_all(tmp_path / "a.jsonl", types_of(t="str", lang="str = en", n="int64?"))
    assert read.columns == {"t": ["a", "b"], "lang": ["en", "nl"], "n": [None, 3]}
    assert [b.row for b in read.bad] == [44]


def test_jsonl_lists_become_arrays_of_the_declared_type(tmp_path):
    """Fixed shapes are stacked, ragged ones are arrays."""
    (tmp_path / "a.jsonl").write_text(
        '{"v": [1, 2.5], "ids": [1]}\n{"v": [3, 4], "ids": [1, 2]}\n{"v": [3], "ids": []}\n'
    )
    read = read_all(tmp_path / "a.jsonl", types_of(v="float32[2]", ids="int64[*]"))
    assert np.stack(read.columns["v"]).tolist() == [[1, 2.5], [3, 4]]
    assert read.columns["v"][0].dtype == np.float32
    assert [v.tolist() for v in read.columns["ids"]] == [[1], [1, 2]]
    assert len(read.bad) == 1


def test_key_and_kept_columns_go_along(tmp_path):
    """They belong to the rows that stay, under the dataset's names; a row must have its key, but no kept column."""
    rows = [{"body": "a", "id": 1, "url": "u1"}, {"body": 5, "id": 2, "url": "u2"}, {"body": "c", "url": "u3"}]
    rows += [{"body": "d", "id": 4}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_all(tmp_path / "a.jsonl", TEXT, ReadOptions({"text": "body"}, "id", ("url",)))
    assert (read.columns, read.key, read.keep) == ({"text": ["a", "d"]}, [1, 4], {"url": ["u1", None]})
    assert ["body" in b.text or "text" in b.text for b in read.bad] == [True, False]
    assert "key column 'id' has no value" in read.bad[1].text


def test_without_declared_types_all_columns_are_read(tmp_path):
    """Numbers are arrays; a name that is none of a variable has to be mapped."""
    (tmp_path / "a.jsonl").write_text('{"a": 1, "b": [1, 2]}\n{"a": 2.5}\n')
    read = read_all(tmp_path / "a.jsonl")
    assert read.columns == {"a": [1.0, 2.5], "b": [[1, 2], None]}
    (tmp_path / "b.jsonl").write_text('{"my text": "x"}\n')
    with pytest.raises(InputError, match=r"'my text' is not named like a variable.*columns="):
        read_all(tmp_path / "b.jsonl")
    assert read_all(tmp_path / "b.jsonl", None, ReadOptions({"t": "my text"})).columns == {"t": ["x"]}


def test_csv_with_everything_in_it(tmp_path):
    """Quotes, delimiters and line breaks in quotes, CRLF, a BOM, blank lines, a last record without its break."""
    path = tmp_path / "a.csv"
    path.write_bytes(codecs.BOM_UTF8 + b'id,text\r\n1,"a ""b"", c\r\nd"\r\n\r\n2,plain\n3,"end"')
    read = read_all(path, types_of(id="int64", text="str"))
    assert read.columns == {"id": [1, 2, 3], "text": ['a "b", c\r\nd', "plain", "end"]}
    assert read.bad == []


def test_csv_cells_become_the_declared_types(tmp_path):
    """Numbers, truth, JSON and bytes are read from their text; an empty cell is no value."""
    rows = [
        "n,x,yes,v,raw,lang,maybe",
        '1,2.5,true,"[1, 2]",b,,',
        '2,nan,0,"[3, 4]",c,nl,7',
        "x,1,1,[],d,,",
        "3,1,2,[],e,,",
    ]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    types = types_of(n="int64", x="float32", yes="bool", v="float32[2]", raw="bytes", lang="str", maybe="int64?")
    read = read_all(tmp_path / "a.csv", types)
    assert read.columns["n"] == [1, 2]
    assert np.isnan(read.columns["x"][1])
    assert read.columns["yes"] == [True, False]
    assert [v.tolist() for v in read.columns["v"]] == [[1, 2], [3, 4]]
    assert (read.columns["raw"], read.columns["lang"], read.columns["maybe"]) == ([b"b", b"c"], ["", "nl"], [None, 7])
    assert ["int64 is expected, 'x' came" in read.bad[0].text, "bool is expected, '2' came" in read.bad[1].text] == [
        True,
        True,
    ]


def test_csv_rows_with_other_fields_than_the_header_are_bad(tmp_path):
    """Too few, too many and wrongly quoted ones cost themselves."""
    (tmp_path / "a.csv").write_text('a,b\n1,2\n3\n4,5,6\n"x"y,1\n7,8\n')
    read = read_all(tmp_path / "a.csv", types_of(a="str", b="str"))
    assert read.columns == {"a": ["1", "7"], "b": ["2", "8"]}
    assert [b.error for b in read.bad] == ["InputError", "InputError", "Error"]
    assert "2 fields are expected, as in the header, 1 came" in read.bad[0].text


def test_fields_that_are_all_empty_are_a_row(tmp_path):
    """A TSV line of tabs, and a CSV line of a space, are no blank lines."""
    (tmp_path / "a.tsv").write_text("a\tb\n\t\n\n1\t2\n")
    assert read_all(tmp_path / "a.tsv", types_of(a="str", b="str")).columns == {"a": ["", "1"], "b": ["", "2"]}
    (tmp_path / "a.csv").write_text("a\n \n\nx\n")
    assert read_all(tmp_path / "a.csv", types_of(a="str")).columns == {"a": [" ", "x"]}


def test_csv_with_semicolons(tmp_path):
    """Spreadsheets of many countries write them; a header without a comma tells, packed or not."""
    raw = codecs.BOM_UTF8 + b'id;text\r\n1;"a;b,c"\r\n2;1,5\r\n'
    (tmp_path / "a.csv").write_bytes(raw)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(raw))
    for name in ("a.csv", "b.csv.gz"):
        read = read_all(tmp_path / name, types_of(id="int64", text="str"), size=ChunkSize(rows=1))
        assert read.columns == {"id": [1, 2], "text": ["a;b,c", "1,5"]}
        check_columns(find_sources(tmp_path / name), ReadOptions(key="id"), TEXT)


@pytest.mark.parametrize(
    ("content", "used", "other"),
    [("id|text\n1|a\n", ",", "|"), ("id;text;a,b\n1;x;y\n", ",", ";"), ("id,te\txt\n", ",", None)],
)
def test_a_wrong_delimiter_is_named(tmp_path, content, used, other):
    """With the one that was taken, the one that is meant, and the option; which then reads the file."""
    (tmp_path / "a.csv").write_text(content)
    sources = find_sources(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="has no column 'text'") as caught:
        check_columns(sources, ReadOptions(), TEXT)
    hint = f"separated by {used!r}; if {other!r} separates it, say --delimiter {other!r}"
    assert (hint in str(caught.value)) == (other is not None)
    if other is not None:
        options = ReadOptions(delimiter=other, key="id")
        check_columns(sources, options, TEXT)
        (chunk,) = plan_chunks(sources, delimiter=other)
        assert read_chunk(chunk, options, TEXT).kept.column("id").to_pylist() == ["1"]


def test_tabs_in_a_csv_file(tmp_path):
    """A header with tabs and without a comma tells that they separate."""
    (tmp_path / "a.csv").write_text("id\ttext\n1\ta,b\n")
    assert read_all(tmp_path / "a.csv", types_of(id="int64", text="str")).columns == {"id": [1], "text": ["a,b"]}


def test_a_csv_field_may_be_large(tmp_path):
    """The limit of 128 KiB that Python's csv has does not hold here."""
    (tmp_path / "a.csv").write_text("a\n" + "x" * 300_000 + "\n")
    assert [len(v) for v in read_all(tmp_path / "a.csv", types_of(a="str")).columns["a"]] == [300_000]


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "must name each column once"), ("a,a\n1,2\n", "once"), ("a,\n", "once"), ('"a\n', "header")],
)
def test_csv_without_a_sound_header_is_refused(tmp_path, content, says):
    """It cannot be told which column is which."""
    (tmp_path / "a.csv").write_text(content)
    (tmp_path / "b.csv").write_text("a\n1\n")
    if not content:
        assert read_all(tmp_path, types_of(a="int64")).columns == {"a": [1]}
    else:
        with pytest.raises(InputError, match=says):
            read_all(tmp_path / "a.csv", types_of(a="str"))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    """A whole column that is missing is an error of the chunk, not of each row."""
    (tmp_path / "a.tsv").write_text("body\tid\nx\t1\n")
    with pytest.raises(InputError, match="no column 'text'; it has body, id; say which column is meant"):
        read_all(tmp_path / "a.tsv", TEXT)
    with pytest.raises(InputError, match="the pipeline has no input 'txt'; it has text"):
        read_all(tmp_path / "a.tsv", TEXT, ReadOptions({"txt": "body"}))
    assert read_all(tmp_path / "a.tsv", TEXT, ReadOptions({"text": "body"})).columns == {"text": ["x"]}


def compressed(raw: bytes, how: str) -> bytes:
    half = len(raw) // 2
    if how == ".gz":
        return gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    return zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]) if how else raw


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_many_chunks_have_the_rows_of_one(tmp_path, name, how):
    """However a file is cut, its rows, ids and bad rows are the same; so are they packed."""
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(list('abc,"\n '), 40)) for _ in range(4000)]
    if name == "a.csv":
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([["text"], *[[t] for t in texts]])
    elif name == "a.jsonl":
        lines = [json.dumps({"text": t}) if i % 7 else "{" for i, t in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        (tmp_path / name).write_text("\n".join(t.replace("\n", " ") for t in texts))
    path = tmp_path / (name + how)
    path.write_bytes(compressed((tmp_path / name).read_bytes(), how))
    whole = read_all(tmp_path / name, TEXT, size=ChunkSize(10**9, 10**9))
    parts = read_all(path, TEXT, size=ChunkSize(rows=100))
    assert whole.chunks == 1
    assert parts.chunks >= (8 if how else 30)
    assert (parts.ids, parts.columns, parts.bad) == (whole.ids, whole.columns, whole.bad)
    assert len(whole.ids) + len(whole.bad) == 4000 - (texts.count("") if name == "a.csv" else 0)


@given(
    rows=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=5)), max_size=20), size=st.integers(1, 200)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_jsonl_rows_once_for_every_chunk_size(tmp_path, rows, size):
    """Each row is in exactly one chunk, in order, for any rows and any size of chunk."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    read = read_all(path, types_of(a="str?", b="str?"), size=ChunkSize(nbytes=size))
    assert read.columns.get("a", []) == [r.get("a") for r in rows]
    assert read.columns.get("b", []) == [r.get("b") for r in rows]
    assert len(set(read.ids)) == len(rows)


def test_a_cut_gzip_gives_its_rows_and_one_bad_one(tmp_path):
    """Whole lines before the cut are rows; the cut is a bad row that says so."""
    raw = b"".join(b'{"text": "row %d"}\n' % i for i in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw)[:-500])
    read = read_all(tmp_path / "a.jsonl.gz", TEXT, size=ChunkSize(rows=500))
    assert read.columns["text"] == [f"row {i}" for i in range(len(read.ids))]
    assert 1000 < len(read.ids) < 5000
    assert ["ends early" in b.text for b in read.bad] == [True]


def test_a_file_that_changed_since_it_was_planned_is_not_read(tmp_path):
    """Its chunks would be other rows than those that were planned."""
    for name in ("a.jsonl", "b.csv"):
        path = tmp_path / name
        path.write_text("text\nx\n")
        (chunk,) = plan_chunks(find_sources(path))
        path.write_text("text\nx\ny\n")
        with pytest.raises(InputError, match="has changed since the run was planned"):
            read_chunk(chunk, ReadOptions(), TEXT)
        path.unlink()
        with pytest.raises(InputError, match="does not exist any more"):
            read_chunk(chunk, ReadOptions(), TEXT)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("limit", [0, 1, 99, 150, 5000])
def test_limit_takes_the_first_rows(tmp_path, name, limit):
    """As many rows as asked for, from the front, bad ones counted."""
    lines = ["text"] * name.endswith(".csv") + ['{"text": "x"}' if "json" in name else f"row {i}" for i in range(300)]
    raw = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    everything = read_all(tmp_path / name, TEXT)
    read = read_all(tmp_path / name, TEXT, size=ChunkSize(rows=40), limit=limit)
    assert read.ids == everything.ids[:limit]
    assert len(everything.ids) == 300
