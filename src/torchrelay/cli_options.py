"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from torchrelay.config.pipeline import Pipeline, split_module
from torchrelay.config.yaml_source import read_source
from torchrelay.errors import ConfigError
from torchrelay.producer.relay import Relay

EXIT_FAILED, EXIT_USAGE, EXIT_BROKER, EXIT_NO_WORKER, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

_FILE_HELP = "A pipeline's YAML file, or module.py:name for one in Python."
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help=_FILE_HELP)]
FilesArgument = Annotated[list[str], typer.Argument(metavar="FILE...", help=_FILE_HELP)]
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

SlotsOption = Annotated[
    str, typer.Option(metavar="auto|cpu=4,cuda:0", help="What this host offers; auto is all that there is.")
]


def host_name() -> str:
    """This machine's name, as a fleet may have it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:100] or "host"


def overrides_of(values: Sequence[str] | None) -> dict[str, str]:
    pairs = [v.partition("=") for v in values or ()]
    for key, equals, _ in pairs:
        if not equals or "." not in key:
            raise ConfigError(f"--set {key!r}: write it as STAGE.KEY=VALUE, for example --set encode.batch.max_rows=64")
    return {key: value for key, _, value in pairs}


def overrides_by_file(files: Sequence[str], values: Sequence[str] | None) -> list[dict[str, str]]:
    """For each file the overrides of its own stages; ConfigError for one that names no stage of any."""
    overrides = overrides_of(values)
    mine: list[dict[str, str]] = []
    for file in files:
        names = _stage_names(file)
        mine.append({k: v for k, v in overrides.items() if k.partition(".")[0] in names})
    stray = [k for k in overrides if not any(k in m for m in mine)]
    # With one file its own message is better: it knows the nearest name.
    return [overrides] if len(files) == 1 else _none_stray(mine, stray)


def _none_stray(mine: list[dict[str, str]], stray: list[str]) -> list[dict[str, str]]:
    if stray:
        raise ConfigError(f"--set {stray[0]}: no file has a stage {stray[0].partition('.')[0]!r}")
    return mine


def _stage_names(file: str) -> set[str]:
    try:
        if split_module(file) is not None:
            return {s.name for s in Pipeline.load(file).written.stages}
        data = read_source(Path(file)).data
    except ConfigError:
        return set()  # loading it says what is wrong
    stages = data.get("stages") if isinstance(data, dict) else None
    return {str(s.get("name")) for s in stages if isinstance(s, dict)} if isinstance(stages, list) else set()


def open_relay(redis: str | None, namespace: str | None) -> Relay:
    return Relay(redis, namespace=namespace).start()


def is_file(pipeline: str) -> bool:
    """Whether PIPELINE is a FILE and no name."""
    return pipeline.endswith((".yaml", ".yml")) or "/" in pipeline or split_module(pipeline) is not None


def pipeline_name(relay: Relay, pipeline: str, overrides: dict[str, str]) -> str:
    """NAME[@VERSION], or a file, which is registered."""
    if is_file(pipeline):
        return relay.register(Pipeline.load(pipeline, overrides))
    return pipeline


def vars_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass with slots or without."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
