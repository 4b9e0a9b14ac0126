"""`torchrelay split`: where a stage's model would be cut into parts, and what each part takes. Needs no server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from torchrelay import terminal
from torchrelay.cli_options import CpuOption, FileArgument, JsonOption, SetOption, overrides_of
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.shards import PartConfig, parts_of
from torchrelay.config.spec import MAX_SHARDS
from torchrelay.errors import ConfigError
from torchrelay.stages import StageContext
from torchrelay.workers.device import pick_device
from torchrelay.workers.splitting import plan_of

if TYPE_CHECKING:
    from torchrelay.stages.splitting import SplitPlan

split_app = typer.Typer()
Balance = Literal["time", "memory"]


@split_app.command()
def split(
    file: FileArgument,
    stage: Annotated[str, typer.Option("--stage", "-s", help="The stage, as the file names it.")],
    parts: Annotated[
        int | None, typer.Option(min=2, max=MAX_SHARDS, help="How many parts; default what the file says.")
    ] = None,
    balance: Annotated[
        Balance | None, typer.Option(help="What parts are made equal in; default what the file says, else time.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show each part's time, weights and what crosses.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where it is measured: auto, cpu, cuda or cuda:N.")] = "auto",
    set_: SetOption = None,
    allow_cpu: CpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a stage's model into parts on this machine, and show where; nothing is started, and nothing kept.

    The stage need not have `shards` yet. Without --explain only the cuts are shown, and what to write into the file.
    Workers measure for themselves, on their own devices, and may cut elsewhere.

    Example: [bold]torchrelay split pipeline.yaml --stage encode --parts 2 --explain[/bold]
    """
    pipeline = _as_split(file, overrides_of(set_), stage, parts, balance)
    first = _first_part(pipeline, stage)
    where = pick_device(first, "auto-cpu" if device == "auto" and allow_cpu else device)
    context = StageContext(device=where, version=pipeline.version, base_dir=pipeline.base_dir)
    plan = plan_of(first, pipeline, context)
    if as_json:
        terminal.print_json({"pipeline": pipeline.ref, "stage": stage, "device": where, **_told(plan, first)})
        return
    _print(plan, first, where, explain=explain)


def _as_split(file: str, overrides: dict[str, str], stage: str, parts: int | None, balance: Balance | None) -> Pipeline:
    """The pipeline with this stage split so; raises ConfigError where it is none, or cannot be split."""
    pipeline = Pipeline.load(file, overrides)
    found = next((s for s in pipeline.written.stages if s.name == stage), None)
    if found is None:
        names = ", ".join(s.name for s in pipeline.written.stages)
        raise ConfigError(f"{pipeline.where('stages')}: no stage {stage!r:.80}; its stages are {names}")
    shards = found.shards if found.shards is not None and found.shards.mode == "pipeline" else None
    if shards is None and parts is None:
        raise ConfigError(
            f"{pipeline.where('stages')}: stage {stage!r} has no shards of mode pipeline; say how many with --parts"
        )
    wanted = {
        "count": parts or (shards.count if shards is not None else 2),
        "mode": "pipeline",
        "balance": balance or (shards.balance if shards is not None else "time"),
    }
    # Its own entry goes whole, with what other modes need.
    mine = {key: value for key, value in overrides.items() if not f"{key}.".startswith(f"{stage}.shards.")}
    return Pipeline.load(file, {**mine, f"{stage}.shards": json.dumps(wanted)})


def _first_part(pipeline: Pipeline, stage: str) -> PartConfig:
    name = parts_of(pipeline.spec, stage)[0]
    first = next(s for s in pipeline.spec.stages if s.name == name)
    assert isinstance(first, PartConfig)  # `_as_split` made it so
    return first


def _told(plan: SplitPlan, first: PartConfig) -> dict[str, Any]:
    """What the plan says, for scripts. Sums are of the whole model; weights that several parts have count in each."""
    total_s = sum(part.seconds for part in plan.parts)
    parts = [
        {
            "part": f"{first.of}.{number}",
            "first": part.first,
            "last": part.last,
            "ms": round(part.seconds * 1000, 4),
            "share": round(part.seconds / total_s, 4) if total_s else None,
            "parameters": part.parameters,
            "weight_bytes": part.weight_bytes,
            "crossing_bytes_per_row": None if number == len(plan.parts) - 1 else part.crossing_bytes,
        }
        for number, part in enumerate(plan.parts)
    ]
    return {"balance": _balance(first), "parts": parts}


def _print(plan: SplitPlan, first: PartConfig, where: str, *, explain: bool) -> None:
    told = _told(plan, first)
    if explain:
        columns = ["part", "from", "to", "#ms a batch", "#share", "#parameters", "#weights", "#bytes a row to the next"]
        title = f"{first.of} in {first.count} parts of equal {told['balance']}, measured on {where}"
        terminal.out.print(terminal.table(columns, map(_cells, told["parts"]), title=terminal.clean(title)))
    else:
        for part in told["parts"][1:]:
            terminal.out.print(f"{terminal.clean(part['part'])} begins with {terminal.clean(part['first'])}")
    balance = "" if told["balance"] == "time" else f", balance: {told['balance']}"
    entry = f"shards: {{count: {first.count}, mode: pipeline{balance}}}"
    terminal.out.print(f"to write at stage {terminal.clean(first.of)}: {terminal.clean(entry)}", soft_wrap=True)


def _cells(part: dict[str, Any]) -> tuple[object, ...]:
    crossing = part["crossing_bytes_per_row"]
    return (
        part["part"],
        part["first"],
        part["last"],
        f"{part['ms']:.3g}",
        "" if part["share"] is None else f"{100 * part['share']:.1f} %",
        f"{part['parameters']:,}",
        _size(part["weight_bytes"]),
        "" if crossing is None else f"{crossing:,}",
    )


def _balance(first: PartConfig) -> str:
    return first.shards.balance if first.shards is not None else "time"


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"
