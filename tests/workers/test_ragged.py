"""Tables of ragged rows through real workers: in shared memory, narrowed, padded, rejected, and back as lists."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conftest import MakePipeline, Workers
from torchrelay import Relay

YAML = """
    pipeline: texts
    input: {tokens: "int32[*]", marks: "float32[*, 2]"}
    output: [back, marks, total, halves]
    stages:
      - {name: halve, use: "stages.py:halve", inputs: [tokens], outputs: {halved: "float32[*]"}, wire: {dtype: float16}}
      - name: pass
        use: stages.py:pass_on
        inputs: [tokens, halved]
        outputs: {back: "int32[*]", halves: "float32[*]"}
      - name: total
        use: stages.py:total
        inputs: [tokens]
        outputs: {total: int64}
        batch: {max_rows: 64, pad: {tokens: 0}, buckets: {tokens: [64, 512]}}
"""
CODE = """
    import numpy as np

    def halve(batch):
        return {"halved": [(row / 2).astype(np.float32) for row in batch["tokens"]]}

    def pass_on(batch):
        assert type(batch["tokens"]) is list
        return {"back": batch["tokens"], "halves": batch["halved"]}

    def total(batch):
        for i in np.flatnonzero(batch.lengths["tokens"] == 13):
            batch.reject(i, "thirteen")
        assert batch["tokens"].shape[1] in (64, 512)
        return {"total": batch["tokens"].sum(axis=1)}
"""


def tables(count: int, rows: int) -> list[dict[str, Any]]:
    """Lengths around 80, none of them 13; tokens that a float16 holds."""
    random = np.random.default_rng(7)
    made = []
    for _ in range(count):
        lengths = [n if n != 13 else 14 for n in random.integers(0, 200, rows)]
        tokens = [random.integers(0, 2000, n).astype(np.int32) for n in lengths]
        made.append({"tokens": tokens, "marks": [np.full((n % 5, 2), n, np.float32) for n in lengths]})
    return made


def check(table: dict[str, Any], result: dict[str, Any]) -> None:
    expected = {
        "back": table["tokens"],
        "marks": table["marks"],
        "halves": [row.astype(np.float32) / 2 for row in table["tokens"]],
    }
    for name, rows in expected.items():
        assert type(result[name]) is list
        assert [(r.dtype, r.tolist()) for r in result[name]] == [(r.dtype, r.tolist()) for r in rows]
    assert result["total"].tolist() == [int(row.sum()) for row in table["tokens"]]


def test_tables_of_ragged_rows_come_back_as_they_went(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers
) -> None:
    """Jobs of many rows in one array and jobs of few in a list, side by side in one batch; durable or not."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    given = [*tables(6, 64), *tables(4, 1), *tables(2, 3), *tables(1, 0)]
    for durable in (False, True):
        futures = [relay.submit_table("texts", table, durable=durable) for table in given]
        for table, future in zip(given, futures, strict=True):
            check(table, future.result(timeout=30))


def test_rejected_rows_leave_their_neighbours(make_pipeline: MakePipeline, relay: Relay, workers: Workers) -> None:
    """A table that keeps what it can comes back without them, in order."""
    relay.register(path := make_pipeline(YAML, CODE))
    workers.start(path)
    (table,) = tables(1, 20)
    odd = {**table, "tokens": [*table["tokens"][:5], np.arange(13, dtype=np.int32), *table["tokens"][6:]]}
    future = relay.submit_table("texts", odd, on_error="keep")
    check({name: [*rows[:5], *rows[6:]] for name, rows in table.items()}, future.result(timeout=30))
    assert {row: error.message for row, error in future.errors.items()} == {5: "thirteen"}
