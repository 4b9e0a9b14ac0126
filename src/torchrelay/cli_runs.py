"""`torchrelay agent`, `torchrelay runs list | show | cancel`, and `run --detach`: runs that others drive."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Annotated, Any, NamedTuple

import typer

from torchrelay import terminal
from torchrelay.agent import Loaded, RunsAgent
from torchrelay.cli_options import (
    CpuOption,
    FilesArgument,
    JsonOption,
    NamespaceOption,
    RedisOption,
    SetOption,
    SlotsOption,
    host_name,
    is_file,
    open_relay,
    overrides_by_file,
)
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.errors import ConfigError, InputError
from torchrelay.host_service import HostService
from torchrelay.producer.relay import Relay
from torchrelay.producer.runs import timetable
from torchrelay.producer.runs.detached import LEVELS, RunRequest, enqueue, runs_queues
from torchrelay.producer.runs.manifest import new_run_id
from torchrelay.producer.runs.overview import Overview, RunView
from torchrelay.queues.connection import open_broker
from torchrelay.queues.fleet import check_host_name
from torchrelay.queues.registry import Registry
from torchrelay.up import Fleet
from torchrelay.workers.host_agent import Host, HostAgent
from torchrelay.workers.logs import set_up_logs
from torchrelay.workers.reconcile import Servable
from torchrelay.workers.slots import SlotReader, open_nvml

__all__ = ["When", "agent_app", "detach", "runs_app"]

agent_app = typer.Typer()
runs_app = typer.Typer(help="The runs of a namespace, whoever drives them.", no_args_is_help=True)
_MOST_RETRIES = 100


@agent_app.command()
def agent(
    files: FilesArgument,
    runs: Annotated[
        str, typer.Option(metavar="LEVEL,..", help="Runs of which priority it takes; the first go first.")
    ] = ",".join(LEVELS),
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
    slots: SlotsOption = "auto",
    name: Annotated[str, typer.Option(help="The host's name in the fleet; default its own.")] = "",
    label: Annotated[list[str] | None, typer.Option(help="What `hosts:` of a stage may ask for. Repeatable.")] = None,
) -> None:
    """Serve stages on this host as a coordinator decides, and drive detached runs, until SIGTERM or Ctrl-C: they drain.

    It serves the pipelines in these FILES, and these versions alone. Start it on each host, and a coordinator anywhere
    (`torchrelay coordinator`). It drives one run at a time, and gives it back when it ends. Stages that nobody serves
    get a worker on this host while a run lasts, as with `torchrelay run`.

    Example: [bold]torchrelay agent embed.yaml ocr.yaml --redis redis://host:6379/0 --slots cpu=4,cuda:0[/bold]
    """
    levels = list(dict.fromkeys(name for name in runs.split(",") if name))
    if not levels or not set(levels) <= set(LEVELS):
        raise InputError(f"--runs {runs!r:.60}: write one or more of {', '.join(LEVELS)}")
    loaded = [
        Loaded(Pipeline.load(f, overrides), overrides)
        for f, overrides in zip(files, overrides_by_file(files, set_), strict=True)
    ]
    settings = Settings.load(url=redis, namespace=namespace)
    set_up_logs(settings.log)
    reader = SlotReader(slots, open_nvml())
    me = Host(check_host_name(name or host_name()), reader, tuple(label or ()), allow_cpu)
    with open_relay(redis, namespace) as relay, closing(open_broker(settings.url)) as broker:
        registry = Registry(broker.client, settings.namespace, settings.lanes)
        servable = {one.pipeline.ref: Servable(one.pipeline, one.overrides) for one in loaded}
        host = HostService(HostAgent(registry, broker.address, settings, me, servable), registry)
        made = RunsAgent(
            relay, _runnable(loaded), levels, lambda: Fleet(redis, namespace, allow_cpu=allow_cpu, make_current=False)
        )
        where = f"{relay.url}, namespace {relay.registry.control.namespace}"
        refs = ", ".join(one.pipeline.ref for one in loaded)
        terminal.err.print(
            f"agent {made.worker.name} of host {me.name} on {where}: {refs}; runs: {', '.join(levels)}", soft_wrap=True
        )
        made.worker.on_stop = host.stop
        host.start()
        try:
            made.serve()
        finally:
            host.stop()
            host.join()


def _runnable(loaded: Sequence[Loaded]) -> list[Loaded]:
    """Without those that have no run graph: they are served alone, and the operator is told."""
    found = []
    for one in loaded:
        try:
            one.pipeline.for_runs()
            found.append(one)
        except ConfigError as why:
            terminal.err.print(f"{one.pipeline.ref} is served, and takes no runs: {why}", soft_wrap=True, markup=False)
    return found


class When(NamedTuple):
    """`--at`, `--every`, `--retries` and `--check` as they were written."""

    at: str | None
    every: str | None
    retries: int
    check: bool = True
    """Whether what the run reads and writes is looked at from here."""


def detach(
    relay: Relay,
    target: str,
    paths: tuple[Sequence[str], str],
    options: Mapping[str, Any],
    when: When,
    *,
    as_json: bool,
) -> None:
    """Asks agents for a run from the first of these paths into the second, and says how to look at it."""
    if not 0 <= when.retries <= _MOST_RETRIES:
        raise InputError(f"--retries {when.retries}: write a number from 0 to {_MOST_RETRIES}")
    (data, output), now = paths, time.time()
    rule = None if when.every is None else timetable.parse_every(when.every)
    due = None if when.at is None else timetable.moment(when.at, now)
    registry = relay.registry
    client, control = registry.client, registry.control
    pipeline: str | Pipeline = Pipeline.load(target) if is_file(target) else registry.find(target).pipeline.ref
    ref = pipeline if isinstance(pipeline, str) else registry.register(pipeline, current=False).pipeline.ref
    if when.check:
        _check(relay, pipeline, data, _first_folder(output, rule, due or now), options)
    else:
        registry.find(ref).pipeline.for_runs()  # says why there are none
    run = new_run_id()
    if rule is None:
        folder = timetable.with_started(output, now if due is None else due)
        request = RunRequest.make(ref, data, folder, options)
        enqueue(client, control.namespace, request, run, at=due, retries=when.retries)
    else:
        request = RunRequest.make(ref, data, timetable.folders(output), options)
        due = timetable.first_time(rule, due, now)
        timetable.save(client, control, timetable.Schedule(run, control.namespace, request, rule, due, when.retries))
    view = Overview(client, control).find(run)
    (queue,) = runs_queues(client, control.namespace, [request.level])
    if as_json:
        terminal.print_json({**view.as_dict(), "queue": queue.name})
        return
    time_of_it = "" if view.due is None else f", {'first ' if rule else ''}at {terminal.when(view.due)}"
    terminal.out.print(f"{run} {view.state} on {queue.name}{time_of_it}", soft_wrap=True)
    terminal.out.print(f"look at it with: torchrelay runs show {run}", soft_wrap=True)
    if view.waits_for:
        terminal.err.print(view.waits_for, soft_wrap=True)


def _first_folder(output: str, rule: int | str | None, at: float) -> str:
    return timetable.with_started(output if rule is None else timetable.folders(output), at)


def _check(relay: Relay, target: str | Pipeline, data: Sequence[str], output: str, options: Mapping[str, Any]) -> None:
    """As for a run in the foreground, and in the same words."""
    try:
        relay.check_run(target, input=list(data), output=output, **options)
    except ConfigError:
        hint = "paths are looked at from here; if the agent's host alone has them, or later, add --no-check"
        terminal.err.print(hint, soft_wrap=True)
        raise


@runs_app.command("list")
def list_(redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False) -> None:
    """List runs: those under way, those that wait, and what ended in the last 30 days.

    Example: [bold]torchrelay runs list --json[/bold]
    """
    with open_relay(redis, namespace) as relay:
        views = Overview(relay.registry.client, relay.registry.control).all()
    if as_json:
        terminal.print_json([v.as_dict() for v in views])
        return
    columns = ["run", "state", "pipeline", "#rows", "#rows/s", "#errors", "#seconds", "output", "driver"]
    terminal.out.print(terminal.table(columns, [_cells(v) for v in views]))


def _cells(view: RunView) -> tuple[str, ...]:
    of = "" if view.total_rows is None else f" of {view.total_rows:,}"
    rows = "" if view.rows is None else f"{view.rows:,}{of}"
    speed = "" if not view.rows_per_s else f"{view.rows_per_s:,.0f}"
    errors = "" if view.errors is None else f"{view.errors:,}"
    seconds = "" if view.seconds is None else f"{view.seconds:,.0f}"
    driver = view.driver or ("an agent" if view.detached else "")
    state = view.state if view.due is None else f"{view.state}, {terminal.when(view.due)}"
    state += ", no agent" if view.waits_for else ""
    return view.id, state, view.pipeline, rows, speed, errors, seconds, view.output, driver


@runs_app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="ID")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how one run stands, or a run that is repeated."""
    with open_relay(redis, namespace) as relay:
        view = Overview(relay.registry.client, relay.registry.control).find(run)
    if as_json:
        terminal.print_json(view.as_dict())
        return
    told = {k: v for k, v in view.as_dict().items() if v not in (None, "", False)}
    for name in ("began", "due"):
        if name in told:
            told[name] = terminal.when(told[name])
    terminal.out.print(terminal.table(["", ""], told.items()))


@runs_app.command()
def cancel(
    run: Annotated[str, typer.Argument(metavar="ID")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a run, which `--resume` goes on with; or a run that is repeated, with what waits of it.

    A run under way ends within seconds: its driver calls off what it sent.
    """
    with open_relay(redis, namespace) as relay:
        outcome = Overview(relay.registry.client, relay.registry.control).cancel(run)
    if as_json:
        terminal.print_json({"run": run, "outcome": outcome})
    else:
        terminal.out.print(f"{terminal.clean(run)} {'cancelled' if outcome == 'cancelled' else 'is being ended'}")
