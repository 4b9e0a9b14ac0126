"""How the fleet is shown: hosts with their slots, who runs what where, what is set aside, and why.

Text that hosts wrote never steers the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from torchrelay import terminal
from torchrelay.config.fleet import CPU, HostReport
from torchrelay.queues.fleet import FleetView
from torchrelay.queues.registry import WorkerReport

__all__ = ["fleet_of", "fleet_parts", "why_parts"]

_GIB = 2**30


def fleet_of(view: FleetView, workers: Sequence[WorkerReport], *, why: bool = False) -> dict[str, Any]:
    """What `status --json` tells of it."""
    states = _states(workers)
    told: dict[str, Any] = {
        "leader": view.leader or None,
        "epoch": view.epoch,
        "hosts": [_host(host, view) for host in view.hosts],
        "allocation": [
            {
                "id": one.id,
                "host": one.host,
                "slot": one.slot,
                "node": f"{one.ref}/{one.stage}",
                "shard": one.shard,
                "shards": one.shards,
                "state": states.get(one.id, "absent"),
                "why": one.why,
            }
            for _, state in sorted(view.desired.items())
            for one in state.workers
        ],
        "alerts": [
            {
                "host": one.host,
                "slot": one.slot,
                "node": f"{one.ref}/{one.stage}",
                "failures": one.failures,
                "again_in_s": round(max(one.until - view.now, 0.0), 1),
                "reason": one.reason,
            }
            for one in view.aside
            if one.until > view.now
        ],
        "wishes": {
            "scale": dict(sorted(view.wishes.scale.items())),
            "drain": sorted(view.wishes.drain),
            "serve": sorted(view.wishes.serve),
        },
    }
    if why:
        told["why"] = dict(view.reasons)
    return told


def _states(workers: Sequence[WorkerReport]) -> dict[str, str]:
    return {worker.assignment: worker.state for worker in workers if worker.assignment}


def _host(host: HostReport, view: FleetView) -> dict[str, Any]:
    state = view.desired.get(host.name)
    return {
        "name": host.name,
        "pid": host.pid,
        "seen_s_ago": round(max(view.now - host.seen_at, 0.0), 1),
        "draining": host.draining or host.name in view.wishes.drain,
        "cpus": host.cpus,
        "memory": host.memory,
        "free_memory": host.free_memory,
        "gpus": [
            {
                "slot": gpu.slot,
                "uuid": gpu.uuid,
                "name": gpu.name,
                "memory": gpu.memory,
                "free": gpu.free,
                "utilisation": gpu.utilisation,
            }
            for gpu in host.gpus
        ],
        "links": [list(group) for group in host.links],
        "labels": list(host.labels),
        "versions": list(host.refs),
        "workers": 0 if state is None else len(state.workers),
        "applied": state is not None and host.applied == state.number,
    }


def fleet_parts(view: FleetView, workers: Sequence[WorkerReport]) -> Iterator[RenderableType]:
    """A table of slots with what runs there, then what people should look at. Nothing where there is no fleet."""
    if not view.hosts and not view.leader:
        return
    states = _states(workers)
    yield Text("")
    yield terminal.table(["host", "slot", "offers", "#free", "#used", "workers"], list(_slot_rows(view, states)))
    leader = f"{view.leader} leads, epoch {view.epoch}" if view.leader else "nobody leads: torchrelay coordinator"
    yield Text(terminal.shown(leader))
    for one in view.aside:
        if one.until > view.now:
            what = f"{one.ref}/{one.stage} failed {one.failures} times on {one.host} {one.slot}"
            again = f"tried there again in {one.until - view.now:.0f} s"
            yield Text.assemble((terminal.shown(f"alert: {what}, {again}: {one.reason}"), "yellow"))
    for node, count in sorted(view.wishes.scale.items()):
        yield Text(terminal.shown(f"asked for: {count} workers of {node}"))


def _slot_rows(view: FleetView, states: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for host in view.hosts:
        draining = host.draining or host.name in view.wishes.drain
        name = f"{host.name} (drains)" if draining else host.name
        runs: dict[str, list[str]] = {}
        state = view.desired.get(host.name)
        for one in () if state is None else state.workers:
            text = f"{one.ref}/{one.stage}" + (f" {one.shard + 1}/{one.shards}" if one.shards > 1 else "")
            told = states.get(one.id, "absent")
            runs.setdefault(one.slot, []).append(text if told == "ready" else f"{text} ({told})")
        offers = f"{host.cpus:g} processors, {host.memory / _GIB:.0f} GiB"
        yield name, CPU, offers, f"{host.free_memory / _GIB:.0f} GiB", "", ", ".join(sorted(runs.get(CPU, ())))
        for gpu in host.gpus:
            used = "" if gpu.utilisation is None else f"{100 * gpu.utilisation:.0f} %"
            offers = f"{gpu.name}, {gpu.memory / _GIB:.0f} GiB"
            free = f"{gpu.free / _GIB:.0f} GiB"
            yield name, gpu.slot, offers, free, used, ", ".join(sorted(runs.get(gpu.slot, ())))


def why_parts(view: FleetView) -> Iterator[RenderableType]:
    """Why each version has workers, each stage so many, each worker its slot; and what found none."""
    yield Text("")
    for title, key in (("versions", "versions"), ("stages", "stages")):
        told = view.reasons.get(key)
        if isinstance(told, Mapping) and told:
            yield terminal.table([title, "why"], sorted((str(k), str(v)) for k, v in told.items()))
    rows = [
        (f"{one.ref}/{one.stage}", f"{one.host} {one.slot}", one.why)
        for _, state in sorted(view.desired.items())
        for one in state.workers
    ]
    if rows:
        yield terminal.table(["worker of", "on", "why"], rows)
    refused = view.reasons.get("refused")
    for one in refused if isinstance(refused, list) else ():
        if isinstance(one, Mapping):
            what = f"no place for {one.get('ref')}/{one.get('stage')}: {one.get('why')}"
            yield Text.assemble((terminal.shown(what), "yellow"))
