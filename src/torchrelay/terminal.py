"""What the command line prints: tables for people, JSON for scripts. Text from jobs never steers the terminal."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchrelay.config.graph import is_runs
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import base_ref, run_ref
from torchrelay.config.shards import PartConfig, combining
from torchrelay.config.spec import ShardsSpec, StageConfig
from torchrelay.group_view import group_rows, groups_of, why_lines
from torchrelay.queues import operate
from torchrelay.queues.registry import Registry, WorkerReport

# Piped output has no width of its own: a line is cut nowhere.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False)


def plain(value: Any) -> Any:
    """A result as JSON can hold it: arrays as lists, bytes as base64, complex as [re, im], NaN and Inf as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, complex):
        return [plain(value.real), plain(value.imag)]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def print_json(value: Any) -> None:
    """One line of JSON on standard output; what a terminal might obey is escaped, as JSON allows for any character."""
    text = json.dumps(plain(value), ensure_ascii=False)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def shown(text: object) -> str:
    """Text from elsewhere, with control characters shown instead of obeyed."""
    line = str(text)
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line


def clean(text: object) -> str:
    """The same, for where rich reads markup: what looks like it is escaped."""
    return escape(shown(text))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A plain table; columns whose name starts with `#` are numbers, set to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        number = column.startswith("#")
        made.add_column(
            column.removeprefix("#"), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in rows:
        made.add_row(*[clean(cell) for cell in row])
    return made


def graph_view(pipeline: Pipeline) -> RenderableType:
    """The pipeline's stages, what each reads and returns, and what it would take to run it."""
    rows = []
    names = {n.index: n.name for n in pipeline.graph.nodes} | {0: "input"}
    for node, spec in zip(pipeline.graph.nodes, pipeline.spec.stages, strict=True):
        reads = "all columns" if node.inputs is None else ", ".join(node.inputs)
        returned = ", ".join(f"{c}: {t}" for c, t in node.outputs.items()) or "what it returns"
        gives = "lists" if node.identity else returned
        after = ", ".join(names[p] for p in node.preds)
        replicas = (
            f"{spec.replicas.min}-{spec.replicas.max}" if spec.replicas.max > spec.replicas.min else spec.replicas.min
        )
        change = f"collapse {spec.collapses}" if spec.collapses else node.rows
        entering = f"{change} when {node.when}" if node.when else change
        rows.append((spec.name, after, reads, gives, entering, spec.device, replicas, spec.batch.max_rows))
    inputs = ", ".join(f"{c}: {t}" for c, t in pipeline.input.items()) or "any columns"
    head = Text.assemble((pipeline.ref, "bold"), f"   input: {inputs}")
    shown = table(["stage", "after", "reads", "returns", "rows", "device", "#workers", "#batch rows"], rows)
    fused = [Text(f"one worker runs {' and '.join(names)}") for names in pipeline.spec.fuse]
    cut = [Text(f"{s.name} is cut into {_cut_words(s, s.shards)}") for s in pipeline.written.stages if s.shards]
    return Group(head, shown, *fused, *cut)


def _cut_words(stage: StageConfig, shards: ShardsSpec) -> str:
    """What `shards` makes of a stage."""
    last = shards.count - 1
    if shards.mode == "tensor":
        return f"{shards.count} shards, of which each worker is a group of processes"
    if shards.mode == "pipeline":
        return f"{shards.count} parts one behind the other, {stage.name}.0 to {stage.name}.{last}"
    ways = [
        f"{column} summed" if dim is None else f"{column} concatenated along dimension {dim}"
        for column, dim in combining(stage).items()
    ]
    return f"{shards.count} shards, {stage.name}.0 to {stage.name}.{last}; {stage.name}.combine has {', '.join(ways)}"


def status_of(registry: Registry, most_delayed: int = 100_000) -> dict[str, Any]:
    """Nodes, and versions that are stranded or drain, as `status --json` prints them."""
    standing = operate.census(registry, most_delayed)
    ranks = registry.ranks()
    workers = [report for report in ranks if not report.rank]
    live = operate.live_versions(registry, standing, workers)
    stranded = [
        {
            "pipeline": v.ref,
            "current": v.current,
            "stages": list(v.missing),
            "registered_from": v.source or None,
            "commands": v.commands,
            **v.jobs.counts(),
        }
        for v in live
        if v.missing
    ]
    draining = [{"pipeline": v.ref, **v.jobs.counts()} for v in live if v.draining]
    groups = groups_of(registry, ranks)
    rows = [{**row, "groups": groups.get(row["node"], [])} for row in _node_rows(registry, standing, workers, groups)]
    return {"nodes": rows, "stranded": stranded, "draining": draining}


def _node_rows(
    registry: Registry,
    standing: Mapping[str, operate.Standing],
    workers: Sequence[WorkerReport],
    groups: Collection[str],
) -> list[dict[str, Any]]:
    """Per node that has work, workers or is current: what waits, what runs, who serves it. What runs put through a
    stage counts there; their reading and writing have rows of their own while they have work or workers. `groups` are
    nodes of which some rank lives, if not the one that counts as the worker."""
    loads = registry.loads()
    paused = operate.paused_nodes(registry)
    serving: dict[str, list[WorkerReport]] = {}
    for report in workers:
        for served in report.nodes:
            serving.setdefault(served, []).append(report)
    current = set(registry.current().values())
    versions = registry.versions()
    known = set(registry.with_runs(versions))
    rows = []
    for ref in versions:
        pipeline = registry.find(ref).pipeline
        twin = registry.find(run_ref(ref)).pipeline if run_ref(ref) in known else None
        for node in (twin or pipeline).graph.nodes:
            keys = [f"{p.ref}/{node.name}" for p in (pipeline, twin) if p is not None and _has(p, node.name)]
            row = _node_row(keys, loads, standing, paused, {w.worker: w for k in keys for w in serving.get(k, [])})
            shows = row["workers"] or row["node"] in groups or (ref in current and not is_runs(node.name))
            if row.pop("busy") or shows:
                rows.append(row | _part_of(pipeline, node.name))
    return rows


def _part_of(pipeline: Pipeline, name: str) -> dict[str, Any]:
    """Of a part of a stage that is cut, which stage, and how it is cut."""
    part = next((s for s in pipeline.spec.stages if s.name == name), None)
    if not isinstance(part, PartConfig):
        return {"part_of": None}
    return {"part_of": f"{pipeline.ref}/{part.of}", "mode": part.cut, "shards": part.count}


def _has(pipeline: Pipeline, stage: str) -> bool:
    return any(n.name == stage for n in pipeline.graph.nodes)


def _node_row(
    keys: Sequence[str],
    loads: Mapping[str, int],
    standing: Mapping[str, operate.Standing],
    paused: Collection[str],
    workers: Mapping[str, WorkerReport],
) -> dict[str, Any]:
    """One stage, in its pipeline and in the graph of the pipeline's runs."""

    def total(counter: str) -> int:
        return sum(loads.get(f"{key}.{counter}", 0) for key in keys)

    here = operate.Standing()
    for key in keys:
        one = standing.get(key, operate.Standing())
        here.add(one.waiting, one.running, one.delayed)
    mine = list(workers.values())
    batches = sum(w.batches for w in mine)
    fill = sum(w.rows for w in mine) / sum(w.batches * w.max_rows for w in mine) if batches else None
    ready, held = total("ready_rows"), total("held_rows")
    ref, _, name = keys[0].partition("/")
    return {
        "node": f"{base_ref(ref)}/{name}",
        "paused": any(key in paused for key in keys),
        "waiting_rows": ready,
        "waiting_bytes": total("ready_bytes"),
        "running_rows": held,
        "delayed_jobs": here.delayed,
        "committed": total("committed"),
        "failed_attempts": total("failed"),
        "workers": len(mine),
        "states": sorted({w.state for w in mine}),
        "batch_fill": fill,
        "moved_bytes": _moved(mine),
        "device_idle_s": round(sum(w.device_idle_s for w in mine), 3),
        "busy": bool(ready or held or here),
    }


def _moved(workers: Sequence[WorkerReport]) -> dict[str, int]:
    """Bytes of large columns that these workers sent, by the way they went (`placement.Where`)."""
    total: dict[str, int] = {}
    for report in workers:
        for way, nbytes in report.moved.items():
            total[way] = total.get(way, 0) + nbytes
    return total


def jobs_text(counts: Mapping[str, int]) -> str:
    """`3 waiting, 1 running` of `Standing.counts()`."""
    return ", ".join(f"{n} {key.removesuffix('_jobs')}" for key, n in counts.items() if key.endswith("_jobs") and n)


def status_view(registry: Registry, most_delayed: int = 1_000) -> Group:
    """The live table of `status` and `up`, with versions that drain or are stranded below it."""
    status = status_of(registry, most_delayed)
    rows: list[tuple[object, ...]] = []
    whole = None
    for r in status["nodes"]:
        if r["part_of"] is not None and r["part_of"] != whole:
            rows.append((r["part_of"], *[""] * 5, f"{r['shards']} shards, {r['mode']}", ""))
        whole = r["part_of"]
        fill = "" if r["batch_fill"] is None else f"{100 * r['batch_fill']:.0f} %"
        states = [*(["paused"] if r["paused"] else []), *(r["states"] or ["no worker"])]
        numbers = (r["waiting_rows"], r["running_rows"], r["committed"], r["failed_attempts"], r["workers"])
        name = r["node"] if whole is None else f"  {r['node'].rpartition('/')[2]}"
        rows.append((name, *numbers, ", ".join(states), fill))
    columns = ["node", "#waiting", "#running", "#committed", "#failed tries", "#workers", "state", "#batch fill"]
    below = [Text(f"draining: {v['pipeline']}: {jobs_text(v)}") for v in status["draining"]]
    for v in status["stranded"]:
        what = f"stranded: {v['pipeline']}: {jobs_text(v)}; no worker for {', '.join(v['stages'])}"
        below.append(Text.assemble((shown(what), "yellow")))
        place = f" on {v['registered_from'].partition(':')[0]}" if v["registered_from"] else ""
        below.append(Text(shown(f"  to run it, with the files of version {v['pipeline'].partition('@')[2]}{place}:")))
        below += [Text(shown(f"  {command}")) for command in v["commands"]]
    parts: list[RenderableType] = [table(columns, rows)]
    grouped = [row for r in status["nodes"] for row in group_rows(r["groups"], r["node"])]
    if grouped:
        names = ["node", "group", "#rank", "host", "#pid", "device", "state", "#epoch"]
        parts += [Text(""), table(names, grouped)]
    parts += [Text(shown(line), "yellow") for r in status["nodes"] for line in why_lines(r["groups"])]
    return Group(*parts, *below)


def print_status(registry: Registry) -> None:
    """Prints the same once; a command to copy is cut nowhere."""
    for part in status_view(registry, 100_000).renderables:
        out.print(part, soft_wrap=isinstance(part, Text))


class _ConsoleStream(io.TextIOBase):
    """A stream whose lines appear above a live table on the same console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        if line := text.rstrip("\n"):
            self._console.print(Text.from_ansi(line), soft_wrap=True)
        return len(text)

    def isatty(self) -> bool:
        return self._console.is_terminal


def above_the_table(console: Console = out) -> TextIO:
    """Where logs go while a live table is shown on this console, so that neither spoils the other."""
    return _ConsoleStream(console)  # type: ignore[return-value]  # it is one for all that logging asks


def when(seconds: float) -> str:
    """A moment, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
