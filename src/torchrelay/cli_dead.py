"""`torchrelay dead`: jobs that failed for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from torchrelay import terminal
from torchrelay.cli_options import EXIT_FAILED, JsonOption, NamespaceOption, RedisOption, open_relay, vars_of
from torchrelay.errors import InputError
from torchrelay.producer.relay import Relay
from torchrelay.queues import dead as dead_letters

dead_app = typer.Typer(help="Jobs that failed for good.", no_args_is_help=True)


@dead_app.command("list")
def dead_list(
    pipeline: Annotated[str | None, typer.Argument(metavar="[PIPELINE]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that were redriven.")] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first."""
    with open_relay(redis, namespace) as relay:
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
    with open_relay(redis, namespace) as relay:
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
    with open_relay(redis, namespace) as relay:
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
    with open_relay(redis, namespace) as relay:
        dropped = dead_letters.drop(relay.registry, _dead_ids(relay, ids, everything, pipeline))
    _print_moved(dropped, "dropped")


def _print_moved(moved: dict[str, str], word: str) -> None:
    for old, new in moved.items():
        terminal.out.print(f"{old} {word} {new if new != old else ''}".rstrip() if new else f"{old} is no dead letter")
    if not all(moved.values()):
        raise typer.Exit(EXIT_FAILED)
