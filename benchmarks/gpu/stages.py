"""The stages that `benchmarks.gpu.efficiency` times: a CPU stage that passes its rows on, and a model."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu.models import build, set_up
from benchmarks.gpu.workloads import Workload
from torchrelay import Batch, StageContext, TorchStage


def pass_on(batch: Batch) -> dict[str, Any]:
    """The rows as they came."""
    return {name: batch[name] for name in batch}


class DeviceMeter:
    """How long the device computed and how long it had nothing to do between two forwards, by CUDA events.

    Writes {"busy_ms", "idle_ms"} to a file at most ten times a second, whole or not at all. Never waits for the device.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._last_end: torch.cuda.Event | None = None
        self._busy_ms = self._idle_ms = 0.0
        self._next_write = 0.0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around what is launched on the current stream."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._pending.append((start, end))
        while self._pending and self._pending[0][1].query():
            self._count(*self._pending.popleft())
        if time.monotonic() >= self._next_write:
            self._next_write = time.monotonic() + 0.1
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"busy_ms": self._busy_ms, "idle_ms": self._idle_ms}))
            os.replace(new, self._path)

    def _count(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        if self._last_end is not None:
            self._idle_ms += self._last_end.elapsed_time(start)
        self._busy_ms += start.elapsed_time(end)
        self._last_end = end


class Classify(TorchStage):
    """The best class and its score, of rows of one shape.

    Every batch is filled up with zeros to the same number of rows, so that one shape is compiled.
    """

    def __init__(self, workload: str, mode: str, meter: str) -> None:
        self.workload = Workload.decode(workload)
        self.mode = mode
        self.meter_path = meter
        self.meter: DeviceMeter | None = None

    def load(self, context: StageContext) -> None:
        set_up(self.mode, torch.device(context.device).type)
        super().load(context)
        if self.device.type == "cuda":
            self.meter = DeviceMeter(self.meter_path)
        for inputs in self.warm_up():
            with torch.inference_mode():
                # Tensors made inside inference mode and outside are compiled for apart; a batch may hold either.
                self.classify(*inputs)
                self.classify(*(values.clone() for values in inputs))

    def build(self, context: StageContext) -> nn.Module:
        return build(self.workload)

    def warm_up(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """One input of each shape that will come, so that the first job does not wait for the compiler."""
        shape = (self.workload.max_rows, *self.workload.shape)
        yield (torch.zeros(shape, dtype=torch.uint8, device=self.device),)

    def classify(self, *inputs: torch.Tensor) -> Any:
        if self.meter is None:
            return self.model(*inputs)
        with self.meter.forward():
            return self.model(*inputs)

    def forward(self, batch: Batch) -> dict[str, Any]:
        rows = batch[self.workload.column]
        label, score = self.classify(filled(rows, self.workload.max_rows))
        return {"label": label[: len(rows)], "score": score[: len(rows)]}


class ClassifyText(Classify):
    """The same of ragged tokens: batches are filled up to the next bucket, and to the rows that make it full."""

    def warm_up(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for bucket in self.workload.buckets:
            rows = self.workload.rows_at(bucket)
            tokens = torch.zeros((rows, bucket), dtype=torch.int32, device=self.device)
            yield tokens, torch.ones(rows, dtype=torch.int64, device=self.device)

    def forward(self, batch: Batch) -> dict[str, Any]:
        tokens, lengths = batch["tokens"], batch.lengths["tokens"]
        count, longest = tokens.shape
        bucket = next(b for b in self.workload.buckets if b >= longest)
        rows = max(count, self.workload.rows_at(bucket))
        tokens = filled(F.pad(tokens, (0, bucket - longest)) if bucket > longest else tokens, rows)
        label, score = self.classify(tokens, filled(lengths, rows, 1))
        return {"label": label[:count], "score": score[:count]}


def filled(values: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    """The tensor with rows of `value` behind its own, `rows` in all; itself when there are as many."""
    if len(values) >= rows:
        return values
    return torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), value)])
