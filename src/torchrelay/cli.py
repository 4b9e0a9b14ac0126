"""The command line. Each command is thin: it parses, calls the room that does the work, and prints.

Exit status: 0 done, 1 failed jobs, 2 usage or configuration, 3 no server to be reached, 4 no worker, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from torchrelay import terminal
from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import (
    BrokerError,
    ConfigError,
    InputError,
    JobError,
    NoWorkers,
    TorchrelayError,
    UsageError,
)
from torchrelay.producer.relay import Relay
from torchrelay.queues import dead as dead_letters
from torchrelay.queues import server as embedded
from torchrelay.stages import check_stages
from torchrelay.up import Fleet, run_fleet

EXIT_FAILED, EXIT_USAGE, EXIT_BROKER, EXIT_NO_WORKER, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    name="torchrelay",
    help="Multi-stage model inference over Redis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
server_app = typer.Typer(help="The embedded server of this folder's .torchrelay.", no_args_is_help=True)
dead_app = typer.Typer(help="Jobs that failed for good.", no_args_is_help=True)
app.add_typer(server_app, name="server")
app.add_typer(dead_app, name="dead")

RedisOption = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="The server; else $TORCHRELAY_REDIS_URL, else the embedded one."),
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Separates users of one server; else $TORCHRELAY_NAMESPACE.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a value of the file. Repeatable.")
]
CpuOption = Annotated[
    bool, typer.Option("--allow-cpu", help="Run `device: gpu` stages on the CPU where there is no GPU.")
]


def _overrides(values: Sequence[str] | None) -> dict[str, str]:
    pairs = [v.partition("=") for v in values or ()]
    for key, equals, _ in pairs:
        if not equals or "." not in key:
            raise ConfigError(f"--set {key!r}: write it as STAGE.KEY=VALUE, for example --set encode.batch.max_rows=64")
    return {key: value for key, _, value in pairs}


def _relay(redis: str | None, namespace: str | None) -> Relay:
    return Relay(redis, namespace=namespace).start()


def _pipeline_name(relay: Relay, pipeline: str, overrides: dict[str, str]) -> str:
    """NAME[@VERSION], or a file, which is registered."""
    if pipeline.endswith((".yaml", ".yml")) or "/" in pipeline:
        return relay.register(Pipeline.load(Path(pipeline), overrides))
    return pipeline


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")], set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Validate pipeline files, import their stages, and show what they would run.

    Example: [bold]torchrelay check pipeline.yaml[/bold]
    """
    found: list[dict[str, Any]] = []
    for file in files:
        problems: tuple[str, ...] = ()
        try:
            pipeline = Pipeline.load(file, _overrides(set_))
            problems = check_stages(pipeline)
        except ConfigError as error:
            problems = error.problems
        found.append({"file": str(file), "ok": not problems, "problems": list(problems)})
        if not problems:
            found[-1]["pipeline"] = pipeline.ref
        if as_json:
            continue
        if problems:
            for problem in problems:
                terminal.err.print(f"[red]error[/red] {terminal.clean(problem)}", soft_wrap=True)
        else:
            terminal.out.print(terminal.graph_view(pipeline))
    if as_json:
        terminal.print_json(found)
    if not all(f["ok"] for f in found):
        raise typer.Exit(EXIT_USAGE)


@app.command()
def up(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
) -> None:
    """Run everything on this machine: the server if there is none, the workers of every stage, a live view.

    Ctrl-C drains: batches under way are finished, the rest goes back to the queues.

    Example: [bold]torchrelay up pipeline.yaml --allow-cpu[/bold]
    """
    overrides = _overrides(set_)
    fleet = Fleet(redis, namespace, allow_cpu=allow_cpu)
    for file in files:
        fleet.add(Pipeline.load(file, overrides), overrides)
    raise typer.Exit(run_fleet(fleet, live=terminal.out.is_terminal))


@app.command()
def worker(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    stage: Annotated[str, typer.Option("--stage", "-s", help="The stage to serve.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
) -> None:
    """Serve one stage on one device, until SIGTERM or Ctrl-C, which drain.

    Example: [bold]torchrelay worker pipeline.yaml --stage encode --device cuda:1 --redis redis://host:6379/0[/bold]
    """
    overrides = _overrides(set_)
    fleet = Fleet(redis, namespace, allow_cpu=allow_cpu)
    fleet.add(Pipeline.load(file, overrides), overrides, stage=stage, device=device)
    raise typer.Exit(run_fleet(fleet, live=False))


@server_app.command("start")
def server_start(as_json: JsonOption = False) -> None:
    """Start the embedded server of the nearest .torchrelay folder; it stays until `server stop`."""
    address = embedded.start(Path.cwd(), outlive=True)
    if as_json:
        terminal.print_json({"url": address.url, "pid": address.pid, "started": address.started})
    else:
        terminal.out.print(
            f"{'started' if address.started else 'already runs'}: {address.url} (pid {address.pid})", soft_wrap=True
        )


@server_app.command("stop")
def server_stop() -> None:
    """Stop it. Its data stays on disk."""
    stopped = embedded.stop(Path.cwd())
    terminal.out.print("stopped" if stopped else "no server runs here")


@server_app.command("status")
def server_status(as_json: JsonOption = False) -> None:
    """Show whether it runs, where, and what it holds. Exit status 3 when it does not run."""
    state = embedded.status(Path.cwd())
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in vars_of(state).items()}
    if as_json:
        terminal.print_json(fields)
    else:
        terminal.out.print(terminal.table(["", ""], fields.items()))
    if not fields.get("running"):
        raise typer.Exit(EXIT_BROKER)


def vars_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass with slots or without."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _rows(text: str, files: Sequence[str] | None) -> list[dict[str, Any]]:
    lines = sys.stdin.read().splitlines() if text == "-" else [text]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f'line {number}: a row is a JSON object such as {{"text": "hi"}}, not {line[:40]!r}')
        rows.append(row)
    for item in files or ():
        column, equals, path = item.partition("=")
        if not equals:
            raise InputError(f"--file {item!r}: write it as COLUMN=PATH")
        source = Path(path)
        if not source.is_file():
            raise InputError(f"--file {item!r}: {path} is no file")
        for row in rows:
            row[column] = source.read_bytes()
    return rows


@app.command()
def submit(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="NAME\\[@VERSION], or a YAML file.")],
    row: Annotated[str, typer.Argument(metavar="JSON|-", help="One row, or - for JSON lines on standard input.")],
    file: Annotated[
        list[str] | None, typer.Option("--file", metavar="COLUMN=PATH", help="A bytes column from a file.")
    ] = None,
    priority: Annotated[str, typer.Option(help="high, medium, low or 0..100.")] = "medium",
    key: Annotated[str | None, typer.Option(help="The same key and row give the same job.")] = None,
    deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help="End the job when it takes longer.")] = None,
    delay: Annotated[float, typer.Option(metavar="SECONDS", help="Start it no sooner.")] = 0.0,
    keep: Annotated[int, typer.Option(metavar="SECONDS", help="Keep the result so long.")] = 3600,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait, and print the results as JSON lines.")] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
) -> None:
    """Submit one row or many; prints job ids, or results with --wait.

    Example: [bold]torchrelay submit embed '{"text": "hi"}' --wait[/bold]
    """
    rows = _rows(row, file)
    if key is not None and len(rows) != 1:
        raise InputError(f"--key goes with one row, {len(rows)} came")
    with _relay(redis, namespace) as relay:
        name = _pipeline_name(relay, pipeline, _overrides(set_))
        level: str | int = int(priority) if priority.isdigit() else priority
        futures = relay.submit_many(
            name,
            rows,
            [key] if key else None,
            priority=level,
            deadline_s=deadline,
            delay_s=delay,
            keep_s=keep,
            wait_s=30.0,
        )
        if not wait:
            for future in futures:
                terminal.out.print(future.id)
            return
        found = relay.registry.find(name).pipeline
        missing = relay.registry.wait_served(found, timeout_s=5.0)
        if missing:
            raise NoWorkers(
                f"no live worker serves {', '.join(missing)} of {found.ref}; the jobs wait. "
                f"Start one: torchrelay worker FILE --stage {missing[0]}, or everything: torchrelay up FILE"
            )
        failed = False
        for future in futures:
            error = future.exception()
            failed = failed or error is not None
            terminal.print_json({"id": future.id, "error": str(error)} if error else future.result())
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def job(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a job is, and its result or error once it ended. Exit status 1 when it failed or is unknown."""
    with _relay(redis, namespace) as relay:
        future = relay.job(job_id)
        state = future.status()
        shown: dict[str, Any] = {"id": job_id, "status": state}
        if state in ("done", "failed", "cancelled", "expired"):
            error = future.exception(timeout=5.0)
            if error is None:
                shown["result"] = terminal.plain(future.result())
            else:
                shown |= {"error": str(error), "error_type": error.error_type, "stage": error.stage}
        if as_json:
            terminal.print_json(shown)
        else:
            terminal.out.print(terminal.table(["", ""], shown.items()))
    if state not in ("waiting", "delayed", "running", "done"):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def cancel(
    job_ids: Annotated[list[str], typer.Argument(metavar="ID...")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """End jobs that have not ended. Exit status 1 when one had ended or is unknown."""
    with _relay(redis, namespace) as relay:
        for job_id in job_ids:
            relay.job(job_id)
        won = relay.cancel(job_ids)
        for job_id, mine in zip(job_ids, won, strict=True):
            state = "cancelled" if mine else f"not cancelled: {relay.job(job_id).status()}"
            terminal.out.print(f"{job_id} {state}")
    if not all(won):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def status(redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False) -> None:
    """Show every stage: what waits, what runs, who serves it."""
    with _relay(redis, namespace) as relay:
        if as_json:
            terminal.print_json({"url": relay.url, "nodes": terminal.node_rows(relay.registry)})
        else:
            terminal.out.print(terminal.status_view(relay.registry))


@app.command()
def pipelines(redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False) -> None:
    """List the pipelines of the namespace with their versions; new jobs take the current one."""
    with _relay(redis, namespace) as relay:
        current = set(relay.registry.current().values())
        rows: list[dict[str, Any]] = []
        for ref in sorted(relay.registry.versions()):
            found = relay.registry.find(ref).pipeline
            stages = [n.name for n in found.graph.nodes]
            rows.append({"pipeline": found.name, "version": found.version, "current": ref in current, "stages": stages})
        if as_json:
            terminal.print_json(rows)
        else:
            cells = [
                (r["pipeline"], r["version"], "current" if r["current"] else "", " ".join(r["stages"])) for r in rows
            ]
            terminal.out.print(terminal.table(["pipeline", "version", "", "stages"], cells))


@dead_app.command("list")
def dead_list(
    pipeline: Annotated[str | None, typer.Argument(metavar="[PIPELINE]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that were redriven.")] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first."""
    with _relay(redis, namespace) as relay:
        letters = sorted(dead_letters.scan(relay.registry, pipeline, redriven=everything), key=lambda d: d.died_at)
        if as_json:
            terminal.print_json([letter.summary() for letter in letters])
            return
        rows = [(d["id"], d["pipeline"], d["stage"], terminal.when(d["died_at"]), d["attempts"], d["error_type"],
                 d["message"][:60], d["redriven_as"]) for d in (x.summary() for x in letters)]  # fmt: skip
        columns = ["id", "pipeline", "stage", "died", "#errors", "error", "message", "redriven as"]
        terminal.out.print(terminal.table(columns, rows))


@dead_app.command("show")
def dead_show(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter with the traceback of every attempt."""
    with _relay(redis, namespace) as relay:
        letter = dead_letters.find(relay.registry, job_id)
        if letter is None:
            raise InputError(f"no dead letter {job_id}; list them with: torchrelay dead list")
        if as_json:
            history = [vars_of(f) for f in letter.history]
            terminal.print_json(letter.summary() | {"columns": letter.columns, "history": history})
            return
        fields = letter.summary() | {"columns": ", ".join(letter.columns), "died_at": terminal.when(letter.died_at)}
        terminal.out.print(terminal.table(["", ""], fields.items()))
        for number, failure in enumerate(letter.history, 1):
            terminal.out.print(
                f"\n[bold]error {number}[/bold] at {terminal.clean(failure.stage)} on {terminal.clean(failure.worker)}"
            )
            for line in (failure.traceback or failure.message).splitlines():
                terminal.out.print(terminal.clean(line), soft_wrap=True)


def _dead_ids(relay: Relay, ids: Sequence[str] | None, everything: bool, pipeline: str | None) -> list[str]:
    if bool(ids) == everything:
        raise InputError("name the dead letters, or pass --all (with --pipeline to choose)")
    return list(ids or ()) or [d.job_id for d in dead_letters.scan(relay.registry, pipeline)]


IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID...]")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]
PipelineOption = Annotated[str | None, typer.Option("--pipeline", help="With --all: only this pipeline's.")]


@dead_app.command("redrive")
def dead_redrive(
    ids: IdsArgument = None,
    everything: AllOption = False,
    pipeline: PipelineOption = None,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Run dead jobs again from the stage where they died, as new jobs; repeating it makes no second job."""
    with _relay(redis, namespace) as relay:
        made = dead_letters.redrive(relay.registry, _dead_ids(relay, ids, everything, pipeline))
    _print_moved(made, "redriven as")


@dead_app.command("drop")
def dead_drop(
    ids: IdsArgument = None,
    everything: AllOption = False,
    pipeline: PipelineOption = None,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Forget dead jobs and free their bytes."""
    with _relay(redis, namespace) as relay:
        dropped = dead_letters.drop(relay.registry, _dead_ids(relay, ids, everything, pipeline))
    _print_moved(dropped, "dropped")


def _print_moved(moved: dict[str, str], word: str) -> None:
    for old, new in moved.items():
        terminal.out.print(f"{old} {word} {new if new != old else ''}".rstrip() if new else f"{old} is no dead letter")
    if not all(moved.values()):
        raise typer.Exit(EXIT_FAILED)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    if isinstance(error, BrokerError):
        return EXIT_BROKER
    if isinstance(error, NoWorkers):
        return EXIT_NO_WORKER
    return EXIT_FAILED


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    terminal.err.print(f"[yellow]warning[/yellow] {terminal.clean(message)}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns (and, as a program, exits with) the exit status."""
    warnings.showwarning = _show_warning
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app(args=arguments)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except ConfigError as error:
        for problem in error.problems:
            terminal.err.print(f"[red]error[/red] {terminal.clean(problem)}", soft_wrap=True)
        code = EXIT_USAGE
    except (TorchrelayError, JobError) as error:
        terminal.err.print(f"[red]error[/red] {terminal.clean(error)}", soft_wrap=True)
        code = _exit_code(error)
    if arguments is None:
        sys.exit(code)
    return code


if __name__ == "__main__":
    main()
