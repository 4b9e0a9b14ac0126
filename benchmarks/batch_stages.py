"""`benchmarks.batch_code` as pipelines of torchrelay, and those of the other benchmarks of runs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks import batch_code as code
from torchrelay import Batch, Pipeline, Stage, StageContext, StageSpec

FAST_S, SLOW_S, LATE_S = 0.17, 0.21, 10.0


def flip(batch: Batch) -> dict[str, Any]:
    return {"image": code.flip(batch["image"])}


def cut(batch: Batch) -> dict[str, Any]:
    return {"middle": code.cut(batch["image"])}


def prepare(batch: Batch) -> dict[str, Any]:
    return {"pixels": np.stack([code.normalised(image) for image in batch["image"]])}


def nap(batch: Batch) -> dict[str, Any]:
    return {"number": code.nap(batch["number"])}


def fast(batch: Batch) -> dict[str, Any]:
    time.sleep(FAST_S * len(batch))
    return {"number": batch["number"]}


class Slow(Stage):
    """Takes LATE_S to load, then SLOW_S a row."""

    def load(self, context: StageContext) -> None:
        time.sleep(LATE_S)

    def forward(self, batch: Batch) -> dict[str, Any]:
        time.sleep(SLOW_S * len(batch))
        return {"number": batch["number"]}


def pause(batch: Batch) -> dict[str, Any]:
    time.sleep(0.002 * len(batch))
    return {"number": batch["number"]}


def increment(batch: Batch) -> dict[str, Any]:
    return {"n": batch["n"] + 1}


class Classify(Stage):
    """`pixels`: float32 [3, 224, 224] -> `logits`: float32 [10]."""

    def load(self, context: StageContext) -> None:
        self._cnn = code.Cnn()

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"logits": self._cnn(batch["pixels"])}


class Embed(Stage):
    """`text` -> `vector`: float32 [384]; the worker pads."""

    def __init__(self, threads: int = 2) -> None:
        self.threads = threads

    def load(self, context: StageContext) -> None:
        self._sentences = code.Sentences(self.threads)

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"vector": self._sentences.vectors(batch["ids"], batch.mask("ids"))}


class Tokenize(Embed):
    """`text` -> `ids`: int32 [tokens]."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"ids": self._sentences.ids(batch["text"])}


IMAGE = "uint8[224, 224, 3]"
images = Pipeline(
    "bench-images",
    input={"image": IMAGE},
    stages=[
        StageSpec("flip", use=flip, inputs=["image"], outputs={"image": IMAGE}, batch={"max_rows": 128}),
        StageSpec("cut", use=cut, inputs=["image"], outputs={"middle": "float32[32, 32, 3]"}, batch={"max_rows": 128}),
    ],
    output=["middle"],
    fuse=[["flip", "cut"]],
)
photos = Pipeline(
    "bench-photos",
    input={"image": "uint8[*, *, 3]"},
    stages=[
        StageSpec("prepare", use=prepare, inputs=["image"], outputs={"pixels": "float32[3, 224, 224]"}),
        StageSpec("classify", use=Classify, inputs=["pixels"], outputs={"logits": "float32[10]"}),
    ],
    output=["logits"],
    fuse=[["prepare", "classify"]],
)
texts = Pipeline(
    "bench-texts",
    input={"text": "str"},
    stages=[
        StageSpec("tokenize", use=Tokenize, inputs=["text"], outputs={"ids": "int32[*]"}, batch={"max_rows": 256}),
        StageSpec(
            "embed",
            use=Embed,
            inputs=["ids"],
            outputs={"vector": "float32[384]"},
            batch={"max_rows": 64, "pad": {"ids": 0}, "max_cost": {"column": "ids", "total": 8192}},
        ),
    ],
    output=["vector"],
)
naps = Pipeline(
    "bench-naps",
    input={"number": "int64"},
    stages=[StageSpec("nap", use=nap, inputs=["number"], outputs={"number": "int64"}, batch={"max_rows": 1000})],
    output=["number"],
)
NUMBER = {"number": "int64"}
balance = Pipeline(
    "bench-balance",
    input=NUMBER,
    stages=[
        StageSpec("fast", use=fast, outputs=NUMBER, batch={"max_rows": 1}),
        StageSpec("slow", use=Slow, outputs=NUMBER, batch={"max_rows": 1}),
    ],
    output=["number"],
)
numbers = Pipeline(
    "bench-numbers",
    input={"n": "int64"},
    stages=[StageSpec("increment", use=increment, inputs=["n"], outputs={"n": "int64"}, batch={"max_rows": 8192})],
    output=["n"],
)
paused = Pipeline(
    "bench-paused",
    input=NUMBER,
    stages=[StageSpec("pause", use=pause, outputs=NUMBER, batch={"max_rows": 10})],
    output=["number"],
)
