"""What `wire` does between real workers and in run_local: less in Redis, the same results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Workers, wait_until
from tests.workers.support import WorkerProcess
from torchrelay import Pipeline, Relay
from torchrelay.errors import ConfigError
from torchrelay.queues import codec, wire
from torchrelay.queues.registry import Registry
from torchrelay.workers.edge import Edge

MakePipeline = Callable[..., Path]

YAML = """
    pipeline: edges
    input: {n: int64}
    output: [shown, vector_seen, crops_seen, text_seen]
    stages:
      - name: make
        use: stages.py:make
        outputs: {vector: "float32[4096]", crops: "float64[*]", text: str, shown: "float32[4096]"}
        wire: WIRE
      - {name: pass_on, use: "stages.py:pass_on", inputs: [n], outputs: {m: int64}}
      - name: see
        use: stages.py:see
        inputs: [vector, crops, text]
        outputs: {vector_seen: "float32[4096]", crops_seen: "float64[*]", text_seen: str}
"""
CODE = """
    import numpy as np

    def numbers(n, size):
        # Many equal values, which compress, and none of which a float16 holds exactly.
        return np.repeat(np.random.default_rng(n).normal(size=size // 64), 64)

    def make(batch):
        vector = np.stack([numbers(n, 4096) for n in batch["n"]]).astype(np.float32)
        return {
            "vector": vector,
            "crops": [numbers(n, 64 * (90 + n)) for n in batch["n"]],
            "text": [f"row {n} " * 2000 for n in batch["n"]],
            "shown": vector,
        }

    def pass_on(batch):
        return {"m": batch["n"]}

    def see(batch):
        assert batch["vector"].dtype == np.float32 and all(c.dtype == np.float64 for c in batch["crops"])
        return {"vector_seen": batch["vector"], "crops_seen": batch["crops"], "text_seen": batch["text"]}
"""
NONE, FLOATS, LZ4, BOTH = (
    "{}",
    "{dtype: float16}",
    "{compress: lz4}",
    "{dtype: float16, compress: zstd}",
)
TRUTH: dict[str, Any] = {}
exec("\n".join(line.removeprefix("    ") for line in CODE.splitlines()), TRUTH)


def expected(n: int, options: str) -> dict[str, Any]:
    """The result for a row, and what each option may change of it."""
    made = TRUTH["make"]({"n": [n]})
    row = {"shown": made["shown"][0], "text_seen": made["text"][0]}
    row |= {"vector_seen": made["vector"][0], "crops_seen": made["crops"][0]}
    if "dtype" in options:
        for name in ("vector_seen", "crops_seen"):
            row[name] = row[name].astype(np.float16).astype(row[name].dtype)
    return row


def assert_equal(row: Any, wanted: dict[str, Any]) -> None:
    assert list(row) == ["shown", "vector_seen", "crops_seen", "text_seen"]
    for name, value in wanted.items():
        assert getattr(row[name], "dtype", None) == getattr(value, "dtype", None)
        np.testing.assert_array_equal(row[name], value)


def blob_bytes(registry: Registry) -> dict[str, int]:
    """Column -> bytes in Redis, of all jobs together."""
    found: dict[str, int] = {}
    for key in registry.client.scan_iter(f"*{registry.control.namespace}*blob:*"):
        column = key.decode().rpartition(".")[2]
        found[column] = found.get(column, 0) + sum(map(len, registry.client.hvals(key)))
    return found


@pytest.mark.parametrize("options", [NONE, FLOATS, LZ4, BOTH])
def test_between_workers(
    options: str, make_pipeline: MakePipeline, workers: Workers, relay: Relay, registry: Registry
) -> None:
    """Blobs between stages are smaller as asked; results are exact, but for floats that were asked to be rounded."""
    path = make_pipeline(YAML.replace("WIRE", options), CODE)
    relay.register(path)
    workers.start(path, stage="make")
    futures = relay.submit_many("edges", [{"n": n} for n in range(4)])
    wait_until(lambda: sum(v for k, v in registry.loads().items() if k.endswith("pass_on.ready_rows")) == 4)
    plain = {"vector": 4 * 4096 * 4, "crops": 64 * 8 * (4 * 90 + 6), "shown": 4 * 4096 * 4, "text": 4 * 7 * 2000}
    share = {NONE: 1.0, FLOATS: 1.0, LZ4: 0.1, BOTH: 0.1}[options]
    least = {NONE: 1.0, FLOATS: 0.5, LZ4: 0.1, BOTH: 0.05}[options]
    found = blob_bytes(registry)
    for column in ("vector", "crops"):
        size = found.get(column, 0)
        assert size <= 1.05 * least * plain[column]
        assert options != NONE or size >= plain[column]
    assert found["shown"] >= plain["shown"]  # it is part of the result
    assert found.get("text", 0) <= 1.05 * share * plain["text"]
    for stage in ("pass_on", "see"):
        workers.start(path, stage=stage)
    for n, future in enumerate(futures):
        assert_equal(future.result(20), expected(n, options))


@pytest.mark.parametrize("options", [NONE, FLOATS, LZ4, BOTH])
def test_run_local_rounds_as_workers_do(options: str, make_pipeline: MakePipeline) -> None:
    """The same path without Redis, whether rows come alone or as one batch."""
    pipeline = Pipeline.load(make_pipeline(YAML.replace("WIRE", options), CODE))
    for n, row in enumerate(pipeline.run_local([{"n": n} for n in range(3)])):
        assert_equal(row, expected(n, options))
    [alone] = pipeline.run_local([{"n": 2}])
    assert_equal(alone, expected(2, options))


def test_rows_that_skip_show_exact_values(make_pipeline: MakePipeline) -> None:
    """A value that a last stage's `when` leaves as it was is part of the result, so it is not rounded."""
    yaml = """
        pipeline: cascade
        input: {x: float32}
        stages:
          - name: small
            use: stages.py:small
            outputs: {score: float32, unsure: bool}
            wire: {dtype: float8_e5m2}
          - {name: large, use: "stages.py:large", inputs: [x], outputs: {score: float32}, when: unsure}
    """
    code = """
        def small(batch):
            return {"score": batch["x"], "unsure": batch["x"] > 1}

        def large(batch):
            return {"score": batch["x"] * 2}
    """
    rows = Pipeline.load(make_pipeline(yaml, code)).run_local([{"x": np.float32(0.1)}, {"x": np.float32(1.3)}])
    assert [row["score"] for row in rows] == [np.float32(0.1), np.float32(2.6)]


def test_hidden_and_result_columns_are_not_compressed(make_pipeline: MakePipeline) -> None:
    """They keep their bytes: clients read them, and need no library."""
    graph = Pipeline.load(make_pipeline(YAML.replace("WIRE", LZ4), CODE)).graph
    edge = Edge.of(graph, graph.nodes[0])
    assert edge is not None
    message = codec.encode(np.zeros(5000, np.int32))
    for column in ("#1", "!1", "shown"):
        assert edge.compressed(column, message) is message
    made = edge.compressed("vector", codec.message(np.zeros(5000, np.int32)))
    assert isinstance(made, bytes)
    assert wire.is_compressed(made)
    assert Edge.of(graph, graph.nodes[1]) is None


def test_a_worker_without_the_library_does_not_start(
    make_pipeline: MakePipeline,
    spawn: Callable[..., WorkerProcess],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the one that compresses nor one behind it: each ends with the package to install; run_local too."""
    path = make_pipeline(YAML.replace("WIRE", LZ4), CODE)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "lz4.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    started = [spawn(path, stage=stage) for stage in ("make", "see")]
    why = 'stage "make": wire.compress lz4 needs the lz4 package: pip install "torchrelay[worker]"'
    for worker in started:
        assert worker.process.wait(30) == 1, worker.log
        assert why in worker.log
    for module in ("lz4", "lz4.block"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as refused:
        Pipeline.load(path).run_local([{"n": 1}])
    assert str(refused.value) == why
