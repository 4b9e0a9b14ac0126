"""How groups of ranks are shown (`shards: {mode: tensor}`): each rank, where it is, and why a group does not form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torchrelay.config.run_graph import base_ref
from torchrelay.queues.groups import GroupView, views
from torchrelay.queues.registry import Registry, WorkerReport

__all__ = ["group_rows", "groups_of", "why_lines"]


def groups_of(registry: Registry, ranks: Sequence[WorkerReport]) -> dict[str, list[dict[str, Any]]]:
    """Of each node (`name@version/stage`) its groups, as `status --json` prints them."""
    mine: dict[str, list[WorkerReport]] = {}
    for report in ranks:
        if report.group:
            mine.setdefault(report.group, []).append(report)
    known = views(registry.client, registry.control, mine)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, reports in mine.items():
        ref, _, stage = reports[0].node.partition("/")
        size = reports[0].ranks
        view = known.get(name) or GroupView(name, size, 0, (), ())
        told = {
            "group": name,
            "epoch": view.epoch,
            "formed": view.formed,
            "ranks": [_rank(rank, view, reports) for rank in range(view.size)],
            "ended": view.why or None,
            "max_rows": view.cap or None,
        }
        why = None if view.formed else _why_not(view, stage, assigned=any(r.assignment for r in reports))
        found.setdefault(f"{base_ref(ref)}/{stage}", []).append({**told, "why": why})
    return found


def _rank(rank: int, view: GroupView, reports: Sequence[WorkerReport]) -> dict[str, Any]:
    # Of one that was started anew the older report may still be there.
    report = max((r for r in reports if r.rank == rank), key=lambda r: r.sent_at, default=None)
    if report is None or rank in view.missing:
        state = "missing"
    else:
        state = "waits" if report.state == "loading" and not view.formed else report.state
    host, device = (None, None) if report is None else (report.host, report.device)
    # Of one that waits the process is over.
    pid = report.pid or None if report is not None and state != "waits" else None
    return {"rank": rank, "host": host, "pid": pid, "device": device, "state": state}


def _why_not(view: GroupView, stage: str, *, assigned: bool) -> str:
    """Why the group does not form, and what to do."""
    if view.missing:
        names = " and ".join(f"rank {rank}" for rank in view.missing)
        start = f"torchrelay worker FILE --stage {stage} --shard {view.missing[0]} --group {view.group}"
        remedy = "its coordinator starts it anew" if assigned else f"start it again: {start}"
        return f"nothing is heard of {names}; {remedy}"
    late = " and ".join(f"rank {rank}" for rank in view.waiting)
    return f"a process of an epoch before {view.epoch} is still to end: of {late}"


def group_rows(groups: Sequence[dict[str, Any]], node: str) -> Iterator[tuple[object, ...]]:
    """Of each rank: node, group, rank, host, pid, device, state, epoch."""
    for group in groups:
        for one in group["ranks"]:
            place = (one["host"] or "", one["pid"] or "", one["device"] or "", one["state"], group["epoch"])
            yield (node, group["group"], one["rank"], *place)


def why_lines(groups: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each group that does not form."""
    for group in groups:
        if group["why"]:
            ended = f" (the epoch before ended: {group['ended']})" if group["ended"] else ""
            yield f"group {group['group']} does not form: {group['why']}{ended}"
