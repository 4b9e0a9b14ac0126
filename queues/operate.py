"""What an operator does to a namespace in service: pause, resume, purge, and see what each version still has to do."""

from __future__ import annotations

import difflib
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrelay.config.graph import Node
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import base_ref
from torchrelay.config.shards import parts_of, written_names
from torchrelay.errors import ConfigError, InputError, PipelineNotFound
from torchrelay.queues.registry import Registered, Registry, WorkerReport, run
from torchrelay.queues.transitions import MAX_JOBS_PER_CALL

_TARGET = re.compile(r"(?P<name>[^@/]+)(?:@(?P<version>[^@/]+))?(?:/(?P<stage>@?[^@/]+))?")
_CENSUS_STEP = 500
_LOOK_S = 0.2


def _nearest(word: str, known: Iterable[str]) -> str:
    words = sorted(known)
    near = difflib.get_close_matches(word, words, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(words) or 'none yet'}"


def find_version(registry: Registry, name: str, version: str) -> str:
    """`name@version` of a registered version; PipelineNotFound with the nearest one."""
    versions = registry.versions()
    mine = [ref.partition("@")[2] for ref in versions if ref.partition("@")[0] == name]
    if not mine:
        hint = _nearest(name, {ref.partition("@")[0] for ref in versions})
        raise PipelineNotFound(
            f"pipeline {name!r:.80} is not registered in namespace {registry.control.namespace!r}; {hint}"
        )
    if version and version not in mine:
        raise PipelineNotFound(f"pipeline {name!r} has no version {version!r:.80}; {_nearest(version, mine)}")
    return f"{name}@{version}"


def _meant(pipeline: Pipeline, stage: str) -> list[Node]:
    """The nodes of a stage, or of all where it is ''."""
    names = parts_of(pipeline.spec, stage)
    return [n for n in pipeline.graph.nodes if not stage or n.name in names]


@dataclass(frozen=True, slots=True)
class Target:
    """PIPELINE[/STAGE]: a pipeline's name or name@version, and a stage of it, which stands for all its parts where it
    is cut (`shards`). '' stands for all of them."""

    name: str
    version: str
    stage: str
    versions: tuple[Registered, ...]

    @classmethod
    def find(cls, registry: Registry, text: str) -> Target:
        """Raises PipelineNotFound or ConfigError with the nearest name for what is not there."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r:.80}: write it as PIPELINE or PIPELINE/STAGE; PIPELINE is NAME or NAME@VERSION")
        name, version, stage = (part or "" for part in match.group("name", "version", "stage"))
        found = find_version(registry, name, version)
        refs = [found] if version else [r for r in registry.versions() if r.partition("@")[0] == name]
        versions = [registry.find(ref) for ref in registry.with_runs(refs)]
        stages = {n.name for v in versions for n in v.pipeline.graph.nodes}
        stages |= {s.name for v in versions for s in v.pipeline.written.stages}
        if stage and stage not in stages:
            raise ConfigError(
                f"pipeline {text.partition('/')[0]!r} has no stage {stage!r:.80}; {_nearest(stage, stages)}"
            )
        having = [v for v in versions if _meant(v.pipeline, stage)]
        return cls(name, version, stage, tuple(having))

    def masks(self) -> dict[int, int]:
        """Bits of the nodes that are meant, by the version's number."""
        return {v.number: sum(n.bit for n in _meant(v.pipeline, self.stage)) for v in self.versions}

    def nodes(self) -> list[str]:
        """`name@version/stage` of every node that is meant."""
        return [f"{v.pipeline.ref}/{n.name}" for v in self.versions for n in _meant(v.pipeline, self.stage)]


def pause(registry: Registry, target: Target, *, on: bool = True) -> list[str]:
    """Stops the claims of these nodes (`on=False`: resumes them, and wakes their workers); returns the nodes.

    What workers hold is finished; submits go on until the queue is full. Without a version, later ones are meant too.
    """
    matched: set[str] = set()
    for lane in registry.lanes:
        nodes: list[str] = run(registry.client, lane.pause(target.name, target.version, target.stage, on))
        # In the graph of runs too: it is one stage.
        matched.update(f"{base_ref(ref)}/{stage}" for ref, _, stage in (node.partition("/") for node in nodes))
    return sorted(matched)


def paused_nodes(registry: Registry) -> set[str]:
    """Nodes that are paused in any lane."""
    found: set[str] = set()
    for lane in registry.lanes:
        fields: Any = registry.client.hgetall(lane.keys.paused)
        found.update(k.decode() for k, v in fields.items() if b"@" in k.partition(b"/")[0] and v == b"1")
    return found


def purge(registry: Registry, target: Target, told: Callable[[int], None] = lambda n: None) -> int:
    """Cancels every job that waits, ready or delayed, at these nodes; returns how many, and tells it on the way.

    Jobs that workers hold are left alone, and jobs that come while it runs may be.
    """
    total = 0
    masks = target.masks()
    for lane in registry.lanes:
        part: list[str] = []
        for job_id in _waiting(registry, lane.keys.delayed, lane.keys.ready, target):
            part.append(job_id)
            if len(part) == MAX_JOBS_PER_CALL:
                total += run(registry.client, lane.purge(masks, part))
                told(total)
                part = []
        total += run(registry.client, lane.purge(masks, part))
    told(total)
    return total


def _waiting(registry: Registry, delayed: str, ready: Callable[[str], str], target: Target) -> Iterator[str]:
    """Ids that may wait at these nodes. Delayed ones first: what becomes ready meanwhile is then seen there."""
    suffixes = tuple(f"|{n.index}".encode() for v in target.versions for n in v.pipeline.graph.nodes)
    for member, _ in registry.client.zscan_iter(delayed, count=MAX_JOBS_PER_CALL):
        if member.endswith(suffixes):
            yield member.partition(b"|")[0].decode()
    for node in target.nodes():
        for member, _ in registry.client.zscan_iter(ready(node), count=MAX_JOBS_PER_CALL):
            yield member.decode()


@dataclass(slots=True)
class Standing:
    """Jobs at a node; one in several branches of a fork counts in each."""

    waiting: int = 0
    running: int = 0
    delayed: int = 0

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running or self.delayed)

    def add(self, waiting: int, running: int, delayed: int) -> None:
        self.waiting += waiting
        self.running += running
        self.delayed += delayed

    def counts(self) -> dict[str, int]:
        return {"waiting_jobs": self.waiting, "running_jobs": self.running, "delayed_jobs": self.delayed}


def census(registry: Registry, most_delayed: int = 100_000) -> dict[str, Standing]:
    """Jobs at every node that has any. Of each lane's delayed jobs, the `most_delayed` that are due first are seen."""
    found: dict[str, Standing] = {}
    for lane in registry.lanes:
        first, total = 0, 1
        while first == 0 or first < min(total, most_delayed):
            step = min(_CENSUS_STEP, most_delayed - first)
            total, rows = run(registry.client, lane.census(first, step))
            for node, *counts in rows:
                found.setdefault(node, Standing()).add(*counts)
            first += step
    return found


@dataclass(frozen=True, slots=True)
class LiveVersion:
    """A version with jobs that have not ended. `missing`: stages that these still need and that nobody serves."""

    ref: str
    current: bool
    jobs: Standing
    missing: tuple[str, ...] = ()
    source: str = ""

    @property
    def draining(self) -> bool:
        """New jobs take another version, and this one's workers finish what is left."""
        return not self.current and not self.missing

    @property
    def commands(self) -> list[str]:
        """What would run its missing stages."""
        return [worker_command(self.source, stage) for stage in self.missing]


def worker_command(source: str, stage: str) -> str:
    """The command that serves a stage of what was registered from `source` (`host:path`, '' where that is unknown)."""
    path = source.partition(":")[2]
    return f"torchrelay worker {shlex.quote(path) if path else 'FILE'} --stage {stage}"


def live_versions(
    registry: Registry, standing: dict[str, Standing], workers: Sequence[WorkerReport]
) -> list[LiveVersion]:
    """Every version with jobs that have not ended, with the stages that would let them wait for ever."""
    served = {node for w in workers if w.state != "failed" for node in w.nodes}
    current = set(registry.current().values())
    sources = registry.sources()
    totals: dict[str, Standing] = {}
    for node, jobs in standing.items():
        totals.setdefault(node.partition("/")[0], Standing()).add(jobs.waiting, jobs.running, jobs.delayed)
    found = []
    for ref, total in sorted(totals.items()):
        pipeline = registry.find(ref).pipeline
        graph = pipeline.graph
        here = [n for n in graph.nodes if f"{ref}/{n.name}" in standing]
        needed = {n.index for n in here} | {d.index for n in here for d in graph.descendants(n.index)}
        lacking = [n.name for n in graph.nodes if n.index in needed and f"{ref}/{n.name}" not in served]
        missing = tuple(written_names(pipeline.spec, lacking))
        found.append(LiveVersion(ref, base_ref(ref) in current, total, missing, sources.get(base_ref(ref), "")))
    return found


@dataclass(frozen=True, slots=True)
class OldWork:
    """What the other versions of a pipeline still have to do, by node; `rows` holds waiting and running rows."""

    jobs: dict[str, Standing] = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)


def old_work(registry: Registry, ref: str) -> OldWork:
    """What versions of this pipeline other than `ref` still have to do."""
    name, loads = ref.partition("@")[0], registry.loads()
    jobs = {
        node: standing
        for node, standing in census(registry).items()
        if node.partition("@")[0] == name and base_ref(node.partition("/")[0]) != ref
    }
    rows = {n: (loads.get(f"{n}.ready_rows", 0), loads.get(f"{n}.held_rows", 0)) for n in jobs}
    return OldWork(dict(sorted(jobs.items())), rows)


def previous_version(registry: Registry, name: str) -> str:
    """The version that new jobs took before the current one; PipelineNotFound when none is known."""
    find_version(registry, name, "")
    current = registry.current().get(name)
    for reign in registry.history(name):
        if reign.ref != current:
            return reign.ref
    raise PipelineNotFound(f"pipeline {name!r} has had no other current version than {current}; name the one to use")


def wait_loaded(
    registry: Registry, ref: str, stages: Sequence[str], timeout_s: float, coming_s: float = 0.0
) -> list[str]:
    """Stages of a version without a ready worker; waits while one of each of them still loads, or so long for one to
    be started."""
    deadline = time.monotonic() + timeout_s
    coming = time.monotonic() + coming_s
    while True:
        workers = registry.workers()
        ready = {node for w in workers if w.state == "ready" for node in w.nodes}
        loading = {node for w in workers if w.state == "loading" for node in w.nodes}
        missing = [s for s in stages if f"{ref}/{s}" not in ready]
        absent = time.monotonic() > coming and any(f"{ref}/{s}" not in loading for s in missing)
        if absent or not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_LOOK_S)
