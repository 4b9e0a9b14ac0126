"""How the fleet is shown: hosts with their slots, who runs what where, what is set aside, and why.

Text that hosts wrote never steers the terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from torchrelay import terminal
from torchrelay.config.fleet import CPU, Assignment, HostReport
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
    columns = ["host", "slot", "offers", "#memory free", "#taken", "#busy", "workers"]
    yield terminal.table(columns, list(_slot_rows(view, states)))
    leader = f"{view.leader} leads, epoch {view.epoch}" if view.leader else "nobody leads: torchrelay coordinator"
    yield Text(terminal.shown(leader))
    for one in view.aside:
        if one.until > view.now:
            what = f"{one.ref}/{one.stage} failed {one.failures} times on {one.host} {one.slot}"
            again = f"tried there again in {one.until - view.now:.0f} s"
            yield Text.assemble((terminal.shown(f"alert: {what}, {again}: {one.reason}"), "yellow"))
    for node, count in sorted(view.wishes.scale.items()):
        back = f"torchrelay scale {node} auto"
        yield Text(terminal.shown(f"asked for: {_workers(count)} of {node}; back to what the load needs: {back}"))
    for host in sorted(view.wishes.drain):
        yield Text(terminal.shown(f"asked for: {host} is to be empty; back: torchrelay drain {host} --undo"))
    if lacking := sum(_refused(view).values()):
        told = f"{_workers(lacking)} {_have(lacking)} no place; what is short: torchrelay status --why"
        yield Text.assemble((told, "yellow"))


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _refused(view: FleetView) -> Counter[tuple[str, str]]:
    """How many workers have no place, by stage and reason."""
    refused = view.reasons.get("refused")
    told = [one for one in refused if isinstance(one, Mapping)] if isinstance(refused, list) else []
    return Counter((f"{one.get('ref')}/{one.get('stage')}", str(one.get("why"))) for one in told)


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
        taken = {} if state is None else _taken(state.workers)
        labels = "".join(f", {label}" for label in host.labels)
        offers = f"{host.cpus:g} processor{'' if host.cpus == 1 else 's'}, {_gib(host.memory)}{labels}"
        cpus = f"{taken.get(CPU, 0.0):g} of {host.cpus:g}"
        yield name, CPU, offers, _gib(host.free_memory), cpus, "", ", ".join(sorted(runs.get(CPU, ())))
        for gpu in host.gpus:
            busy = "" if gpu.utilisation is None else f"{100 * gpu.utilisation:.0f} %"
            share = f"{taken.get(gpu.slot, 0.0):g} of 1"
            workers = ", ".join(sorted(runs.get(gpu.slot, ())))
            yield name, gpu.slot, f"{gpu.name}, {_gib(gpu.memory)}", _gib(gpu.free), share, busy, workers


def _taken(workers: Sequence[Assignment]) -> dict[str, float]:
    """Processors that are taken on a host, and shares of its GPUs."""
    found: dict[str, float] = {}
    for one in workers:
        found[CPU] = round(found.get(CPU, 0.0) + one.need.cpus, 6)
        if one.slot != CPU:
            found[one.slot] = round(found.get(one.slot, 0.0) + one.need.compute, 6)
    return found


def _gib(value: int) -> str:
    return f"{value / _GIB:.0f} GiB"


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
    for (node, text), count in _refused(view).items():
        what = f"{_workers(count)} of {node} {_have(count)} no place: {text}"
        yield Text.assemble((terminal.shown(what), "yellow"))
