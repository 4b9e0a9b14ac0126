"""A stage's model in parts, each run by a runner as a worker would, with what goes between in a test's hands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay import Pipeline
from torchrelay.config.imports import import_use
from torchrelay.config.shards import PartConfig
from torchrelay.stages import Made, Runner, StageContext, make_runner
from torchrelay.stages.splitting import SplitPlan
from torchrelay.workers.splitting import LocalPlans, plan_of, split_stage

Table = Mapping[str, Any]
STAGES = "tests.stages.splitting.split_stages"


def load(folder: Path, use: str, input: Mapping[str, str], outputs: Mapping[str, str], **stage: Any) -> Pipeline:
    """A pipeline with one stage `model`, whose class is in `split_stages`; in two parts unless told."""
    entry = {"name": "model", "use": f"{STAGES}:{use}", "outputs": dict(outputs), **stage}
    entry.setdefault("shards", {"count": 2, "mode": "pipeline"})
    text = {"pipeline": "cut", "input": dict(input), "output": list(outputs), "stages": [entry]}
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(text))
    return Pipeline.load(path)


class Parts:
    """All parts of a pipeline's only stage, loaded, by one plan."""

    def __init__(self, pipeline: Pipeline, plan: SplitPlan | None = None) -> None:
        self.pipeline = pipeline
        self.plan = plan or plan_of(self._configs[0], pipeline, _context(pipeline))
        agree = LocalPlans().agree if plan is None else lambda place, make: plan.encode()
        if plan is None:
            text = self.plan.encode()
            agree = lambda place, make: text  # noqa: E731
        self.runners = [self._runner(config, agree) for config in self._configs]

    @property
    def _configs(self) -> list[PartConfig]:
        return [s for s in self.pipeline.spec.stages if isinstance(s, PartConfig)]

    def _runner(self, config: PartConfig, agree: Any) -> Runner:
        context = _context(self.pipeline)
        stage = split_stage(config, self.pipeline, context, agree)
        graph = self.pipeline.graph
        node = graph.node(config.name)
        runner = make_runner(stage, config, graph.types_of(node), node.outputs)
        runner.load(context)
        return runner

    def first(self, *batches: Table) -> list[Table]:
        """What the first part makes of each batch: the columns that go on, with the batch's own."""
        return [{**batch, **self.runners[0].run([batch], [rows_in(batch)])[0].columns} for batch in batches]

    def rest(self, tables: Sequence[Table]) -> list[Made]:
        """What the other parts make of them as one batch."""
        for runner in self.runners[1:-1]:
            came = [{name: table[name] for name in ("%state", "%sizes")} for table in tables]
            made = runner.run(came, [rows_in(t) for t in tables])
            tables = [{**table, **m.columns} for table, m in zip(tables, made, strict=True)]
        return self.runners[-1].run(list(tables), [rows_in(t) for t in tables])

    def __call__(self, *batches: Table) -> list[Made]:
        """Each is a batch of its own in the first part, and all are one in the others."""
        return self.rest(self.first(*batches))


def whole(pipeline: Pipeline) -> Runner:
    """The stage as it runs without shards."""
    written = pipeline.written.stages[0]
    node = pipeline.graph.nodes[-1]
    obj = import_use(written.use or "", pipeline.base_dir)
    types = {name: kind for name, kind in pipeline.graph.types_of(node).items() if not name.startswith("%")}
    runner = make_runner(obj, written.model_copy(update={"shards": None}), types, node.outputs)
    runner.load(_context(pipeline))
    return runner


def rows_in(table: Table) -> int:
    return len(next(iter(table.values())))


def assert_as_whole(parts: Parts, *batches: Table) -> None:
    """Parts that get these batches together make of each row what the whole model makes of it."""
    runner = whole(parts.pipeline)
    for made, batch in zip(parts(*batches), batches, strict=True):
        wanted = runner.run([batch], [rows_in(batch)])[0]
        assert made.columns.keys() == wanted.columns.keys()
        assert dict(made.rejected) == dict(wanted.rejected)
        assert (made.counts is None) == (wanted.counts is None)
        if made.counts is not None:
            np.testing.assert_array_equal(made.counts, wanted.counts)
        for name, value in wanted.columns.items():
            for ours, theirs in zip(made.columns[name], value, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def _context(pipeline: Pipeline) -> StageContext:
    return StageContext(device="cpu", version=pipeline.version, base_dir=pipeline.base_dir)
