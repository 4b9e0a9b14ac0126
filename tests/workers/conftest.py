"""Fixtures of the worker tests: the obedient pipeline, its log, and worker processes that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workers.support import CODE, YAML, ForwardLog, WorkerProcess
from torchrelay.queues.registry import Registry


@pytest.fixture
def forward_log(tmp_path: Path) -> ForwardLog:
    return ForwardLog(tmp_path / "forwards.txt")


@pytest.fixture
def obey(make_pipeline: Callable[..., Path], forward_log: ForwardLog) -> Callable[..., Path]:
    """`obey("batch: {max_rows: 8}", ...)` writes the pipeline; each text is one more key of its stage."""

    def make(*options: str) -> Path:
        return make_pipeline(YAML.format(log=forward_log.path, options="\n        ".join(options)), CODE)

    return make


@pytest.fixture
def spawn(registry: Registry, server_url: str) -> Iterator[Callable[..., WorkerProcess]]:
    """`spawn(path, lease_ms="1000")` starts a worker process; settings go into its environment."""
    made: list[WorkerProcess] = []

    def start(path: Path, **settings: str) -> WorkerProcess:
        made.append(WorkerProcess(registry, server_url, path, **settings))
        return made[-1]

    yield start
    for worker in made:
        worker.end()
