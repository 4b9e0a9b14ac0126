"""What `check` says of where workers would run: on this machine, or on hosts that are only described (`--on`)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from torchrelay import terminal
from torchrelay.config.fleet import Gpu, HostReport
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import parse_bytes
from torchrelay.coordinator.allocate import Allocation, allocate, units_of
from torchrelay.coordinator.words import amounts
from torchrelay.errors import ConfigError
from torchrelay.workers.slots import SlotReader, open_nvml

__all__ = ["HERE", "described", "this_host", "told", "views", "would_run"]

HERE = "this machine"
_GPUS = re.compile(r"(\d+)x([A-Za-z0-9][A-Za-z0-9_. -]*):([0-9][^,]*)")
_HOSTS = re.compile(r"(\d+)\*(.*)")
_MOST_HOSTS, _MOST_GPUS = 1024, 64
# Of what is not described: what hosts with GPUs commonly have, for each.
_CPUS, _MEMORY = 8.0, 64 << 30


def this_host(*, allow_cpu: bool = False) -> HostReport:
    """This machine, as an agent would tell of it, beside what others use of it now."""
    offer = SlotReader("auto", open_nvml()).read()
    return HostReport(
        HERE,
        "",
        os.getpid(),
        offer.cpus,
        offer.memory,
        offer.free_memory,
        gpus=offer.gpus,
        links=offer.links,
        allow_cpu=allow_cpu,
    )


def described(texts: Sequence[str], *, allow_cpu: bool = False) -> list[HostReport]:
    """Hosts as `--on` describes them: `[N*]PART,PART...`, of `8xH100:80GiB`, `cpu=64`, `memory=512GiB`, `label=a100`.

    Without `cpu` and `memory`, a host has 8 processors and 64 GiB for each of its GPUs, and as much without any; its
    GPUs are joined by NVLink. Raises ConfigError.
    """
    found: list[HostReport] = []
    for text in texts:
        match = _HOSTS.fullmatch(text.strip())
        count, parts = (int(match[1]), match[2]) if match else (1, text)
        host = _host(text, parts, allow_cpu)
        if not 1 <= count <= _MOST_HOSTS - len(found):
            raise ConfigError(f"--on {text!r:.80}: describe 1 to {_MOST_HOSTS} hosts in all")
        found += [replace(host, name=f"host{len(found) + i + 1}") for i in range(count)]
    return found


def _host(text: str, parts: str, allow_cpu: bool) -> HostReport:
    gpus: list[Gpu] = []
    labels: list[str] = []
    given: dict[str, float] = {}
    for part in (p.strip() for p in parts.split(",")):
        key, _, value = part.partition("=")
        match = _GPUS.fullmatch(part)
        try:
            if match is not None and len(gpus) + int(match[1]) <= _MOST_GPUS:
                memory = parse_bytes(match[3])
                gpus += [Gpu(len(gpus) + i, "", match[2], memory, memory) for i in range(int(match[1]))]
            elif key == "cpu" and 0 <= float(value) <= 1e6:
                given[key] = float(value)
            elif key == "memory":
                given[key] = parse_bytes(value)
            elif key == "label" and value:
                labels.append(value)
            else:
                raise ConfigError(f"{part!r:.60} is no part of a host")
        except (ConfigError, ValueError) as error:
            example = "4*8xH100:80GiB,cpu=64,memory=512GiB,label=a100"
            raise ConfigError(f"--on {text!r:.80}: {error}; write it like {example}") from error
    each = max(len(gpus), 1)
    memory = int(given.get("memory", _MEMORY * each))
    cpus = given.get("cpu", _CPUS * each)
    links = (tuple(g.index for g in gpus),) if len(gpus) > 1 else ()
    return HostReport(
        "", "", 0, cpus, memory, memory, gpus=tuple(gpus), links=links, labels=tuple(labels), allow_cpu=allow_cpu
    )


def would_run(pipelines: Sequence[Pipeline], hosts: Sequence[HostReport]) -> Allocation:
    """Where the fewest workers of each stage would run (`replicas.min`) if all hosts had all these pipelines."""
    refs = tuple(p.ref for p in pipelines)
    units = [unit for p in pipelines for unit in units_of(p, {g.first.name: g.replicas for g in p.groups})]
    return allocate([replace(host, refs=refs) for host in hosts], units, ())


def told(allocation: Allocation, ref: str) -> dict[str, Any]:
    """Of one pipeline, as `check --json` prints it."""
    placed = ("host", "slot", "stage", "shard", "shards", "need", "why")
    return {
        "allocation": [{k: asdict(a)[k] for k in placed} for a in allocation.assignments if a.ref == ref],
        "refused": [
            {"stage": r.unit.stage, "shard": r.unit.shard, "short": r.what, "by": r.missing, "why": r.why}
            for r in allocation.refused
            if r.unit.ref == ref
        ],
    }


def views(allocation: Allocation) -> list[RenderableType]:
    """What people read: a line for each worker, and for each reason why one has no place."""
    several = len({a.ref for a in allocation.assignments}) > 1
    rows = [
        (a.host, a.slot, f"{a.ref}/{a.stage}" if several else a.stage, amounts(a.need), a.why)
        for a in allocation.assignments
    ]
    shown: list[RenderableType] = [Text("would run", style="bold")] if rows else []
    shown += [terminal.table(["host", "slot", "stage", "takes", "why"], rows)] if rows else []
    reasons: dict[str, int] = {}
    for refusal in allocation.refused:
        reasons[refusal.why] = reasons.get(refusal.why, 0) + 1
    for why, count in reasons.items():
        times = f" ({count} workers)" if count > 1 else ""
        shown.append(Text.assemble(("has no place ", "yellow"), terminal.clean(why) + times))
    return shown
