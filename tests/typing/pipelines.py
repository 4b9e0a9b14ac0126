"""Pipelines in Python over the public names. Never run: mypy (strict) and pyright read it, in test_typing.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import numpy as np

from torchrelay import Batch, Expand, Pipeline, Stage, StageSpec, errors


class Words(Stage):
    """Texts to words: a stage that makes several rows of one."""

    def __init__(self, separator: str = " ") -> None:
        self.separator = separator

    def forward(self, batch: Batch) -> Expand:
        words = [text.split(self.separator) for text in batch["text"]]
        return Expand({"word": [w for found in words for w in found]}, counts=[len(found) for found in words])


class Lengths(Stage):
    """One row of each."""

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        for i, word in enumerate(batch["word"]):
            if not word.isprintable():
                batch.reject(i, "it holds control characters")
        return {"length": np.array([len(w) for w in batch["word"]])}


def longest(batch: Batch, *, at_least: int = 0) -> dict[str, Any]:
    """A plain function as a stage."""
    return {"longest": np.array([max(lengths, default=at_least) for lengths in batch["length"]])}


def build(folder: Path) -> Pipeline:
    """Every kind of key."""
    return Pipeline(
        "words",
        input={"text": "str", "short": "bool = false"},
        output=["longest", "word"],
        limits={"rows_per_job": 10_000},
        stages=[
            StageSpec("words", use=Words, after="input", inputs=["text"], outputs={"word": "str"}, rows="expand"),
            StageSpec(
                "lengths",
                use="words.py:Lengths",
                after=["words"],
                inputs={"word": "words.word"},
                outputs={"length": "int64?"},
                when="input.short",
                device="gpu",
                weights=folder / "w.safetensors",
                torch={"dtype": "float16"},
                batch={"max_rows": 64, "max_wait_ms": 2.5},
                replicas={"min": 1, "max": 4},
                retry={"attempts": 5, "backoff_s": [0.5, 30]},
                timeout_s=5,
                queue={"max_rows": 1000, "max_bytes": "1GiB"},
            ),
            StageSpec("back", rows={"collapse": "words"}, after="lengths"),
            StageSpec(
                "longest", use=longest, after="back", args={"at_least": 1}, outputs={"longest": "int64"}, replicas=2
            ),
        ],
        base_dir=folder,
    )


def use(pipeline: Pipeline, rows: list[dict[str, object]]) -> list[dict[str, Any]]:
    """What users do with one."""
    assert_type(pipeline.name, str)
    assert_type(pipeline.version, str)
    assert_type(pipeline.source, str | None)
    assert_type(pipeline.path, Path | None)
    assert_type(Pipeline.load("words.py:pipeline", {"words.replicas": "2"}), Pipeline)
    for result in pipeline.run_local(rows, device="cpu", on_error="return", meta={"user": 7}):
        assert_type(result, dict[str, Any] | errors.JobFailed)
    found = pipeline.run_local(rows)
    assert_type(found, list[dict[str, Any]])
    return found


def refused() -> None:
    """What a type checker tells before anything runs."""
    StageSpec("a", use=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    StageSpec("a", rows="many")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    StageSpec("a", batch_rows=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Pipeline("a", stages=["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
