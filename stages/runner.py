"""Puts one stage to work: tables of jobs in, tables of jobs out. What a worker calls, with nothing of Redis in it."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.shards import shard_of
from torchrelay.config.spec import BatchSpec, StageConfig, TorchSpec
from torchrelay.config.types import ColumnType
from torchrelay.errors import ConfigError, InputError, StageLoadError, TorchrelayError
from torchrelay.stages.batch import Batch, as_pieces, assemble, join_rows
from torchrelay.stages.faults import DeviceLost, blame, is_device_lost, is_out_of_memory, let_go
from torchrelay.stages.loading import Identity, make_stage
from torchrelay.stages.outputs import Expand, Made, empty_outputs, own, split
from torchrelay.stages.stage import Stage, StageContext
from torchrelay.stages.warm_up import Unknown, row_buckets, shapes_of, table_of

if TYPE_CHECKING:
    from torchrelay.stages.feeding import Departure, Exports, Fed, Feeder
    from torchrelay.stages.torch_stage import TorchStage

__all__ = ["Launched", "Prepared", "Runner", "configure", "make_runner"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch before its forward; without one, none of its jobs has a row."""

    rows: Sequence[int]
    batch: Batch | None = None
    fed: Fed | None = None

    def discard(self) -> None:
        """It will not be launched."""
        if self.fed is not None:
            self.fed.give_back(None)


@dataclass(frozen=True, slots=True)
class Launched:
    """A batch whose forward was called: what it made, or how to make that of what is still on its way."""

    made: list[Made] | None
    departure: Departure | None = None
    split: Callable[[object], list[Made]] | None = None

    @property
    def arrived(self) -> bool:
        """Whether the forward is over, and not only on its way to the device."""
        return self.departure is None


log = logging.getLogger("torchrelay.stages")


class Runner:
    """One stage, from load to close. All calls come from one thread, since torch keeps device and mode per thread; but
    see `overlap`.

    Args:
        stage: the stage object.
        name: the stage's name in the pipeline, for errors.
        types: declared types of the columns that it reads; empty where nothing is declared.
        outputs: declared types of what it returns; empty where nothing is declared.
        batch: which columns are padded, with what, and up to which buckets.
        expands: whether it returns Expand.
        part: which part of a stage it is, for errors; "" where it is the whole.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        types: Mapping[str, ColumnType] | None = None,
        outputs: Mapping[str, ColumnType] | None = None,
        batch: BatchSpec | None = None,
        *,
        expands: bool = False,
        part: str = "",
    ) -> None:
        self.stage = stage
        self.name = name
        self._types = types or {}
        self._outputs = outputs or {}
        self._batch = batch or BatchSpec()
        self._expands = expands
        self._part = part
        self._device = "cpu"
        self._loaded = False
        self._overlaps = False
        self._feeder: Feeder | None = None
        self._last: Departure | None = None
        self.idle_s = 0.0
        self.on_device_lost: Callable[[BaseException], None] = lambda error: None

    @property
    def members(self) -> Sequence[Runner]:
        """The stages that it runs one behind the other: itself, unless several are fused."""
        return (self,)

    @property
    def takes_tensors(self) -> bool:
        """Whether its batches are brought to its device."""
        return takes_tensors(self.stage)

    def behind(self, passed: int) -> Runner:
        """What runs jobs that passed so many of its members."""
        return self.members[passed]

    def load(self, context: StageContext) -> None:
        """Load the stage's model.

        Raises:
            ConfigError: the stage raised it: it would never load.
            StageLoadError: whatever else the stage raised, with its type and message.
        """
        self._device = context.device
        self._loaded = True
        try:
            self.stage.load(context)
        except TorchrelayError as error:
            if isinstance(error, StageLoadError | ConfigError) and f"stage {self.name!r}" not in str(error):
                kind = ConfigError if isinstance(error, ConfigError) else StageLoadError
                raise kind(f"stage {self.name!r}: {error}") from error
            raise
        except Exception as error:
            raise StageLoadError(f"stage {self.name!r} does not load: {type(error).__name__}: {error}") from error

    def warm_up(self, columns: Collection[str] | None) -> None:
        """Runs a stage that is compiled or recorded for each shape with zeros of every shape that batches can have.

        Called once, after `load` and before other threads start. Where the shapes cannot be told, the log says why, and
        the first batches compile.

        Args:
            columns: the names of the columns that it reads; None where they are not known.

        Raises:
            StageLoadError: the stage raised. Where a shape does not fit the device's memory, it is only left out.
        """
        stage = getattr(self.stage, "inner", self.stage)  # of a group
        shaped = stage.shaped if is_torch_stage(stage) else None
        if shaped is None:
            return
        try:
            batches, left_out = shapes_of(columns, self._types, self._batch)
        except Unknown as why:
            log.info("stage %r is not warmed up: %s; its first batches take longer", self.name, why)
            return
        started = time.monotonic()
        with shaped.warming():
            tried = [self._try_shape(rows, shapes) for rows, shapes in batches]
        shaped.warm = all(tried) and not left_out
        more = "; there are more, of which the first batch will compile" if left_out else ""
        seconds = time.monotonic() - started
        log.info("stage %r: warmed up %d shapes in %.1f s%s", self.name, sum(tried), seconds, more)

    def _try_shape(self, rows: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        told = f"{rows} rows of " + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        try:
            self.run([table_of(rows, shapes, self._types)], [rows], [{}])
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                what = f"stage {self.name!r} does not warm up with {told}: {type(error).__name__}: {error}"
                raise StageLoadError(what) from error
            full = error
        let_go(full)
        self.free_memory()
        log.warning("stage %r: %s do not fit the device's memory; lower batch.max_rows", self.name, told)
        return False

    def run(
        self,
        tables: Sequence[Mapping[str, Column]],
        rows: Sequence[int],
        meta: Sequence[Mapping[str, Any]] = (),
        ended: Callable[[], Sequence[bool]] | None = None,
    ) -> list[Made]:
        """Compute one batch.

        Args:
            tables: per job, the columns that the stage reads.
            rows: per job, its number of rows. If all are 0 the stage is not called.
            meta: per job, what its submitter attached; may be empty.
            ended: tells per job whether it has ended meanwhile, for `batch.cancelled`.

        Returns: per job, what the stage made of it. Columns may share memory with the stage's own buffers: encode or
            copy them before the next call.

        Raises:
            InputError: the inputs do not fit together, or the outputs do not fit what is declared.
            DeviceLost: a CUDA error came of it after which nothing more can be computed in this process. Before,
                `on_device_lost` is called, which may end the process.
            Exception: whatever else `forward` raised.
        """
        return self.finish(self.launch(self._together(tables, rows, meta, ended, None)))

    def overlap(self) -> None:
        """From here on `prepare`, `launch` and `finish` are called by three threads, each ahead of the next."""
        self._overlaps = True
        if takes_tensors(self.stage) and self._device.startswith("cuda"):
            from torchrelay.stages.feeding import Feeder

            self._feeder = Feeder(self._device)

    def prepare(
        self,
        tables: Sequence[Mapping[str, Column]],
        rows: Sequence[int],
        meta: Sequence[Mapping[str, Any]] = (),
        ended: Callable[[], Sequence[bool]] | None = None,
    ) -> Prepared:
        """Put a batch together and start it on its way to the device; arguments and errors as for `run`."""
        return self._together(tables, rows, meta, ended, self._feeder)

    def _together(
        self,
        tables: Sequence[Mapping[str, Column]],
        rows: Sequence[int],
        meta: Sequence[Mapping[str, Any]],
        ended: Callable[[], Sequence[bool]] | None,
        feeder: Feeder | None,
    ) -> Prepared:
        if not any(rows):
            return Prepared(rows)
        rules = self._batch
        join, empty = (join_rows, np.empty) if feeder is None else (as_pieces, feeder.host_empty)
        with self._watched():
            batch = assemble(tables, rows, self._types, rules.pad, meta, rules.buckets, joined_by=join, empty=empty)
            batch = replace(batch, ended=ended)
            if feeder is not None:
                fed = feeder.feed(batch, self.stage.on_host if takes_tensors(self.stage) else ())
                return Prepared(rows, fed.batch, fed)
            if takes_tensors(self.stage):
                batch = self.stage.tensors(batch, self._device)
            return Prepared(rows, batch)

    def launch(self, prepared: Prepared, exports: Exports | None = None) -> Launched:
        """Run the stage on it; a GPU may still be computing when this returns. Raises whatever `forward` raised.

        `exports` takes columns that need not come to the host.
        """
        rows, batch, fed = prepared.rows, prepared.batch, prepared.fed
        if batch is None:
            nothing = np.zeros(0, np.int64) if self._expands else None
            return Launched([Made(empty_outputs(self._outputs), nothing) for _ in rows])
        with self._watched(self.name):
            if fed is not None and takes_tensors(self.stage):
                return self._launch_fed(rows, batch, fed, self.stage, exports)
            outputs = self.stage.infer(batch) if takes_tensors(self.stage) else self.stage.forward(batch)
            made = self._split(outputs, rows, batch)
        # The stage may use its own buffers again while these are on their way.
        return Launched([own(m) for m in made] if self._overlaps else made)

    def _split(self, outputs: object, rows: Sequence[int], batch: Batch) -> list[Made]:
        try:
            return split(outputs, rows, self.name, self._outputs, expands=self._expands, rejected=batch.rejected)
        except InputError as error:
            if not self._part:
                raise
            raise InputError(f"{error}; {self._part}") from None

    def _launch_fed(
        self, rows: Sequence[int], batch: Batch, fed: Fed, stage: TensorStage, exports: Exports | None
    ) -> Launched:
        from torchrelay.stages.feeding import Departure, begin

        ended: Any = None
        try:
            begun = begin(fed, self._device)
            outputs = stage.infer(batch)
            # Rows that were rejected are taken out of the columns, which is done on the host.
            departure = Departure(self.name, outputs, self._device, begun, None if batch.rejected else exports)
            ended = departure.ended
            return Launched(None, departure, lambda outputs: self._split(outputs, rows, batch))
        finally:
            fed.give_back(ended)

    def finish(self, launched: Launched) -> list[Made]:
        """Wait for what was launched and give it back to the jobs; returns and raises what `run` does."""
        departure = launched.departure
        if departure is None or launched.split is None:
            return launched.made or []
        with self._watched(self.name):
            outputs = departure.arrived()
            self.idle_s = departure.idle_s(self._last)
            self._last = departure
            return launched.split(outputs)

    @contextmanager
    def _watched(self, stage: str = "") -> Iterator[None]:
        """`stage` is to blame, unless what it consists of says better."""
        try:
            yield
        except Exception as error:
            if stage:
                blame(error, stage)
            if is_device_lost(error):
                self.on_device_lost(error)
                what = f"stage {self.name!r}: device {self._device} is of no more use to this process: {error}"
                raise DeviceLost(what) from error
            raise

    def free_memory(self) -> None:
        """Gives the device what torch holds of its memory unused. What an error's traceback holds is in use."""
        torch = sys.modules.get("torch")
        if torch is None:
            return
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def memory(self) -> tuple[int, int, int] | None:
        """Bytes of its GPU's memory: what this process holds, what all processes use, what there is. None without one.
        Called by the thread that computes."""
        torch = sys.modules.get("torch")
        if torch is None or not self._device.startswith("cuda") or not torch.cuda.is_initialized():
            return None
        try:
            free, total = torch.cuda.mem_get_info(self._device)
            return torch.cuda.memory_reserved(self._device), total - free, total
        except Exception:
            # What is wrong with the device, the next forward tells.
            return None

    def close(self) -> None:
        """Close the stage, once; a runner that was never loaded closes nothing."""
        if self._loaded:
            self._loaded = False
            self.stage.close()


class TensorStage(Protocol):
    """A stage whose batches hold tensors, but for the columns of `on_host`."""

    on_host: frozenset[str]

    def tensors(self, batch: Batch, device: str) -> Batch: ...
    def infer(self, batch: Batch) -> Mapping[str, Any] | Expand: ...


def takes_tensors(stage: Any) -> TypeGuard[TensorStage]:
    """Whether its batches are brought to its device."""
    return bool(stage._takes_tensors)


def is_torch_stage(stage: Stage) -> TypeGuard[TorchStage]:
    """Whether it derives from TorchStage; without importing torch for stages that do not."""
    module = sys.modules.get("torchrelay.stages.torch_stage")
    return module is not None and isinstance(stage, module.TorchStage)


def make_runner(
    obj: object,
    spec: StageConfig,
    types: Mapping[str, ColumnType] | None = None,
    outputs: Mapping[str, ColumnType] | None = None,
) -> Runner:
    """Build the runner of one stage as its YAML describes it.

    Args:
        obj: what `use:` names, or a stage object; not looked at for a stage without `use`.
        spec: the stage's entry in the YAML.
        types, outputs: declared types of what it reads and returns.

    Raises:
        ConfigError: `obj` is no stage class, or weights or torch options are given for a stage without torch.
        StageLoadError: its `__init__` raised.
    """
    if spec.use is None:
        obj = Identity()
    stage = obj if isinstance(obj, Stage) else make_stage(obj, spec.args, spec.name)
    configure(stage, spec)
    return Runner(stage, spec.name, types, outputs, spec.batch, expands=spec.rows == "expand", part=_part(spec))


def configure(stage: Stage, spec: StageConfig) -> None:
    """Tells a stage its `torch` options and `weights`; raises ConfigError for one that takes none."""
    options = spec.torch
    if is_torch_stage(stage):
        from torchrelay.stages.torch_stage import TorchOptions

        try:
            told = TorchOptions(**options.model_dump(), row_buckets=row_buckets(spec.batch))
            stage.configure(told, spec.weights, None if spec.shards is None else spec.shards.plan)
        except ConfigError as error:
            raise ConfigError(f"stage {spec.name!r}: {error}") from error
    elif spec.weights or options != TorchSpec():
        raise ConfigError(
            f"stage {spec.name!r}: `weights` and `torch` are for a TorchStage, and {type(stage).__qualname__} is a "
            "plain Stage; derive it from torchrelay.TorchStage, or read the file in load() and name it in `args`"
        )
    elif spec.shards is not None and spec.shards.plan is not None:
        raise ConfigError(
            f"stage {spec.name!r}: `shards: {{plan}}` is for a TorchStage, and {type(stage).__qualname__} is a plain "
            "Stage, which cuts its model itself, by context.rank and context.world_size; take the plan out"
        )


def _part(spec: StageConfig) -> str:
    """What to tell of a shard that returned what does not fit: it is declared for all of them together."""
    shard, shards = shard_of(spec)
    if shards == 1:
        return ""
    whole = spec.name.rpartition(".")[0]
    return (
        f"it is shard {shard} of {shards}, and returns its part of what {whole} declares: what is concatenated is "
        "divided by the number of shards, what is summed is whole. Cut the layers that make it alike "
        "(torchrelay.cutting, or context.shard and context.shards), or change shards.combine"
    )
