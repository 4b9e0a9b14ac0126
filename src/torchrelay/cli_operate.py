"""`torchrelay pause | resume | purge | deploy | rollback | pipelines`: what operators do to a namespace in service."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from torchrelay import terminal
from torchrelay.cli_options import (
    EXIT_FAILED,
    FilesArgument,
    JsonOption,
    NamespaceOption,
    RedisOption,
    SetOption,
    open_relay,
    overrides_by_file,
)
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.shards import written_names
from torchrelay.errors import ConfigError, InputError, NoWorkers
from torchrelay.queues import operate
from torchrelay.queues.fleet import FleetRecords
from torchrelay.queues.registry import CURRENT_S, Registry
from torchrelay.stages import check_stages

operate_app = typer.Typer()
_LOADING_S = 60.0
# A coordinator decides each second, and an agent starts what it is told at once.
_COMING_S = 15.0
_LOOK_S = 0.5
_LINE_EVERY_S = 10.0

TargetArgument = Annotated[str, typer.Argument(metavar="PIPELINE[/STAGE]", help="PIPELINE is NAME or NAME@VERSION.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Switch although nobody serves a stage yet.")]


@operate_app.command()
def pause(
    target: TargetArgument, redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False
) -> None:
    """Start no more jobs at a stage, or anywhere in a pipeline. What runs is finished; submits go on until it is full.

    NAME means all its versions, later ones included.

    Example: [bold]torchrelay pause embed/encode[/bold]
    """
    _pause(target, True, redis, namespace, as_json)


@operate_app.command()
def resume(
    target: TargetArgument, redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False
) -> None:
    """Let a paused stage or pipeline go on, at once.

    Example: [bold]torchrelay resume embed[/bold]
    """
    _pause(target, False, redis, namespace, as_json)


def _pause(target: str, on: bool, redis: str | None, namespace: str | None, as_json: bool) -> None:
    with open_relay(redis, namespace) as relay:
        found = operate.Target.find(relay.registry, target)
        nodes = operate.pause(relay.registry, found, on=on)
    if as_json:
        terminal.print_json({"paused": on, "nodes": nodes})
        return
    for node in nodes:
        terminal.out.print(f"{node} {'paused' if on else 'resumed'}")


@operate_app.command()
def purge(
    target: TargetArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where there is no terminal.")] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cancel every job that waits at a stage, or anywhere in a pipeline; what runs is left alone.

    Example: [bold]torchrelay purge embed/encode --yes[/bold]
    """
    with open_relay(redis, namespace) as relay:
        found = operate.Target.find(relay.registry, target)
        if not yes:
            _confirm(relay.registry, found, target)
        count = operate.purge(relay.registry, found)
    if as_json:
        terminal.print_json({"cancelled": count, "nodes": found.nodes()})
    else:
        terminal.out.print(f"{count} jobs cancelled")


def _confirm(registry: Registry, found: operate.Target, target: str) -> None:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(f"purge {target}: there is no terminal to ask at; pass --yes to cancel what waits")
    standing = operate.census(registry)
    waiting = [standing[n] for n in found.nodes() if n in standing]
    count = sum(s.waiting + s.delayed for s in waiting)
    if not typer.confirm(f"Cancel what waits at {terminal.shown(target)}, about {count} jobs?", err=True):
        terminal.err.print("nothing was cancelled")
        raise typer.Exit(EXIT_FAILED)


@operate_app.command()
def deploy(
    files: FilesArgument,
    force: ForceOption = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until the old versions' jobs have ended.")] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a file and make its version the one that new jobs take; jobs that are there finish on theirs.

    Workers of the new version come first. A coordinator starts them where an agent has the file, and lets those of the
    old one go when its last job has ended; without one, `torchrelay worker FILE --stage S` starts them and does not
    switch. Without a live worker for each stage nothing changes, and the exit status is 4.

    Example: [bold]torchrelay deploy embed.yaml --wait[/bold]
    """
    loaded = [_checked(f, overrides) for f, overrides in zip(files, overrides_by_file(files, set_), strict=True)]
    names = [p.name for p in loaded]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the files are versions of one pipeline ({', '.join(names)}); deploy one of them")
    with open_relay(redis, namespace) as relay:
        registry = relay.registry
        before = registry.current()
        with _served(registry, [p.ref for p in loaded]) as coming_s:
            unserved = {p.ref: _unserved(registry, p, p.source or "", force, coming_s) for p in loaded}
            for pipeline in loaded:
                registry.register(pipeline)
        shown = [_switched(registry, p, before.get(p.name), unserved[p.ref]) for p in loaded]
        _finish(registry, shown, wait, as_json)


@operate_app.command()
def rollback(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE")],
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help="Default: the one that was current before.")] = "",
    force: ForceOption = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the version that was current before, or the named one, the one that new jobs take again.

    A second rollback goes forward again: the version before is then the newer one.

    Example: [bold]torchrelay rollback embed[/bold]
    """
    name, _, at = pipeline.partition("@")
    version = version.removeprefix(f"{name}@") or at
    with open_relay(redis, namespace) as relay:
        registry = relay.registry
        if version:
            ref = operate.find_version(registry, name, version)
        else:
            ref = operate.previous_version(registry, name)
        found = registry.find(ref).pipeline
        path = registry.sources().get(ref, "").partition(":")[2]
        before = registry.current().get(name)
        with _served(registry, [ref]) as coming_s:
            unserved = _unserved(registry, found, path, force, coming_s)
            registry.make_current(ref)
        _finish(registry, [_switched(registry, found, before, unserved)], False, as_json)


def _checked(file: str, overrides: dict[str, str]) -> Pipeline:
    pipeline = Pipeline.load(file, overrides)
    problems = check_stages(pipeline)
    if problems:
        raise ConfigError("\n".join(problems), problems)
    return pipeline


@contextmanager
def _served(registry: Registry, refs: Sequence[str]) -> Iterator[float]:
    """The leader, where there is one, gives these versions workers meanwhile; gives how long they may take to come."""
    records = FleetRecords(registry.client, registry.control)
    view = records.view()
    asked = [ref for ref in refs if view.leader and any(ref in host.refs for host in view.hosts)]
    for ref in asked:
        records.wish_serve(ref, _LOADING_S + _COMING_S)
    try:
        yield _COMING_S if len(asked) == len(refs) else 0.0
    finally:
        for ref in asked:
            records.wish_serve(ref, 0)


def _unserved(registry: Registry, pipeline: Pipeline, path: str, force: bool, coming_s: float) -> list[str]:
    """Stages without a live worker: none, unless `force`. Raises NoWorkers with the commands that start them."""
    stages = [n.name for n in pipeline.graph.nodes]
    limits = (0.0, 0.0) if force else (_LOADING_S, coming_s)
    missing = written_names(pipeline.spec, operate.wait_loaded(registry, pipeline.ref, stages, *limits))
    if missing and not force:
        commands = "; ".join(operate.worker_command(f":{path}" if path else "", s) for s in missing)
        raise NoWorkers(
            f"no live worker serves {', '.join(missing)} of {pipeline.ref}; nothing was changed. Start one, which does "
            f"not switch, and come again, or pass --force: {commands}{_refused(registry, pipeline.ref)}"
        )
    return missing


def _refused(registry: Registry, ref: str) -> str:
    """Why the leader found no place for it."""
    told = FleetRecords(registry.client, registry.control).view().reasons.get("refused")
    mine = [one for one in told if isinstance(one, dict) and one.get("ref") == ref] if isinstance(told, list) else []
    return "".join(f"; the coordinator found no place for {one.get('stage')}: {one.get('why')}" for one in mine[:1])


def _switched(registry: Registry, pipeline: Pipeline, before: str | None, unserved: list[str]) -> dict[str, Any]:
    """What is said of one pipeline after the switch."""
    old = operate.old_work(registry, pipeline.ref)
    return {
        "pipeline": pipeline.name,
        "version": pipeline.version,
        "previous": None if before is None else before.partition("@")[2],
        "unserved": unserved,
        "old": [
            {"node": node, "waiting_rows": old.rows[node][0], "running_rows": old.rows[node][1], **jobs.counts()}
            for node, jobs in old.jobs.items()
        ],
    }


def _finish(registry: Registry, switched: Sequence[dict[str, Any]], wait: bool, as_json: bool) -> None:
    if not as_json:
        for one in switched:
            _print_switched(one)
    if wait:
        _wait_drained(registry, [f"{one['pipeline']}@{one['version']}" for one in switched])
    if as_json:
        terminal.print_json([{**one, "drained": True} for one in switched] if wait else list(switched))


def _print_switched(one: dict[str, Any]) -> None:
    ref, previous = f"{one['pipeline']}@{one['version']}", one["previous"]
    if previous == one["version"]:
        terminal.out.print(f"new jobs take {ref}, as before")
    else:
        instead = f" instead of {one['pipeline']}@{previous}" if previous else ""
        terminal.out.print(f"new jobs take {ref} now{instead}")
    if one["unserved"]:
        terminal.err.print(f"[yellow]warning[/yellow] no worker serves {', '.join(one['unserved'])} of {ref} yet")
    for row in one["old"]:
        delayed = f", {row['delayed_jobs']} jobs delayed" if row["delayed_jobs"] else ""
        terminal.out.print(
            f"  {row['node']} still has {row['waiting_rows']} rows waiting, {row['running_rows']} running{delayed}"
        )


def _wait_drained(registry: Registry, refs: Sequence[str]) -> None:
    """Waits until no job of these pipelines' other versions is left, and none can come."""
    columns = (TextColumn("old versions"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    # A client may submit to the version that it knew for a moment longer.
    quiet_since, told_at, stranded = time.monotonic(), time.monotonic(), ""
    most = 1
    with Progress(*columns, console=terminal.err, disable=not terminal.err.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")
        while time.monotonic() - quiet_since <= CURRENT_S + _LOOK_S:
            left, missing = _left(registry, refs)
            now = time.monotonic()
            if left:
                quiet_since, most = now, max(most, left)
            bar.update(task, total=most, completed=most - left, left=f"{left} jobs left")
            if missing != stranded:
                stranded = missing
                if missing:
                    terminal.err.print(missing, soft_wrap=True, markup=False)
            if not terminal.err.is_terminal and now - told_at >= _LINE_EVERY_S:
                told_at = now
                terminal.err.print(f"old versions: {left} jobs left")
            time.sleep(_LOOK_S)


def _left(registry: Registry, refs: Sequence[str]) -> tuple[int, str]:
    """Jobs of the other versions, and what to start when some of them would wait for ever."""
    names = {ref.partition("@")[0] for ref in refs}
    live = operate.live_versions(registry, operate.census(registry), registry.workers())
    old = [v for v in live if v.ref not in refs and v.ref.partition("@")[0] in names]
    commands = [f"no worker serves a stage that {v.ref} needs: {c}" for v in old for c in v.commands]
    return sum(sum(v.jobs.counts().values()) for v in old), terminal.shown("; ".join(commands))


@operate_app.command()
def pipelines(redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False) -> None:
    """List the pipelines of the namespace with their versions; new jobs take the current one.

    `since` is when new jobs began to take a version last, `from` the file that it was registered from.

    Example: [bold]torchrelay pipelines --json[/bold]
    """
    with open_relay(redis, namespace) as relay:
        rows = _pipeline_rows(relay.registry)
    if as_json:
        terminal.print_json(rows)
        return
    cells = [
        (
            r["pipeline"],
            r["version"],
            "current" if r["current"] else "",
            terminal.when(r["since"]) if r["since"] else "",
            " ".join(r["stages"]),
            r["registered_from"] or "",
        )
        for r in rows
    ]
    terminal.out.print(terminal.table(["pipeline", "version", "", "since", "stages", "from"], cells))


def _pipeline_rows(registry: Registry) -> list[dict[str, Any]]:
    current, sources = registry.current(), registry.sources()
    refs = sorted(registry.versions())
    since: dict[str, float] = {}
    for name in {ref.partition("@")[0] for ref in refs}:
        for reign in reversed(registry.history(name)):
            since[reign.ref] = reign.since
    return [
        {
            "pipeline": ref.partition("@")[0],
            "version": ref.partition("@")[2],
            "current": current.get(ref.partition("@")[0]) == ref,
            "since": since.get(ref) or None,
            "stages": [s.name for s in registry.find(ref).pipeline.written.stages],
            "registered_from": sources.get(ref),
        }
        for ref in refs
    ]
