"""Cutting one source into chunks, format by format, from what its footer, header or first bytes say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torchrelay.config.runs import Chunk, ChunkSize, Source
from torchrelay.errors import ConfigError, DecodeError
from torchrelay.producer.runs.formats import compression_of
from torchrelay.stages.reading.arrays import array_headers
from torchrelay.stages.reading.files import open_file, shown
from torchrelay.stages.reading.images import IMAGE_COLUMN, PATH_COLUMN
from torchrelay.stages.reading.tables import arrow_batches, parquet_file
from torchrelay.stages.reading.tars import KEY_COLUMN, Samples
from torchrelay.stages.reading.texts import DELIMITERS, TEXT_COLUMN, csv_header, delimiter_of
from torchrelay.stages.reading.unpacking import unpacked_pieces

__all__ = ["columns_of", "cut_images", "cut_source", "found_delimiter", "unpacked_head"]

_HEAD_BYTES = 64 << 10
_HEAD_SAMPLES = 64
_MOST_HEAD_BYTES = 16 << 20
# How much an image file grows by decoding, roughly.
_IMAGE_GROWTH = 8
Piece = tuple[int, int]


def cut_source(source: Source, size: ChunkSize, number: int, delimiter: str | None = None) -> Iterator[Chunk]:
    """The chunks of a file, of CSV with this delimiter where it is given.

    Raises InputError where it is not of its format, ConfigError for an unknown one.
    """
    if source.format in ("jsonl", "text", "tar", *DELIMITERS):
        yield from _cut_bytes(source, size, number, delimiter)
        return
    with open_file(source.path, source.fingerprint) as file:
        if source.format == "parquet":
            metadata = parquet_file(source.path, file).metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            pieces = _merged(((g.num_rows, g.total_byte_size) for g in groups), size)
        elif source.format == "arrow":
            pieces = _merged(((b.num_rows, b.nbytes) for b in arrow_batches(source.path, file)[1]), size)
        elif source.format in ("npy", "npz"):
            headers = array_headers(source.path, source.format, file).values()
            rows = next(iter(headers)).shape[0]
            pieces = _merged([(rows, rows * sum(h.row_bytes for h in headers))], size)
        else:
            raise ConfigError(f"{shown(source.path)}: format {source.format!r:.40} is not known")
        options = {"fingerprint": source.fingerprint}
        for i, (start, end) in enumerate(pieces):
            yield Chunk(number + i, source.number, source.path, source.format, start, end, "rows", start, options)


def _merged(groups: Iterable[Piece], size: ChunkSize) -> Iterator[Piece]:
    """Ranges of rows: groups of (rows, bytes) are joined while they fit, and cut evenly where one is too large."""
    start, rows, nbytes = 0, 0, 0
    for group_rows, group_bytes in groups:
        if rows and (rows + group_rows > size.rows or nbytes + group_bytes > size.nbytes):
            yield start, start + rows
            start, rows, nbytes = start + rows, 0, 0
        pieces = max(-(-group_rows // size.rows), min(-(-group_bytes // size.nbytes), group_rows))
        if pieces > 1:
            for i in range(pieces):
                yield start + group_rows * i // pieces, start + group_rows * (i + 1) // pieces
            start += group_rows
        else:
            rows, nbytes = rows + group_rows, nbytes + group_bytes
    if rows:
        yield start, start + rows


def _cut_bytes(source: Source, size: ChunkSize, number: int, delimiter: str | None) -> Iterator[Chunk]:
    """Even ranges of the stored file, of as many bytes as hold about as many rows as are asked for."""
    if not source.nbytes:
        return
    compression = compression_of(source.path)
    options: dict[str, Any] = {"fingerprint": source.fingerprint}
    if compression:
        options["compression"] = compression
    with open_file(source.path, source.fingerprint) as file:
        if source.format == "tar":
            row_bytes, growth = _tar_head(source, file), 1.0
        else:
            head = file.read(_HEAD_BYTES)
            text = unpacked_head(head, compression)
            row_bytes, growth = len(head) / max(text.count(b"\n"), 1), max(len(text) / len(head), 1.0)
            if source.format in DELIMITERS:
                options["delimiter"] = delimiter or delimiter_of(source.format, text)
    target = max(int(min(size.nbytes / growth, size.rows * row_bytes)), 1)
    pieces = -(-source.nbytes // target)
    for i in range(pieces):
        start, end = source.nbytes * i // pieces, source.nbytes * (i + 1) // pieces
        yield Chunk(number + i, source.number, source.path, source.format, start, end, "bytes", None, options)


def unpacked_head(head: bytes, compression: str) -> bytes:
    """The text that a file's first bytes hold, no more than some MiB of it."""
    if not compression:
        return head
    pieces: list[bytes] = []
    try:
        for _, piece in unpacked_pieces(io.BytesIO(head), compression):
            pieces.append(piece)
            if sum(map(len, pieces)) > _MOST_HEAD_BYTES:
                break
    except DecodeError:
        pass  # the head ends within a stream; whoever reads the file says what is damaged
    return b"".join(pieces)


def _tar_head(source: Source, file: Any) -> float:
    """Bytes per sample of a tar's first samples; raises InputError where it is no tar."""
    samples = Samples(source.path, file)
    count, last = 0, 0
    for sample in samples.take(0, source.nbytes):
        if isinstance(sample, Exception) or count == _HEAD_SAMPLES:
            break
        count += 1
        last = max(at + length for at, length in sample.members.values())
    return last / count if count else float(source.nbytes)


def cut_images(images: Sequence[Source], size: ChunkSize, folder: str, number: int) -> Iterator[Chunk]:
    """Chunks of image files that follow each other, each of which is one row."""
    prefix = folder.rstrip("/") + "/"
    group: list[Source] = []
    nbytes = 0
    for source in images:
        if not source.path.startswith(prefix):
            raise ConfigError(f"{shown(source.path)} does not lie in {shown(folder)}, the folder of this run's images")
        grown = source.nbytes * _IMAGE_GROWTH
        full = len(group) == size.rows or nbytes + grown > size.nbytes
        if group and (full or source.number != group[-1].number + 1):
            yield _image_chunk(group, folder, prefix, number)
            group, nbytes, number = [], 0, number + 1
        group.append(source)
        nbytes += grown
    if group:
        yield _image_chunk(group, folder, prefix, number)


def _image_chunk(group: list[Source], folder: str, prefix: str, number: int) -> Chunk:
    names = [s.path.removeprefix(prefix) for s in group]
    return Chunk(number, group[0].number, folder, "image", 0, len(names), "rows", 0, {"files": names})


def columns_of(source: Source, delimiter: str | None = None) -> list[str] | None:
    """A source's columns; of JSONL and tar those of its first rows, None where these tell nothing.

    Raises InputError where they cannot be read.
    """
    if source.format in ("jsonl", "tar"):
        return _columns_of_head(source)
    if source.format == "image":
        return [IMAGE_COLUMN, PATH_COLUMN]
    if source.format == "text":
        return [TEXT_COLUMN]
    if source.format in DELIMITERS:
        compression = compression_of(source.path)
        delimiter = delimiter or found_delimiter(source)
        return csv_header(source.path, delimiter, compression, source.fingerprint)
    with open_file(source.path, source.fingerprint) as file:
        if source.format == "parquet":
            return list(parquet_file(source.path, file).schema_arrow.names)
        if source.format == "arrow":
            return list(arrow_batches(source.path, file)[0].names)
        headers = array_headers(source.path, source.format, file)
        return [name for n, h in headers.items() for name in h.dtype.names or (n,)]


def found_delimiter(source: Source) -> str:
    """What separates the fields of a CSV file, by its header."""
    with open_file(source.path, source.fingerprint) as file:
        return delimiter_of(source.format, unpacked_head(file.read(_HEAD_BYTES), compression_of(source.path)))


def _columns_of_head(source: Source) -> list[str] | None:
    names: dict[str, None] = {}
    with open_file(source.path, source.fingerprint) as file:
        if source.format == "tar":
            for sample in islice(Samples(source.path, file).take(0, source.nbytes), _HEAD_SAMPLES):
                names |= {} if isinstance(sample, Exception) else dict.fromkeys((KEY_COLUMN, *sample.members))
            return list(names) or None
        head = unpacked_head(file.read(_HEAD_BYTES), compression_of(source.path))
    for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a bad row, or cut by the head's end
        names |= dict.fromkeys(row) if isinstance(row, dict) else {}
    return list(names) or None
