"""The types of a run's output: one per column in all parts, whatever each chunk held, and no value changed."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.conftest import MakePipeline, Workers
from torchrelay import Relay
from torchrelay.errors import ConfigError, RunConflict

YAML = """
    pipeline: tell
    input: {{n: "int64"}}
    {output}
    stages:
      - {{name: work, use: "stages.py:tell", {more}}}
"""
CODE = """
    import json
    from pathlib import Path

    import numpy as np

    VALUES = json.loads(Path(__file__).with_name("values.json").read_text())

    def tell(batch):
        return {"v": [VALUES[int(n)] for n in batch["n"]]}

    def plain(batch):
        return {"v": np.asarray(batch["n"]) * 2}
"""

Start = Callable[..., None]


@pytest.fixture
def start(make_pipeline: MakePipeline, workers: Workers) -> Start:
    """Workers of a pipeline whose stage returns these values, of which nothing is declared; or the doubles of `n`."""

    def begin(values: list[Any] | None = None) -> None:
        stage = "" if values is not None else "outputs: {v: int64}"
        code = CODE if values is not None else CODE.replace("def tell", "def other").replace("def plain", "def tell")
        path = make_pipeline(YAML.format(output="", more=stage or "batch: {max_rows: 2}"), code)
        path.with_name("values.json").write_text(json.dumps(values or []))
        for name in (None, "@read", "@write"):
            workers.start(path, stage=name)

    return begin


def in_one(folder: Path) -> pa.Table:
    """The folder as one dataset; each part by itself has the same types."""
    table = ds.dataset(folder).to_table()
    for part in folder.glob("part-*.parquet"):
        own = pq.read_schema(part)
        assert own.types == table.schema.types, (part, own, table.schema)
        assert own.names == table.schema.names
    return table


UTC = datetime.UTC
EVERY = {
    "i32": pa.array([None, None, 3, -4, 5, 6], pa.int32()),
    "u64": pa.array([None, None, 2**64 - 1, 2**63, 0, 1], pa.uint64()),
    "half": pa.array([None, None, 1.5, 2.5, 0.1, 6], pa.float32()).cast(pa.float16(), safe=False),
    "flag": pa.array([None, None, True, False, None, True]),
    "stamp": pa.array([None, None, 1_700_000_000_123_456_789, 5, None, -1], pa.timestamp("ns", "Europe/Zurich")),
    "naive": pa.array([None, None, datetime.datetime(2024, 1, 2, 3, 4, 5), None, None, None], pa.timestamp("ms")),
    "day": pa.array([None, None, datetime.date(1900, 1, 1), None, None, datetime.date(9999, 12, 31)], pa.date32()),
    "clock": pa.array([None, None, 1, 2, 3, 86_399_999_999_999], pa.time64("ns")),
    "span": pa.array([None, None, 1, 2, 3, -4], pa.duration("ms")),
    "money": pa.array([None, None, decimal.Decimal("1234567890123456789012345678.123456789"), None, None, None]),
    "names": pa.array([None, None, "a", "b", "a", ""]).dictionary_encode(),
    "large": pa.array([None, None, "ä\0b", "", "x" * 100_000, "e\u0301"], pa.large_string()),
    "raw": pa.array([None, None, b"\xff\0", b"", b"a", None], pa.binary()),
    "lists": pa.array([None, None, [1, None], [], [2], None], pa.list_(pa.int16())),
    "texts": pa.array([None, None, ["a", None], [], ["b"], None]),
    "pair": pa.array([None, None, [1, 2], [3, 4], None, [5, 6]], pa.list_(pa.int8(), 2)),
    "deep": pa.array(
        [None, None, {"a": [{"t": datetime.date(2024, 1, 1)}], "b": None}, {"a": [], "b": "x"}, None, None]
    ),
    "map": pa.array([None, None, [("k", 1)], [], None, None], pa.map_(pa.string(), pa.int64())),
    "nothing": pa.nulls(6),
}


@pytest.mark.parametrize("format", ["parquet", "arrow", "memory"])
def test_kept_columns_have_the_types_of_the_dataset(relay: Relay, start: Start, tmp_path: Path, format: str) -> None:
    """Each value as it is, nulls too, where the first chunk has none but them; in the merged file and in `rows()`."""
    start()
    table = pa.table({"n": range(6), **EVERY})
    data: Any = tmp_path / f"in.{format}"
    if format == "parquet":
        pq.write_table(table, data)
    elif format == "arrow":
        with pa.ipc.new_file(data, table.schema) as file:
            file.write_table(table)
    else:
        data = table
    out = tmp_path / "out"
    run = relay.run("tell", input=data, output=out, key="n", keep=list(EVERY), chunk_rows=2, merge=True)
    assert (run.summary()["rows"], run.summary()["errors"]) == (6, 0)
    for found in (in_one(out), pq.read_table(tmp_path / "out.parquet")):
        for name in ("n", *EVERY):
            want = table.column(name)
            assert found.schema.field(name).type == want.type, name
            assert found.column(name).to_pylist() == want.to_pylist(), name
    assert [row["money"] for row in run.rows()] == EVERY["money"].to_pylist()


def test_files_whose_types_differ_are_kept_in_one_that_holds_both(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Decided before the run; no file's type depends on which chunk comes first. What no type holds is refused."""
    start()
    kinds = [
        (pa.int8(), pa.timestamp("s"), pa.string()),
        (pa.int64(), pa.timestamp("us"), pa.dictionary(pa.int8(), pa.string())),
    ]
    (tmp_path / "in").mkdir()
    for i, (number, stamp, text) in enumerate(kinds):
        columns = {"n": [i], "x": pa.array([2**40 if i else 1], number), "t": pa.array([5 * 10 ** (6 * i) + i], stamp)}
        pq.write_table(pa.table({**columns, "s": pa.array(["a"]).cast(text)}), tmp_path / "in" / f"{i}.parquet")
    options: dict[str, Any] = {"key": "n", "keep": ["x", "t", "s"], "merge": True}
    relay.run("tell", input=tmp_path / "in", output=tmp_path / "out", **options)
    table = in_one(tmp_path / "out")
    assert table.schema.field("x").type == pa.int64()
    assert table.column("x").to_pylist() == [1, 2**40]
    assert table.schema.field("t").type == pa.timestamp("us")
    assert table.column("t").cast(pa.int64()).to_pylist() == [5_000_000, 5_000_001]
    assert table.column("s").to_pylist() == ["a", "a"]

    def added(x: Any) -> None:
        pq.write_table(pa.table({"n": [2], "x": x, "t": pa.nulls(1), "s": ["b"]}), tmp_path / "in/2.parquet")

    # An added file must fit the types that are there.
    added([2.5])
    with pytest.raises(RunConflict, match="type of column 'x' was int64, and added files have double"):
        relay.run("tell", input=tmp_path / "in", output=tmp_path / "out", resume=True, **options)
    added(["2"])
    with pytest.raises(ConfigError, match=r"column 'x' is string in .*2\.parquet' and int64 in files before it"):
        relay.run("tell", input=tmp_path / "in", output=tmp_path / "new", **options)
    pq.write_table(
        pa.table({"n": [2], "x": pa.array([7], pa.int16()), "t": pa.nulls(1), "s": ["b"]}), tmp_path / "in/2.parquet"
    )
    run = relay.run("tell", input=tmp_path / "in", output=tmp_path / "out", resume=True, **options)
    assert run.summary()["rows"] == 3
    assert in_one(tmp_path / "out").column("x").to_pylist() == [1, 2**40, 7]
    assert pq.read_table(tmp_path / "out.parquet").column("s").to_pylist() == ["a", "a", "b"]


LINES: dict[str, tuple[list[Any], pa.DataType]] = {
    "late": ([None, None, None, "x"], pa.string()),
    "mixed": ([1, 2, 2.5, None], pa.float64()),
    "wide": ([1, 2, 2**62, None], pa.int64()),
    "wider": ([1, None, 2**64 - 1, 0], pa.uint64()),
    "word": (["1", None, 2, "3"], pa.string()),
    "objects": ([{"a": 1}, None, {"b": [None]}, []], pa.string()),
    "huge": ([1, 2, 2**70, None], pa.string()),
    "exact": ([2**60 + 1, 1, 0.5, None], pa.string()),
    "flag": ([True, None, False, None], pa.bool_()),
    "none": ([None] * 4, pa.string()),
}


@pytest.mark.parametrize("format", ["jsonl", "memory"])
def test_kept_columns_of_lines_have_one_type_too(relay: Relay, start: Start, tmp_path: Path, format: str) -> None:
    """Numbers that hold all there are, text, or JSON where values are of several kinds; `rows()` gives each back."""
    start()
    rows = [{"n": i, **{name: values[i] for name, (values, _) in LINES.items()}} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: Any = tmp_path / "in.jsonl" if format == "jsonl" else rows
    out = tmp_path / "out"
    options: dict[str, Any] = {"keep": list(LINES), "chunk_rows": 1, "merge": True}
    run = relay.run("tell", input=data, output=out, limit=4, **options)
    assert (run.summary()["rows"], run.summary()["errors"]) == (4, 0)
    for table in (in_one(out), pq.read_table(tmp_path / "out.parquet")):
        for name, (_, kind) in LINES.items():
            assert table.schema.field(name).type == kind, name
        assert table.column("wider").to_pylist() == LINES["wider"][0]
        assert table.column("word").to_pylist() == ['"1"', None, "2", '"3"']
    assert [{name: row[name] for name in LINES} for row in run.rows()] == [{k: r[k] for k in LINES} for r in rows]


def test_a_value_that_does_not_fit_the_kept_type_costs_its_row_and_a_type_may_be_named(
    relay: Relay, start: Start, tmp_path: Path
) -> None:
    """The message says how; what was named in the first place takes it."""
    start()
    rows = iter([{"n": i, "x": 1} for i in range(100)] + [{"n": 100, "x": 1.5}, {"n": 101, "x": 2.0}])
    run = relay.run("tell", input=rows, output=tmp_path / "a", keep=["x"], chunk_rows=50)
    assert (run.summary()["rows"], run.summary()["errors"]) == (100, 2)
    errors = pq.read_table(tmp_path / "a/_run/errors.parquet").to_pylist()
    assert "column 'x': it is int64 in this run" in errors[0]["text"]
    assert "keep_types" in errors[0]["text"]
    rows = iter([{"n": i, "x": 1} for i in range(100)] + [{"n": 100, "x": 1.5}])
    run = relay.run("tell", input=rows, output=tmp_path / "b", keep=["x"], keep_types={"x": "float64"}, chunk_rows=50)
    assert run.summary()["errors"] == 0
    assert in_one(tmp_path / "b").column("x").to_pylist() == [1.0] * 100 + [1.5]


RESULTS: list[tuple[str, list[Any], pa.DataType, list[Any]]] = [
    ("null, then text", [None, None, "a", "b"], pa.string(), [None, None, "a", "b"]),
    ("null, then numbers", [None, None, 1, 2.5], pa.float64(), [None, None, 1.0, 2.5]),
    ("integers, then floats", [1, 2, 0.5, 1.5], pa.float64(), [1.0, 2.0, 0.5, 1.5]),
    ("large integers, then floats", [2**60 + 1, 2, 0.5, 1.5], pa.string(), [str(2**60 + 1), "2", "0.5", "1.5"]),
    ("text, then numbers", ["a", "1", 1, 2], pa.string(), ['"a"', '"1"', "1", "2"]),
    ("flags, then numbers", [True, False, 1, 0], pa.string(), ["true", "false", "1", "0"]),
    ("small, then large", [1, -1, 2**62, 5], pa.int64(), [1, -1, 2**62, 5]),
    ("small, then largest", [1, 2, 2**63, 5], pa.uint64(), [1, 2, 2**63, 5]),
]


def test_result_columns_that_are_not_declared_have_one_type_at_the_end(
    relay: Relay, start: Start, tmp_path: Path
) -> None:
    """That which they would have, had the run been one chunk; after a resume and in the merged file too."""
    values = [value for _, given, _, _ in RESULTS for value in given]
    start(values)
    pq.write_table(pa.table({"n": range(len(values))}), tmp_path / "in.parquet")
    for i, (case, given, kind, want) in enumerate(RESULTS):
        (tmp_path / f"in{i}").mkdir()
        ids = range(4 * i, 4 * i + 4)
        pq.write_table(pa.table({"n": list(ids)[:2]}), tmp_path / f"in{i}/a.parquet")
        options: dict[str, Any] = {"key": "n", "merge": True}
        out = tmp_path / f"out{i}"
        relay.run("tell", input=tmp_path / f"in{i}", output=out, **options)
        pq.write_table(pa.table({"n": list(ids)[2:]}), tmp_path / f"in{i}/b.parquet")
        run = relay.run("tell", input=tmp_path / f"in{i}", output=out, resume=True, **options)
        table = in_one(out)
        assert (table.schema.field("v").type, table.column("v").to_pylist()) == (kind, want), case
        assert pq.read_table(tmp_path / f"out{i}.parquet").equals(table), case
        assert [row["v"] for row in run.rows()] == given, case
        assert table.column("n").to_pylist() == list(ids)
        # Another look finds nothing to do.
        assert (
            "retyped" not in relay.run("tell", input=tmp_path / f"in{i}", output=out, resume=True, **options).summary()
        )


def test_null_keys_cost_their_rows_and_doubled_ones_are_told(relay: Relay, start: Start, tmp_path: Path) -> None:
    """Nothing without a key is written; keys that several rows have are counted, with examples."""
    start()
    pq.write_table(pa.table({"n": range(6), "id": ["a", None, "b", "a", "c", "a"]}), tmp_path / "in.parquet")
    run = relay.run("tell", input=tmp_path / "in.parquet", output=tmp_path / "out", key="id", chunk_rows=2)
    summary = run.summary()
    assert (summary["rows"], summary["errors"]) == (5, 1)
    assert (summary["duplicate_keys"], summary["duplicate_key_examples"]) == (2, ["a"])
    (error,) = pq.read_table(tmp_path / "out/_run/errors.parquet").to_pylist()
    assert (error["_row"], error["stage"]) == (1, "@read")
    assert "key column 'id' has no value in this row" in error["text"]


def test_without_pyarrow_a_run_says_what_to_install(
    relay: Relay, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, in whatever format: the list of errors and the parts' records need it too."""
    start()
    (tmp_path / "in.jsonl").write_text('{"n": 1}\n')
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for format in ("jsonl", "parquet", "npy"):
        with pytest.raises(ConfigError, match=r'dataset runs need pyarrow: pip install "torchrelay\[runs\]"'):
            relay.prepare_run("tell", input=tmp_path / "in.jsonl", output=tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
