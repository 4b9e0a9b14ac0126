"""Chunks of a run on real workers: read, computed and written beside what else the workers do."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import MakePipeline, Workers, wait_until
from tests.workers.support import ForwardLog, WorkerProcess
from torchrelay import AsyncRelay, Pipeline, Relay
from torchrelay.config.run_graph import CHUNK, RESULT
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import Chunk, ReadOptions, WriteOptions
from torchrelay.errors import InputError, RunConflict
from torchrelay.producer.runs import driver
from torchrelay.producer.runs.pace import Progress
from torchrelay.producer.runs.run import Run
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry
from torchrelay.queues.registry import run as recounted
from torchrelay.terminal import status_of


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


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_dataset_goes_through_a_pipeline(
    relay: Relay, registry: Registry, workers: Workers, obey: Callable[..., Path], tmp_path: Path, ahead: int
) -> None:
    """Every row once, in order; the summary agrees with what is there; nothing is left behind."""
    path = obey(f"batch: {{max_rows: 4, ahead: {ahead}}}", "retry: {attempts: 1}")
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


STAGES = """
    import numpy as np
    from torchrelay import Expand

    def grow(batch):
        return {"big": np.repeat(batch["x"][:, None], 5000, axis=1).astype("float32")}

    def halve(batch):
        return {"half": batch["big"][:, ::2] / 2}

    def total(batch):
        for i, half in enumerate(batch["half"]):
            if half[0] == 3.5:
                batch.reject(i, "seven")
        return {"total": batch["half"].sum(axis=1)}

    def crops(batch):
        counts = [int(t) % 3 for t in batch["total"]]
        return Expand({"crop": np.repeat(batch["total"], counts)}, counts)
"""
LONG = """
    pipeline: long
    input: {{x: int64}}
    output: [total, x{more}]
    stages:
      - {{name: grow, use: 'stages.py:grow', outputs: {{big: "float32[5000]"}}, batch: {{max_rows: 8}}}}
      - name: halve
        use: stages.py:halve
        inputs: [big]
        outputs: {{half: "float32[2500]"}}
        batch: {{max_rows: 8}}
      - {{name: total, use: 'stages.py:total', inputs: [half], outputs: {{total: float32}}, batch: {{max_rows: 16}}}}
      {stage}
    fuse: {fuse}
"""
EXPAND = "- {name: crops, use: 'stages.py:crops', inputs: [total], rows: expand, outputs: {crop: float32}}"


@pytest.mark.parametrize(("fuse", "stage"), [("[]", ""), ("[[grow, halve]]", ""), ("[]", EXPAND)])
def test_large_columns_go_from_stage_to_stage_in_shared_memory(
    relay: Relay,
    registry: Registry,
    workers: Workers,
    make_pipeline: MakePipeline,
    tmp_path: Path,
    fuse: str,
    stage: str,
) -> None:
    """As for online jobs: fused or not, made more or not; what the pipeline takes and gives is as it is there."""
    path = make_pipeline(LONG.format(fuse=fuse, stage=stage, more=", crop" if stage else ""), STAGES)
    for name in (None, "@read", "@write"):
        workers.start(path, stage=name)
    pq.write_table(pa.table({"x": range(40), "name": [f"n{i}" for i in range(40)]}), tmp_path / "d.parquet")
    run = relay.run("long", input=tmp_path / "d.parquet", output=tmp_path / "out", key="name", chunk_rows=16)
    good = [i for i in range(40) if i != 7]
    rows = list(run.rows())
    times = {i: (i * 1250) % 3 if stage else 1 for i in good}
    assert [(r["name"], r["x"], r["total"]) for r in rows] == [
        (f"n{i}", i, i * 1250.0) for i in good for _ in range(times[i])
    ]
    assert all(r.get("crop", r["total"]) == r["total"] for r in rows)
    assert run.summary()["errors"] == 1
    wait_until(
        lambda: sum(w.moved.get("arena", 0) for w in registry.workers()) > 40 * 5000 * (0 if fuse != "[]" else 4)
    )
    moved = {w.node.rpartition("/")[2]: w.moved for w in registry.workers()}
    assert moved["total"].get("remote", 0) == 0


def test_runs_of_an_async_client(
    server_url: str, namespace: str, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """It does not hold up the loop, and a task that is cancelled cancels its run."""
    path = obey("batch: {max_rows: 4}")
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage)
    data = dataset(tmp_path / "d.parquet", 60, **{f"r{i}": "sleep 0.05" for i in range(20, 60)})

    async def both() -> tuple[Run, str]:
        async with AsyncRelay(server_url, namespace=namespace) as relay:
            first = await relay.run("obey", input=data, output=tmp_path / "a", limit=20)
            task = asyncio.create_task(relay.run("obey", input=data, output=tmp_path / "b", chunk_rows=8))
            while not list((tmp_path / "b").glob("part-*")):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            second = await relay.run("obey", input=data, output=tmp_path / "b", resume=True, wait=False)
            await asyncio.to_thread(second.wait)
            return first, second.summary()["status"]

    first, status = asyncio.run(both())
    assert (first.summary()["rows"], status) == (20, "done")
    assert pq.read_table(tmp_path / "b").num_rows == 60


FORK = """
    pipeline: fork
    input: {x: int64}
    stages:
      - {name: grow, use: 'stages.py:grow', after: input, outputs: {big: "float32[5000]"}}
      - {name: halve, use: 'stages.py:halve', after: grow, inputs: [big], outputs: {half: "float32[2500]"}}
      - {name: total, use: 'stages.py:total', after: halve, inputs: [half], outputs: {total: float32}}
      - {name: second, use: 'stages.py:second', after: grow, inputs: [big], outputs: {second: float32}}
"""
SECOND = """
    def second(batch):
        return {"second": batch["big"][:, 1]}
"""


def test_branches_end_in_one_part(
    relay: Relay, registry: Registry, workers: Workers, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    """A row that one of them rejects is in neither; what one of the two hands on waits for the other."""
    path = make_pipeline(FORK, textwrap.dedent(STAGES) + textwrap.dedent(SECOND))
    for name in (None, "@read", "@write"):
        workers.start(path, stage=name)
    run = relay.run("fork", input=[{"x": i} for i in range(30)], output=tmp_path / "out", chunk_rows=8)
    assert [(r["_row"], r["total"], r["second"]) for r in run.rows()] == [
        (i, i * 1250.0, float(i)) for i in range(30) if i != 7
    ]
    for lane in registry.lanes:
        assert recounted(registry.client, lane.recount()) == []


def test_the_summary_counts_all_that_workers_did(
    relay: Relay, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """Also what they had not told of when the last chunk was done, and how long rows waited; rates are of a session."""
    path = obey("batch: {max_rows: 4}", "retry: {attempts: 1}")
    for name in (None, "@read", "@write"):
        workers.start(path, stage=name)
    data = dataset(tmp_path / "d.parquet", 80, **{f"r{i}": "raise" if i == 5 else "sleep 0.02" for i in range(80)})
    first = relay.run("obey", input=data, output=tmp_path / "out", chunk_rows=8, limit=80).summary()
    stages = first["stages"]
    # Rows that are looked for by halving are computed again.
    assert 80 <= stages["work"]["rows"] <= 90
    assert (stages["@read"]["rows"], stages["@write"]["rows"]) == (10, 10)
    assert 10.0 < stages["work"]["service_s"] < 60.0
    # The chunks of a second or two wait for one worker: the last of them for most of that.
    assert 0.1 < stages["work"]["wait_s"] < first["seconds"]
    assert all(stages[name]["wait_s"] is not None for name in stages)
    (error,) = pq.read_table(tmp_path / "out" / "_run" / "errors.parquet").to_pylist()
    assert error["attempts"] == 1
    again = relay.run("obey", input=data, output=tmp_path / "out", chunk_rows=8, limit=80, resume=True).summary()
    assert (again["rows"], again["rows_now"], again["rows_per_s"]) == (79, 0, 0.0)


def test_a_chunk_that_kills_its_workers_costs_no_other(
    relay: Relay, registry: Registry, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """The row alone is charged and told of, not among the dead letters."""
    path = obey("batch: {max_rows: 4}")
    for name in (None, "@read", "@write"):
        workers.start(path, stage=name)
    data = dataset(tmp_path / "d.parquet", 40, r13="die")
    run = relay.run("obey", input=data, output=tmp_path / "out", chunk_rows=10)
    summary = run.summary()
    assert (run.status, summary["rows"], summary["failed_chunks"], summary["chunks_done"]) == ("done", 39, 0, 4)
    (line,) = pq.read_table(tmp_path / "out" / "_run" / "errors.parquet").to_pylist()
    assert (line["chunk"], line["_row"], line["error"], line["stage"]) == (1, 13, "WorkerDied", "work")
    assert not list(dead.scan(registry))
    assert [r["_row"] for r in run.rows()] == [i for i in range(40) if i != 13]


def test_status_shows_a_run_under_its_stages_and_cancel_ends_it(
    relay: Relay, registry: Registry, workers: Workers, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """Reading and writing have rows of their own while they are served; nothing stays under way."""
    path = obey("batch: {max_rows: 4}")
    for name in (None, "@read", "@write"):
        workers.start(path, stage=name)
    data = dataset(tmp_path / "d.parquet", 400, **{f"r{i}": "sleep 0.05" for i in range(400)})
    run = relay.run("obey", input=data, output=tmp_path / "out", chunk_rows=20, wait=False)
    ref = Pipeline.load(path).ref
    wait_until(lambda: nodes(registry)[f"{ref}/work"]["waiting_rows"] >= 40)
    shown = nodes(registry)
    assert list(shown) == [f"{ref}/work", f"{ref}/@read", f"{ref}/@write"]
    assert [shown[n]["workers"] for n in shown] == [1, 1, 1]
    assert shown[f"{ref}/work"]["running_rows"] > 0
    assert (run.done(), run.status) == (False, "running")
    run.cancel()
    assert run.summary()["status"] == run.status == "cancelled"
    wait_until(lambda: nodes(registry)[f"{ref}/work"]["running_rows"] == 0)
    assert {n: r["waiting_rows"] for n, r in nodes(registry).items() if r["waiting_rows"]} == {}


def nodes(registry: Registry) -> dict[str, Any]:
    return {row["node"]: row for row in status_of(registry)["nodes"]}


def test_a_run_that_nobody_reads_for_says_what_to_start(
    relay: Relay, workers: Workers, obey: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command, once."""
    monkeypatch.setattr(driver, "_HINT_S", 0.5)
    path = obey()
    workers.start(path)
    run = relay.run("obey", input=dataset(tmp_path / "d.parquet", 4), output=tmp_path / "out", wait=False)
    with pytest.warns(RuntimeWarning, match=r"no live worker for .*/@read: .* worker .* --stage @read") as caught:
        wait_until(lambda: caught.list)
    for name in ("@read", "@write"):
        workers.start(path, stage=name)
    assert run.wait(20).summary()["rows"] == 4


WRITER = """
    import json

    class Lines:
        suffix = ".lines"

        def write(self, path, columns):
            with open(path, "w") as file:
                file.writelines(f"{row}\\n" for row in columns["out"])
"""


def test_a_class_that_writes_is_imported_only_where_the_operator_named_it(
    relay: Relay,
    workers: Workers,
    obey: Callable[..., Path],
    spawn: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    """What a job says is no import path: elsewhere its chunks fail with the setting that would allow it."""
    path = obey()
    (tmp_path / "writers.py").write_text(textwrap.dedent(WRITER))
    for stage in (None, "@read", "@write"):
        workers.start(path, stage=stage)
    data = dataset(tmp_path / "d.parquet", 6)
    run = relay.run(Pipeline.load(path), input=data, output=tmp_path / "a", format="writers.py:Lines")
    assert run.status == "failed"
    (line,) = pq.read_table(tmp_path / "a" / "_run" / "errors.parquet").to_pylist()
    assert "TORCHRELAY_RUN_WRITER=writers.py:Lines" in line["text"]
    workers.stop()
    workers.start(path)
    workers.start(path, stage="@read")
    spawn(path, stage="@write", run_writer="writers.py:Lines").ready()
    run = relay.run(Pipeline.load(path), input=data, output=tmp_path / "b", format="writers.py:Lines")
    assert run.status == "done"
    (part,) = (tmp_path / "b").glob("part-*.lines")
    assert part.read_text().split() == [f"{i}!" for i in range(6)]


def test_a_run_that_was_prepared_holds_its_folder_until_it_ends(
    relay: Relay, obey: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing was submitted, and it can go on; two drivers never work on one folder."""
    relay.register(obey())
    data = dataset(tmp_path / "d.parquet", 4)
    first = relay.prepare_run("obey", input=data, output=tmp_path / "out")
    assert (first.status, first.done()) == ("prepared", False)
    with pytest.raises(InputError, match=r"call start\(\)"):
        first.wait()
    with pytest.raises(RunConflict, match="drives a run there now"):
        relay.run("obey", input=data, output=tmp_path / "out", resume=True)
    first.end()
    assert not any(relay.registry.loads().values())
    second = relay.run("obey", input=data, output=tmp_path / "out", resume=True, wait=False)
    assert second.id == first.id
    second.cancel()
    assert second.summary()["status"] == "cancelled"
