"""Jobs whose payloads are odd, and rows that no stage saw: opened, closed and committed as any other. No Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrelay.config import Pipeline
from torchrelay.config.spec import BatchSpec
from torchrelay.errors import BytesLost, DecodeError
from torchrelay.queues import codec
from torchrelay.queues.job import Packed, Ref, decode_payload, encode_payload
from torchrelay.queues.levels import ResultTable, result_table
from torchrelay.stages import Batch, Runner
from torchrelay.stages.loading import make_stage
from torchrelay.workers.assemble import Assembler
from torchrelay.workers.batching import Planner
from torchrelay.workers.compute import compute
from torchrelay.workers.work import Incoming, Output, Work

MakePipeline = Callable[..., Path]
Function = Callable[[Batch], Any]


class Quiet:
    """A meter that notes nothing."""

    def started(self, works: Sequence[Work[str]]) -> None: ...
    def stopped(self, rows: int) -> None: ...
    def ended(self, works: Sequence[Work[str]]) -> list[bool]:
        return [False] * len(works)

    def goes_on(self, works: Sequence[Work[str]]) -> bool:
        return True


def packed(table: Mapping[str, Any]) -> dict[str, Packed]:
    return {name: codec.encode(column) for name, column in table.items()}


def through(pipeline: Pipeline, functions: Sequence[Function], table: Mapping[str, Any], rows: int) -> ResultTable:
    """The result of one table job that keeps what it can, computed by a chain of functions."""
    payload = encode_payload(packed(table))
    for node, function in zip(pipeline.graph.nodes, functions, strict=True):
        assembler: Assembler[str] = Assembler(pipeline.graph, node)
        opened = assembler.open_all([Incoming("job", [payload], rows, keep=True, last=True)])
        assert opened.bad == []
        runner = Runner(make_stage(function), node.name, outputs=node.outputs)
        [[(work, outcome)]] = compute(opened.ready, runner, Planner(BatchSpec(max_rows=100)), Quiet())
        assert isinstance(outcome, Output)
        closed = assembler.close(work, outcome)
        payload, rows = encode_payload({**closed.riding, **closed.made}, b"", closed.origins), closed.rows
    end = decode_payload(payload)
    return result_table({n: codec.decode(p) for n, p in end.columns.items() if isinstance(p, bytes)}, end.origins)


CHAIN = """
    pipeline: chain
    input: {x: int64}
    stages:
      - {name: first, use: "stages.py:first"}
      - {name: second, use: "stages.py:second", inputs: [y]}
"""
CHAIN_CODE = """
    def first(batch): ...
    def second(batch): ...
"""


@pytest.fixture
def chain(make_pipeline: MakePipeline) -> Pipeline:
    return Pipeline.load(make_pipeline(CHAIN, CHAIN_CODE))


def refuse(batch: Batch) -> None:
    for i in range(len(batch)):
        batch.reject(i, "none is good \udc80" + "!" * 5000)


def never(batch: Batch) -> None:
    raise AssertionError("called")


def test_a_table_whose_rows_are_all_rejected_passes_stages_that_declare_nothing(chain: Pipeline) -> None:
    """A later stage misses columns that nobody could make; the table ends with its rows' errors all the same."""
    columns, source_rows, failures = through(chain, [refuse, never], {"x": np.arange(3)}, 3)
    assert columns == {}
    assert source_rows.tolist() == []
    assert [f.row for f in failures] == [0, 1, 2]


def test_words_of_a_rejection_are_made_fit_to_travel(chain: Pipeline) -> None:
    """A lone surrogate or a novel must not cost the other rows their results."""
    [failure, *_] = through(chain, [refuse, never], {"x": np.arange(3)}, 3).failures
    assert failure.message.startswith("none is good ?!!!")
    assert len(failure.message) == 1000


def test_a_table_without_rows_passes_stages_that_declare_nothing(chain: Pipeline) -> None:
    """No stage is called, none can say which columns it would have made."""
    assert through(chain, [never, never], {"x": np.arange(0)}, 0).failures == []


def test_a_missing_column_is_still_an_error_where_rows_enter(chain: Pipeline) -> None:
    """Only for no rows is it no matter."""
    opened = Assembler[str](chain.graph, chain.graph.node("second")).open_all(
        [Incoming("job", [encode_payload(packed({"x": np.arange(2)}))], 2)]
    )
    [(_, error)] = opened.bad
    assert "column 'y' is missing" in str(error)


CASCADE = """
    pipeline: cascade
    input: {x: int64, flag: json}
    stages:
      - {name: first, use: "stages.py:first", when: flag, outputs: {x: int64}}
"""


@pytest.mark.parametrize("flag", [np.array([1, 2]), np.array([0]), np.zeros(0)])
def test_arrays_in_the_column_of_when_are_refused_in_words(make_pipeline: MakePipeline, flag: Any) -> None:
    """json may hold them; they are neither true nor false, and the worker lives on."""
    graph = Pipeline.load(make_pipeline(CASCADE, CHAIN_CODE)).graph
    good = encode_payload(packed({"x": np.arange(2), "flag": [np.int64(0), {"a": 1}]}))
    bad = encode_payload(packed({"x": np.arange(2), "flag": [1, flag]}))
    opened = Assembler[str](graph, graph.nodes[0]).open_all([Incoming("bad", [bad], 2), Incoming("good", [good], 2)])
    [(job, error)] = opened.bad
    assert job == "bad"
    assert isinstance(error, DecodeError)
    assert "neither true nor false" in str(error)
    [work] = opened.ready
    assert work.active is not None
    assert work.active.tolist() == [1]


@pytest.mark.parametrize(
    "table",
    [
        {"x": np.array(1)},
        {"x": "ab"},
        {"x": {"a": 1, "b": 2}},
        {"x": 2},
        {"x": [1, 2], "#zz": [1]},
        {"x": [1, 2], "#1": np.array([1, 1], np.uint32), "!1": 3},
        {"x": [1, 2], "!1": [["a", "b", "c", "d", "e"]]},
        {"x": [1, 2], "!1": [[0]]},
        {"x": [1, 2], "!": []},
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_forged_payloads_harm_no_neighbour(make_pipeline: MakePipeline, table: dict[str, Any], keep: bool) -> None:
    """Whatever they hold, the other job of the batch is opened, and nothing is raised."""
    pipeline = Pipeline.load(
        make_pipeline(
            """
            pipeline: forged
            input: {x: int64}
            stages:
              - {name: first, use: "stages.py:first", inputs: [x], outputs: {y: int64}, rows: expand}
              - {name: second, use: "stages.py:second", inputs: [x], outputs: {z: int64}}
            """,
            CHAIN_CODE,
        )
    )
    good = Incoming("good", [encode_payload(packed({"x": np.arange(2)}))], 2)
    for node in pipeline.graph.nodes[:1]:
        forged = Incoming("forged", [encode_payload(packed(table))], 2, keep)
        opened = Assembler[str](pipeline.graph, node).open_all([forged, good])
        assert "good" in [w.job for w in opened.ready]


def test_bytes_of_the_input_that_are_gone_are_told_from_those_that_a_restart_brings_back(chain: Pipeline) -> None:
    """The one job cannot be helped, the others start again: where the bytes were made, if the name tells."""
    graph = chain.graph
    payloads = {
        "input": encode_payload({"y": Ref("0123456789abcdef~1.0.y", 1, 9)}),
        "made": encode_payload({"y": Ref("0123456789abcdef.1.fence.y", 1, 9)}),
        "strange": encode_payload({"y": Ref("0123456789abcdef.99.fence.y", 1, 9)}),
        "nameless": encode_payload({"y": Ref("y", 1, 9)}),
    }
    assembler: Assembler[str] = Assembler(graph, graph.node("second"), lambda wanted: [None] * len(wanted))
    opened = assembler.open_all([Incoming(name, [payload], 1) for name, payload in payloads.items()])
    assert opened.lost == [("made", 0b01), ("strange", 0), ("nameless", 0)]
    [(job, error)] = opened.bad
    assert job == "input"
    assert isinstance(error, BytesLost)
