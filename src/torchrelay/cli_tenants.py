"""`torchrelay tenants list | set`: how those that jobs are for share what is there."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from torchrelay import terminal
from torchrelay.cli_options import JsonOption, NamespaceOption, RedisOption, open_relay
from torchrelay.queues import tenants

tenants_app = typer.Typer(no_args_is_help=True)


@tenants_app.command("list")
def list_(redis: RedisOption = None, namespace: NamespaceOption = None, as_json: JsonOption = False) -> None:
    """Show the weights that were set; every other tenant has 1.

    Example: [bold]torchrelay tenants list[/bold]
    """
    with open_relay(redis, namespace) as relay:
        found = tenants.weights(relay.registry)
    if as_json:
        terminal.print_json(found)
        return
    table = Table("tenant", "weight")
    for name, weight in found.items():
        table.add_row(name, f"{weight:g}")
    terminal.out.print(table)


@tenants_app.command("set")
def set_(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="As jobs name it: --tenant, tenant=.")],
    weight: Annotated[float, typer.Argument(metavar="WEIGHT", help="Its share; others have 1.")],
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Give a tenant a larger or smaller share, for what is submitted from now on.

    Example: [bold]torchrelay tenants set research 3[/bold]
    """
    with open_relay(redis, namespace) as relay:
        tenants.set_weight(relay.registry, tenant, weight)
    terminal.out.print(f"{tenant}: weight {weight:g}")
