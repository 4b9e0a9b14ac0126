"""What is made of a run's parts at its end: `_run/errors.parquet`, `_run/run.json`, and one file where it is wanted.

All is derived: it can be made again at any time, and an interrupted driver leaves the former file or the whole new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from torchrelay.producer.runs.agreeing import agree
from torchrelay.producer.runs.folder import RunFolder
from torchrelay.producer.runs.keys import duplicates
from torchrelay.stages.writing.arrow import need_arrow
from torchrelay.stages.writing.found import load
from torchrelay.stages.writing.layout import json_text
from torchrelay.stages.writing.staging import Staging
from torchrelay.stages.writing.stores import HIDDEN, disk_trouble

__all__ = ["ERRORS", "SUMMARY", "ChunkFailure", "RunSummary", "Totals", "finish", "totals_of"]

ERRORS: Final = f"{HIDDEN}/errors.parquet"
SUMMARY: Final = f"{HIDDEN}/run.json"
_BATCH = 10_000


@dataclass(frozen=True)
class ChunkFailure:
    """A chunk without a part: its job failed as a whole. `rows` is None where nobody counted them."""

    chunk: int
    source: int
    rows: int | None
    stage: str
    error: str
    text: str
    attempts: int = 0


class Totals(NamedTuple):
    """Sums over the parts that count. `errors` are rows that failed at their last try."""

    rows: int
    errors: int
    parts: int
    nbytes: int


@dataclass(frozen=True)
class RunSummary:
    """What the driver knows of a run beside its parts. `stages` is per stage whatever it measured: rows, seconds of
    service and wait, batch fill."""

    status: str
    """done, stopped, cancelled or failed."""
    seconds: float
    chunks: int | None = None
    """As planned; None where planning did not come to its end."""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    rows_now: int | None = None
    """Rows that this session wrote, of which the rate is; all of the run's where nobody says."""


def totals_of(run: RunFolder) -> Totals:
    """Of the parts as of the last `look` or `find`."""
    rows = sum(found.record.rows for found in run.parts.values())
    errors = sum(found.record.failed for found in run.last_rounds())
    return Totals(rows, errors, len(run.parts), sum(found.nbytes for found in run.parts.values()))


def finish(run: RunFolder, summary: RunSummary, failures: Sequence[ChunkFailure] = ()) -> dict[str, Any]:
    """Looks at all parts once more, writes the errors and the summary, and gives back what run.json says.

    Removes what no chunk's part is; no job of the run may be under way any more unless it was given up.
    """
    run.look()
    if summary.status == "done":
        run.remove_strays()
    failures = [f for f in failures if f.chunk not in run.done()]
    retyped = agree(run)
    twice = duplicates(run)
    errors = write_errors(run, failures)
    totals, plan = totals_of(run), run.manifest.plan
    rows_now = totals.rows if summary.rows_now is None else summary.rows_now
    content = {
        "run": run.run,
        "pipeline": plan.pipeline,
        "version": plan.version,
        "input": plan.input,
        "created": run.manifest.created,
        "status": summary.status,
        "rows": totals.rows,
        "errors": totals.errors + sum(f.rows or 0 for f in failures),
        "error_lines": errors,
        "failed_chunks": len(failures),
        "chunks": summary.chunks,
        "chunks_done": len(run.done()),
        "parts": totals.parts,
        "bytes": totals.nbytes,
        "seconds": round(summary.seconds, 3),
        "rows_per_s": round(rows_now / summary.seconds, 1) if summary.seconds > 0 else None,
        **({} if twice is None else {"duplicate_keys": twice.rows, "duplicate_key_examples": list(twice.examples)}),
        **({"retyped": retyped} if retyped else {}),
        "stages": {name: dict(numbers) for name, numbers in summary.stages.items()},
        "rows_now": rows_now,
        **summary.more,
    }
    run.output.store.write(SUMMARY, (json.dumps(content, indent=1, default=str) + "\n").encode())
    return content


def write_errors(run: RunFolder, failures: Sequence[ChunkFailure] = ()) -> int:
    """Writes errors.parquet, of no rows where none failed; how many lines it has.

    A failed row has `_source` and `_row`; a chunk that failed as a whole has one line, without `_row`.
    """
    pa = need_arrow()
    from pyarrow import parquet

    kinds = {"_source": pa.int64(), "_path": pa.string(), "_row": pa.int64(), "key": pa.string(), "chunk": pa.int64()}
    kinds |= {"rows": pa.int64(), "stage": pa.string(), "error": pa.string(), "text": pa.string()}
    schema = pa.schema([*kinds.items(), ("attempts", pa.int64())])
    lines = 0
    store = run.output.store
    with disk_trouble(store.where), Staging(store, "errors", "x") as staging:
        path = staging.make(".parquet")
        with parquet.ParquetWriter(str(path), schema, compression="zstd") as writer:
            for batch in _batched(_error_lines(run, failures)):
                writer.write_table(pa.Table.from_pylist(batch, schema))
                lines += len(batch)
        staging.sync()
        store.replace(path, ERRORS)
    return lines


def _error_lines(run: RunFolder, failures: Sequence[ChunkFailure]) -> Iterator[dict[str, Any]]:
    sources = run.manifest.plan.sources

    def path(source: int) -> str | None:
        return sources[source].path if 0 <= source < len(sources) else None

    left = sorted(failures, key=lambda f: f.chunk)
    for found in run.last_rounds():
        chunk = found.record.part.chunk
        while left and left[0].chunk < chunk:
            yield _failure_line(left.pop(0), path)
        if not found.record.failed:
            continue
        for error in load(run.output, found).record.errors():
            line = asdict(error)
            key = error.key if error.key is None or isinstance(error.key, str) else json_text(error.key)
            yield {
                "_source": line.pop("source"),
                "_path": path(error.source),
                "_row": line.pop("row"),
                "chunk": chunk,
                "rows": 1,
                **line,
                "key": key,
            }
    for failure in left:
        yield _failure_line(failure, path)


def _failure_line(failure: ChunkFailure, path: Any) -> dict[str, Any]:
    line = asdict(failure)
    source = line.pop("source")
    return {"_source": source, "_path": path(source), "_row": None, "key": None, **line}


def _batched(lines: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for line in lines:
        batch.append(line)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
