"""Files planned and read as a run does it: found, cut into chunks that went through JSON, and each chunk read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchrelay.config.runs import Chunk, ChunkSize, ReadOptions
from torchrelay.config.types import parse_type
from torchrelay.producer.runs.planning import find_sources, plan_chunks, root_of
from torchrelay.stages.reading import BadRow, read_chunk


@dataclass
class AllRows:
    """What all chunks together gave."""

    ids: list[tuple[int, int]] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    key: list[Any] = field(default_factory=list)
    keep: dict[str, list[Any]] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    chunks: int = 0


def types_of(**columns: str) -> dict[str, Any]:
    """Column types from their texts."""
    return {name: parse_type(text) for name, text in columns.items()}


def read_all(
    data: Any,
    types: dict[str, Any] | None = None,
    options: ReadOptions | None = None,
    size: ChunkSize | None = None,
    format: str | None = None,
    limit: int | None = None,
) -> AllRows:
    """Every row of an input, through its plan."""
    sources = find_sources(data, format)
    plan = plan_chunks(sources, size or ChunkSize(), root=root_of(data), limit=limit)
    return read_chunks((Chunk.decode(c.encode()) for c in plan), types, options)


def read_chunks(chunks: Iterator[Chunk], types: Any = None, options: ReadOptions | None = None) -> AllRows:
    """Every row of these chunks."""
    out = AllRows()
    for chunk in chunks:
        read = read_chunk(chunk, options or ReadOptions(), types)
        out.chunks += 1
        out.ids += zip(read.sources.tolist(), read.rows.tolist(), strict=True)
        for name, column in read.table.items():
            assert len(column) == len(read)
            out.columns.setdefault(name, []).extend(column)
        if read.kept is not None:
            assert read.kept.num_rows == len(read)
            asked = options or ReadOptions()
            for name, column in read.kept.to_pydict().items():
                if name == asked.key:
                    out.key += column
                if name in asked.keep:
                    out.keep.setdefault(name, []).extend(column)
        out.bad += read.bad
    return out
