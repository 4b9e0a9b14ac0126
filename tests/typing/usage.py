"""A program over the public names. It is never run: mypy (strict) and pyright read it, in test_typing.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, assert_type

import numpy as np
from torch import nn

from torchrelay import Batch, JobFuture, Pipeline, Priority, Relay, Stage, StageContext, TorchStage, errors


class Lengths(Stage):
    """A stage with an argument, on numpy and lists."""

    def __init__(self, unit: str = "chars") -> None:
        self.unit = unit

    def load(self, context: StageContext) -> None:
        assert_type(context.device, str)
        self.words = context.path("words.txt").read_text().split()

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        texts: list[str] = batch["text"]
        assert_type(len(batch), int)
        return {"length": np.array([len(t) for t in texts]), "known": [t in self.words for t in texts]}

    def close(self) -> None:
        self.words = []


class Encode(TorchStage):
    """A stage around a module."""

    def __init__(self, width: int) -> None:
        self.width = width

    def build(self, context: StageContext) -> nn.Module:
        return nn.Linear(self.width, 8)

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        return {"vector": self.model(batch["x"])}


def submit(relay: Relay) -> dict[str, Any]:
    """One job, its future and every kind of end."""
    assert_type(relay.register("pipeline.yaml"), str)
    future = relay.submit("embed", {"text": "hi"}, priority=Priority.HIGH, key="doc-17", deadline_s=2.0, meta={"u": 7})
    assert_type(future, JobFuture[dict[str, Any]])
    future.add_done_callback(lambda done: print(done.id, done.status()))
    try:
        row = future.result(timeout=5)
    except errors.JobFailed as error:
        assert_type(error.stage, str)
        assert_type(error.attempts, int)
        raise
    except (errors.DeadlineExceeded, TimeoutError):
        assert_type(future.cancel(), bool)
        return relay.infer("embed", {"text": "hi"}, deadline_s=2.0)
    assert_type(row, dict[str, Any])
    assert_type(future.exception(), errors.JobError | None)
    return row


def submit_many(relay: Relay, rows: list[dict[str, object]]) -> Iterator[dict[str, Any]]:
    """Many jobs, in one call and as a stream."""
    try:
        futures = relay.submit_many("embed", rows, keys=[str(i) for i in range(len(rows))], wait_s=1.0)
    except errors.QueueFull as error:
        assert_type(error.accepted, tuple[object, ...])
        return
    assert_type(futures, list[JobFuture[dict[str, Any]]])
    assert_type(relay.cancel([f.id for f in futures]), list[bool])
    yield from relay.map("embed", rows, in_flight=64)


def load() -> str:
    """A pipeline file."""
    try:
        pipeline = Pipeline.load("pipeline.yaml", {"encode.batch.max_rows": "64"})
    except errors.ConfigError as error:
        assert_type(error.problems, tuple[str, ...])
        raise SystemExit("\n".join(error.problems)) from error
    assert_type(pipeline.output, tuple[str, ...] | None)
    with Relay(namespace="prod") as relay:
        return relay.register(pipeline)
