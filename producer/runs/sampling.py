"""A look at rows of files that have no schema: which values some columns have. Reads blocks, never whole files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from torchrelay.config.runs import Chunk, Source
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.cutting import unpacked_head
from torchrelay.producer.runs.formats import compression_of
from torchrelay.stages.reading.files import open_file
from torchrelay.stages.reading.tars import read_tar

__all__ = ["values_of_lines", "values_of_tars"]

_BLOCK_BYTES = 256 << 10
_MOST_BLOCKS = 128
_LONGEST_HEAD = 16 << 20
_TAR_BYTES, _TAR_ROWS, _MOST_TARS = 16 << 20, 64, 64
Values = dict[str, list[Any]]


def values_of_lines(sources: Sequence[Source], names: Sequence[str]) -> Values:
    """Values of these columns in JSONL files: of all rows of small inputs, of blocks all over larger ones."""
    seen: Values = {n: [] for n in names}
    filled = [s for s in sources if s.nbytes]
    some = filled[:: -(-len(filled) // _MOST_BLOCKS) or 1]
    for source in some:
        for line in _lines(source, max(_MOST_BLOCKS // len(some), 1)):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a bad row, or a piece of one
            for name in names if isinstance(row, dict) else ():
                if row.get(name) is not None:
                    seen[name].append(row[name])
    return seen


def _lines(source: Source, blocks: int) -> Iterator[bytes]:
    try:
        with open_file(source.path, source.fingerprint) as file:
            compression = compression_of(source.path)
            if compression:
                yield from unpacked_head(file.read(_BLOCK_BYTES), compression).split(b"\n")
                return
            blocks = min(blocks, -(-source.nbytes // _BLOCK_BYTES))
            for i in range(blocks):
                yield from _block(file, source.nbytes * i // blocks)
    except (InputError, ConfigError, OSError):
        return  # planning says what is wrong with it


def _block(file: BinaryIO, start: int) -> list[bytes]:
    file.seek(start)
    data = file.read(_BLOCK_BYTES)
    while not start and b"\n" not in data and len(data) < _LONGEST_HEAD and (more := file.read(len(data))):
        data += more
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines[1:] if start else lines


def values_of_tars(sources: Sequence[Source], names: Sequence[str]) -> Values:
    """Values of the first samples of tars."""
    seen: Values = {n: [] for n in names}
    wanted = frozenset(part for n in names for part in n.split(";"))
    for source in [s for s in sources if s.nbytes][:_MOST_TARS]:
        options = {"fingerprint": source.fingerprint, "max_rows": _TAR_ROWS}
        end = min(source.nbytes, _TAR_BYTES)
        try:
            raw = read_tar(Chunk(0, source.number, source.path, "tar", 0, end, "bytes", None, options), wanted)
        except (InputError, OSError):
            continue  # planning says what is wrong with it
        for name in names:
            for part in name.split(";"):
                seen[name] += list(raw.columns.get(part, ()))
    return seen
