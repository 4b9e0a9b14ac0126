"""One file of all parts of a run, in the order of the input. Flat in memory: rows pass through in small batches.

It lies beside the folder (`vectors/` gives `vectors.parquet`), so that readers of the folder do not meet rows twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.folder import RunFolder
from torchrelay.producer.runs.reading import chunks_of, in_order
from torchrelay.stages.writing.arrow import LAYOUT_KEY, need_arrow
from torchrelay.stages.writing.formats import BATCH_ROWS
from torchrelay.stages.writing.found import Found, file_names, load
from torchrelay.stages.writing.layout import Array, Layout
from torchrelay.stages.writing.staging import Staging
from torchrelay.stages.writing.stores import disk_trouble, open_store
from torchrelay.stages.writing.table import ID_COLUMNS

__all__ = ["merge"]

GROUP_ROWS = 1 << 16
GROUP_BYTES = 64 << 20


def merge(run: RunFolder, target: str | None = None) -> str:
    """Writes all rows into one file and says where it is. It is replaced if it is there, whole or not at all.

    Raises:
        ConfigError: the format has no one-file form (it has for Parquet and JSON lines), or the target lies among the
            parts.
        InputError: parts whose columns do not fit into one schema.
    """
    kind = run.output.options.format
    if kind not in ("parquet", "jsonl"):
        raise ConfigError(f"parts of format {kind!r:.60} do not merge into one file; use parquet or jsonl")
    where = run.output.store.where
    path = target or f"{where}{run.output.format.suffix}"
    folder, _, name = path.rpartition("/")
    store = open_store(folder or ".")
    if store.where == where:
        raise ConfigError(f"merged file {path}: lies among the parts, and readers would meet rows twice; put it beside")
    with disk_trouble(store.where), Staging(run.output.store, "merged", "x") as staging:
        made = staging.make(run.output.format.suffix)
        (_merge_parquet if kind == "parquet" else _merge_lines)(run, made)
        staging.sync()
        store.replace(made, name)
    return path


def _merge_parquet(run: RunFolder, made: Path) -> None:
    pa = need_arrow()
    from pyarrow import parquet

    schema = _common_schema(run)
    with parquet.ParquetWriter(str(made), schema, compression="zstd", compression_level=1) as writer:
        # Small chunks would make small row groups, which are slow to read.
        waiting: list[Any] = []
        rows = nbytes = 0
        for table in _fitted_tables(run, schema):
            waiting.append(table)
            rows, nbytes = rows + table.num_rows, nbytes + table.nbytes
            if rows >= GROUP_ROWS or nbytes >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, rows, nbytes = [], 0, 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _fitted_tables(run: RunFolder, schema: Any) -> Iterator[Any]:
    pa = need_arrow()
    for parts in chunks_of(run):
        for table in _tables(run, parts):
            try:
                # Columns that one part has and another has not are null there.
                own = _without_guesses(table.schema)
                columns = [
                    pa.nulls(table.num_rows) if pa.types.is_null(field.type) else table.column(i)
                    for i, field in enumerate(own)
                ]
                known = pa.Table.from_arrays(columns, schema=own)
                fitted = pa.concat_tables([schema.empty_table(), known], promote_options="permissive")
                yield fitted.select(schema.names).cast(schema)
            except pa.ArrowException as error:
                raise InputError(f"{parts[0].name} does not fit the other parts: {error!s:.200}") from error


def _common_schema(run: RunFolder) -> Any:
    pa = need_arrow()
    from pyarrow import parquet

    schema = None
    # Parts without rows may not know all columns; they only count where there is nothing else.
    some = [f for f in run.parts.values() if f.record.rows] or list(run.parts.values())
    for found in sorted(some, key=lambda f: f.record.part):
        with run.output.store.open(file_names(found)[0]) as file:
            own = _without_guesses(parquet.read_schema(file)).remove_metadata()
        try:
            schema = own if schema is None else pa.unify_schemas([schema, own], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{found.name} does not fit the other parts: {error!s:.200}") from error
    return pa.schema([]) if schema is None else schema


def _without_guesses(schema: Any) -> Any:
    """The schema with columns of no value in a part as what they are: they fit into whatever other parts have there."""
    pa = need_arrow()
    fields = []
    for field in schema:
        packed = (field.metadata or {}).get(LAYOUT_KEY)
        empty = packed is not None and Layout.decode(packed).kind == "null"
        fields.append(field.with_type(pa.null()).remove_metadata() if empty else field)
    return pa.schema(fields)


def _tables(run: RunFolder, parts: list[Found]) -> Iterator[Any]:
    pa = need_arrow()
    from pyarrow import parquet

    if len(parts) == 1:
        with run.output.store.open(parts[0].name) as file:
            for batch in parquet.ParquetFile(file).iter_batches(BATCH_ROWS):
                yield pa.Table.from_batches([batch])
        return
    tables, places = [], []
    for part in parts:
        with run.output.store.open(part.name) as file:
            tables.append(parquet.ParquetFile(file).read())
        packed = load(run.output, part).record.places()
        ids = packed if packed is not None else np.stack([tables[-1][n].to_numpy() for n in ID_COLUMNS])
        places.append(ids)
    yield pa.concat_tables(tables, promote_options="permissive").take(in_order(places))


def _merge_lines(run: RunFolder, made: Path) -> None:
    with made.open("wb") as out:
        for parts in chunks_of(run):
            if len(parts) == 1:
                with run.output.store.open(file_names(parts[0])[0]) as file:
                    for block in iter(lambda: file.read(1 << 20), b""):  # called right here
                        out.write(block)
                continue
            lines: list[bytes] = []
            places: list[Array] = []
            for part in parts:
                with run.output.store.open(file_names(part)[0]) as file:
                    own = file.readlines()
                lines += own
                places.append(_places_of_lines(run, part, own))
            out.writelines(lines[i] for i in in_order(places).tolist())


def _places_of_lines(run: RunFolder, part: Found, lines: list[bytes]) -> Array:
    packed = load(run.output, part).record.places()
    if packed is not None:
        return packed
    rows = [json.loads(line) for line in lines]
    return np.array([[row[name] for row in rows] for name in ID_COLUMNS], np.int64).reshape(3, len(rows))
