"""Runs to open, and parts in them, without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.config.runs import ReadOptions, Source, WriteOptions
from torchrelay.producer.runs.folder import Entering, RunFolder, open_run
from torchrelay.producer.runs.manifest import RunPlan
from torchrelay.stages.writing import PartRows, RowError, Written, write_part


def sources(*names: str, change: str = "1") -> list[Source]:
    return [Source(i, f"/data/{name}", "parquet", 10, f"10-{change}") for i, name in enumerate(names)]


def plan_for(folder: object, given: Sequence[Source] = (), **more: Any) -> RunPlan:
    write = {k: more.pop(k) for k in ("format", "key", "keep") if k in more}
    named = {"pipeline": "embed", "version": "0a1b2c3d", "input": "/data/*.parquet", "read": ReadOptions(), **more}
    return RunPlan(sources=list(given) or sources("a", "b"), write=WriteOptions(str(folder), **write), **named)


def opened(folder: object, given: Sequence[Source] = (), *, resume: bool = False, **more: Any) -> RunFolder:
    return open_run(plan_for(folder, given, **more), Entering(resume))


def put(
    run: RunFolder,
    chunk: int,
    rows: Sequence[int],
    failed: Sequence[int] = (),
    round_: int = 0,
    fence: str = "w-1",
) -> Written:
    """Writes a part of source 0 whose rows have their own number as `x`, and as a text."""
    numbers = np.asarray(rows, np.int64)
    extra = {} if run.output.options.key is None else {run.output.options.key: [f"key-{n}" for n in rows]}
    errors = [RowError(0, n, "encode", "ValueError", f"row {n}", 1, f"key-{n}" if extra else None) for n in failed]
    columns = {"x": numbers, "text": [f"row {n}" for n in rows]}
    written = write_part(
        run.output,
        run.part(chunk, round_),
        fence,
        PartRows(columns, numbers * 0, numbers, numbers * 0, extra=extra, errors=errors),
        lambda: True,
    )
    assert written is not None
    run.commit(chunk, written.name, round_)
    return written


def manifest_text(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "_run/manifest.json").read_text())
    return found
