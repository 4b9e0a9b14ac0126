"""A stage's model in parts, each run by a runner as a worker would, with what goes between in a test's hands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay import Pipeline
from torchrelay.config.imports import import_use
from torchrelay.config.shards import SIZES, STATE, PartConfig
from torchrelay.queues.plans import SplitPlace
from torchrelay.stages import Runner, StageContext, make_runner
from torchrelay.stages.outputs import Made
from torchrelay.workers.splitting import LocalPlans, split_stage

Table = Mapping[str, Any]


def cut(
    folder: Path, use: str, inputs: Mapping[str, str], outputs: Mapping[str, str], *, parts: int = 2, **stage: Any
) -> Pipeline:
    """A pipeline of one stage `model`, whose class is in `split_stages`."""
    entry = {"name": "model", "use": f"tests.stages.splitting.split_stages:{use}", "outputs": dict(outputs), **stage}
    entry["shards"] = {"count": parts, "mode": "pipeline"}
    text = {"pipeline": "cut", "input": dict(inputs), "output": list(outputs), "stages": [entry]}
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(text))
    return Pipeline.load(path)


class Parts:
    """All parts of a pipeline's only stage, loaded; by `kept` instead of the plan that is made here."""

    def __init__(self, pipeline: Pipeline, kept: Callable[[str], str] = str) -> None:
        self.pipeline = pipeline
        plans, self.runners = LocalPlans(), []

        def agree(place: SplitPlace, make: Callable[[], str]) -> str:
            return kept(plans.agree(place, make))

        for config in pipeline.spec.stages:
            assert isinstance(config, PartConfig)
            context, node = _context(pipeline), pipeline.graph.node(config.name)
            stage = split_stage(config, pipeline, context, agree)
            self.runners.append(make_runner(stage, config, pipeline.graph.types_of(node), node.outputs))
            self.runners[-1].load(context)

    def first(self, *batches: Table) -> list[Table]:
        """What the first part makes of each batch: the columns that go on, beside the batch's own."""
        return [{**batch, **self.runners[0].run([batch], [rows_in(batch)])[0].columns} for batch in batches]

    def rest(self, tables: Sequence[Table]) -> list[Made]:
        """What the other parts make of them as one batch."""
        for runner in self.runners[1:-1]:
            came = [{name: table[name] for name in (STATE, SIZES)} for table in tables]
            made = runner.run(came, list(map(rows_in, tables)))
            tables = [{**table, **m.columns} for table, m in zip(tables, made, strict=True)]
        return self.runners[-1].run(tables, list(map(rows_in, tables)))


def rows_in(table: Table) -> int:
    return len(next(iter(table.values())))


def assert_as_whole(parts: Parts, *batches: Table) -> None:
    """Each batch is one of its own in the first part, and all are one in the others: of each row comes what the whole
    model makes of it."""
    whole = _whole(parts.pipeline)
    for made, batch in zip(parts.rest(parts.first(*batches)), batches, strict=True):
        wanted = whole.run([batch], [rows_in(batch)])[0]
        assert made.columns.keys() == wanted.columns.keys()
        assert dict(made.rejected) == dict(wanted.rejected)
        np.testing.assert_array_equal(made.counts, wanted.counts)
        for name, value in wanted.columns.items():
            for ours, theirs in zip(made.columns[name], value, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def _whole(pipeline: Pipeline) -> Runner:
    """The stage as it runs without shards."""
    written, node = pipeline.written.stages[0], pipeline.graph.nodes[-1]
    types = {name: kind for name, kind in pipeline.graph.types_of(node).items() if not name.startswith("%")}
    obj = import_use(written.use or "", pipeline.base_dir)
    runner = make_runner(obj, written.model_copy(update={"shards": None}), types, node.outputs)
    runner.load(_context(pipeline))
    return runner


def _context(pipeline: Pipeline) -> StageContext:
    return StageContext(device="cpu", version=pipeline.version, base_dir=pipeline.base_dir)
