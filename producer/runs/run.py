"""`Run`: one dataset on its way through one pipeline, as `Relay.run` gives it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.runs import CHUNK_ROWS, ChunkSize, ReadOptions, Source
from torchrelay.errors import InputError, TorchrelayError
from torchrelay.producer.core import Core
from torchrelay.producer.lookups import reached
from torchrelay.producer.runs.driver import Driver
from torchrelay.producer.runs.finishing import RunSummary, finish, totals_of
from torchrelay.producer.runs.folder import Entering, RunFolder, check_folder, open_existing, open_run
from torchrelay.producer.runs.kept_types import kept_of_memory, kept_of_sources
from torchrelay.producer.runs.manifest import RunPlan
from torchrelay.producer.runs.memory import is_in_memory, memory_source
from torchrelay.producer.runs.merging import merge
from torchrelay.producer.runs.options import RunOptions
from torchrelay.producer.runs.pace import Progress, rows_per_chunk, slowest_rate
from torchrelay.producer.runs.planning import check_columns, find_sources, measure, root_of
from torchrelay.producer.runs.reading import rows_of
from torchrelay.producer.runs.recording import Recorder
from torchrelay.producer.runs.works import Chunks, planned, pushed, works_of
from torchrelay.queues.registry import Registry
from torchrelay.queues.run_records import RUNNING, RunRecord, RunRecords
from torchrelay.stages.writing.arrow import need_arrow
from torchrelay.stages.writing.table import check_names

__all__ = ["CheckedRun", "Run", "check_run"]

log = logging.getLogger("torchrelay.runs")
_JOIN_S = 0.2


class Run:
    """A run that was started. Its methods may be called from any thread.

    `id` names it, `output` is its folder. The folder holds all that there is to know of it: a run that was interrupted
    goes on with `resume=True`, from any process.
    """

    def __init__(
        self,
        driver: Driver,
        folder: RunFolder,
        options: RunOptions,
        chunks: Chunks | None,
        base_dir: Path,
        records: RunRecords,
    ) -> None:
        self.id = folder.run
        self.output = folder.output.store.where
        self._driver = driver
        self._folder = folder
        self._options = options
        self._chunks = chunks
        self._planned: int | None = None
        self._total_rows: int | None = None
        self._before = totals_of(folder).rows, len(folder.done())
        self._began = 0.0
        self._recorder = Recorder(records, self._standing, driver.cancel)
        self._base_dir = base_dir
        self._summary: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="torchrelay-run", daemon=True)

    def __repr__(self) -> str:
        return f"<Run {self.id} into {self.output}: {self.status}>"

    def start(self) -> Run:
        """Begins; who waits calls `wait`."""
        self._began = time.time()
        self._recorder.start()
        self._thread.start()
        return self

    @property
    def status(self) -> str:
        """prepared, running; then done, failed (a chunk has no part), stopped (too many errors) or cancelled."""
        if self._thread.ident is None:
            return "prepared"
        return "running" if self._thread.is_alive() else self._driver.status

    def done(self) -> bool:
        """Whether it has ended, however."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def progress(self) -> Progress:
        """How it stands now."""
        return self._driver.progress()

    def wait(self, timeout: float | None = None) -> Run:
        """Until it has ended; raises TimeoutError after so many seconds, and whatever made it impossible to go on.

        Ctrl-C cancels what is under way, and leaves a run that can go on.
        """
        if self._thread.ident is None:
            raise InputError(f"run {self.id} was not started; call start()")
        try:
            if timeout is not None:
                self._thread.join(timeout)
            while timeout is None and self._thread.is_alive():
                self._thread.join(_JOIN_S)  # in short steps, for a wait without end cannot be interrupted everywhere
        except KeyboardInterrupt:
            self.end()
            raise
        if self._thread.is_alive():
            raise TimeoutError(f"run {self.id} has not ended yet; it goes on")
        if self._error is not None:
            raise self._error
        return self

    def cancel(self) -> None:
        """Ends it soon: chunks under way are cancelled, parts that are there stay, and `resume=True` goes on."""
        self._driver.cancel()

    def end(self) -> None:
        """Cancels it and waits until the folder is given free; also of a run that was never started."""
        self.cancel()
        if self._thread.ident is None:
            self._folder.close()
        else:
            self._thread.join()

    def summary(self) -> dict[str, Any]:
        """Waits; what `_run/run.json` says: status, rows, errors, chunks, seconds, rows_per_s, stages."""
        self.wait()
        assert self._summary is not None  # else there was an error, which `wait` raised
        return self._summary

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows that were written, in the order of the input; of a run under way, those that are there by now."""
        options = self._options.write
        run = open_existing(self.output, format=options.format, base_dir=self._base_dir)
        return rows_of(run, columns)

    def _work(self) -> None:
        try:
            counting = threading.Thread(target=self._count, name="torchrelay-run-plan", daemon=True)
            counting.start()
            try:
                self._driver.run()
            finally:
                self._summary = self._finish()
        except BaseException as error:
            self._error = error
        finally:
            try:
                self._folder.close()
            except (TorchrelayError, OSError) as error:
                self._error = self._error or error
            self._recorder.stop()

    def _standing(self) -> RunRecord:
        """How it stands now, for `runs list`."""
        now, plan = self._driver.progress(), self._folder.manifest.plan
        rows, chunks = self._before
        ended = self._summary is not None or self._error is not None
        state = "failed" if self._error is not None else self._driver.status if ended else RUNNING
        return RunRecord(
            self.id,
            f"{plan.pipeline}@{plan.version}",
            plan.input,
            self.output,
            socket.gethostname(),
            os.getpid(),
            self._began,
            state,
            round(time.time() - self._began, 3),
            rows + now.rows,
            self._total_rows,
            chunks + now.chunks_done,
            self._planned,
            now.failed_rows + now.failed_chunks,
            round(now.rows_per_s, 1),
            now.eta_s,
            "" if self._error is None else f"{type(self._error).__name__}: {self._error}"[:1000],
        )

    def _count(self) -> None:
        """How many chunks there are, beside the work: it only tells how long the rest will take."""
        done = self._folder.done()
        try:
            if self._chunks is not None:
                totals = measure(chunk for chunk, _ in self._chunks())
                self._planned, self._total_rows = totals.chunks, totals.rows
                again = sum(1 for _ in self._folder.retries()) if self._options.retry_errors else 0
                self._driver.chunks = self._planned - len(done) + again
        except (TorchrelayError, OSError) as error:
            log.info("the chunks are not counted: %s", error)

    def _finish(self) -> dict[str, Any]:
        driver, progress = self._driver, self._driver.progress()
        stages = {s.name: {k: v for k, v in asdict(s).items() if k != "name"} for s in progress.stages}
        more = {"bottleneck": progress.bottleneck, "errors_now": driver.failed_rows}
        summary = RunSummary(driver.status, progress.seconds, self._planned, stages, more, driver.rows)
        content = finish(self._folder, summary, driver.failures)
        if self._options.merge and driver.status == "done":
            content["merged"] = merge(self._folder)
        return content


def _fitting_rows(registry: Registry, pipeline: Pipeline) -> int:
    nodes = [f"{pipeline.ref}/{node.name}" for node in pipeline.graph.nodes]
    return rows_per_chunk(pipeline.spec.stages, slowest_rate(nodes, registry.workers()))


def described(data: Any) -> str:
    """An input, for people."""
    if is_in_memory(data):
        return f"{type(data).__name__} in memory"
    return " ".join(map(os.fspath, [data] if isinstance(data, str | os.PathLike) else data))


@dataclass(frozen=True)
class CheckedRun:
    """A run that could be begun; nothing was written yet. `pipeline` is what it is asked of, `twin` its run graph,
    `text` names the input."""

    core: Core
    pipeline: Pipeline
    twin: Pipeline
    data: Any
    options: RunOptions
    sources: list[Source]
    read: ReadOptions
    text: str

    @property
    def in_memory(self) -> bool:
        """Whether the driver itself has the rows."""
        return is_in_memory(self.data)

    def plan(self, size: ChunkSize) -> RunPlan:
        """What its folder will say of it."""
        pipeline, options = self.pipeline, self.options
        return RunPlan(
            pipeline.name, pipeline.version, self.text, self.sources, self.read, options.write, size, options.limit
        )

    @property
    def base_dir(self) -> Path:
        """Where a writer's class is looked up."""
        return Path() if self.pipeline._folder is None else self.pipeline._folder

    @property
    def entering(self) -> Entering:
        """How it may enter its folder."""
        options = self.options
        return Entering(options.resume, options.run_id, options.accept_version, options.into_existing)

    def open(self) -> Run:
        """Takes hold of the output folder. Raises RunConflict where somebody else was faster."""
        core, options, registry = self.core, self.options, self.core.registry
        with reached():
            registry.register(self.twin)
            size = ChunkSize(options.chunk_rows or _fitting_rows(registry, self.pipeline), options.chunk_bytes)
        folder = open_run(self.plan(size), self.entering, self.base_dir)
        try:
            root = root_of(self.data) if self.sources[0].format == "image" else None

            def chunks() -> Iterator[Any]:
                return pushed(folder, self.data, self.pipeline.input) if self.in_memory else planned(folder, root)

            works = works_of(folder, chunks, retry_errors=options.retry_errors)
            driver = Driver(core, self.twin, folder, works, options)
            with core.lock:
                core.start()
                core.inbox.start()
            # Rows in memory may come but once: only what files hold is counted ahead.
            records = RunRecords(registry.client, registry.control)
            return Run(driver, folder, options, None if self.in_memory else chunks, self.base_dir, records)
        except BaseException:
            folder.close()
            raise


def check_run(core: Core, target: str | Pipeline, data: Any, options: RunOptions) -> CheckedRun:
    """Checks all that can be checked before anything is written. `target` is a name, or a pipeline, which is
    registered.
    Raises PipelineNotFound, ConfigError and InputError for what cannot be run, RunConflict for a folder that holds
    another run.
    """
    need_arrow()  # what reads and writes runs, and the list of errors, need it in any format
    registry = core.registry
    with reached():
        known = registry.find(target) if isinstance(target, str) else registry.register(target, current=False)
    pipeline = known.pipeline
    twin = pipeline.for_runs()
    graph: Any = twin.graph
    check_names(graph.written or (), options.write.key, options.write.keep)
    text = described(data)
    if is_in_memory(data):
        sources = [memory_source(data)]
        kept, data = kept_of_memory(data, options.read, pipeline.input, options.keep_types, options.write.format)
    else:
        sources = find_sources(data, options.input_format)
        check_columns(sources, options.read, pipeline.input)
        kept = kept_of_sources(sources, options.read, options.keep_types, options.write.format)
    checked = CheckedRun(core, pipeline, twin, data, options, sources, replace(options.read, kept=kept), text)
    size = ChunkSize(options.chunk_rows or CHUNK_ROWS, options.chunk_bytes)
    check_folder(checked.plan(size), checked.entering, checked.base_dir)
    return checked
