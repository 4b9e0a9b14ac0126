"""The output folder of a run while a driver works on it: opened fresh or to go on, and what is there already.

Promise: one driver at a time; a chunk counts as done when a whole part of it lies there, whoever wrote it; what does
not verify is put aside and not counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from torchrelay.config.runs import ChunkSize, Source
from torchrelay.errors import ConfigError, RunConflict
from torchrelay.producer.runs.holding import Hold, take_hold
from torchrelay.producer.runs.manifest import (
    Manifest,
    RunPlan,
    read_manifest,
    remove_old_lists,
    resumed,
    started,
    write_manifest,
)
from torchrelay.stages.writing.found import Found, Output, Scan, choose, file_names, load, scan
from torchrelay.stages.writing.part import open_output
from torchrelay.stages.writing.record import PartId, parse_name
from torchrelay.stages.writing.staging import remove_dead
from torchrelay.stages.writing.stores import BAD, EMPTY, HIDDEN, RECORDS, LocalStore, Store, open_store

__all__ = ["Entering", "Retry", "RunFolder", "check_folder", "open_existing", "open_run"]

WINNERS: Final = f"{HIDDEN}/winners.json"
_SHOWN = 5
_log = logging.getLogger(__name__)
Key = tuple[int, int]
"""(chunk, round)."""


class Retry(NamedTuple):
    """Rows of a chunk to try again, by (source, row); they become the part of this round."""

    chunk: int
    round: int
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Entering:
    """How a run may enter its output folder."""

    resume: bool = False
    """Go on with the run that is there; where there is none, begin one."""
    run: str | None = None
    """The id of a new run; a folder that holds the run of this id goes on with it in any case."""
    accept_version: bool = False
    """What is left may be done by another version of the pipeline."""
    into_existing: bool = False
    """The folder may hold other files, as long as no reader would take them for parts."""


def check_folder(plan: RunPlan, how: Entering | None = None, base_dir: Path = Path()) -> None:
    """Raises what `open_run` would, as far as that can be told without writing anything."""
    output = open_output(plan.write, base_dir)
    if isinstance(output.store, LocalStore):
        _check_place(Path(output.store.where))
    known = read_manifest(output.store)
    _agreed(output, known, plan, how or Entering())
    if known is not None:
        take_hold(output.store).release()


def _check_place(folder: Path) -> None:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise ConfigError(f"output {folder}: {there} is a file where a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output {folder}: may not write {there}; allow it, or choose another")


def open_run(plan: RunPlan, how: Entering | None = None, base_dir: Path = Path()) -> RunFolder:
    """Takes hold of the output folder and starts a run in it, or goes on with the one that it holds. One of which no
    part is there is no obstacle: it is begun anew. `base_dir` is where a writer's class is looked up.

    Raises:
        RunConflict: the folder holds a run and is not to go on with it; it holds another run, or files that no run
            made; another driver works on it.
        ConfigError: the folder or the format cannot be used.
    """
    output = open_output(plan.write, base_dir)
    hold = take_hold(output.store)
    try:
        known = read_manifest(output.store)
        manifest = _agreed(output, known, plan, how or Entering())
        if manifest is not known:
            write_manifest(output.store, manifest)
        remove_old_lists(output.store, manifest)
        folder = RunFolder(output, manifest, hold)
        folder.look()
    except BaseException:
        hold.release()
        raise
    return folder


def _agreed(output: Output, known: Manifest | None, plan: RunPlan, how: Entering) -> Manifest:
    """The manifest that the folder is to have from now on, in place of the one that it has."""
    if known is None:
        _refuse_strangers(output, into_existing=how.into_existing)
        return started(plan, how.run)
    if how.resume or known.run == how.run:
        try:
            return resumed(known, plan, accept_version=how.accept_version)
        except RunConflict:
            if _has_parts(output.store):
                raise
    elif _has_parts(output.store):
        raise RunConflict(
            f"output {output.store.where} holds run {known.run} of {known.plan.pipeline} "
            f"(begun {known.created}); go on with --resume, or choose another folder"
        )
    return _anew(known, plan, how.run)


def _anew(known: Manifest, plan: RunPlan, run: str | None) -> Manifest:
    """In place of a run without any part. Its jobs may still be under way: where they are the same, so is the run."""
    try:
        again = resumed(known, plan)
    except RunConflict:
        return started(plan, run)
    return again if again.plan.size == plan.size else started(plan, run)


def _has_parts(store: Store) -> bool:
    """Of whatever format, for another one may be asked for now."""
    names = (name for folder in ("", EMPTY, RECORDS) for name in store.sizes(folder, "part-"))
    return any(parse_name(name.partition(".")[0]) for name in names)


def open_existing(folder: str, *, format: str | None = None, base_dir: Path = Path()) -> RunFolder:
    """The run of a folder to be read, while its driver may still work on it. Changes nothing there.

    `format` must name the writer's class where the parts are of one: what a folder says is not imported.

    Raises ConfigError where there is no run, and DecodeError where it cannot be read.
    """
    manifest = read_manifest(open_store(folder))
    if manifest is None:
        raise ConfigError(f"{folder}: holds no run; is it the folder that was given as the output?")
    kind = manifest.plan.write.format
    if ":" in kind and format != kind:
        raise ConfigError(f"{folder}: its parts are of format {kind!r:.80}; pass format={kind!r:.80} to run that code")
    # The folder may have been moved since.
    output = open_output(replace(manifest.plan.write, folder=folder), base_dir)
    run = RunFolder(replace(output, read_only=True), manifest)
    run.find()
    return run


def _refuse_strangers(output: Output, *, into_existing: bool) -> None:
    store = output.store
    files = list(store.sizes(""))
    mixed = [n for n in files if n.endswith(output.format.suffix) or parse_name(n.partition(".")[0])]
    if mixed := [n for n in mixed if not n.startswith((".", "_"))]:
        raise RunConflict(
            f"output {store.where} holds {mixed[0]!r:.80} and no run; its rows would mix with those of the run, "
            "choose an empty folder"
        )
    if isinstance(store, LocalStore) and os.path.isdir(store.where):
        files = sorted(os.listdir(store.where))  # folders too
    # What systems leave in folders, and begins with a dot, nobody means.
    others = [n for n in files if n != HIDDEN and not n.startswith(".")]
    if others and not into_existing:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise RunConflict(
            f"output {store.where} holds {', '.join(f'{n!r:.80}' for n in others[:_SHOWN])}{more}, and no run; choose "
            "an empty folder, or add --into-existing to write beside them"
        )


class RunFolder:
    """An open run. `close` gives the folder free; the run can go on at any later time."""

    def __init__(self, output: Output, manifest: Manifest, hold: Hold | None = None) -> None:
        self.output = output
        self.manifest = manifest
        self._hold = hold
        self._winners: dict[Key, str] = _read_winners(output)
        self._parts: dict[Key, Found] = {}

    @property
    def run(self) -> str:
        return self.manifest.run

    @property
    def size(self) -> ChunkSize:
        """The chunk size that the run is planned with, whatever was asked for this time."""
        return self.manifest.plan.size

    @property
    def batches(self) -> list[list[Source]]:
        """What to plan: each batch by itself, with chunk numbers that go on from the last of the one before."""
        return self.manifest.source_batches()

    @property
    def parts(self) -> dict[Key, Found]:
        """The parts that count, as of the last `look`, by (chunk, round)."""
        return self._parts

    def done(self) -> set[int]:
        """Chunks that need not be computed."""
        return {chunk for chunk, round_ in self._parts if round_ == 0}

    def part(self, chunk: int, round_: int = 0) -> PartId:
        """What a chunk's writer is told to write."""
        return PartId(self.run, chunk, round_)

    def commit(self, chunk: int, name: str, round_: int = 0) -> None:
        """Takes down which part the chunk's job committed. A part that counts already goes on to count."""
        if not self.output.store.links:  # else a chunk has one name for its part
            self._winners.setdefault((chunk, round_), name)

    def renew(self) -> None:
        """To be called every few seconds while the run goes on; raises RunConflict when another driver took over."""
        if self._hold is not None:
            self._hold.renew()

    def look(self) -> None:
        """Finds the parts that are there and whole, and tidies: what is left of dead writers goes, of several parts of
        a chunk all but one, and what does not verify is put into `_run/bad`."""
        output, found = self.output, self._scan()
        if found.foreign:
            name, why = min(found.foreign.items())
            raise RunConflict(f"output {output.store.where}: {name}: {why}; move it away, then go on with --resume")
        for name, why in found.broken.items():
            _log.warning("output %s: %s is put into %s: %s", output.store.where, name, BAD, why)
            self._move_away(name)
        for other in self._take(found):
            self._remove(other)
        for (chunk, round_), part in self._parts.items():
            self.commit(chunk, part.name, round_)
        # After the scan, which gave their names to files that dead writers had left complete.
        if isinstance(output.store, LocalStore):
            remove_dead(output.store)

    def find(self) -> None:
        """Finds the parts that are there and whole, and tidies nothing."""
        self._take(self._scan())

    def _scan(self) -> Scan:
        return scan(self.output, self.run, {found.name: found for found in self._parts.values()})

    def _take(self, found: Scan) -> list[Found]:
        """Decides which parts count; gives back those that do not."""
        self._parts, others = {}, []
        for key, parts in found.parts.items():
            self._parts[key] = winner = choose(parts, self._winners.get(key))
            others += [other for other in parts if other is not winner]
        return others

    def retries(self) -> Iterator[Retry]:
        """The rows that failed at their last try, chunk by chunk. Chunks that were not done at all are not among them:
        going on computes those."""
        for last in self.last_rounds():
            if last.record.failed:
                errors = load(self.output, last).record.errors()
                part = last.record.part
                yield Retry(part.chunk, part.round + 1, tuple((e.source, e.row) for e in errors))

    def last_rounds(self) -> Iterator[Found]:
        """The part of each chunk's last round, by chunk: its errors are those that are left."""
        last: dict[int, Found] = {}
        for (chunk, _), found in sorted(self._parts.items()):
            last[chunk] = found
        yield from last.values()

    def remove_strays(self) -> None:
        """Removes files that look like parts and belong to none that counts; for when no chunk is under way."""
        wanted = {name for found in self._parts.values() for name in (*file_names(found), found.name)}
        for name in self.output.store.sizes(""):
            if parse_name(name.partition(".")[0]) is not None and name not in wanted:
                self.output.store.remove(name)

    def close(self) -> None:
        """Keeps what the folder cannot tell by itself, and gives it free."""
        try:
            if not self.output.store.links and self._hold is not None and self._winners:
                rows = [[chunk, round_, name] for (chunk, round_), name in self._winners.items()]
                self.output.store.write(WINNERS, json.dumps(rows).encode())
        finally:
            if self._hold is not None:
                self._hold.release()
                self._hold = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move_away(self, record: str) -> None:
        store = self.output.store
        store.move_away(record)
        if not self.output.format.inside:
            stem = record.rpartition("/")[2].partition(".")[0]
            for name in store.sizes("", f"{stem}."):
                store.move_away(name)

    def _remove(self, found: Found) -> None:
        # The record last: without it nobody knows of the files.
        for name in [*file_names(found), found.name]:
            self.output.store.remove(name)


def _read_winners(output: Output) -> dict[Key, str]:
    try:
        rows = json.loads(output.store.read(WINNERS))
        return {(int(chunk), int(round_)): str(name) for chunk, round_, name in rows}
    except (FileNotFoundError, ValueError, TypeError):
        return {}
