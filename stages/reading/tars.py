"""WebDataset shards: a tar whose files `key.jpg`, `key.json` ... that follow each other are one row.

Columns are named by what stands behind the first dot (`jpg`, `seg.png`), and `__key__` is what stands before it. `row`
is the sample's number in the tar. A tar has no index, so it is read forward; only headers, and what is wanted.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from torchrelay.config.runs import Chunk
from torchrelay.errors import InputError
from torchrelay.stages.reading.cursors import CURSORS
from torchrelay.stages.reading.files import open_file, shown
from torchrelay.stages.reading.images import IMAGE_SUFFIXES
from torchrelay.stages.reading.raw import MISSING, BadRow, Raw, Unreadable, ids

__all__ = ["KEY_COLUMN", "Sample", "Samples", "count_samples", "read_tar"]

KEY_COLUMN = "__key__"
_TEXTS = frozenset({"txt", "text", "caption", "transcript"})
_INTEGERS = frozenset({"cls", "cls2", "index", "inx", "id"})
_JSON = frozenset({"json", "jsn"})
# What a member that is no image is read as holds at most this much; images are bounded by their pixels.
_MOST_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's files: where in the tar they begin and end, by extension."""

    number: int
    offset: int
    key: str
    members: dict[str, tuple[int, int]]


class Samples:
    """A forward reader of one tar. `take` gives the samples whose first header lies in a range of bytes."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.position = 0
        self.file = file
        self._path = path
        self._number = 0
        self._ahead: Sample | None = None
        self._next: tarfile.TarInfo | None = None
        self._ended = False
        # Of the last header that was read: damage belongs to the chunk in which it lies.
        self._header_at = 0
        self._damage: InputError | None = None
        try:
            self._tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # close() closes the file below it
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{shown(path)} is no tar file: {error}") from error
        self._advance()

    def close(self) -> None:
        self.file.close()

    def take(self, start: int, end: int) -> Iterator[Sample | InputError]:
        """Samples that begin in `[start, end)`; damage of the tar is given as the last one. Iterate to the end."""
        while True:
            if self._ahead is None:
                self._ahead = self._read_sample()
            sample = self._ahead
            if sample is None or sample.offset >= end:
                break
            self._ahead = None
            if sample.offset >= start:
                yield sample
        if sample is None and self._damage is not None and self._header_at < end:
            damage, self._damage = self._damage, None
            if self._header_at >= start:
                yield damage
        self.position = end

    @property
    def number(self) -> int:
        """Number of the next sample."""
        return self._number

    def _advance(self) -> None:
        """The next regular file's header, into `_next`."""
        self._next = None
        while not self._ended:
            try:
                info = self._tar.next()
            except (tarfile.TarError, EOFError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self._damage = InputError(f"the tar is cut or damaged behind byte {self._header_at}: {error}")
                info = None
            # It keeps each header for look-ups by name, which nobody does here.
            self._tar.members = []  # type: ignore[attr-defined]  # a public name that typeshed does not list
            self._ended = info is None
            if self._ended and self._damage is None and self._block().strip(b"\0"):
                # TarFile takes a broken header for the end.
                self._damage = InputError(f"the tar is damaged: no file's header is at byte {self._tar.offset}")
            self._header_at = self._header_at if info is None else info.offset
            if info is not None and info.isreg():
                self._next = info
                return

    def _block(self) -> bytes:
        self.file.seek(self._tar.offset)
        return self.file.read(tarfile.BLOCKSIZE)

    def _read_sample(self) -> Sample | None:
        first = self._next
        if first is None:
            return None
        key, extension = _split(first.name)
        members = {extension: (first.offset_data, first.size)}
        self._advance()
        while self._next is not None:
            other, extension = _split(self._next.name)
            if other != key or extension in members:
                break
            members[extension] = (self._next.offset_data, self._next.size)
            self._advance()
        self._number += 1
        return Sample(self._number - 1, first.offset, key, members)


def _split(name: str) -> tuple[str, str]:
    """`a/b.seg.png` is (`a/b`, `seg.png`), as WebDataset has it."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, extension.lower()


def read_tar(chunk: Chunk, wanted: frozenset[str] | None) -> Raw:
    """The samples of a chunk; files of a sample that are missing are MISSING."""
    key = (chunk.path, chunk.format, chunk.options.get("fingerprint"))
    most = chunk.options.get("max_rows")
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    nbytes = 0
    with CURSORS.borrow(key, chunk.start, lambda: _begin(chunk)) as samples:
        for sample in samples.take(chunk.start, chunk.end):
            if most is not None and len(numbers) + len(bad) >= most:
                continue
            if isinstance(sample, InputError):
                bad.append(BadRow(chunk.source, samples.number, type(sample).__name__, str(sample)))
                continue
            row: dict[str, Any] = {KEY_COLUMN: sample.key}
            for extension, (at, size) in sample.members.items():
                if wanted is None or extension in wanted:
                    row[extension] = _member(samples.file, at, size, extension)
                    nbytes += size
            rows.append(row)
            numbers.append(sample.number)
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {name: [row.get(name, MISSING) for row in rows] for name in names}
    images = frozenset(n for n in names if "." + n.rpartition(".")[2] in IMAGE_SUFFIXES)
    return Raw(ids([chunk.source] * len(rows)), ids(numbers), columns, bad, nbytes, images)


def count_samples(chunk: Chunk) -> int:
    """The rows of a chunk, damage counted as one, as it is a bad row."""
    key = (chunk.path, chunk.format, chunk.options.get("fingerprint"))
    with CURSORS.borrow(key, chunk.start, lambda: _begin(chunk)) as samples:
        return sum(1 for _ in samples.take(chunk.start, chunk.end))


def _begin(chunk: Chunk) -> Samples:
    file = open_file(chunk.path, chunk.options.get("fingerprint"))
    try:
        return Samples(chunk.path, file)
    except BaseException:
        file.close()
        raise


def _member(file: BinaryIO, at: int, size: int, extension: str) -> Any:
    """A file's value by its extension; never unpickled."""
    if size > _MOST_MEMBER_BYTES:
        return Unreadable("InputError", f"{extension}: {size} bytes are over the limit of {_MOST_MEMBER_BYTES}")
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        return Unreadable("InputError", f"{extension}: the tar was cut within this file")
    kind = extension.rpartition(".")[2]
    try:
        if kind in _TEXTS:
            return data.decode()
        if kind in _INTEGERS:
            return int(data)
        if kind in _JSON:
            return json.loads(data.decode())
        if kind == "npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, RecursionError, EOFError) as error:
        return Unreadable.of(error, f"{extension}: ")
    return data
