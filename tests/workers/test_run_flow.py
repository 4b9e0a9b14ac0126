"""A chunk on its way through a run graph, without a server: what is read, what fails on the way, what is written."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrelay.config import Pipeline
from torchrelay.config.imports import import_use
from torchrelay.config.run_graph import CHUNK, READ, RESULT, ROWS, WRITE
from torchrelay.config.spec import StageConfig
from torchrelay.local import Blobs
from torchrelay.queues import codec
from torchrelay.queues.job import decode_payload, encode_payload
from torchrelay.stages import Batch, Stage, StageContext, make_group_runner
from torchrelay.stages.outputs import ReadRows
from torchrelay.workers.assemble import Assembler
from torchrelay.workers.batching import Planner
from torchrelay.workers.compute import Failed, compute
from torchrelay.workers.gathering import FAILED, PARTS
from torchrelay.workers.work import Incoming, Output

STAGES = """
    from torchrelay import Expand

    def double(batch):
        for i, n in enumerate(batch["n"]):
            if n == 13:
                raise ValueError("unlucky")
            if n % 5 == 0 and n:
                batch.reject(i, "five")
        return {"n2": batch["n"] * 2}

    def words(batch):
        lists = [t.split() for t in batch["t"]]
        if any("bad" in words for words in lists):
            raise ValueError("a bad word")
        return Expand({"word": [w for words in lists for w in words]}, [len(words) for words in lists])

    def everything(batch):
        return {"seen": [",".join(sorted(batch)) for _ in range(len(batch))]}
"""


class Rows(Stage):
    """Reads a chunk that is given at once."""

    def __init__(self, columns: dict[str, Any], own: dict[str, Any]) -> None:
        self.columns, self.own = columns, own

    def forward(self, batch: Batch) -> ReadRows:
        assert list(batch[CHUNK]) == ["what to read"]
        return ReadRows(self.columns, [len(self.own["@row"])], self.own, {"@refused": [[[7, 3, "", "Damaged", "x"]]]})


class Note(Stage):
    """Notes what there is to write."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {}

    def forward(self, batch: Batch) -> dict[str, Any]:
        assert len(batch) == 1
        self.table = {name: batch[name][0] for name in batch}
        return {RESULT: [{"rows": len(self.table["@row"])}]}


def walk(path: Path, columns: dict[str, Any], **own: Any) -> tuple[dict[str, Any], Any]:
    """(what there was to write, the job's result)."""
    twin = Pipeline.load(path).for_runs()
    note = Note()
    ours = {READ: Rows(columns, {f"@{n}": c for n, c in own.items()}), WRITE: note}

    def find(stage: StageConfig) -> object:
        return ours.get(stage.name) or (stage.use and import_use(stage.use, twin.base_dir))

    payloads, rows, job = (
        {0: encode_payload({CHUNK: codec.encode(["what to read"]), ROWS: codec.encode([None])})},
        {0: 1},
        Blobs(),
    )
    for group in sorted(twin.groups, key=lambda g: g.first.rank):
        runner = make_group_runner(find, group)
        runner.load(StageContext())
        assembler: Assembler[Blobs] = Assembler(twin.graph, group.first, None, group=group)
        preds = group.first.preds
        keep = len(group.first.at) >= len(twin.graph.entry)
        incoming = Incoming(job, [payloads[p] for p in preds], rows[preds[0]], keep, last=True)
        opened = assembler.open_all([incoming])
        assert not opened.bad, opened.bad
        planner: Planner[Blobs] = Planner(group.batch, group.types)
        ((work, outcome),) = next(compute(opened.ready, runner, planner, job))
        assert isinstance(outcome, Output), outcome.error if isinstance(outcome, Failed) else outcome
        closed = assembler.close(work, outcome)
        packed = {**closed.riding, **{n: codec.join(m) for n, m in closed.made.items()}}
        payloads[group.last.index] = encode_payload(packed, b"", closed.origins)
        rows[group.last.index] = closed.rows
    end = decode_payload(payloads[twin.graph.nodes[-1].index])
    return note.table, {name: codec.decode(packed) for name, packed in end.columns.items()}  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stages.py").write_text(textwrap.dedent(STAGES))
    return tmp_path


def pipeline(folder: Path, text: str) -> Path:
    (folder / "p.yaml").write_text("pipeline: p\n" + textwrap.dedent(text))
    return folder / "p.yaml"


def test_rows_that_fail_are_told_of_and_their_neighbours_are_written(folder: Path) -> None:
    """By number, key and place in the file; what was not read at all comes along as it was told."""
    text = """
        input: {n: int64}
        output: [n2]
        stages: [{name: double, use: 'stages.py:double', batch: {max_rows: 4}}]
    """
    numbers = np.arange(1, 15)
    table, result = walk(pipeline(folder, text), {"n": numbers}, row=numbers + 100, key=[f"k{n}" for n in numbers])
    good = [n for n in numbers.tolist() if n != 13 and n % 5]
    assert table["n2"].tolist() == [2 * n for n in good]
    assert table["@row"].tolist() == [100 + n for n in good]
    assert table["@key"] == [f"k{n}" for n in good]
    assert table[PARTS].tolist() == [0] * len(good)
    assert table["@refused"] == [[7, 3, "", "Damaged", "x"]]
    assert "n" not in table
    told = [(why.stage, why.error_type, why.message, of["@row"], of["@key"]) for why, of in table[FAILED]]
    assert told == [
        ("double", "Rejected", "five", 105, "k5"),
        ("double", "Rejected", "five", 110, "k10"),
        ("double", "ValueError", "unlucky", 113, "k13"),
    ]
    assert result == {RESULT: [{"rows": len(good)}]}


def test_rows_made_of_a_row_are_numbered(folder: Path) -> None:
    """Older columns are repeated for them; a row of which one fails is written in no part of it."""
    text = """
        input: {t: str}
        output: [word, t]
        stages: [{name: words, use: 'stages.py:words', rows: expand, outputs: {word: str}, batch: {max_rows: 1}}]
    """
    table, _ = walk(pipeline(folder, text), {"t": ["a b c", "", "bad d", "e"]}, row=np.arange(4))
    assert table["word"] == ["a", "b", "c", "e"]
    assert table["t"] == ["a b c"] * 3 + ["e"]
    assert table["@row"].tolist() == [0, 0, 0, 3]
    assert table[PARTS].tolist() == [0, 1, 2, 0]
    assert [(why.row, why.error_type) for why, _ in table[FAILED]] == [(2, "ValueError")]


def test_rows_that_were_made_and_put_together_again_are_rows_that_were_read(folder: Path) -> None:
    text = """
        input: {t: str}
        output: [word]
        stages:
          - {name: words, use: 'stages.py:words', rows: expand, outputs: {word: str}}
          - {name: back, rows: {collapse: words}}
    """
    table, _ = walk(pipeline(folder, text), {"t": ["a b", "", "c"]}, row=np.arange(3))
    assert table["word"] == [["a", "b"], [], ["c"]]
    assert (table["@row"].tolist(), table[PARTS].tolist()) == ([0, 1, 2], [0, 0, 0])


@pytest.mark.parametrize("rows", [0, 2])
def test_columns_that_nobody_declared_are_written_if_the_last_stages_made_them(folder: Path, rows: int) -> None:
    """A stage that reads all sees the pipeline's columns, and none of the run's."""
    text = """
        stages:
          - {name: double, use: 'stages.py:double', outputs: {n2: int64}, inputs: [n]}
          - {name: everything, use: 'stages.py:everything'}
    """
    table, _ = walk(pipeline(folder, text), {"n": np.ones(rows, int), "m": ["x"] * rows}, row=np.arange(rows))
    users = {name: column for name, column in table.items() if name[0] != "@"}
    assert users == ({"seen": ["m,n,n2"] * 2} if rows else {})


def test_a_chunk_without_rows_is_written_too(folder: Path) -> None:
    """Else nobody would know that it is done."""
    text = """
        input: {n: int64}
        output: [n2]
        stages: [{name: double, use: 'stages.py:double', outputs: {n2: int64}}]
    """
    table, result = walk(pipeline(folder, text), {"n": np.zeros(0, np.int64)}, row=np.zeros(0, np.int64))
    assert (table["n2"].shape, table["@row"].tolist(), table[FAILED]) == ((0,), [], [])
    assert result == {RESULT: [{"rows": 0}]}


def test_branches_are_written_together(folder: Path) -> None:
    """Rows that either of them rejects are left out of both."""
    text = """
        input: {n: int64, t: str}
        stages:
          - {name: double, use: 'stages.py:double', after: input, inputs: [n], outputs: {n2: int64}}
          - {name: everything, use: 'stages.py:everything', after: input, outputs: {seen: str}}
    """
    table, _ = walk(pipeline(folder, text), {"n": np.array([4, 5]), "t": ["a", "b"]}, row=np.arange(2))
    assert (table["n2"].tolist(), table["seen"]) == ([8], ["n,t"])
    assert [(why.row, why.stage) for why, _ in table[FAILED]] == [(1, "double")]
