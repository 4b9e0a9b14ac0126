"""Datasets that are meant badly, through whole runs: what is written is what was read, and what cannot be is told."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.conftest import MakePipeline, Workers
from torchrelay import Relay
from torchrelay.errors import ConfigError

YAML = """
    pipeline: echo
    input: {input}
    {output}
    stages:
      - {{name: work, use: "stages.py:echo"}}
"""
CODE = """
    def echo(batch):
        return OUT
"""
Start = Callable[..., None]


@pytest.fixture
def start(make_pipeline: MakePipeline, workers: Workers) -> Start:
    def begin(input: str, out: str, output: str = "") -> None:
        path = make_pipeline(YAML.format(input=input, output=output), CODE.replace("OUT", out))
        for name in (None, "@read", "@write"):
            workers.start(path, stage=name)

    return begin


def test_texts_of_every_kind_come_back(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Empty, NUL, very long, both normal forms, half of a surrogate pair: each as it is, or its row alone fails."""
    start("{t: str}", '{"v": batch["t"]}')
    texts = ["", "a\0b", "x" * 3_000_000, "\u00e9", "e\u0301", "\u202eabc", "😀", "\ud800", "\n", '"']
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"t": t, "id": t, "keep": [t]}) + "\n" for t in texts))
    run = relay.run("echo", input=tmp_path / "in.jsonl", output=tmp_path / "out", key="id", keep=["keep"], chunk_rows=3)
    good = [t for t in texts if t != "\ud800"]
    table = ds.dataset(tmp_path / "out").to_table()
    assert table.column("v").to_pylist() == good
    assert table.column("id").to_pylist() == good
    assert [row["keep"] for row in run.rows()] == [[t] for t in good]
    summary = run.summary()
    assert (summary["rows"], summary["errors"], summary["failed_chunks"]) == (len(good), 1, 0)
    assert summary["duplicate_keys"] == 0


def test_a_stage_that_makes_no_text_costs_that_row_alone(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Half of a surrogate pair, made of good input."""
    start("{t: str}", '{"v": [t.replace("x", chr(0xD800)) for t in batch["t"]]}')
    (tmp_path / "in.txt").write_text("a\nb\nx\nc\n")
    run = relay.run("echo", input=tmp_path / "in.txt", output=tmp_path / "out", columns={"t": "text"})
    assert [row["v"] for row in run.rows()] == ["a", "b", "c"]
    assert (run.summary()["errors"], run.summary()["failed_chunks"]) == (1, 0)


@pytest.mark.parametrize("dtype", ["uint64", "float16", "bfloat16"])
def test_numbers_of_every_width_come_back(relay: Relay, start: Start, tmp_path: Path, dtype: str) -> None:
    """Beyond 2**63, half floats, and tensors of bfloat16 in a dataset."""
    start(f"{{x: {dtype}}}", '{"v": batch["x"]}')
    if dtype == "uint64":
        values: Any = [0, 2**63, 2**64 - 1]
        pq.write_table(pa.table({"x": pa.array(values, pa.uint64())}), tmp_path / "in.parquet")
        data: Any = tmp_path / "in.parquet"
    elif dtype == "float16":
        values = [0.5, 65504.0, -0.0]
        np.save(tmp_path / "in.npy", np.asarray(values, np.float16))
        data = tmp_path / "in.npy"
    else:
        torch = pytest.importorskip("torch")
        values = [0.5, 1.0, -3.0]
        data = [{"x": torch.tensor(v, dtype=torch.bfloat16)} for v in values]
    run = relay.run("echo", input=data, output=tmp_path / "out", chunk_rows=1)
    assert run.summary()["errors"] == 0
    assert [float(row["v"]) if dtype != "uint64" else row["v"] for row in run.rows()] == values
    assert ds.dataset(tmp_path / "out").to_table().column("v").to_pylist() == values


def test_files_without_rows_among_others(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Of each format; they make no part, and change no type."""
    start("{n: int64}", '{"v": batch["n"]}')
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"n": pa.array([], pa.int64()), "k": pa.array([], pa.null())}), tmp_path / "a/0.parquet")
    pq.write_table(pa.table({"n": [1], "k": ["x"]}), tmp_path / "a/1.parquet")
    (tmp_path / "b").mkdir()
    for i, text in enumerate(["", "\n\n", '{"n": 1, "k": "x"}\n']):
        (tmp_path / f"b/{i}.jsonl").write_text(text)
    (tmp_path / "c").mkdir()
    for i, text in enumerate(["n,k\n", "n,k\n1,x\n"]):
        (tmp_path / f"c/{i}.csv").write_text(text)
    for name in "abc":
        run = relay.run("echo", input=tmp_path / name, output=tmp_path / f"out-{name}", keep=["k"], merge=True)
        assert (run.summary()["rows"], run.summary()["errors"], run.summary()["failed_chunks"]) == (1, 0, 0), name
        table = ds.dataset(tmp_path / f"out-{name}").to_table()
        assert table.select(["k", "v"]).to_pylist() == [{"k": "x", "v": 1}]
        assert table.schema.field("k").type == pa.string()


def test_names_that_the_output_has_already_are_refused_before_anything_runs(
    relay: Relay, start: Start, tmp_path: Path
) -> None:
    """Where results are declared or not."""
    start("{n: int64}", '{"v": batch["n"]}')
    pq.write_table(pa.table({"n": [1], "_row": [2]}), tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match="kept column '_row' has the name of a column that identifies rows"):
        relay.run("echo", input=tmp_path / "in.parquet", output=tmp_path / "out", keep=["_row"])
    assert not (tmp_path / "out").exists()
    run = relay.run("echo", input=tmp_path / "in.parquet", output=tmp_path / "out", key="n", keep=["_row", "n"])
    assert ds.dataset(tmp_path / "out").to_table().to_pylist() == [{"n": 1, "_row": 2, "v": 1}]
    assert run.summary()["rows"] == 1


def test_a_column_whose_name_is_spelled_in_the_other_normal_form_is_hinted_at(
    relay: Relay, start: Start, tmp_path: Path
) -> None:
    """Both look the same on a screen."""
    start("{n: int64}", '{"v": batch["n"]}')
    pq.write_table(pa.table({"n": [1], "caf\u00e9": ["x"]}), tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match="other Unicode form"):
        relay.run("echo", input=tmp_path / "in.parquet", output=tmp_path / "out", keep=["cafe\u0301"])


def test_rows_that_all_fail_make_a_readable_folder(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Chunks without rows beside others with rows, and a run without any."""
    start("{n: int64}", '{"v": [1 // int(n) for n in batch["n"]]}')
    pq.write_table(pa.table({"n": [0, 0, 1, 0], "k": [None, None, "x", None]}), tmp_path / "in.parquet")
    options: dict[str, Any] = {"keep": ["k"], "chunk_rows": 1, "merge": True}
    run = relay.run("echo", input=tmp_path / "in.parquet", output=tmp_path / "out", **options)
    assert (run.summary()["rows"], run.summary()["errors"]) == (1, 3)
    assert ds.dataset(tmp_path / "out").to_table().column("k").to_pylist() == ["x"]
    run = relay.run("echo", input=tmp_path / "in.parquet", output=tmp_path / "none", limit=2, **options)
    assert (run.summary()["rows"], run.summary()["errors"]) == (0, 2)
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
    assert list(run.rows()) == []


def test_types_that_parts_cannot_hold_are_refused_before_anything_runs(
    relay: Relay, start: Start, tmp_path: Path
) -> None:
    """Arrow has more types than Parquet; views, as polars gives them, are plain text and bytes."""
    start("{n: int64}", '{"v": [1 // int(n) for n in batch["n"]]}')
    unions = pa.UnionArray.from_sparse(pa.array([0, 0], pa.int8()), [pa.array([1, 2])])
    for name, column in {"union": unions, "months": pa.array([(1, 2, 3), None], pa.month_day_nano_interval())}.items():
        data = pa.table({"n": [1, 2], name: column})
        with pytest.raises(ConfigError, match=f"column '{name}' is .* which parquet output cannot hold"):
            relay.run("echo", input=data, output=tmp_path / "out", keep=[name])
    views = {"s": pa.array(["a", "b", None], pa.string_view()), "b": pa.array([b"a", b"", b"c"], pa.binary_view())}
    relay.run("echo", input=pa.table({"n": [1, 0, 1], **views}), output=tmp_path / "out", key="b", keep=["s"])
    assert ds.dataset(tmp_path / "out").to_table().select(["s", "b"]).to_pylist() == [
        {"s": "a", "b": b"a"},
        {"s": None, "b": b"c"},
    ]


def test_rows_in_memory_with_times_and_decimals(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Python's own have Arrow's types; one of another kind costs its row."""
    start("{n: int64}", '{"v": batch["n"]}')
    now = datetime.datetime(2024, 5, 6, 7, 8, 9, 10, datetime.UTC)
    rows: list[Any] = [{"n": i, "t": now, "d": now.date(), "m": decimal.Decimal("1.50")} for i in range(70)]
    rows += [{"n": 70, "t": None, "d": None, "m": decimal.Decimal("123456789.25")}, {"n": 71, "t": now, "d": "x"}]
    run = relay.run("echo", input=iter(rows), output=tmp_path / "out", keep=["t", "d", "m"], chunk_rows=40)
    table = ds.dataset(tmp_path / "out").to_table()
    assert (table.num_rows, run.summary()["errors"]) == (71, 1)
    assert table.select(["t", "d", "m"]).slice(69).to_pylist() == [
        {"t": now, "d": now.date(), "m": decimal.Decimal("1.50")},
        {"t": None, "d": None, "m": decimal.Decimal("123456789.25")},
    ]
    assert table.schema.field("t").type == pa.timestamp("us", "UTC")


@pytest.mark.parametrize("format", ["jsonl", "npy"])
def test_kept_columns_in_other_formats(relay: Relay, start: Start, tmp_path: Path, format: str) -> None:
    """Times as text with all their digits, JSON as JSON, numbers as numbers."""
    start("{n: int64}", '{"v": batch["n"]}')
    stamps = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC"))
    kept = {"t": stamps, "m": [decimal.Decimal("1.50"), None], "s": [{"a": [1]}, None]}
    pq.write_table(pa.table({"n": [1, 2], **kept}), tmp_path / "in.parquet")
    names = list(kept)
    run = relay.run("echo", input=tmp_path / "in.parquet", output=tmp_path / "out", format=format, key="n", keep=names)
    assert [{name: row[name] for name in names} for row in run.rows()] == [
        {"t": "2023-11-14T22:13:20.123456789+00:00", "m": "1.50", "s": {"a": [1]}},
        {"t": None, "m": None, "s": None},
    ]
