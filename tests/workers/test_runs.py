"""Chunks of a run on real workers: read, computed and written beside what else the workers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Workers, wait_until
from torchrelay import Pipeline, Relay
from torchrelay.config.run_graph import CHUNK, RESULT
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import Chunk, ReadOptions, WriteOptions
from torchrelay.producer.runs.pace import Progress
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


def test_a_dataset_goes_through_a_pipeline(
    relay: Relay, registry: Registry, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """Every row once, in order; the summary agrees with what is there; nothing is left behind."""
    path = obey("batch: {max_rows: 4}", "retry: {attempts: 1}")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage)
    (tmp_path / "in").mkdir()
    dataset(tmp_path / "in" / "a.parquet", 25, r3="raise")
    dataset(tmp_path / "in" / "b.parquet", 10)
    told: list[Progress] = []
    run = relay.run(
        "obey",
        input=tmp_path / "in",
        output=tmp_path / "out",
        keep=["n"],
        chunk_rows=10,
        merge=True,
        on_progress=told.append,
    )
    summary = run.summary()
    good = [(0, i) for i in range(25) if i != 3] + [(1, i) for i in range(10)]
    rows = list(run.rows())
    assert [(r["_source"], r["_row"]) for r in rows] == good
    assert [(r["n"], r["out"]) for r in rows] == [(str(i), f"{i}!") for _, i in good]
    assert (run.status, summary["rows"], summary["errors"], summary["chunks"]) == ("done", 34, 1, 4)
    assert (told[-1].chunks_done, told[-1].rows, told[-1].failed_rows) == (4, 34, 1)
    assert {s.name: s.rows for s in told[-1].stages}["work"] >= 0
    (error,) = pq.read_table(tmp_path / "out" / "_run" / "errors.parquet").to_pylist()
    assert (error["_source"], error["_row"], error["stage"], error["error"]) == (0, 3, "work", "ValueError")
    assert pq.read_table(tmp_path / "out.parquet")["out"].to_pylist() == [r["out"] for r in rows]
    assert pq.read_table(tmp_path / "out").num_rows == 34
    loads = registry.loads()
    assert {k: v for k, v in loads.items() if k.endswith(("ready_rows", "held_rows")) and v} == {}


@pytest.mark.parametrize("kind", ["list", "iterator", "table"])
def test_rows_in_memory_go_through_too(
    relay: Relay, workers: Workers, obey: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """They travel with their jobs; the output is as that of files."""
    path = obey("batch: {max_rows: 4}")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage)
    rows = [{"n": str(i)} for i in range(11)]
    data = {"list": rows, "iterator": iter(rows), "table": {"n": [r["n"] for r in rows]}}[kind]
    run = relay.run("obey", input=data, output=tmp_path / "out", key="n", chunk_rows=3)
    assert list(run.rows()) == [{"n": str(i), "out": f"{i}!"} for i in range(11)]
    assert run.summary()["chunks_done"] == 4


@pytest.mark.alone
@pytest.mark.parametrize("ahead", [0, 2])
def test_online_jobs_overtake_the_chunks_of_a_run_and_chunks_are_not_starved(
    relay: Relay, workers: Workers, obey: Callable[..., Path], forward_log: ForwardLog, tmp_path: Path, ahead: int
) -> None:
    """One waits for a forward or a few, not for the chunk that is under way, nor for those behind it."""
    path = obey(f"batch: {{max_rows: 4, ahead: {ahead}}}")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage)
    data = dataset(tmp_path / "d.parquet", 400, **{f"r{i}": "sleep 0.02" for i in range(400)})
    run = relay.run("obey", input=data, output=tmp_path / "out", chunk_rows=200, wait=False)
    wait_until(lambda: len(forward_log.forwards()) > 5)
    for n in range(5):
        before = len(forward_log.forwards())
        # A forward of the run takes 80 ms, a chunk 4 s.
        assert relay.submit("obey", {"n": f"online{n}"}, priority="high").result(3) == {"out": f"online{n}!"}
        at = next(i for i, (_, names) in enumerate(forward_log.forwards()) if f"online{n}" in names)
        assert at - before <= 10
    assert run.progress().chunks_done == 0
    assert run.wait(60).summary()["rows"] == 400
    assert {count for n, count in forward_log.runs().items() if n.isdigit()} == {1}
