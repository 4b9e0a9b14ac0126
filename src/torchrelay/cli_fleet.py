"""`torchrelay coordinator | status | scale | drain`: who decides, what was decided, what people ask for."""

from __future__ import annotations

import signal
import threading
from contextlib import closing
from typing import Annotated, Any, TypeGuard

import typer
from rich.text import Text

from torchrelay import terminal
from torchrelay.cli_options import JsonOption, NamespaceOption, RedisOption, open_relay
from torchrelay.config.graph import is_runs
from torchrelay.config.settings import Settings
from torchrelay.config.shards import PartConfig
from torchrelay.config.spec import StageConfig
from torchrelay.coordinator.service import Coordinator
from torchrelay.errors import ConfigError, InputError
from torchrelay.fleet_view import fleet_of, fleet_parts, why_parts
from torchrelay.queues import operate
from torchrelay.queues.connection import connect, open_broker
from torchrelay.queues.fleet import FleetRecords
from torchrelay.queues.registry import Registry
from torchrelay.workers.logs import set_up_logs

fleet_app = typer.Typer()
# A coordinator whose link was cut is to wait for a lead soon after it is back.
_PATIENCE_S = 5.0


@fleet_app.command()
def coordinator(
    name: Annotated[str, typer.Option(help="How status calls it; default host and process.")] = "",
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Decide which host serves which stage, for all pipelines of the namespace, until SIGTERM or Ctrl-C.

    Any number may run: one leads, and another one takes over within five seconds when it dies. Workers run on without.

    Example: [bold]torchrelay coordinator --redis redis://host:6379/0[/bold]
    """
    settings = Settings.load(url=redis, namespace=namespace)
    set_up_logs(settings.log)
    stop = threading.Event()
    with closing(open_broker(settings.url)) as broker, connect(broker.address, timeout_s=_PATIENCE_S) as client:
        registry = Registry(client, settings.namespace, settings.lanes)
        registry.open()
        made = Coordinator(registry, name, settings.priority_boost_ms_per_point)

        def end(*_: object) -> None:
            stop.set()
            made.poke()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        terminal.err.print(
            f"coordinator {made.name} on {broker.url}, namespace {settings.namespace}", soft_wrap=True, markup=False
        )
        made.run(stop)


@fleet_app.command()
def status(
    why: Annotated[
        bool, typer.Option("--why", help="Also say why each worker is where it is, and what is refused.")
    ] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every stage: what waits, what runs, who serves it; versions that drain or that nobody serves; and the hosts.

    Example: [bold]torchrelay status --why[/bold]

    Example: [bold]torchrelay status --json[/bold]
    """
    with open_relay(redis, namespace) as relay:
        registry = relay.registry
        view = FleetRecords(registry.client, registry.control).view()
        if as_json:
            fleet = fleet_of(view, registry.workers(), why=why)
            terminal.print_json({"url": relay.url, **terminal.status_of(registry), **fleet})
            return
        terminal.print_status(registry)
        for part in (*fleet_parts(view, registry.workers()), *(why_parts(view) if why else ())):
            terminal.out.print(part, soft_wrap=isinstance(part, Text))


@fleet_app.command()
def scale(
    target: Annotated[str, typer.Argument(metavar="PIPELINE/STAGE", help="PIPELINE is NAME or NAME@VERSION.")],
    workers: Annotated[str, typer.Argument(metavar="N|auto", help="auto leaves it to the coordinator again.")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask for N workers of a stage, whatever its load; the coordinator keeps to it until it is told `auto`.

    NAME means all its versions, later ones included. Of a stage with shards, N workers for each of its parts.

    Example: [bold]torchrelay scale embed/encode 4[/bold]
    """
    if workers != "auto" and not (workers.isascii() and workers.isdigit()):
        raise InputError(f"{workers!r:.40} workers: write a number, or auto")
    with open_relay(redis, namespace) as relay:
        found = operate.Target.find(relay.registry, target)
        if not found.stage:
            raise InputError(f"{target!r:.80}: name a stage as well, as in {found.name}/STAGE")
        if is_runs(found.stage):
            raise ConfigError(f"{found.stage} has workers while runs last; start more with: torchrelay worker FILE")
        wholes = {s.of for v in found.versions for s in v.pipeline.spec.stages if _is_part(s, found.stage)}
        if wholes:
            whole = f"{target.rpartition('/')[0]}/{wholes.pop()}"
            remedy = f"torchrelay scale {whole} {workers}"
            raise InputError(f"{found.stage} is a part of a stage, and all its parts have as many workers; {remedy}")
        version = f"@{found.version}" if found.version else ""
        node = f"{found.name}{version}/{found.stage}"
        records = FleetRecords(relay.registry.client, relay.registry.control)
        records.wish_scale(node, None if workers == "auto" else int(workers))
        _warn_without_leader(records)
    shown: dict[str, Any] = {"node": node, "workers": None if workers == "auto" else int(workers)}
    if as_json:
        terminal.print_json(shown)
    else:
        terminal.out.print(f"{node}: {'as its load needs' if workers == 'auto' else f'{workers} workers'}")


@fleet_app.command()
def drain(
    host: Annotated[str, typer.Argument(metavar="HOST", help="As `torchrelay status` names it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it have workers again.")] = False,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move everything off a host: its workers finish their batches and end, others start elsewhere. It stays so.

    Example: [bold]torchrelay drain gpu-7[/bold]
    """
    with open_relay(redis, namespace) as relay:
        records = FleetRecords(relay.registry.client, relay.registry.control)
        view = records.view()
        known = sorted({one.name for one in view.hosts} | set(view.wishes.drain))
        if host not in known:
            raise InputError(f"there is no host {host!r:.80}; known: {', '.join(known) or 'none yet'}")
        records.wish_drain(host, on=not undo)
        _warn_without_leader(records)
    if as_json:
        terminal.print_json({"host": host, "draining": not undo})
    else:
        terminal.out.print(f"{host} {'may have workers again' if undo else 'drains'}")


def _is_part(stage: StageConfig, name: str) -> TypeGuard[PartConfig]:
    return isinstance(stage, PartConfig) and stage.name == name


def _warn_without_leader(records: FleetRecords) -> None:
    if not records.led():
        terminal.err.print("nobody leads, so nothing happens yet; start one with: torchrelay coordinator")
