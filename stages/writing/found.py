"""The parts that lie in a run's folder: which there are, whether they are whole, and their rows again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.runs import WriteOptions
from torchrelay.errors import DecodeError, RunConflict
from torchrelay.stages.writing.formats import Format, read_footer
from torchrelay.stages.writing.layout import Array, Layout
from torchrelay.stages.writing.record import PartId, PartName, PartRecord, parse_name
from torchrelay.stages.writing.stores import EMPTY, RECORDS, LocalStore, Store
from torchrelay.stages.writing.table import ID_COLUMNS

__all__ = [
    "Found",
    "Output",
    "Scan",
    "choose",
    "complete",
    "file_names",
    "find",
    "load",
    "part_names",
    "places_of",
    "read_part",
    "scan",
]


_READERS = 8


@dataclass(frozen=True)
class Output:
    """Where and how the parts of a run lie. `read_only`: nothing is written there, not even to finish a dead writer's
    work."""

    options: WriteOptions
    store: Store
    format: Format
    read_only: bool = False


class Found(NamedTuple):
    """A part that is whole. `name` is the file that holds its record."""

    name: str
    record: PartRecord
    nbytes: int


class Scan(NamedTuple):
    """All parts of one run. `parts` are whole; `broken` and `foreign` say what is wrong with other files so named."""

    parts: dict[tuple[int, int], list[Found]]
    broken: dict[str, str]
    foreign: dict[str, str]


def find(output: Output, part: PartId) -> Found | None:
    """The part, if it is there. Raises RunConflict when a file that is none of this run's has its name."""
    if output.store.links:
        end = output.format.suffix if output.format.inside else ".json"
        names = [f"{folder}{part.stem}{end}" for folder in _folders(output.format)]
    else:
        listed = part_names(output, part.stem)
        names = [n for n, name in listed if (name.chunk, name.round) == (part.chunk, part.round)]
    for name in names:
        try:
            found = _open(output, name)
        except FileNotFoundError:
            continue
        except DecodeError as error:
            if not output.store.links:
                continue
            raise RunConflict(
                f"output {output.store.where}: {name} is in the way: {error}; remove it, then go on with --resume"
            ) from error
        if found.record.part == part:
            return found
        if output.store.links:
            raise RunConflict(
                f"output {output.store.where}: {name} belongs to run {found.record.part.run}; move it away"
            )
    return None


def _folders(kind: Format) -> tuple[str, ...]:
    """Where records lie; a part without rows comes second, for one with rows counts where both are there."""
    return ("", f"{EMPTY}/") if kind.inside else (f"{RECORDS}/",)


def part_names(output: Output, begin: str = "") -> Iterator[tuple[str, PartName]]:
    """The names of files that hold the records of parts and begin so, by folder and then sorted."""
    end = output.format.suffix if output.format.inside else ".json"
    for folder in _folders(output.format):
        for name in output.store.sizes(folder, begin):
            parsed = parse_name(name.removesuffix(end)) if name.endswith(end) else None
            if parsed is not None:
                yield folder + name, parsed


def _open(output: Output, name: str) -> Found:
    """Raises FileNotFoundError, and DecodeError for what is no whole part."""
    store = output.store
    if output.format.inside:
        texts = read_footer(store, name)
        record = PartRecord.decode(texts)
        if int(texts["rows"]) != record.rows:
            raise DecodeError(f"{name} has {texts['rows']} rows, and says {record.rows}")
        return Found(name, record, store.size(name) or 0)
    try:
        texts = json.loads(store.read(name))
    except ValueError as error:
        raise DecodeError(f"{name} is no record of a part: {error}") from error
    record = PartRecord.decode(texts if isinstance(texts, dict) else {})
    complete(output, record)
    return Found(name, record, sum(file.nbytes for file in record.files))


def complete(output: Output, record: PartRecord) -> None:
    """Gives the files of a record their final names where its writer died before; raises DecodeError if they are not
    what it says."""
    store = output.store
    for file in record.files:
        size = store.size(file.name)
        if size is None and not output.read_only and isinstance(store, LocalStore) and store.links:
            try:
                store.add(store.tmp_folder() / file.made_as, file.name)
            except FileNotFoundError:
                pass
            size = store.size(file.name)
        if size != file.nbytes:
            came = "is missing" if size is None else f"has {size} bytes"
            raise DecodeError(f"{file.name} {came}, {file.nbytes} were written")


def scan(output: Output, run: str, known: Mapping[str, Found] | None = None) -> Scan:
    """Looks at every part of the folder; raises nothing for what is wrong with one.

    `known` are parts that were whole before, by name: where all files have their sizes still, none is opened again.
    """
    sizes = {
        f"{folder}{name}": nbytes
        for folder in ("", f"{EMPTY}/")
        for name, nbytes in output.store.sizes(folder, "part-").items()
    }
    result = Scan({}, {}, {})
    listed = []
    for name, parsed in part_names(output):
        before = (known or {}).get(name)
        if before is not None and all(sizes.get(n) == nbytes for n, nbytes in _sizes_of(before)):
            _sort_in(result, run, before, parsed)
        else:
            listed.append((name, parsed))
    with ThreadPoolExecutor(_READERS) as readers:
        # Each waits for a disk or a network most of the time.
        for (name, parsed), found in zip(listed, readers.map(lambda n: _try_open(output, n[0]), listed), strict=True):
            if isinstance(found, DecodeError):
                result.broken[name] = str(found)
            elif found is not None:
                _sort_in(result, run, found, parsed)
    return result


def _sizes_of(found: Found) -> list[tuple[str, int]]:
    return [(file.name, file.nbytes) for file in found.record.files] or [(found.name, found.nbytes)]


def _try_open(output: Output, name: str) -> Found | DecodeError | None:
    try:
        return _light(_open(output, name))
    except FileNotFoundError:
        return None  # somebody just took it away
    except DecodeError as error:
        return error


def _sort_in(result: Scan, run: str, found: Found, parsed: PartName) -> None:
    part = found.record.part
    if part.run != run:
        result.foreign[found.name] = f"it belongs to run {part.run}"
    elif (part.chunk, part.round) != (parsed.chunk, parsed.round):
        result.broken[found.name] = f"it is part {part.stem} by its content"
    else:
        result.parts.setdefault((part.chunk, part.round), []).append(found)


def _light(found: Found) -> Found:
    # Of ten thousand parts the counts are kept; errors and places are read again when they are wanted.
    record = found.record
    layouts = _shared(tuple((name, _alike(layout)) for name, layout in record.layouts.items()))
    return found._replace(
        record=PartRecord(record.part, record.fence, record.rows, record.failed, layouts, record.files)
    )


@lru_cache(256)
def _shared(layouts: tuple[tuple[str, Layout], ...]) -> Mapping[str, Layout]:
    return dict(layouts)


def _alike(layout: Layout) -> Layout:
    """The same for parts whose rows only differ in their lengths."""
    return Layout("ragged", layout.dtype, (None,) * len(layout.shape)) if layout.kind == "ragged" else layout


def choose(parts: Iterable[Found], winner: str | None) -> Found:
    """The one of several parts of a chunk that counts: the recorded winner, else one with rows, else the first."""
    ordered = sorted(parts, key=lambda p: (p.name != winner, not p.record.rows, p.name))
    return ordered[0]


def load(output: Output, found: Found) -> Found:
    """The part with all of its record; raises DecodeError."""
    try:
        return _open(output, found.name)
    except FileNotFoundError as error:
        raise DecodeError(f"{found.name} is gone from {output.store.where}; go on with --resume") from error


def file_names(found: Found) -> list[str]:
    """The files that hold the part's rows."""
    return [file.name for file in found.record.files] or [found.name]


def read_part(output: Output, found: Found) -> Iterator[dict[str, Column]]:
    """The part's columns, some rows at a time, with dtypes and shapes as they were written. Needs a loaded part."""
    if found.record.rows:
        yield from output.format.read(output.store, found.record, file_names(found))


def places_of(record: PartRecord, columns: Mapping[str, Column], start: int) -> Array:
    """int64 [3, n]: source, row and part of the n rows that were read from number `start` on."""
    packed = record.places()
    if packed is not None:
        rows = len(next(iter(columns.values()), ()))
        return packed[:, start : start + rows]
    return np.stack([np.asarray(columns[name], np.int64) for name in ID_COLUMNS])
