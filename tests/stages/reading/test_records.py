"""Lines and CSV records of a byte range: every row exactly once, whatever the chunks, the packing and who reads."""

from __future__ import annotations

import csv
import gzip
import io

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.errors import DecodeError
from torchrelay.stages.reading import records as records_module
from torchrelay.stages.reading import unpacking
from torchrelay.stages.reading.records import Records, lines_of

lines = st.lists(st.text("ab\r é", max_size=9), max_size=12)
fields = st.text('ab,"\n\r é', max_size=9)
tables = st.lists(st.tuples(fields, fields), max_size=9)
sizes = st.integers(1, 40)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps of a few bytes, so that short texts cross their borders."""
    monkeypatch.setattr(records_module, "_WINDOW", 8)
    monkeypatch.setattr(records_module, "_EXTEND", 3)
    monkeypatch.setattr(unpacking, "_PLAIN_SLICE", 5)
    monkeypatch.setattr(unpacking, "PACKED_SLICE", 3)


def packed(raw: bytes, how: str, at: int) -> bytes:
    """The text as one member or two that follow each other."""
    if how == "gz":
        return gzip.compress(raw[:at]) + gzip.compress(raw[at:])
    if how == "zst":
        return zstandard.compress(raw[:at]) + zstandard.compress(raw[at:])
    return raw


def with_offsets(rows: list[bytes]) -> list[tuple[int, bytes]]:
    out, at = [], 0
    for row in rows:
        out.append((at, row))
        at += len(row)
    return out


def encoded_lines(texts: list[str], last_break: bool) -> list[bytes]:
    rows = [t.encode() + b"\n" for t in texts]
    if rows and not last_break:
        rows[-1] = rows[-1][:-1]
    return [r for r in rows if r]


def ranges(length: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, length)) for at in range(0, length, size)]


@given(lines, st.booleans(), sizes)
def test_each_line_is_in_exactly_one_range(texts, last_break, size):
    """The ranges of a plain file, however small, have each line once, in order, and no half of one."""
    rows = encoded_lines(texts, last_break)
    raw = b"".join(rows)
    got = [r for at, end in ranges(len(raw), size) for r in lines_of(io.BytesIO(raw), at, end)]
    assert got == with_offsets(rows)


@given(lines, st.booleans(), sizes, st.sampled_from(["", "gz", "zst"]), st.integers(0, 99), st.data())
def test_each_line_is_read_once_by_whoever_reads_on(texts, last_break, size, how, at, data):
    """A forward reader, kept or begun anew for any chunk, gives each line of a packed file once."""
    rows = encoded_lines(texts, last_break)
    stored = packed(b"".join(rows), how, at)
    assert read_forward(stored, how, "", size, data) == with_offsets(rows)


@given(tables, st.booleans(), sizes, st.sampled_from(["", "gz", "zst"]), st.integers(0, 99), st.data())
def test_each_csv_record_is_read_once_with_its_line_breaks(table, last_break, size, how, at, data):
    """Records whose fields hold quotes, delimiters and line breaks are not torn, in plain and packed files."""
    rows = []
    for row in table:
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(row)
        rows.append(text.getvalue().encode())
    if rows and not last_break:
        rows[-1] = rows[-1][:-1]
    stored = packed(b"".join(rows), how, at)
    assert read_forward(stored, how, ",", size, data) == with_offsets(rows)


def read_forward(stored: bytes, how: str, delimiter: str, size: int, data) -> list:
    reader, got = None, []
    for at, end in ranges(len(stored), size):
        if reader is None or data.draw(st.booleans()):
            reader = Records(io.BytesIO(stored), how, delimiter)
        got += reader.take(at, end)
    return got


@given(st.text('ab,"\n', max_size=40), sizes)
def test_any_text_is_cut_without_loss(text, size):
    """Also where quotes stand wrongly, the records put together are the text."""
    raw = text.encode()
    reader = Records(io.BytesIO(raw), "", ",")
    got = [r for at, end in ranges(len(raw), size) for r in reader.take(at, end)]
    assert b"".join(r for _, r in got) == raw


def test_a_quote_within_a_field_opens_nothing():
    """A quote opens a field only at its beginning: inches do not swallow the file."""
    raw = b'a,5" nail\nb,"x\ny"\nc,d\n'
    rows = [r for _, r in Records(io.BytesIO(raw), "", ",").take(0, len(raw))]
    assert rows == [b'a,5" nail\n', b'b,"x\ny"\n', b"c,d\n"]


@pytest.mark.parametrize("how", ["", "gz"])
def test_a_line_that_is_too_long_is_passed_over(how):
    """It is an error at its offset, is not held, and the lines around it are read."""
    raw = b"one\n" + b"x" * 500 + b"\ntwo\n"
    stored = packed(raw, how, 9)
    reader = Records(io.BytesIO(stored), how, "", most=50)
    got = list(reader.take(0, len(stored)))
    assert [at for at, _ in got] == [0, 4, 505]
    assert got[0][1] == b"one\n"
    assert got[2][1] == b"two\n"
    assert isinstance(got[1][1], DecodeError)
    assert "longer than 50 bytes" in str(got[1][1])
    if not how:
        plain = list(lines_of(io.BytesIO(raw), 0, 6, most=50)) + list(lines_of(io.BytesIO(raw), 6, 509, most=50))
        assert [(at, str(r)) for at, r in plain] == [(at, str(r)) for at, r in got]


def test_a_quote_that_is_never_closed_says_so():
    """The record is one error, which says that nothing behind it was read; those before it are there."""
    raw = b"a,b\n" + b'c,"' + b"x\n" * 100
    got = list(Records(io.BytesIO(raw), "", ",", most=60).take(0, len(raw)))
    assert got[0] == (0, b"a,b\n")
    assert got[1][0] == 4
    assert "a quote never closed" in str(got[1][1])
    assert len(got) == 2


@pytest.mark.parametrize("how", ["gz", "zst"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "tail"])
def test_damage_is_one_row_at_its_end(how, harm):
    """Lines before the damage are read, the damage is one error, in one range only."""
    raw = b"".join(b"line %d of some length\n" % i for i in range(300))
    stored = bytearray(packed(raw, how, len(raw)))
    if harm == "cut":
        del stored[-40:]
    elif harm == "flipped":
        stored[len(stored) // 2] ^= 0xFF
    else:
        stored += b"no frame at all"
    for size in (7, 64, 10_000):
        got = [r for at, end in ranges(len(stored), size) for r in Records(io.BytesIO(stored), how, "").take(at, end)]
        errors = [r for _, r in got if isinstance(r, DecodeError)]
        good = [r for _, r in got if isinstance(r, bytes)]
        if harm == "flipped" and how == "zst" and not errors:
            continue  # zstd frames need not carry a checksum
        assert len(errors) == 1
        assert f"the {how} stream" in str(errors[0])
        assert got[-1][1] is errors[0]
        if harm != "flipped":
            assert raw.startswith(b"".join(good))
        if harm == "tail":
            assert len(good) == 300


def test_gzip_padding_is_no_damage():
    """Zeros behind the last member, as tapes have them, are ignored."""
    stored = gzip.compress(b"a\nb\n") + b"\0" * 50
    assert [r for _, r in Records(io.BytesIO(stored), "gz", "").take(0, len(stored))] == [b"a\n", b"b\n"]


def test_what_was_taken_is_the_position():
    """A reader's position is the end of what it gave, so that a kept one is used only from there on."""
    reader = Records(io.BytesIO(b"a\nb\nc\n"), "", "")
    assert list(reader.take(0, 3)) == [(0, b"a\n"), (2, b"b\n")]
    assert reader.position == 3
    assert list(reader.take(3, 6)) == [(4, b"c\n")]
