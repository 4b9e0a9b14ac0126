"""The command line. Each command is thin: it parses, calls the room that does the work, and prints.

Exit status: 0 done, 1 failed jobs, 2 usage or configuration, 3 no server to be reached, 4 no worker, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from redis import exceptions as redis_errors

from torchrelay import terminal
from torchrelay.cli_dead import dead_app
from torchrelay.cli_fleet import fleet_app
from torchrelay.cli_operate import operate_app
from torchrelay.cli_options import (
    EXIT_BROKER,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO_WORKER,
    EXIT_USAGE,
    CpuOption,
    FileArgument,
    FilesArgument,
    JsonOption,
    NamespaceOption,
    RedisOption,
    SetOption,
    host_name,
    open_relay,
    overrides_by_file,
    overrides_of,
    pipeline_name,
)
from torchrelay.cli_run import run_app
from torchrelay.cli_runs import agent_app, runs_app
from torchrelay.cli_server import server_app
from torchrelay.cli_split import split_app
from torchrelay.cli_tenants import tenants_app
from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import (
    BrokerError,
    ConfigError,
    InputError,
    JobError,
    NoWorkers,
    RunConflict,
    TorchrelayError,
    UsageError,
)
from torchrelay.on_demand import ReadersOnDemand
from torchrelay.stages import check_stages
from torchrelay.system import System
from torchrelay.up import Fleet, run_fleet
from torchrelay.would_run import described, this_host, told, views, would_run

app = typer.Typer(
    name="torchrelay",
    help="Multi-stage model inference over Redis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(server_app, name="server")
app.add_typer(dead_app, name="dead")
app.add_typer(runs_app, name="runs")
app.add_typer(tenants_app, name="tenants", help="How those that jobs are for share what is there.")
for part in (fleet_app, operate_app, run_app, agent_app, split_app):
    app.registered_commands += part.registered_commands


@app.command()
def check(
    files: FilesArgument,
    set_: SetOption = None,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="HOSTS", help="Hosts to place workers on, such as 2*8xH100:80GiB. Repeatable."),
    ] = None,
    allow_cpu: CpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Validate pipeline files, import their stages, and show what they would run, and where.

    Workers are placed on this machine, or on the hosts that --on describes: then exit status 4 says that some have no
    place.

    Example: [bold]torchrelay check pipeline.yaml[/bold]

    Example: [bold]torchrelay check ocr.yaml --on '2*8xH100:80GiB,cpu=64,memory=512GiB,label=fast' --on cpu=16[/bold]
    """
    hosts = described(on, allow_cpu=allow_cpu) if on else [this_host(allow_cpu=allow_cpu)]
    found: list[dict[str, Any]] = []
    good: list[Pipeline] = []
    for file, overrides in zip(files, overrides_by_file(files, set_), strict=True):
        problems: tuple[str, ...] = ()
        try:
            pipeline = Pipeline.load(file, overrides)
            problems = check_stages(pipeline)
        except ConfigError as error:
            problems = error.problems
        found.append({"file": file, "ok": not problems, "problems": list(problems)})
        if not problems:
            found[-1]["pipeline"] = pipeline.ref
            good += [pipeline] if pipeline not in good else []
        if as_json:
            continue
        if problems:
            for problem in problems:
                terminal.err.print(f"[red]error[/red] {terminal.clean(problem)}", soft_wrap=True)
        else:
            terminal.out.print(terminal.graph_view(pipeline))
    allocation = would_run(good, hosts)
    if as_json:
        terminal.print_json([f | (told(allocation, f["pipeline"]) if f["ok"] else {}) for f in found])
    else:
        for part in views(allocation):
            terminal.out.print(part)
    if not all(f["ok"] for f in found):
        raise typer.Exit(EXIT_USAGE)
    if on and allocation.refused:
        raise typer.Exit(EXIT_NO_WORKER)


@app.command()
def up(
    files: FilesArgument,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
) -> None:
    """Run everything on this machine: the server if there is none, a coordinator, an agent, their workers, a live view.

    What reads and writes datasets is started when a run wants it. Ctrl-C drains: batches under way are finished, the
    rest goes back to the queues.

    Example: [bold]torchrelay up pipeline.yaml --allow-cpu[/bold]
    """
    fleet = System(host_name(), redis, namespace, allow_cpu=allow_cpu)
    for file, overrides in zip(files, overrides_by_file(files, set_), strict=True):
        fleet.add(Pipeline.load(file, overrides), overrides)
    raise typer.Exit(run_fleet(fleet, live=terminal.out.is_terminal, tick=ReadersOnDemand(fleet).tick))


@app.command()
def worker(
    file: FileArgument,
    stage: Annotated[str, typer.Option("--stage", "-s", help="The stage to serve; @read or @write for runs.")],
    shard: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Of a stage with shards, this one; default all.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    group: Annotated[str, typer.Option(help="Name of the group that ranks of several hosts form.")] = "",
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
) -> None:
    """Serve one stage on one device, until SIGTERM or Ctrl-C, which drain.

    Of a stage with shards, a worker for each of its parts (STAGE.0, STAGE.1 ..), which are stages of their own; what
    combines them is STAGE.combine.

    Which version new jobs take stays as it is, unless this is the first: `up`, `deploy` and `rollback` switch it.

    Example: [bold]torchrelay worker pipeline.yaml --stage encode --device cuda:1 --redis redis://host:6379/0[/bold]

    Example: [bold]torchrelay worker pipeline.yaml --stage head --shard 1 --device cuda:1[/bold]
    """
    overrides = overrides_of(set_)
    fleet = Fleet(redis, namespace, allow_cpu=allow_cpu, make_current=False)
    fleet.add(Pipeline.load(file, overrides), overrides, stage=stage, device=device, shard=shard, group=group)
    raise typer.Exit(run_fleet(fleet, live=False))


def _rows(text: str, files: Sequence[str] | None) -> list[dict[str, Any]]:
    # Only a newline ends a line: texts may hold the other characters that Python splits at.
    lines = sys.stdin.buffer.read().split(b"\n") if text == "-" else [text.encode("utf-8", "surrogateescape")]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="NAME\\[@VERSION], or a FILE as for up.")],
    row: Annotated[
        str,
        typer.Argument(metavar="[JSON|-]", help="One row, or - for JSON lines on standard input.", show_default=False),
    ] = "{}",
    file: Annotated[
        list[str] | None, typer.Option("--file", metavar="COLUMN=PATH", help="A bytes column from a file.")
    ] = None,
    priority: Annotated[str, typer.Option(help="high, medium, low or 0..100.")] = "medium",
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Who the jobs are for.")] = None,
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

    Example: [bold]torchrelay submit classify --file image=a.jpg --wait[/bold]
    """
    if wait and keep == 0:
        raise InputError("--keep 0 keeps no result to wait for; leave one of --keep 0 and --wait out")
    rows = _rows(row, file)
    if key is not None and len(rows) != 1:
        raise InputError(f"--key goes with one row, {len(rows)} came")
    with open_relay(redis, namespace) as relay:
        name = pipeline_name(relay, pipeline, overrides_of(set_))
        level: str | int = int(priority) if priority.isascii() and priority.isdigit() else priority
        futures = relay.submit_many(
            name,
            rows,
            [key] if key is not None else None,
            priority=level,
            deadline_s=deadline,
            delay_s=delay,
            keep_s=keep,
            wait_s=30.0,
            tenant=tenant,
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
    with open_relay(redis, namespace) as relay:
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
    with open_relay(redis, namespace) as relay:
        for job_id in job_ids:
            relay.job(job_id)
        won = relay.cancel(job_ids)
        for job_id, mine in zip(job_ids, won, strict=True):
            state = "cancelled" if mine else f"not cancelled: {relay.job(job_id).status()}"
            terminal.out.print(f"{job_id} {state}")
    if not all(won):
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
    except (redis_errors.RedisError, ConnectionError) as error:
        terminal.err.print(f"[red]error[/red] the server went away: {terminal.clean(error)}", soft_wrap=True)
        code = EXIT_BROKER
    except (TorchrelayError, JobError) as error:
        # What differs stands in lines; a line break that somebody else wrote is only shown.
        lines = str(error).splitlines() if isinstance(error, RunConflict) else [error]
        terminal.err.print("[red]error[/red] " + "\n".join(map(terminal.clean, lines)), soft_wrap=True)
        code = _exit_code(error)
    if arguments is None:
        sys.exit(code)
    return code


if __name__ == "__main__":
    main()
