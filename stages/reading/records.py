"""Rows of text files as bytes: lines, and CSV records, whose line breaks may stand in quotes.

Each has an offset, where its first byte lies in the unpacked text, and a place, where that byte lies in the file as it
is stored. A chunk is a range of places and has the rows that begin there, so that every row is in one chunk however the
file is cut. Lines of a plain file are read from the chunk's start on (`lines_of`); what is compressed or CSV is read
forward from the file's start (`Records`), since only from there can be told where its rows begin.
"""

from __future__ import annotations

import bisect
import re
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, Final

import numpy as np

from torchrelay.errors import DecodeError
from torchrelay.stages.reading.unpacking import Piece, plain_pieces, unpacked_pieces

__all__ = ["MOST_RECORD_BYTES", "Record", "Records", "lines_of"]

MOST_RECORD_BYTES: Final = 64 << 20
"""A longer line is a bad row; it is passed over without being held."""
_EXTEND = 64 << 10
_WINDOW = 1 << 20
Record = tuple[int, bytes | DecodeError]
"""Offset and bytes, line break included; an error where they are too long or damaged."""


def lines_of(file: BinaryIO, start: int, end: int, most: int = MOST_RECORD_BYTES) -> Iterator[Record]:
    """The lines of a plain file that begin in `[start, end)`."""
    # A line begins at `start` if the byte before ends one.
    at = _after_break(file, start - 1, end) if start else 0
    if at >= end:
        return
    file.seek(at)
    data = file.read(end - at)
    begin = 0
    for stop in _breaks(data):
        yield at + begin, _bounded(data[begin:stop], most)
        begin = stop
    if begin < len(data):
        yield at + begin, _bounded(data[begin:] + _rest_of_line(file, most - (len(data) - begin)), most)


def _after_break(file: BinaryIO, at: int, end: int) -> int:
    """Where the first line begins behind `at`; `end` or more where none does before it."""
    file.seek(at)
    while at < end:
        piece = file.read(min(_WINDOW, end - at))
        if not piece:
            return end
        found = piece.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(piece)
    return end


def _rest_of_line(file: BinaryIO, most: int) -> bytes:
    pieces, length = [], 0
    while length <= most:
        piece = file.read(_EXTEND)
        found = piece.find(b"\n")
        pieces.append(piece if found < 0 else piece[: found + 1])
        length += len(pieces[-1])
        if found >= 0 or not piece:
            break
    return b"".join(pieces)


def _bounded(record: bytes, most: int) -> bytes | DecodeError:
    return record if len(record) <= most else _too_long(most)


def _too_long(most: int) -> DecodeError:
    return DecodeError(f"the row is longer than {most} bytes")


def _breaks(data: bytes) -> list[int]:
    """Where each line ends, behind its line break."""
    ends: list[int] = (np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1).tolist()
    return ends


class Records:
    """A forward reader of one text file. `take` gives the rows that begin in a range of places, each once.

    Args:
        file: from its start; closed by `close`.
        compression: gz, zst or "" for none.
        delimiter: of CSV, whose records may hold line breaks in quotes; "" for lines.
        most: bytes of the longest row.
    """

    def __init__(self, file: BinaryIO, compression: str, delimiter: str, most: int = MOST_RECORD_BYTES) -> None:
        self.position = 0
        self._file = file
        self._packed = bool(compression)
        self._pieces: Iterator[Piece] = unpacked_pieces(file, compression) if compression else plain_pieces(file)
        self._tokens = _csv_tokens(delimiter) if delimiter else None
        self._most = most
        # The text that is held, its offset, where its next row begins, and the ends of rows that were found.
        self._text = b""
        self._offset = 0
        self._begin = 0
        self._ends: deque[int] = deque()
        # Offset and place of the pieces that the text was made of.
        self._piece_offsets: list[int] = []
        self._piece_places: list[int] = []
        # Offset and place of a row that is passed over because it is too long.
        self._dropped: tuple[int, int] | None = None
        self._damage: DecodeError | None = None
        self._ended = False

    def close(self) -> None:
        self._file.close()

    def take(self, start: int, end: int) -> Iterator[Record]:
        """The rows that begin in `[start, end)`, which lies behind what was taken before.

        Iterate to the end: what was read of later rows stays for the next call. Damage is given as the last row.
        """
        while True:
            begun = self._begin < len(self._text) or self._dropped is not None
            whole = bool(self._ends) or (self._ended and (begun or self._damage is not None))
            if (begun or whole) and self._next()[1] >= end:
                break
            if whole:
                (offset, place), record = self._next(), self._pop()
                if place >= start:
                    yield offset, record
            elif self._ended:
                break
            else:
                self._read_on()
        self.position = end

    def _next(self) -> tuple[int, int]:
        """Offset and place of the next row's first byte."""
        if self._dropped is not None:
            return self._dropped
        offset = self._offset + self._begin
        if not self._packed:
            return offset, offset
        at = bisect.bisect_right(self._piece_offsets, offset) - 1
        return offset, self._piece_places[at] if at >= 0 else 0

    def _pop(self) -> bytes | DecodeError:
        last = not self._ends
        stop = len(self._text) if last else self._ends.popleft()
        record, self._begin = self._text[self._begin : stop], stop
        if last and self._damage is not None:
            damage, self._damage, self._dropped = self._damage, None, None
            return damage
        if self._dropped is not None:
            self._dropped = None
            return _too_long(self._most)
        return _bounded(record, self._most)

    def _read_on(self) -> None:
        """Reads the next text behind an unfinished row, and finds where rows end in it.

        As much is read as is held, so that a long row is not looked at again for every piece.
        """
        held = self._text[self._begin :]
        self._offset, self._begin = self._offset + self._begin, 0
        passed = max(bisect.bisect_right(self._piece_offsets, self._offset) - 1, 0)
        del self._piece_offsets[:passed], self._piece_places[:passed]
        pieces, length = [held], len(held)
        want = length + max(_WINDOW, length)
        try:
            while length < want and not self._ended:
                place, piece = next(self._pieces, (0, b""))
                self._ended = not piece
                if piece:
                    self._piece_offsets.append(self._offset + length)
                    self._piece_places.append(place)
                    pieces.append(piece)
                    length += len(piece)
        except DecodeError as error:
            self._damage, self._ended = error, True
        self._text = b"".join(pieces)
        self._find_ends(len(held))
        if not self._ends and length > self._most:
            self._pass_over()

    def _find_ends(self, seen: int) -> None:
        if self._tokens is None or self._dropped is not None:
            self._ends.extend(seen + end for end in _breaks(self._text[seen:]))
            return
        for match in self._tokens.finditer(self._text):
            if match.group() == b"\n":
                self._ends.append(match.end())

    def _pass_over(self) -> None:
        """Lets go of a row that is too long. Where it ends in CSV cannot be told: a quote may be open."""
        self._dropped = self._next()
        if self._tokens is not None:
            hint = "; is a quote never closed? Nothing behind it was read"
            self._damage, self._ended = DecodeError(f"{_too_long(self._most)}{hint}"), True
        self._offset += len(self._text)
        self._text = b""


def _csv_tokens(delimiter: str) -> re.Pattern[bytes]:
    """Quoted fields and line breaks. A quote opens a field only where the field begins.

    One that is not closed reaches to the end of the text, and so does one whose closing quote is the last byte, which
    may be half of a doubled one: either way no line break behind it is found before more was read.
    """
    before = rb"(?:(?<![^\r\n" + re.escape(delimiter.encode()) + rb"])|(?<=\A\xef\xbb\xbf))"
    return re.compile(before + rb'"(?:[^"]++|"")*+"?|\n')
