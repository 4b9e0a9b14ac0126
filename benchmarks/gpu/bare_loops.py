"""The loops that the relay is measured against: `bare` over data on the device, `raw` with copies from shared memory.

Both run the same compiled model over the same batches in one process, and wait for the device at their end only
(`raw` also for results two batches back, so that what it reads is there).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.models import prepare, set_up
from benchmarks.gpu.workloads import Packed, Table, Workload

Inputs = tuple[torch.Tensor, ...]


class Slot:
    """Device inputs of one shape, pinned places for its results, and the events between the two streams."""

    def __init__(self, like: Inputs, results: Inputs) -> None:
        self.inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in like)
        self.results = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in results)
        self.filled, self.free, self.done = torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()


class SharedSegment:
    """The batches in one POSIX shared-memory file, registered with CUDA where there is a GPU."""

    def __init__(self, batches: list[Packed], device: str) -> None:
        sizes = [-(-array.nbytes // 4096) * 4096 for packed in batches for array in packed.inputs]
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.posix_fallocate(file.fileno(), 0, sum(sizes))
            self._memory = mmap.mmap(file.fileno(), sum(sizes))
        whole = torch.from_numpy(np.frombuffer(self._memory, np.uint8))
        self._registered = whole.data_ptr() if device == "cuda" else None
        if self._registered is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._registered, sum(sizes), 0))
        self.batches: list[Inputs] = []
        start = 0
        for packed in batches:
            tensors = []
            for array in packed.inputs:
                part = whole[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
                tensors.append(part.copy_(torch.from_numpy(array)))
                start += -(-array.nbytes // 4096) * 4096
            self.batches.append(tuple(tensors))

    def close(self) -> None:
        self.batches = []
        if self._registered is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._registered))


class Recorded:
    """A model whose calls are CUDA graphs, one per shape. Results are overwritten by the next call of their shape."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self._graphs: dict[torch.Size, tuple[Inputs, Inputs, torch.cuda.CUDAGraph]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Inputs:
        found = self._graphs.get(inputs[0].shape)
        if found is None:
            found = self._graphs[inputs[0].shape] = self._record(inputs)
        static, results, graph = found
        _copy(static, inputs)
        graph.replay()
        return results

    def _record(self, inputs: Inputs) -> tuple[Inputs, Inputs, torch.cuda.CUDAGraph]:
        static = tuple(t.clone() for t in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._model(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = tuple(self._model(*static))
        return static, results, graph


class Loops:
    """The bare loops of one workload. `start()` compiles; then `bare()` and `raw()` return units per second. With
    `graphs` they replay CUDA graphs, as the relay's stage then does."""

    def __init__(
        self, load: Workload, tables: list[Table], device: str, mode: str, seconds: float, *, graphs: bool = False
    ) -> None:
        self._graphs = graphs and device == "cuda"
        self._load = load
        self._device = device
        self._mode = mode
        self._seconds = seconds
        self._batches = load.pack(tables)
        self.units = sum(packed.units for packed in self._batches)
        self._rings: dict[torch.Size, cycle[Slot]] = {}

    def start(self) -> None:
        set_up(self._mode, self._device)
        self._model = prepare(self._load, self._device, self._mode)
        self._shared = SharedSegment(self._batches, self._device)
        if self._graphs:
            self._model = Recorded(self._model)
        with torch.inference_mode():
            self._resident = [tuple(t.to(self._device, copy=True) for t in inputs) for inputs in self._shared.batches]
            for inputs in self._resident:
                results = self._model(*inputs)
                if self._device == "cuda" and inputs[0].shape not in self._rings:
                    self._rings[inputs[0].shape] = cycle([Slot(inputs, results), Slot(inputs, results)])
        self._wait()

    def close(self) -> None:
        self._wait()
        self._shared.close()

    def reference(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and scores of the pool's first rows."""
        labels, scores = np.full(rows, -1), np.full(rows, np.nan, np.float32)
        with torch.inference_mode():
            for packed, inputs in zip(self._batches, self._resident, strict=True):
                label, score = (t.cpu().numpy()[: len(packed.rows)] for t in self._model(*inputs))
                wanted = packed.rows < rows
                labels[packed.rows[wanted]], scores[packed.rows[wanted]] = label[wanted], score[wanted]
        return labels, scores

    def bare(self) -> float:
        """Over data on the device."""
        return self._per_second(self._run_resident)

    def raw(self) -> float:
        """Each batch copied from shared memory, two on their way at once; results back to the host."""
        return self._per_second(self._run_overlapped if self._device == "cuda" else self._run_copied)

    def _per_second(self, run: Callable[[int], None]) -> float:
        with torch.inference_mode():
            turns = 1
            # The second time, since the first may be slow: an idle device raises its clocks only by and by.
            for share in (0.1, 1.0):
                turns = max(1, round(share * self._seconds * turns / self._timed(run, turns)))
            return turns * self.units / self._timed(run, turns)

    def _timed(self, run: Callable[[int], None], turns: int) -> float:
        self._wait()
        started = time.perf_counter()
        run(turns)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _run_resident(self, turns: int) -> None:
        for _ in range(turns):
            for inputs in self._resident:
                self._model(*inputs)

    def _run_copied(self, turns: int) -> None:
        for _ in range(turns):
            for inputs in self._shared.batches:
                self._model(*(tensor.clone() for tensor in inputs))

    def _run_overlapped(self, turns: int) -> None:
        copying, computing = torch.cuda.Stream(), torch.cuda.current_stream()
        for _ in range(turns):
            for inputs in self._shared.batches:
                slot = next(self._rings[inputs[0].shape])
                with torch.cuda.stream(copying):
                    copying.wait_event(slot.free)
                    _copy(slot.inputs, inputs)
                    slot.filled.record(copying)
                computing.wait_event(slot.filled)
                results = self._model(*slot.inputs)
                slot.free.record(computing)
                slot.done.synchronize()
                _copy(slot.results, results)
                slot.done.record(computing)


def _copy(into: Inputs, values: Any) -> None:
    for place, value in zip(into, values, strict=True):
        place.copy_(value, non_blocking=True)
