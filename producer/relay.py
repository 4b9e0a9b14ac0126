"""`Relay`: the synchronous client. It puts jobs in and takes results out; the work is done by workers elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import JobError
from torchrelay.producer.core import Core, options_of, past_deadline
from torchrelay.producer.encoding import Options, SubmitOptions, kept_rows
from torchrelay.producer.futures import JobFuture, Row, Table
from torchrelay.producer.mapping import Window, map_rows, yields_errors
from torchrelay.queues.registry import Registry

if TYPE_CHECKING:
    from torchrelay.producer.runs.options import RunKeywords
    from torchrelay.producer.runs.run import CheckedRun, Run

__all__ = ["Relay"]


class Relay:
    """A connection to a namespace. Use it as a context manager, or call `close()`. Thread-safe.

    Without a URL it takes `$TORCHRELAY_REDIS_URL`, else the embedded server of the nearest `.torchrelay` folder
    upwards, else it starts one. Nothing is opened before `start()`, `with`, or the first call.
    """

    def __init__(self, url: str | None = None, *, namespace: str | None = None, lanes: int | None = None) -> None:
        self._core = Core(Settings.load(url=url, namespace=namespace, lanes=lanes), "Relay")

    def __enter__(self) -> Relay:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self) -> Relay:
        """Connects, checks the server and opens the namespace. Raises BrokerUnavailable or BrokerMisconfigured."""
        self._core.start()
        return self

    def close(self) -> None:
        """Sends the last acknowledgements and disconnects. Jobs go on; `job(id)` finds them from anywhere."""
        self._core.close()

    @property
    def registry(self) -> Registry:
        """The namespace's pipelines, workers and loads."""
        return self._core.registry

    @property
    def url(self) -> str:
        """Where the server is, without a password."""
        return self._core.start().broker.url

    def register(self, pipeline: str | os.PathLike[str] | Pipeline) -> str:
        """Makes a pipeline known and its version the one that new jobs take; returns `name@version`. Idempotent.

        `pipeline` is a YAML file, `module.py:name` or a Pipeline. Raises ConfigError with every problem of the file.
        """
        return self._core.register(pipeline)

    def submit(
        self, pipeline: str, row: Mapping[str, Any], *, key: str | None = None, **options: Unpack[Options]
    ) -> JobFuture[Row]:
        """Submits one row (column -> value, without a batch axis) to `name` or `name@version`; returns its future.

        The job is durable when this returns. The same `key` with the same row returns the same job. Options, here and
        wherever jobs are submitted:

        - `priority`: "high", "medium", "low", or 0 to 100, larger is sooner
        - `deadline_s`: past it the job is never started, and it ends as expired
        - `delay_s`: it starts no sooner
        - `keep_s`: keeps the result that long for every process (default: until this client has it, at most an hour;
          an hour with a key); 0 keeps nothing: fire and forget
        - `wait_s`: how long to wait for room while the entry queue is full (default 0)
        - `meta`: a small mapping that travels with the job to `batch.meta`
        - `durable`: False lets columns over 4 KiB lie in this host's shared memory alone, where every worker that reads
          them is on this host; such a job fails with BytesLost if it has to start anew and the memory is gone
        - `tenant`: who it is for. Within a priority, tenants whose jobs wait share a pipeline's entry by weight,
          however many each has submitted; jobs without one go by their time alone

        Raises InputError for a row that does not fit, QueueFull when the entry queue stays full for `wait_s` seconds,
        RunConflict for a key that was used with another row, PipelineNotFound.
        """
        parsed = options_of(options)
        encoder = self._core.encoder(pipeline)
        return self._core.send(encoder, [encoder.row(row, key)], parsed)[0]

    def submit_many(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]],
        keys: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> list[JobFuture[Row]]:
        """Submits many rows in few round trips, each a job of its own; options as for `submit`.

        Every row is checked before the first is sent. QueueFull and RunConflict carry the futures of the jobs that went
        in as `accepted`.
        """
        return self._submit_rows(pipeline, kept_rows(rows), keys, options_of(options))

    def _submit_rows(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]],
        keys: Sequence[str] | None,
        options: SubmitOptions,
        first: int = 0,
    ) -> list[JobFuture[Row]]:
        """`first` is the number of the first row, for errors."""
        encoder = self._core.encoder(pipeline)
        return self._core.send(encoder, encoder.rows(rows, keys, first), options)

    def submit_table(
        self,
        pipeline: str,
        table: Mapping[str, Any],
        *,
        on_error: Literal["raise", "keep"] = "raise",
        key: str | None = None,
        **options: Unpack[Options],
    ) -> JobFuture[Table]:
        """Submits N rows (column -> N values, an array `[N, ...]` or a list; N may be 0) as one job.

        Its `result()` is a table. With `on_error="raise"` a row that fails fails the job; with "keep" the others go on,
        the result is without the row, and the future's `errors` tells of it. `source_rows` says which submitted row
        each result row came from. Options as for `submit`; raises what `submit` raises, and InputError for more rows
        than the pipeline's `limits.rows_per_job`.
        """
        parsed = options_of(options)
        encoder = self._core.encoder(pipeline)
        return self._core.send(encoder, [encoder.table(table, on_error, key)], parsed)[0]

    def infer(
        self, pipeline: str, row: Mapping[str, Any], *, key: str | None = None, **options: Unpack[Options]
    ) -> Row:
        """Submits one row and waits for its result; the job is cancelled when `deadline_s` passes first.

        A job that was there before, by its key, is left alone. Raises what `submit` and `JobFuture.result` raise.
        """
        future = self.submit(pipeline, row, key=key, **options)
        deadline_s = options.get("deadline_s")
        try:
            # The server ends the job at its deadline; the second beyond it is for the news to arrive.
            return future.result(None if deadline_s is None else deadline_s + 1.0)
        except JobError:
            raise
        except TimeoutError as late:
            if not future.joined:
                future.cancel()
            raise past_deadline(future, self._core.unserved(future.pipeline)) from late
        except BaseException:
            if not future.done() and not future.joined:
                future.cancel()
            raise

    @overload
    def map(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        in_flight: int = 256,
        ordered: bool = True,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[Options],
    ) -> Generator[Row, None, None]: ...

    @overload
    def map(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        in_flight: int = 256,
        ordered: bool = True,
        on_error: Literal["return"],
        **options: Unpack[Options],
    ) -> Generator[Row | JobError, None, None]: ...

    def map(
        self,
        pipeline: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        in_flight: int = 256,
        ordered: bool = True,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[Options],
    ) -> Generator[Any, None, None]:
        """Results of all rows, with at most `in_flight` jobs under way; waits while the queue is full.

        They come in the order of the rows, or with `ordered=False` as they are done. The first job that fails raises
        its JobError and cancels those under way, as does closing the generator; `on_error="return"` yields the
        JobError in the result's place instead, and goes on.
        """
        window: Window[JobFuture[Row]] = Window(in_flight, ordered)
        keep_errors = yields_errors(on_error)
        parsed = options_of(options, wait_s=math.inf)

        def submit(part: list[Mapping[str, Any]], first: int) -> list[JobFuture[Row]]:
            return self._submit_rows(pipeline, part, None, parsed, first)

        jobs = map_rows(iter(kept_rows(rows)), window, submit, self._core.await_any, self._core.cancel)

        def results() -> Generator[Any, None, None]:
            try:
                for job in jobs:
                    error = job.exception() if keep_errors else None
                    yield job.result() if error is None else error
            finally:
                jobs.close()

        return results()

    def run(
        self,
        pipeline: str | Pipeline,
        *,
        input: Any,
        output: str | os.PathLike[str],
        wait: bool = True,
        **options: Unpack[RunKeywords],
    ) -> Run:
        """Puts a dataset through a pipeline, chunk by chunk, and writes what comes out of it into a folder.

        Workers read the dataset and write the parts (`torchrelay worker FILE --stage @read`, and `@write`, beside those
        of the stages); this process only says which chunk is next. The folder holds all that is needed to go on with a
        run that was interrupted, by whatever: `resume=True` does what is missing.

        Args:
            pipeline: name, name@version, or a Pipeline, which is registered; new jobs take the version that they took.
            input: a Parquet, JSONL, CSV, text, .npy, .npz or tar file, a folder of these or of images, a glob, what
                Hugging Face's `save_to_disk` wrote, local or a URL that fsspec opens; several of them; or rows in
                memory: a map-style Dataset, a table, any iterable of rows.
            output: a folder or URL.
            wait: until it has ended. Else it goes on beside; see the methods of `Run`.

        Options:

        - `columns`: pipeline column -> dataset column, where their names differ
        - `key`: the dataset's column that identifies a row in the output; else a row has `_source`, `_row` and `_part`
        - `keep`: columns of the dataset that the output repeats
        - `keep_types`: kept column or key -> str, bytes, json or a numeric dtype, where no file says its type (JSONL,
          tar, rows in memory); else the rows that are looked at first decide
        - `input_format`: of the input, where its names do not tell; `delimiter`: of CSV, else its header tells
        - `format`: "parquet" (default), "jsonl", "npy", or "file.py:Writer"
        - `resume`: go on with the run that the folder holds; without it, such a folder is refused
        - `retry_errors`: of a run that is done, try the rows that failed once more
        - `accept_version`: with either, what is left may be done by another version of the pipeline
        - `into_existing`: the folder may hold other files
        - `limit`: rows to stop after; `max_errors`: failed rows at which to stop
        - `merge`: also write one file of all parts, in the order of the input
        - `image_side`: JPEG files may come smaller, no side below so many pixels: decoding takes less time
        - `chunk_rows`, `chunk_bytes`: how much one job takes; default about a second's work, where that is known
        - `priority`: of its jobs, default "low": at every stage, jobs of higher priority overtake them
        - `tenant`: who it is for, as for `submit`; its chunks then share with those of other tenants' runs
        - `in_flight`: chunks under way; default what keeps the workers busy
        - `run_id`: what names a new run; a folder that holds the run of this id goes on without `resume`
        - `on_progress`: called about twice a second, in another thread, with a `Progress`

        Rows that fail are told of in `_run/errors.parquet` and are no error here; see `run.summary()`.

        Raises ConfigError and InputError for what cannot be run, RunConflict for a folder that holds another run (or
        any, without `resume`), PipelineNotFound, BrokerUnavailable.
        """
        run = self.prepare_run(pipeline, input=input, output=output, **options).start()
        return run.wait() if wait else run

    def prepare_run(
        self, pipeline: str | Pipeline, *, input: Any, output: str | os.PathLike[str], **options: Unpack[RunKeywords]
    ) -> Run:
        """The same up to the first job: all is checked, and the folder is held, until `start()` or `end()` is called of
        what this returns."""
        return self.check_run(pipeline, input=input, output=output, **options).open()

    def check_run(
        self, pipeline: str | Pipeline, *, input: Any, output: str | os.PathLike[str], **options: Unpack[RunKeywords]
    ) -> CheckedRun:
        """The same up to the folder: all is checked, nothing is written until `open()` is called of what this
        returns."""
        # Only who runs datasets needs what reads and writes them.
        from torchrelay.producer.runs.options import RunOptions
        from torchrelay.producer.runs.run import check_run

        return check_run(self._core.start(), pipeline, input, RunOptions.parse(output, options))

    def job(self, job_id: str) -> JobFuture[Any]:
        """The future of a job by its id, from any process. Raises InputError for what is no id of this namespace.

        Its `result()` raises ResultExpired when the result is not kept any more.
        """
        return self._core.job(job_id)

    def cancel(self, job_ids: Sequence[str]) -> list[bool]:
        """Ends these jobs; for each whether this call ended it."""
        return self._core.cancel([self.job(job_id).id for job_id in job_ids])
