"""`run_stage`: one stage, run on a table as a worker runs it, in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from pydantic import ValidationError

from torchrelay.config.columns import Column, check_table
from torchrelay.config.imports import bind_args
from torchrelay.config.ragged import shown
from torchrelay.config.spec import StageConfig
from torchrelay.config.types import ColumnType, parse_type
from torchrelay.errors import ConfigError, InputError, JobFailed
from torchrelay.producer.encoding import SubmitOptions
from torchrelay.queues import codec
from torchrelay.stages import Expand, Made, Runner, Stage, StageContext, make_runner
from torchrelay.stages.batch import join_rows
from torchrelay.stages.loading import stage_target
from torchrelay.stages.outputs import own
from torchrelay.testing.gathered import cut, run_gathered
from torchrelay.workers.device import pick_device

__all__ = ["run_stage"]

AnyStage = Stage | type[Stage] | Callable[..., Any]
Table = dict[str, np.ndarray[Any, np.dtype[Any]] | list[Any]]


@overload
def run_stage(
    stage: AnyStage,
    table: Mapping[str, Any],
    *,
    device: str = "cpu",
    args: Mapping[str, Any] | None = None,
    input: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
    rows: Literal["same"] = "same",
    pad: Mapping[str, float] | None = None,
    max_rows: int | None = None,
    meta: Mapping[str, Any] | None = None,
    context: StageContext | None = None,
    torch: Mapping[str, Any] | None = None,
    weights: str | None = None,
    base_dir: str | Path | None = None,
    rejected: MutableMapping[int, str] | None = None,
    shards: Mapping[str, Any] | None = None,
) -> Table: ...


@overload
def run_stage(
    stage: AnyStage,
    table: Mapping[str, Any],
    *,
    device: str = "cpu",
    args: Mapping[str, Any] | None = None,
    input: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
    rows: Literal["expand"],
    pad: Mapping[str, float] | None = None,
    max_rows: int | None = None,
    meta: Mapping[str, Any] | None = None,
    context: StageContext | None = None,
    torch: Mapping[str, Any] | None = None,
    weights: str | None = None,
    base_dir: str | Path | None = None,
    rejected: MutableMapping[int, str] | None = None,
    shards: Mapping[str, Any] | None = None,
) -> Expand: ...


def run_stage(
    stage: AnyStage,
    table: Mapping[str, Any],
    *,
    device: str = "cpu",
    args: Mapping[str, Any] | None = None,
    input: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
    rows: Literal["same", "expand"] = "same",
    pad: Mapping[str, float] | None = None,
    max_rows: int | None = None,
    meta: Mapping[str, Any] | None = None,
    context: StageContext | None = None,
    torch: Mapping[str, Any] | None = None,
    weights: str | None = None,
    base_dir: str | Path | None = None,
    rejected: MutableMapping[int, str] | None = None,
    shards: Mapping[str, Any] | None = None,
) -> Table | Expand:
    """Loads one stage, runs it on a table as a worker would, and closes it.

    Args:
        stage: an instance (`Encode(model="m")`), or a class or a function with its `args`.
        table: column -> N values, an array `[N, ...]` or a list; what a worker would hand to the stage.
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one.
        input, outputs: column -> type, as in a pipeline; checked where they are given.
        rows: "expand" for a stage that returns Expand.
        pad, torch, weights: as in a pipeline's stage.
        max_rows: the most rows that one forward gets; default all N.
        meta: what `batch.meta` holds for each row.
        context: what `load` is told, in place of `device` and `base_dir`.
        base_dir: the folder that `weights` and `context.path` are relative to; default the current one.
        rejected: takes `row -> why` of the rows that the stage rejects.
        shards: as in a pipeline, with `mode: gather`: the stage is loaded and run as each of the shards, and what they
            return is combined. Needs `outputs`.

    Returns: the table of what it returned, or an Expand; as the codec carries it, without rejected rows.

    Raises: JobFailed for a rejected row unless `rejected` is given, InputError for a table or outputs that do not fit,
        ConfigError, StageLoadError, DeviceError, and whatever `forward` raises.
    """
    tuning = {"max_rows": max_rows or 1_000_000, "pad": dict(pad or {})}
    options = {"rows": rows, "torch": dict(torch or {}), "weights": weights, "batch": tuning}
    spec = _spec(stage, dict(args or {}), options)
    types = _types("input", input)
    columns, total = check_table(types, table)
    sent = {name: _carried(name, column) for name, column in columns.items()}
    packed = SubmitOptions.parse({"meta": meta}).meta
    fields: Any = codec.decode(packed) if packed else {}
    _types("outputs", outputs)
    told = context or StageContext(device=_device(spec, device), base_dir=Path(base_dir or "."))

    def run(one: AnyStage, part: StageConfig, where: StageContext, given: Mapping[str, Column], rows: int) -> Made:
        # What combines shards gets their columns, and none of the table's.
        mine = types if given is sent else {}
        runner = make_runner(one, part, types=mine, outputs=_types("outputs", part.outputs))
        try:
            runner.load(where)
            return _run(runner, given, rows, part.batch.max_rows, fields)
        finally:
            runner.close()

    if shards is None:
        made = run(stage, spec.model_copy(update={"outputs": dict(outputs or {})}), told, sent, total)
    else:
        made = run_gathered(stage, cut(spec, outputs or {}, shards), told, sent, total, run)
    _report(made, spec.name, rejected)
    seen: Table = {name: shown(column) for name, column in made.columns.items()}
    return seen if made.counts is None else Expand(seen, made.counts)


def _spec(stage: AnyStage, args: dict[str, Any], options: dict[str, Any]) -> StageConfig:
    kind = type(stage) if isinstance(stage, Stage) else stage
    shown = getattr(kind, "__name__", type(kind).__name__)
    name = re.sub(r"[^a-z0-9_-]", "_", shown.lower()).lstrip("_-0123456789")[:64] or "stage"
    if isinstance(stage, Stage):
        if args:
            raise ConfigError(f"args go with a class or a function; this {shown} is made already")
        stage_target(kind, name)
    elif problems := bind_args(stage_target(stage, name), args):
        raise ConfigError(f"stage {name!r}: args: " + "; ".join(problems))
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return StageConfig.model_validate({"name": name, "use": "stage:stage", "args": args, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{place}: {problem['msg'].removeprefix('Value error, ')}") from error


def _types(what: str, given: Mapping[str, str] | None) -> dict[str, ColumnType]:
    try:
        return {name: parse_type(text) for name, text in (given or {}).items()}
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error


def _device(spec: StageConfig, asked: str) -> str:
    if asked == "auto":
        return pick_device(spec.model_copy(update={"device": "gpu"}), "auto-cpu")
    return pick_device(spec, asked)


def _carried(name: str, column: Column) -> Any:
    """The column as the codec brings it to the other side."""
    try:
        return codec.decode(codec.encode(column))
    except InputError as error:
        raise InputError(f"column {name!r}: {error}") from error


def _run(runner: Runner, table: Mapping[str, Column], total: int, max_rows: int, meta: Mapping[str, Any]) -> Made:
    pieces: list[Made] = []
    refused: dict[int, str] = {}
    for start in range(0, max(total, 1), max_rows):
        rows = min(max_rows, total - start)
        part = {name: column[start : start + rows] for name, column in table.items()}
        (made,) = runner.run([part], [rows], [meta])
        refused.update((start + row, why) for row, why in made.rejected.items())
        pieces.append(made if rows == total else own(made))
    # A forward of which every row was rejected may not even tell its columns.
    full = [p.columns for p in pieces if p.columns] or [{}]
    columns = {name: _carried(name, join_rows([part[name] for part in full])) for name in full[0]}
    counts = [p.counts for p in pieces if p.counts is not None]
    return Made(columns, np.concatenate(counts) if counts else None, refused)


def _report(made: Made, name: str, rejected: MutableMapping[int, str] | None) -> None:
    if made.rejected and rejected is None:
        row, why = min(made.rejected.items())
        raise JobFailed(why, stage=name, attempts=1, error_type="Rejected", row=row)
    if rejected is not None:
        rejected.update(made.rejected)
