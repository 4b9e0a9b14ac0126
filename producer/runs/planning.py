"""Planning a run: from an input's text to its files, and from those to chunks.

    sources = find_sources("docs/*.parquet")
    for chunk in plan_chunks(sources, ChunkSize(rows=512)): ...

Cheap, and the same every time: listings, footers and the head of a file are read, never its rows (but for `limit`).
Chunks come one by one, so that memory does not grow with the dataset. Sources that are added later are planned by a
call of their own with `first_number`, which leaves the chunks of the others as they were.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torchrelay.config.columns import Types
from torchrelay.config.runs import Chunk, ChunkSize, ReadOptions, Source
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.cutting import columns_of, cut_images, cut_source, found_delimiter
from torchrelay.producer.runs.formats import check_format, one_format
from torchrelay.producer.runs.limiting import limited
from torchrelay.producer.runs.listing import list_input, root_of_input
from torchrelay.stages.reading.choosing import OPEN_FORMATS, resolve
from torchrelay.stages.reading.files import shown
from torchrelay.stages.reading.kept import kept_names
from torchrelay.stages.reading.texts import DELIMITERS, other_delimiter

__all__ = ["Totals", "check_columns", "find_sources", "input_fingerprint", "measure", "plan_chunks", "root_of"]

Input = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_sources(data: Input, format: str | None = None) -> list[Source]:
    """The files that an input names, numbered in order.

    Args:
        data: a file, a folder of any depth, a glob, a folder that Hugging Face's `save_to_disk` wrote, local or an
            fsspec URL; or several of them.
        format: where the names do not tell it.

    Raises ConfigError for what is missing, empty, of no known or of several formats.
    """
    check_format(format)
    sources: list[Source] = []
    seen: set[str] = set()
    for text in _texts(data):
        listing = list_input(text)
        paths = [path for path, _ in listing.files]
        kind, mine = ("arrow", [True] * len(paths)) if listing.arrow else one_format(paths, format, shown(text))
        if sources and sources[0].format != kind:
            raise ConfigError(
                f"one run reads one format; {shown(text)} is {kind}, the inputs before are {sources[0].format}"
            )
        for (path, facts), chosen in zip(listing.files, mine, strict=True):
            if path in seen:
                raise ConfigError(f"{shown(path)} is named twice; its rows would be read twice")
            if chosen:
                seen.add(path)
                sources.append(Source(len(sources), path, kind, facts.nbytes, facts.fingerprint))
    return sources


def root_of(data: Input) -> str:
    """The folder below which the `path` column of images is given: the input's folder, or a glob's fixed part."""
    roots = [root_of_input(text) for text in _texts(data)]
    return roots[0] if len(roots) == 1 else _common(roots)


def _texts(data: Input) -> Iterator[str]:
    texts = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not texts:
        raise ConfigError("a run needs an input; none was given")
    for text in texts:
        if not isinstance(text, str | os.PathLike):
            raise ConfigError(f"an input is a path, a glob or a URL, not {text!r:.80}")
        yield os.fspath(text)


def plan_chunks(
    sources: Iterable[Source],
    size: ChunkSize | None = None,
    *,
    limit: int | None = None,
    root: str | None = None,
    first_number: int = 0,
    delimiter: str | None = None,
) -> Iterator[Chunk]:
    """The chunks of these sources, in order.

    Args:
        sources: as `find_sources` numbered them.
        size: how much one job takes; the same size gives the same chunks.
        limit: rows to stop after. Where the rows of files are not counted anywhere, those before it are read here.
        root: folder below which images are named (`root_of`); the folder that they share where it is not given.
        first_number: of the first chunk, where others were planned before.
        delimiter: of CSV; by each file's header where it is not given.

    Raises ConfigError, when its turn comes, for a file that is not of its format or was cut.
    """
    if limit is not None and (type(limit) is not int or limit < 0):
        raise ConfigError(f"limit is a number of rows from 0, not {limit!r:.40}")
    listed = list(sources)
    chunks = _chunks(listed, size or ChunkSize(), root, first_number, delimiter)
    return chunks if limit is None else limited(chunks, limit)


def _chunks(
    sources: list[Source], size: ChunkSize, root: str | None, number: int, delimiter: str | None
) -> Iterator[Chunk]:
    images = [s for s in sources if s.format == "image"]
    folder = root if root is not None else _common([os.path.dirname(s.path) for s in images]) if images else ""
    for chunk in cut_images(images, size, folder, number):
        yield chunk
        number = chunk.number + 1
    for source in sources:
        if source.format == "image":
            continue
        try:
            for chunk in cut_source(source, size, number, delimiter):
                yield chunk
                number = chunk.number + 1
        except (InputError, OSError) as error:
            raise ConfigError(f"{shown(source.path)} cannot be planned: {error}") from error


def _common(folders: Sequence[str]) -> str:
    """The nearest folder that all of these lie in; of URLs too."""
    split = [f.split("/") for f in folders]
    first, last = min(split), max(split)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "/".join(first[:same]) or "/"


def input_fingerprint(sources: Iterable[Source]) -> str:
    """One text for the whole input: it changes when a file is added, removed, renamed or changed."""
    digest = hashlib.sha256()
    for source in sources:
        for part in (source.path, source.format, source.fingerprint):
            raw = part.encode("utf-8", "surrogateescape")
            digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def check_columns(sources: Sequence[Source], options: ReadOptions, types: Types | None) -> None:
    """Raises ConfigError where the first source has not the columns that are asked for, with those that it has.

    Of JSONL and tar, where each row has its own, the first rows tell; a kept column need not be among theirs.
    """
    first = next((s for s in sources if s.nbytes), None)
    if first is None:
        return
    if options.delimiter is not None and first.format not in DELIMITERS:
        raise ConfigError(f"delimiter {options.delimiter!r:.20} is for CSV; {shown(first.path)} is {first.format}")
    asked = replace(options, keep=()) if first.format in OPEN_FORMATS else options
    columns = None
    try:
        columns = columns_of(first, options.delimiter)
        resolve(first.format, columns, asked, types)
    except (InputError, OSError) as error:
        hint = _delimiter_hint(first, options, types, columns) if first.format in DELIMITERS and columns else ""
        raise ConfigError(f"{shown(first.path)}: {error}{hint}") from error


def _delimiter_hint(source: Source, options: ReadOptions, types: Types | None, columns: list[str]) -> str:
    """What to do where a header lacks columns because its fields are separated by something else."""
    used = options.delimiter or found_delimiter(source)
    names = [*(options.columns.get(n, n) for n in types or options.columns), *kept_names(options)]
    other = other_delimiter(columns, used, names)
    if other is None:
        return ""
    return f". Its header was taken to be separated by {used!r}; if {other!r} separates it, say --delimiter {other!r}"


@dataclass(frozen=True, slots=True)
class Totals:
    """How much a plan is."""

    chunks: int
    rows: int | None
    """None where no file says it."""


def measure(chunks: Iterable[Chunk]) -> Totals:
    """Walks a plan once, without keeping it: finds files that cannot be planned before a run begins."""
    count, rows, known = 0, 0, True
    for chunk in chunks:
        count += 1
        known = known and chunk.unit == "rows"
        rows += chunk.end - chunk.start
    return Totals(count, rows if known else None)
