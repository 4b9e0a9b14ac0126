"""Reading a run's chunks inside a worker: descriptor in, rows of the pipeline's input out. Imports no redis.

`read_chunk` is all that a worker needs. Per format a module makes `Raw` rows under the dataset's names; `choosing`
makes the pipeline's columns of them. Libraries that only some formats need are imported when such a file is read.
"""

from __future__ import annotations

from torchrelay.config.columns import Types
from torchrelay.config.runs import Chunk, ReadOptions
from torchrelay.errors import InputError
from torchrelay.stages.reading.choosing import ReadResult, choose, wanted_columns
from torchrelay.stages.reading.raw import BadRow, Raw

__all__ = ["BadRow", "ReadResult", "read_chunk", "read_raw"]


def read_chunk(chunk: Chunk, options: ReadOptions, types: Types | None = None) -> ReadResult:
    """The rows of a chunk as the pipeline's input.

    Args:
        chunk: as planned.
        options: which dataset columns become which input columns, and what goes along.
        types: the pipeline's declared input columns; None or empty takes all columns as they are.

    Returns the rows that can enter the pipeline, with their ids, and each row that cannot with the reason.

    Raises InputError where nothing of the chunk can be read: its file is gone, has changed, is damaged, or lacks a
    column; trying again does not help. OSError where reading failed for another reason. ConfigError where an extra is
    missing.
    """
    raw = read_raw(chunk, wanted_columns(chunk.format, options, types))
    return choose(raw, chunk.format, options, types)


def read_raw(chunk: Chunk, wanted: frozenset[str] | None = None) -> Raw:
    """The rows of a chunk under the dataset's names; only the wanted columns need be there. Raises as `read_chunk`."""
    # Each reader is imported with its format, so that text needs no pyarrow, and a worker stays small.
    if chunk.format in ("text", "jsonl", "csv", "tsv"):
        from torchrelay.stages.reading.texts import read_text

        return read_text(chunk)
    if chunk.format == "parquet":
        from torchrelay.stages.reading.tables import read_parquet

        return read_parquet(chunk, wanted)
    if chunk.format == "arrow":
        from torchrelay.stages.reading.tables import read_arrow

        return read_arrow(chunk, wanted)
    if chunk.format == "image":
        from torchrelay.stages.reading.images import read_images

        return read_images(chunk, wanted)
    if chunk.format in ("npy", "npz"):
        from torchrelay.stages.reading.arrays import read_arrays

        return read_arrays(chunk, wanted)
    if chunk.format == "tar":
        from torchrelay.stages.reading.tars import read_tar

        return read_tar(chunk, wanted)
    raise InputError(f"format {chunk.format!r:.40} is not known here; the run was planned by another version")
