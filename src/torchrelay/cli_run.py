"""`torchrelay run`: a dataset through a pipeline, from the command line."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from torchrelay import terminal
from torchrelay.cli_options import (
    EXIT_FAILED,
    CpuOption,
    JsonOption,
    NamespaceOption,
    RedisOption,
    SetOption,
    is_file,
    open_relay,
    overrides_of,
)
from torchrelay.cli_runs import When
from torchrelay.cli_runs import detach as ask_agents
from torchrelay.config.graph import is_runs
from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import InputError, NoWorkers
from torchrelay.producer.relay import Relay
from torchrelay.producer.runs.pace import Progress as Standing
from torchrelay.producer.runs.run import Run
from torchrelay.queues.registry import Registry
from torchrelay.run_here import workers_here
from torchrelay.up import Fleet

__all__ = ["run_app"]

run_app = typer.Typer()
_LINE_EVERY_S = 5.0
_LOOK_S = 0.2
_WAIT_FOR_WORKERS_S, _WAIT_FOR_READERS_S = 5.0, 15.0


@run_app.command()
def run(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="NAME\\[@VERSION], or a FILE as for up.")],
    input: Annotated[
        list[str], typer.Option("--input", "-i", metavar="PATH", help="A file, folder, glob or URL. Repeatable.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="A folder or URL, of this run alone.")
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", metavar="MINE=THEIRS,..", help="Pipeline column = dataset column. Repeatable."),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="COLUMN", help="The dataset's column that identifies a row.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="COLUMN,..", help="Columns that the output repeats.")
    ] = None,
    keep_types: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-types", metavar="COLUMN=TYPE,..", help="Of kept columns where no file says it: float64, str, json.."
        ),
    ] = None,
    input_format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Of the input, where names do not tell: csv, image, parquet..")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(metavar="CHAR", help="Of CSV; by default, its header tells.")] = None,
    format: Annotated[str, typer.Option(help="parquet, jsonl, npy or file.py:Writer.")] = "parquet",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Go on, and try rows that failed once more.")
    ] = False,
    accept_version: Annotated[
        bool, typer.Option("--accept-version", help="Go on though the pipeline's version changed; keep what is there.")
    ] = False,
    into_existing: Annotated[bool, typer.Option("--into-existing", help="The folder may hold other files.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Stop after so many rows.")] = None,
    max_errors: Annotated[int | None, typer.Option(metavar="N", help="Stop when more rows than that fail.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write one file, in the order of the input.")] = False,
    image_side: Annotated[
        int | None, typer.Option(metavar="N", help="JPEG files may come smaller, no side below N pixels: faster.")
    ] = None,
    chunk_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Rows of one job; default about a second's work.")
    ] = None,
    priority: Annotated[str, typer.Option(help="high, medium, low or 0..100.")] = "low",
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Who it is for.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Let an agent drive it; print its id.")] = False,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="With --detach: when, as 2026-01-31T08:00.")] = None,
    every: Annotated[
        str | None, typer.Option(metavar="SECONDS|CRON", help="With --detach: again and again, each into a new folder.")
    ] = None,
    retries: Annotated[
        int, typer.Option(metavar="N", help="With --detach: how often a run that failed is taken up again.")
    ] = 3,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="With --detach: look at the input and the output from here.")
    ] = True,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put a dataset through a pipeline; the results, and what failed, are in the output folder.

    With a FILE, stages that nobody serves get a worker on this machine for as long as the run lasts; so do reading and
    writing (`@read`, `@write`). Ctrl-C ends it and leaves a run that `--resume` goes on with.

    Exit status: 0 done, 1 rows or chunks failed, 2 usage, 3 no server, 4 no worker, 130 interrupted.

    Example: [bold]torchrelay run embed.yaml -i 'docs/*.parquet' -o vectors/ --columns text=body --key doc_id[/bold]

    Example: [bold]torchrelay run classify.yaml -i photos/ -o labels/ --resume --retry-errors[/bold]

    Example: [bold]torchrelay run embed.yaml -i docs/ -o '/data/{started}' --detach --every '0 3 * * *'[/bold]

    Example: [bold]torchrelay run embed -i s3://bucket/docs/ -o s3://bucket/vectors/ --redis redis://host:6379/0[/bold]
    """
    options: dict[str, Any] = {
        "columns": _pairs("--columns", "MINE=THEIRS, for example text=body", columns),
        "key": key,
        "keep": _names(keep),
        "format": format,
        "resume": resume,
        "retry_errors": retry_errors,
        "accept_version": accept_version,
        "into_existing": into_existing,
        "limit": limit,
        "max_errors": max_errors,
        "merge": merge,
        "priority": int(priority) if priority.isascii() and priority.isdigit() else priority,
    }
    more = {"chunk_rows": chunk_rows, "image_side": image_side, "input_format": input_format, "delimiter": delimiter}
    more["tenant"] = tenant
    options |= {k: v for k, v in more.items() if v is not None}
    if keep_types:
        options["keep_types"] = _pairs("--keep-types", "COLUMN=TYPE, for example price=float64", keep_types)
    if (at or every) and not detach:
        raise InputError(f"--{'at' if at else 'every'} is for a run that an agent drives; add --detach")
    if detach:
        if set_ or allow_cpu:
            raise InputError("--set and --allow-cpu go with the agent that drives a detached run; start it with them")
        with open_relay(redis, namespace) as relay:
            ask_agents(relay, pipeline, (input, output), options, When(at, every, retries, check), as_json=as_json)
        return
    overrides = overrides_of(set_)
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        relay = stack.enter_context(open_relay(redis, namespace))
        target = _target(relay, pipeline, overrides)
        # Before any model is loaded: what cannot be run is refused at once.
        checked = relay.check_run(target, input=input, output=output, **options)
        look: Callable[[], None] = _nothing
        if isinstance(target, Pipeline):
            fleet = _fleet(redis, namespace, allow_cpu, format)
            look = stack.enter_context(workers_here(fleet, relay.registry, target, overrides))
        # After that: where a stage does not load, no folder is made.
        prepared = checked.open()
        stack.callback(_leave, prepared)
        summary = _follow(prepared.start(), look)
        if as_json:
            terminal.print_json(summary)
        else:
            _print_summary(prepared, summary)
    if summary["status"] != "done" or summary["errors"] or summary["failed_chunks"]:
        raise typer.Exit(EXIT_FAILED)


def _fleet(redis: str | None, namespace: str | None, allow_cpu: bool, format: str) -> Fleet:
    """No worker yet. Those that write may import what this command names."""
    output = terminal.above_the_table(terminal.err) if terminal.err.is_terminal else None
    fleet = Fleet(redis, namespace, allow_cpu=allow_cpu, make_current=False, output=output)
    if ":" in format:
        fleet.settings = replace(fleet.settings, run_writer=format)
    return fleet


def _nothing() -> None: ...


def _target(relay: Relay, text: str, overrides: dict[str, str]) -> str | Pipeline:
    """The pipeline of a file; of a name its version, once workers serve it."""
    if is_file(text):
        pipeline = Pipeline.load(text, overrides)
        relay.registry.register(pipeline, current=False)
        return pipeline
    found = relay.registry.find(text).pipeline
    missing = _wait_served(relay.registry, found.for_runs())
    if missing:
        raise NoWorkers(
            f"no live worker serves {', '.join(missing)} of {found.ref}; start one with: torchrelay worker FILE "
            f"--stage {missing[0]}, or give the pipeline's FILE in place of its name"
        )
    return found.ref


def _wait_served(registry: Registry, twin: Pipeline) -> Sequence[str]:
    """Waits for workers; longer for those that read and write, which `up` starts when they are wanted."""
    missing = registry.wait_served(twin, 0)
    registry.want(f"{twin.ref}/{name}" for name in missing if is_runs(name))
    missing = registry.wait_served(twin, _WAIT_FOR_WORKERS_S)
    if missing and all(map(is_runs, missing)):
        missing = registry.wait_served(twin, _WAIT_FOR_READERS_S)
    return missing


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM means what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pairs(option: str, how: str, values: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in _names(values):
        mine, equals, theirs = item.partition("=")
        if not (mine and equals and theirs):
            raise InputError(f"{option} {item!r:.80}: write it as {how}")
        if mine in found:
            raise InputError(f"{option} names {mine!r:.60} twice")
        found[mine] = theirs
    return found


def _names(values: list[str] | None) -> list[str]:
    return [name for value in values or () for name in value.split(",") if name]


def _follow(run: Run, look: Callable[[], None]) -> dict[str, Any]:
    """Shows how it goes until it has ended; returns its summary."""
    try:
        if terminal.err.is_terminal:
            _bar(run, look, terminal.err)
        else:
            _lines(run, look, terminal.err)
    except BaseException:
        run.cancel()  # first, for workers of this machine drain before the run is left
        raise
    return run.summary()


def _leave(run: Run) -> None:
    """Whatever ended the command, the folder is free, and holds a run that can go on."""
    run.end()
    if run.status != "done":
        terminal.err.print(f"to go on with it, add --resume (output: {terminal.clean(run.output)})", soft_wrap=True)


def _bar(run: Run, look: Callable[[], None], console: Console) -> None:
    # The text is what gives way on a narrow terminal.
    bar_at, share_at = Column(min_width=20), Column(min_width=4)
    columns = (
        BarColumn(20, table_column=bar_at),
        TaskProgressColumn(table_column=share_at),
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        while not run.done():
            now = run.progress()
            bar.update(task, total=now.chunks, completed=now.chunks_done, description=terminal.clean(_text(now)))
            look()
            time.sleep(_LOOK_S)


def _lines(run: Run, look: Callable[[], None], console: Console) -> None:
    next_line = time.monotonic() + _LINE_EVERY_S
    while not run.done():
        look()
        if time.monotonic() >= next_line:
            next_line += _LINE_EVERY_S
            console.print(terminal.clean(_text(run.progress())), soft_wrap=True)
        time.sleep(_LOOK_S)


def _text(now: Standing) -> str:
    """One line of how it stands."""
    parts = [f"{now.rows:,} rows", f"{now.rows_per_s:,.0f} rows/s"]
    if now.chunks is not None:
        parts.append(f"{now.chunks_done} of {now.chunks} chunks")
    if now.failed_rows or now.failed_chunks:
        parts.append(f"{now.failed_rows} rows and {now.failed_chunks} chunks failed")
    if now.eta_s is not None:
        parts.append(f"{_time(now.eta_s)} left")
    waiting = ", ".join(f"{s.name} {s.waiting_rows}" for s in now.stages if s.waiting_rows)
    if waiting:
        parts.append(f"waiting: {waiting}")
    if now.bottleneck:
        parts.append(f"bottleneck: {now.bottleneck}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print_summary(run: Run, summary: dict[str, Any]) -> None:
    rows = f"{summary['rows']:,} rows in {summary['chunks_done']} chunks"
    speed = f"{summary['seconds']:.1f} s" + (f", {summary['rows_per_s']:,} rows/s" if summary["rows_per_s"] else "")
    terminal.out.print(f"{summary['status']}: {rows}, {speed}, in {terminal.clean(run.output)}", soft_wrap=True)
    if merged := summary.get("merged"):
        terminal.out.print(f"merged into {terminal.clean(merged)}", soft_wrap=True)
    if twice := summary.get("duplicate_keys"):
        such = terminal.clean(", ".join(map(repr, summary["duplicate_key_examples"])))
        text = f"{twice:,} rows have a key that a row before them has, such as {such}"
        terminal.err.print(f"[yellow]{text}[/yellow]", soft_wrap=True)
    if summary["error_lines"]:
        failed = f"{summary['errors']} rows and {summary['failed_chunks']} chunks failed"
        terminal.err.print(
            f"[yellow]{failed}[/yellow]; see {terminal.clean(run.output)}/_run/errors.parquet", soft_wrap=True
        )
    sys.stdout.flush()
