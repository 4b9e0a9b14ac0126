"""Which columns of a batch stay in the memory of the GPU that made them, and where: see `handoff: device`.

A column stays where only the next stages read it, all their workers are on this host and copy from this GPU, where it
is large enough to be worth a copy of its own, and while there is room. Otherwise it goes to the host, as all others do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchrelay.config.columns import fits_as_it_is
from torchrelay.config.device_rows import DeviceRows
from torchrelay.workers.claimer import Held
from torchrelay.workers.device_exporter import DeviceExporter, Run
from torchrelay.workers.node import NodeContext
from torchrelay.workers.pieces import Part
from torchrelay.workers.storage import SharedMemory, Storage

__all__ = ["ColumnExports"]

# Below that a job's column is at its reader sooner by shared memory, with less to do.
LEAST_JOB_BYTES = 64 << 10


class ColumnExports:
    """Of one node's batches, on the thread that launches them; used by `stages.feeding.Departure`."""

    def __init__(self, context: NodeContext, memory: SharedMemory, storage: Storage, exporter: DeviceExporter) -> None:
        self._declared = context.group.outputs
        self._entrances = context.entrances()
        self._entrance = 0
        self._memory = memory
        self._storage = storage
        self._exporter = exporter
        self._jobs = 1

    @classmethod
    def of(cls, context: NodeContext, memory: SharedMemory, storage: Storage) -> ColumnExports | None:
        """None for a worker whose columns all go to the host."""
        exporter = memory.exporter
        return None if exporter is None else cls(context, memory, storage, exporter)

    def batch(self, parts: Sequence[Part[Held]]) -> ColumnExports | None:
        """For the columns of this batch; None where they cannot stay: a job in several batches is put together on the
        host, and one that lost bytes before goes through Redis."""
        self._jobs = len(parts)
        self._entrance = parts[0].work.job.entrance
        fit = all(part.gathering is None and not part.work.job.entry.restarted for part in parts)
        return self if fit else None

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceRows | None:
        kind = self._declared.get(name)
        nbytes = math.prod(shape) * dtype.itemsize
        entrance = self._entrances[self._entrance]
        graph, last = entrance.pipeline.graph, entrance.group.last
        keeps = last.keeps
        if nbytes < self._jobs * LEAST_JOB_BYTES or (keeps is not None and name not in keeps):
            return None
        if kind is not None and not fits_as_it_is(name, kind, dtype, shape[1:]):
            return None
        readers = graph.consumers(name, last.index)
        # Only for these is what this stage read kept.
        if not readers or readers & ~last.kept_for:
            return None
        if not self._memory.placer.copies_from(self._exporter.gpu, self._storage.readers_of(name, self._entrance)):
            return None
        run = self._exporter.take(nbytes)
        writer = self._memory.placer.writer
        if run is None and writer is not None and writer.collect():
            run = self._exporter.take(nbytes)
        return None if run is None else DeviceRows(run, 0, dtype, shape)

    def copy_in(self, rows: DeviceRows, address: int, stream: int) -> None:
        run = rows.memory
        assert isinstance(run, Run)  # from the call above
        run.write(address, rows.nbytes, stream)
