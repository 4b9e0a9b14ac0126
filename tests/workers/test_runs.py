"""Chunks of a run on real workers: read, computed and written beside what else the workers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Workers
from tests.workers.support import CODE, ForwardLog
from torchrelay import Pipeline, Relay
from torchrelay.config.run_graph import CHUNK, RESULT
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import Chunk, ReadOptions, WriteOptions
from torchrelay.queues.registry import Registry


def task(path: Path, out: Path, start: int, end: int, number: int = 0) -> str:
    chunk = Chunk(number, 0, str(path), "parquet", start, end, "rows", start)
    return RunTask("r1", chunk, ReadOptions(), WriteOptions(str(out))).encode()


def dataset(path: Path, rows: int, **orders: str) -> Path:
    """Rows named by their number; `orders` say what a row is to do."""
    do = [orders.get(f"r{i}", "") for i in range(rows)]
    pq.write_table(pa.table({"n": [str(i) for i in range(rows)], "do": do}), path)
    return path


def test_a_chunk_is_read_computed_and_written_beside_online_jobs(
    relay: Relay, registry: Registry, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """One worker serves the stage for both; rows that raise are told of in the part, their neighbours are in it."""
    path = obey("batch: {max_rows: 4}", "retry: {attempts: 1}")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage)
    data = dataset(tmp_path / "d.parquet", 20, r3="raise", r11="raise")
    twin = Pipeline.load(path).for_runs()
    out = tmp_path / "out"
    future = relay.submit_table(twin.ref, {CHUNK: [task(data, out, 0, 16)]}, on_error="keep")
    assert relay.infer("obey", {"n": "a"}) == {"out": "a!"}
    (written,) = future.result(20)[RESULT]
    assert (written["rows"], written["failed"], written["adopted"]) == (14, 2, False)
    table = pq.read_table(out / written["name"])
    good = [i for i in range(16) if i not in (3, 11)]
    assert table["out"].to_pylist() == [f"{i}!" for i in good]
    assert table["_row"].to_pylist() == good
