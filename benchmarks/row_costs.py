"""What a row costs in Python at each step of its way, without a server: microseconds of one thread, by row and by job.

A batch of jobs is checked and encoded as a client does it, opened, planned, put together, read, split and closed as a
worker does it, and its results are decoded as a client does it. The stage itself takes no time: it returns the rows as
they came, or for padded ones a number each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import parse, parser
from torchrelay import StageSpec
from torchrelay.config.columns import check_table
from torchrelay.config.pipeline import Pipeline
from torchrelay.queues import codec
from torchrelay.queues.job import decode_payload, encode_payload
from torchrelay.queues.levels import result_table
from torchrelay.stages.batch import Batch, assemble
from torchrelay.stages.outputs import Made, own, split
from torchrelay.workers.assemble import Assembler
from torchrelay.workers.batching import Planner
from torchrelay.workers.work import Incoming, Opened, Output, Work

JOB_ROWS, JOBS = 64, 8
STEPS = ("check", "encode", "open", "plan", "join", "read", "split", "close", "decode")
Table = Mapping[str, Any]


class Case(NamedTuple):
    """One kind of column: its type, a stage's `batch` entry, and a job's values."""

    type: str
    batch: dict[str, Any]
    values: Callable[[np.random.Generator], Any]


def _tokens(random: np.random.Generator) -> list[np.ndarray]:
    lengths = np.exp(random.normal(np.log(80), 0.8, JOB_ROWS)).astype(int).clip(8, 512)
    return [random.integers(1, 30_000, length).astype(np.int32) for length in lengths]


_BUCKETS = {
    "pad": {"x": 0},
    "buckets": {"x": [32, 64, 128, 256, 512]},
    "max_cost": {"column": "x", "total": 16_384},
}
CASES = {
    "fixed": Case("float32[384]", {}, lambda random: random.standard_normal((JOB_ROWS, 384), np.float32)),
    "ragged": Case("int32[*]", {}, _tokens),
    "padded": Case("int32[*]", _BUCKETS, _tokens),
    "text": Case("str", {}, lambda random: ["x" * len(tokens) for tokens in _tokens(random)]),
}


class Course:
    """All steps of one case, each on what the one before it made."""

    def __init__(self, case: Case, jobs: int) -> None:
        stage = StageSpec("only", use="operator:itemgetter", batch={"max_rows": jobs * JOB_ROWS, **case.batch})
        pipeline = Pipeline("costs", input={"x": case.type}, stages=[stage])
        node = pipeline.graph.nodes[0]
        self._types = pipeline.input
        self._rules = pipeline.spec.stages[0].batch
        self._assembler: Assembler[int] = Assembler(pipeline.graph, node)
        self._planner: Planner[int] = Planner(self._rules, pipeline.graph.types_of(node))
        random = np.random.default_rng(0)
        self._tables: list[Table] = [{"x": case.values(random)} for _ in range(jobs)]

    def run(self) -> dict[str, float]:
        """Seconds of each step, for all jobs."""
        clock = _Clock()
        checked = clock.time("check", lambda: [check_table(self._types, table)[0] for table in self._tables])
        encoded = clock.time("encode", lambda: [_encoded(table) for table in checked])
        payloads = [encode_payload(columns) for columns in encoded]
        incoming = [Incoming(i, [payload], JOB_ROWS) for i, payload in enumerate(payloads)]
        opened: Opened[int] = clock.time("open", lambda: self._assembler.open_all(incoming))
        groups = clock.time("plan", lambda: self._planner.batches(opened.ready))
        batches = clock.time("join", lambda: [self._batch(works) for works in groups])
        outputs = clock.time("read", lambda: [self._outputs(batch) for batch in batches])
        made = clock.time("split", lambda: [_split(o, b) for o, b in zip(outputs, batches, strict=True)])
        pairs = [(w, m) for works, each in zip(groups, made, strict=True) for w, m in zip(works, each, strict=True)]
        results = clock.time("close", lambda: [self._closed(work, part) for work, part in pairs])
        clock.time("decode", lambda: [_decoded(columns) for columns in results])
        return clock.seconds

    def _batch(self, works: Sequence[Work[int]]) -> Batch:
        rules = self._rules
        rows = [work.rows for work in works]
        return assemble([w.table for w in works], rows, self._types, rules.pad, (), rules.buckets)

    def _outputs(self, batch: Batch) -> Table:
        return {"y": batch["x"][:, 0] if self._rules.pad else batch["x"]}

    def _closed(self, work: Work[int], made: Made) -> dict[str, bytes]:
        closed = self._assembler.close(work, Output(made.columns, None, {}))
        return {name: codec.join(message) for name, message in closed.made.items()}


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, step: str, act: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = act()
        self.seconds[step] = time.perf_counter() - started
        return made


def _encoded(table: Table) -> dict[str, bytes]:
    return {name: codec.join(codec.message(column)) for name, column in table.items()}


def _split(outputs: Table, batch: Batch) -> list[Made]:
    return [own(made) for made in split(outputs, batch.job_rows, "only")]


def _decoded(columns: Mapping[str, bytes]) -> object:
    payload = decode_payload(encode_payload(columns))
    return result_table({name: codec.decode(columns[name]) for name in payload.columns}, payload.origins)


def main() -> None:
    made = parser(__doc__ or "")
    made.set_defaults(jobs=JOBS, rounds=200)
    options = parse(made)
    print(f"# jobs of {JOB_ROWS} rows, {options.jobs} at a time; medians")
    print(f"{'us/row':<12}" + "".join(f"{step:>9}" for step in STEPS) + f"{'all':>9}{'us/job':>9}")
    for name, case in CASES.items():
        course = Course(case, options.jobs)
        runs = [course.run() for _ in range(options.rounds + 1)][1:]
        costs = [statistics.median(run[step] for run in runs) * 1e6 / (options.jobs * JOB_ROWS) for step in STEPS]
        print(f"{name:<12}" + "".join(f"{c:9.3f}" for c in costs) + f"{sum(costs):9.3f}{sum(costs) * JOB_ROWS:9.1f}")


if __name__ == "__main__":
    main()
