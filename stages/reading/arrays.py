"""NumPy's .npy and .npz: ranges of the first axis, of which nothing else is read unless it is compressed.

A range is read, not mapped: where a mapped file is cut meanwhile, its reader dies of SIGBUS.
"""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.runs import Chunk
from torchrelay.errors import InputError
from torchrelay.stages.reading.cursors import CURSORS
from torchrelay.stages.reading.files import open_file, shown
from torchrelay.stages.reading.raw import Raw, ids

__all__ = ["ARRAY_COLUMN", "Header", "array_headers", "read_arrays"]

ARRAY_COLUMN = "array"
"""The one column of a .npy file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a .npy file says of its array, and where its bytes begin."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    begin: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def _header(file: Any, where: str) -> Header:
    npy = np.lib.format
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format is not read; its fields have names beyond Latin-1")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise InputError(f"{where} is no .npy array: {error}") from error
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, which are not read because that could run any code")
    for kind in [dtype[n] for n in dtype.names] if dtype.names else [dtype]:
        if kind.base.kind not in "biufcSU":
            raise InputError(f"{where}: {kind} is not carried; store numbers or text")
    if not shape:
        raise InputError(f"{where} is one value; the first axis must be the rows")
    return Header(tuple(shape), bool(fortran), dtype, file.tell())


def array_headers(path: str, format: str, file: BinaryIO) -> dict[str, Header]:
    """Column to header, of .npy or .npz; raises InputError where it is none, or columns differ in their rows."""
    if format == "npy":
        header = _header(file, shown(path))
        _check_size(path, header, file)
        return {ARRAY_COLUMN: header}
    try:
        with zipfile.ZipFile(file) as packed:
            headers = {}
            for info in packed.infolist():
                with packed.open(info) as member:
                    headers[info.filename.removesuffix(".npy")] = _header(member, f"{shown(path)}: {info.filename!r}")
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise InputError(f"{shown(path)} is no .npz file, or was cut: {error}") from error
    rows = {name: h.shape[0] for name, h in headers.items()}
    if not rows or len(set(rows.values())) > 1:
        raise InputError(f"{shown(path)}: its arrays must be columns of the same rows, not {rows}")
    return headers


def _check_size(path: str, header: Header, file: BinaryIO) -> None:
    size = file.seek(0, 2)
    need = header.begin + header.shape[0] * header.row_bytes
    if size < need:
        raise InputError(f"{shown(path)} was cut: {need} bytes are announced, {size} are there")


class _Arrays:
    """The open file with its headers; a packed member is unpacked forward."""

    def __init__(self, chunk: Chunk) -> None:
        self.position = 0
        self.file = open_file(chunk.path, chunk.options.get("fingerprint"))
        self._members: dict[str, Any] = {}
        try:
            self.headers = array_headers(chunk.path, chunk.format, self.file)
            if chunk.format == "npz":
                archive = zipfile.ZipFile(self.file)
                for name, info in ((i.filename.removesuffix(".npy"), i) for i in archive.infolist()):
                    if info.compress_type == zipfile.ZIP_STORED:
                        begin = _begin_of(self.file, info) + self.headers[name].begin
                        self.headers[name] = replace(self.headers[name], begin=begin)
                    else:
                        self._members[name] = archive.open(info)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        for member in self._members.values():
            member.close()
        self.file.close()

    def rows(self, name: str, start: int, end: int) -> np.ndarray[Any, Any]:
        header = self.headers[name]
        file = self._members.get(name, self.file)
        if header.fortran and len(header.shape) > 1:
            # Rows lie scattered over the whole array.
            file.seek(header.begin)
            flat = np.frombuffer(file.read(header.shape[0] * header.row_bytes), header.dtype)
            return flat.reshape(header.shape, order="F")[start:end]
        file.seek(header.begin + start * header.row_bytes)
        # numpy takes large memory in large pages, which is in place several times as fast as that of bytes.
        rows = np.empty((end - start, *header.shape[1:]), header.dtype)
        room = rows.reshape(-1).view(np.uint8).data
        come = 0
        while come < len(room):
            count = file.readinto(room[come:])
            if not count:
                raise EOFError(f"{come} bytes of {len(room)} are there")
            come += count
        return rows


def _begin_of(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header and the two names of varying length in it."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return int(info.header_offset + 30 + name + extra)


def read_arrays(chunk: Chunk, wanted: frozenset[str] | None) -> Raw:
    """Rows of a chunk; a structured array has a column per field."""
    key = (chunk.path, chunk.format, chunk.options.get("fingerprint"))
    columns: dict[str, Column] = {}
    with CURSORS.borrow(key, chunk.start, lambda: _Arrays(chunk)) as arrays:
        try:
            for name, header in arrays.headers.items():
                names = header.dtype.names
                if wanted is None or name in wanted or wanted & set(names or ()) or len(arrays.headers) == 1:
                    rows = arrays.rows(name, chunk.start, chunk.end)
                    columns |= {n: _native(rows[n]) for n in names} if names else {name: _native(rows)}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            where = f"{shown(chunk.path)}, rows {chunk.start} to {chunk.end}"
            raise InputError(f"{where}: cannot be read: {error}") from error
        arrays.position = chunk.end
    count = chunk.end - chunk.start
    nbytes = sum(c.nbytes for c in columns.values() if isinstance(c, np.ndarray))
    return Raw(ids([chunk.source] * count), ids(range(chunk.start, chunk.end)), columns, nbytes=nbytes)


def _native(array: np.ndarray[Any, Any]) -> Column:
    if array.dtype.kind in "SU":
        texts: list[Any] = array.tolist()
        return texts
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
