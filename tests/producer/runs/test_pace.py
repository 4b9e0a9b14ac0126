"""How much of a run is under way, how large its chunks are, what holds it up: decisions over plain values."""

from __future__ import annotations

from typing import Any

import pytest

from torchrelay.config.spec import BatchSpec, StageConfig
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs import pace
from torchrelay.producer.runs.options import RunOptions
from torchrelay.producer.runs.pace import (
    StageFigures,
    Throughput,
    bottleneck,
    chunks_in_flight,
    rows_per_chunk,
    slowest_rate,
    stage_figures,
)
from torchrelay.queues.registry import WorkerReport


def worker(name: str, *nodes: str, state: str = "ready", **numbers: Any) -> WorkerReport:
    first, *rest = nodes
    return WorkerReport(name, "h", 1, first, "cpu", state, 0.0, fused=rest, **numbers)


def stage(max_rows: int, use: str | None = "a.py:A") -> StageConfig:
    rows: Any = "same" if use else {"collapse": "x"}
    return StageConfig(name="a", use=use, rows=rows, batch=BatchSpec(max_rows=max_rows))


@pytest.mark.parametrize(
    ("max_rows", "rate", "rows"),
    [
        ([32], None, 1024),
        ([1000], None, 1000),
        ([48, 16], None, 1008),
        ([3000], None, 3000),
        ([32], 100.0, 96),
        ([32], 3.0, 32),
        ([64], 1e6, 16384),
        ([100_000], None, 1024),
    ],
)
def test_a_chunk_is_whole_batches_and_about_a_second(max_rows: list[int], rate: float | None, rows: int) -> None:
    """A stage without code, which only regroups, has no batches that count."""
    assert rows_per_chunk([*map(stage, max_rows), stage(4096, None)], rate) == rows


def test_the_rate_is_that_of_a_worker_of_the_slowest_stage() -> None:
    """And unknown until all have been at work for a moment."""
    fast = worker("1", "p@v/a", rows=1000, busy_s=1.0)
    slow = [worker(n, "p@v/b", rows=30, busy_s=1.0) for n in "23"]
    assert slowest_rate(["p@v/a", "p@v/b"], [fast, *slow]) == 30.0
    assert slowest_rate(["p@v/a", "p@v/b"], [fast]) is None
    assert slowest_rate(["p@v/a"], [worker("1", "p@v/a", rows=5, busy_s=0.1)]) is None


def test_two_chunks_a_worker_are_under_way_within_bounds() -> None:
    nodes = ["p@v+run/a", "p@v+run/@read"]
    serving = [worker(str(n), "p@v/a", "p@v+run/a") for n in range(5)]
    others = [worker("x", "q@v/a", "q@v+run/a"), worker("y", "p@v+run/a", state="failed")]
    assert chunks_in_flight(nodes, [*serving, *others]) == 10
    assert chunks_in_flight(nodes, []) == 4
    assert chunks_in_flight(nodes, [worker(str(n), "p@v+run/@read") for n in range(500)]) == 256


def test_figures_are_of_the_run_and_of_both_graphs() -> None:
    """What workers had done before does not count; one whose child died began to count anew."""
    refs = ["p@v+run", "p@v"]
    before = {n: worker(n, "p@v/a", "p@v+run/a", rows=100, busy_s=5.0, batches=10) for n in "12"}
    now = [
        worker("1", "p@v/a", "p@v+run/a", rows=140, busy_s=6.0, batches=20, max_rows=8, moved={"arena": 7}),
        worker("2", "p@v/a", "p@v+run/a", rows=20, busy_s=0.5, batches=5, max_rows=8),
    ]
    loads = {"p@v/a.ready_rows": 3, "p@v+run/a.ready_rows": 40, "p@v+run/a.held_rows": 8}
    (found,) = stage_figures(["a"], refs, loads, now, before, 2.0, {"a": 36.0})
    assert found == StageFigures("a", 43, 8, 2, 1.5 / 4.0, 60, 1000 * 1.5 / 60, 60 / (15 * 8), 7, pytest.approx(0.5))
    (idle,) = stage_figures(["@read"], refs, {}, [], {}, 2.0, {"@read": 1.0})
    assert idle == StageFigures("@read", 0, 0, 0)


def test_the_bottleneck_is_who_is_busiest_or_not_there() -> None:
    calm, busy = StageFigures("a", 0, 1, 1, 0.2, 10), StageFigures("b", 9, 1, 1, 0.9, 10)
    assert bottleneck([calm, busy]) == "b"
    assert bottleneck([calm, busy, StageFigures("c", 5, 0, 0)]) == "c"
    assert bottleneck([StageFigures("a", 0, 0, 1)]) == ""
    assert bottleneck([]) == ""


def test_the_rate_of_the_last_seconds_tells_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    through = Throughput(began=1000.0)
    assert through.eta_s(10) is None
    for n in range(100):
        clock[0] += 1.0 if n < 50 else 0.5
        through.ended(10)
    rows, chunks = through.rates()
    assert (round(rows, 1), round(chunks, 2)) == (20.0, 2.0)
    assert through.eta_s(20) == pytest.approx(10.0)
    assert through.eta_s(None) is None
    assert (through.rows, through.chunks, through.seconds) == (1000, 100, 75.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chunk_row": 5}, "did you mean 'chunk_rows'"),
        ({"limit": -1}, "limit -1 must be a whole number from 0"),
        ({"limit": True}, "limit True must be"),
        ({"in_flight": 0}, "in_flight 0 must be a whole number from 1"),
        ({"chunk_rows": 0}, "chunk_rows 0 must be"),
        ({"keep": "url"}, "keep 'url' is a list of columns"),
        ({"priority": "urgent"}, "priority"),
        ({"format": "csv"}, "none of parquet, jsonl, npy"),
        ({"columns": {"a": 1}}, "columns maps"),
        ({"key": ""}, "key is the name"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, ConfigError), match=says):
        RunOptions.parse("out", given)


def test_options_are_what_was_given(tmp_path: Any) -> None:
    """A folder is absolute, as workers run elsewhere; to try errors again is to go on."""
    made = RunOptions.parse(tmp_path / "out", {"retry_errors": True, "key": "id", "keep": ["a"], "columns": {"t": "x"}})
    assert (made.write.folder, made.write.key, made.write.keep) == (str(tmp_path / "out"), "id", ("a",))
    assert (made.read.columns, made.resume, made.priority) == ({"t": "x"}, True, 0)
    assert RunOptions.parse("s3://b/out", {}).write.folder == "s3://b/out"
    assert RunOptions.parse("out", {}).write.folder.startswith("/")
    with pytest.raises(InputError, match="is a folder or a URL"):
        RunOptions.parse("", {})
    assert RunOptions.parse("out", {"image_side": 64}).read.image_side == 64
