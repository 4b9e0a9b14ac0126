"""`torchrelay server`: the embedded server of a folder."""

from __future__ import annotations

from pathlib import Path

import typer

from torchrelay import terminal
from torchrelay.cli_options import EXIT_BROKER, JsonOption, vars_of
from torchrelay.queues import server as embedded

server_app = typer.Typer(help="The embedded server of this folder's .torchrelay.", no_args_is_help=True)


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
