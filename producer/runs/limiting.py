"""The first rows of a plan alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torchrelay.config.runs import Chunk
from torchrelay.errors import ConfigError, InputError
from torchrelay.stages.reading.files import shown
from torchrelay.stages.reading.tars import count_samples
from torchrelay.stages.reading.texts import records_of

__all__ = ["count_rows", "limited"]


def limited(chunks: Iterable[Chunk], rows: int) -> Iterator[Chunk]:
    """Chunks with `rows` rows in all, bad ones counted; the last is shortened.

    Where a plan has bytes, the rows of its chunks are counted by reading them, no further than the limit.
    """
    left = rows
    for chunk in chunks:
        if left <= 0:
            return
        try:
            count = count_rows(chunk)
        except (InputError, OSError) as error:
            raise ConfigError(f"the rows of {shown(chunk.path)} cannot be counted: {error}") from error
        yield chunk if count <= left else _shortened(chunk, left)
        left -= count


def count_rows(chunk: Chunk) -> int:
    """How many rows a chunk has, bad ones counted; where it has bytes, they are read for it.

    Raises InputError and OSError where they cannot be.
    """
    if chunk.unit == "rows":
        return chunk.end - chunk.start
    return count_samples(chunk) if chunk.format == "tar" else sum(1 for _ in records_of(chunk))


def _shortened(chunk: Chunk, rows: int) -> Chunk:
    if chunk.unit == "bytes":
        return replace(chunk, options={**chunk.options, "max_rows": rows})
    options = dict(chunk.options)
    if "files" in options:
        options["files"] = options["files"][:rows]
    return replace(chunk, end=chunk.start + rows, options=options)
