"""Writes one part of a run so that it is there whole or not at all, once, whatever happens to its writer.

Temporary files -> on the disk -> is the lease still ours? -> final name, without replacing -> folder on the disk.

The final name says the chunk, and the record within says whose it is. Where a file can be linked without replacing
another, the first writer of a chunk wins, and all later ones, however late they wake, adopt what it wrote: so there is
never a second part of a chunk, not even of a job that nobody waits for any more. Elsewhere (object stores, some mounted
file systems) the name holds the writer's fence too, and the run's folder says which counts (`found.choose`).

Files whose format has no room for a record have it beside, in `_run/parts`. Then the record is what is linked first: it
names the temporary files, and whoever meets a record without its files gives them their final names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torchrelay.config.runs import WriteOptions
from torchrelay.errors import DecodeError, WorkerError
from torchrelay.stages.writing.formats import open_format
from torchrelay.stages.writing.found import Found, Output, complete, find
from torchrelay.stages.writing.record import PartFile, PartId, PartRecord, RowError, pack_errors
from torchrelay.stages.writing.staging import Staging
from torchrelay.stages.writing.stores import EMPTY, RECORDS, disk_trouble, open_store
from torchrelay.stages.writing.table import PartRows, PartTable, assemble

__all__ = ["Written", "open_output", "write_part"]


class Written(NamedTuple):
    """A part that is there. `adopted`: another writer's, of the same chunk."""

    name: str
    rows: int
    failed: int
    nbytes: int
    adopted: bool


def open_output(options: WriteOptions, base_dir: Path = Path()) -> Output:
    """Where and how parts are written; made once and used for many. `base_dir` holds a writer's class.

    Raises ConfigError for a folder or format that cannot be used.
    """
    return Output(options, open_store(options.folder), open_format(options.format, base_dir))


def write_part(
    output: Output, part: PartId, fence: str, rows: PartRows, still_ours: Callable[[], bool]
) -> Written | None:
    """Writes the part unless it is there already; None when the lease is lost, and then nothing is written.

    Args:
        fence: of the job that writes; stands in the record, and in names where the folder needs it.
        still_ours: asks the server whether the job is still held under that fence; called once, at the last moment.

    Raises:
        ConfigError: columns whose names clash, a folder that may not be written.
        InputError: a column that the format does not take.
        RunConflict: a file of another run has the part's name.
        WorkerError: the disk is full, or fails.
    """
    table = assemble(rows, output.options)
    try:
        return _write(output, part, fence, rows.errors, table, still_ours)
    except FileNotFoundError as error:
        raise WorkerError(
            f"output {output.store.where}: {error.filename} is gone while {part.stem} was written; who cleans up there?"
        ) from error


def _write(
    output: Output,
    part: PartId,
    fence: str,
    errors: Sequence[RowError],
    table: PartTable,
    still_ours: Callable[[], bool],
) -> Written | None:
    there = find(output, part)
    if there is not None:
        return _adopted(there)
    record = PartRecord(
        part,
        fence,
        table.rows,
        len(errors),
        table.layouts,
        packed_errors=pack_errors(errors),
        packed_places=table.places,
    )
    stem = part.stem if output.store.links else part.fenced_stem(fence)
    where = output.store.where
    with Staging(output.store, stem, fence) as staging:
        with disk_trouble(where):
            record, paths = _make(output, staging, stem, table, record)
            staging.sync()
        # What goes wrong there is not the disk's fault.
        if not still_ours():
            return None
        with disk_trouble(where):
            publish = _publish_inside if output.format.inside else _publish_beside
            return publish(output, record, paths)


def _make(
    output: Output, staging: Staging, stem: str, table: PartTable, record: PartRecord
) -> tuple[PartRecord, list[Path]]:
    """The record with its files, and the temporary files; last that of the record, where it lies beside."""
    files = output.format.write(staging.make, table, record)
    folder = f"{EMPTY}/" if not table.rows else ""
    made = [PartFile(f"{folder}{stem}{end}", path.name, path.stat().st_size) for end, path in files]
    record, paths = replace(record, files=tuple(made)), [path for _, path in files]
    if not output.format.inside:
        paths.append(staging.make(".json"))
        paths[-1].write_text(json.dumps(record.encode()), encoding="utf-8")
    return record, paths


def _publish_inside(output: Output, record: PartRecord, paths: list[Path]) -> Written:
    (file,) = record.files
    if output.store.add(paths[0], file.name):
        return Written(file.name, record.rows, record.failed, file.nbytes, False)
    return _adopt(output, record.part)


def _publish_beside(output: Output, record: PartRecord, paths: list[Path]) -> Written:
    store = output.store
    if not store.links:
        # The record comes last: what has none is no part.
        for file, path in zip(record.files, paths, strict=False):
            store.add(path, file.name)
    stem = record.files[0].name.rpartition("/")[2].partition(".")[0]
    if not store.add(paths[-1], f"{RECORDS}/{stem}.json"):
        return _adopt(output, record.part)
    if store.links:
        complete(output, record)
    return Written(f"{RECORDS}/{stem}.json", record.rows, record.failed, sum(f.nbytes for f in record.files), False)


def _adopt(output: Output, part: PartId) -> Written:
    there = find(output, part)
    if there is None:
        raise DecodeError(f"{part.stem} was there and is gone again from {output.store.where}; who cleans that folder?")
    return _adopted(there)


def _adopted(there: Found) -> Written:
    return Written(there.name, there.record.rows, there.record.failed, there.nbytes, True)
