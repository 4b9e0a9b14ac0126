"""A lane as plain lists and dicts: what the transitions must amount to, without a server.

Times are not modelled: the machine that drives it moves deadlines, delays and leases into the past on the server.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Spot:
    """A job at one open node: where it is (ready, delayed, or the fence that holds it), and the counters."""

    at: str = "ready"
    attempts: int = 0
    strikes: int = 0
    suspect: bool = False


@dataclass
class Job:
    """A live job. `blobs` are (name, consumers) of what stages made, `restart` the mask to restart from, `near` a later
    one that does where nothing made before it is gone, `fused` the nodes that were committed together with the next
    one."""

    id: str
    pipeline: int
    rank: float
    key: str | None = None
    mask: int = 0
    gen: int = 0
    overdue: bool = False
    history: int = 0
    restart: int | None = None
    near: int | None = None
    blobs: list[tuple[str, int]] = field(default_factory=list)
    spots: dict[int, Spot] = field(default_factory=dict)
    fused: dict[int, int] = field(default_factory=dict)


@dataclass
class Held:
    """A grant as the server must know it: (id, generation) of the entries that were not given back."""

    worker: str
    pipeline: int
    node: int
    entries: list[tuple[str, int]]


class Model:
    """Jobs, grants, dead letters and ended jobs of one lane."""

    def __init__(self, graphs: dict[int, Any]) -> None:
        self.graphs = graphs
        self.live: dict[str, Job] = {}
        self.ended: dict[str, str] = {}
        self.kept: dict[str, list[str]] = {}
        self.dead: dict[str, tuple[Job, str]] = {}
        self.grants: dict[str, Held] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.key_of: dict[str, str] = {}
        self.retired: set[str] = set()
        self.commits: list[tuple[str, int, int]] = []
        self.replies: list[str] = []
        self.hosts: dict[str, str] = {}
        self.answering: set[str] = set()

    def open_nodes(self, job: Job) -> list[int]:
        nodes = self.graphs[job.pipeline].nodes
        return [n.index for n in nodes if not job.mask & n.bit and all(job.mask & 1 << (p - 1) for p in n.preds if p)]

    def open_up(self, job: Job, at: str = "ready") -> None:
        for node in self.open_nodes(job):
            job.spots.setdefault(node, Spot(at))

    def ready(self, pipeline: int, node: int) -> list[str]:
        there = [
            j for j in self.live.values() if j.pipeline == pipeline and node in j.spots and j.spots[node].at == "ready"
        ]
        return [j.id for j in sorted(there, key=lambda j: (j.rank, j.id))]

    def add(self, job: Job, content: str, at: str) -> None:
        self.live[job.id] = job
        if job.key is not None:
            self.keys[job.key] = (content, job.id)
            self.key_of[job.id] = job.key
        self.open_up(job, at)

    def end(self, job: Job, status: str, *, kept: list[str] | None = None) -> None:
        del self.live[job.id]
        self.ended[job.id] = status
        self.kept[job.id] = kept or []
        self.replies.append(job.id)

    def elsewhere(self, job: Job, node: int, host: str) -> bool:
        """Whether a job at this node needs what lies in the shared memory of another host that answers."""
        hosts = {
            self.hosts[name] for name, consumers in job.blobs if name in self.hosts and consumers >> (node - 1) & 1
        }
        return bool((hosts - {host}) & self.answering)

    def claim(
        self, worker: str, fence: str, pipeline: int, node: int, most: int, host: str = ""
    ) -> list[tuple[str, int]]:
        taken: list[tuple[str, int]] = []
        for job_id in self.ready(pipeline, node):
            job = self.live[job_id]
            if job.overdue:
                self.end(job, "expired")
                continue
            if len(taken) >= most or (taken and job.spots[node].suspect):
                break
            if self.elsewhere(job, node, host):
                continue
            job.spots[node].at = fence
            taken.append((job_id, job.gen))
            if job.spots[node].suspect or len(taken) >= most:
                break
        if taken:
            self.grants[fence] = Held(worker, pipeline, node, list(taken))
        return taken

    def give_back(self, fence: str, entry: tuple[str, int]) -> Job | None:
        """Takes an entry out of its grant; its job when the grant held it and the record still agrees."""
        grant = self.grants.get(fence)
        if grant is None or entry not in grant.entries:
            return None
        grant.entries.remove(entry)
        if not grant.entries:
            del self.grants[fence]
        job = self.live.get(entry[0])
        return job if job is not None and job.gen == entry[1] and job.spots[grant.node].at == fence else None

    def chain(self, pipeline: int, node: int, most: int) -> list[int]:
        """The node and at most so many behind it that one worker could run with it."""
        nodes, chain = self.graphs[pipeline].nodes, [node]
        while len(chain) <= most and len(succs := nodes[chain[-1] - 1].succs) == 1:
            if len(nodes[succs[0] - 1].preds) > 1:
                break
            chain.append(succs[0])
        return chain

    def commit(self, fence: str, nodes: list[int], entry: tuple[str, int], blob: tuple[str, int] | None) -> str:
        job = self.give_back(fence, entry)
        if job is None:
            return "s"
        if job.overdue:
            self.end(job, "expired")
            return "d"
        self.commits += [(*entry, node) for node in nodes]
        graph = self.graphs[job.pipeline]
        before = job.mask
        volatile = {n.index for n in graph.nodes if n.kept_for}
        if job.restart is not None and blob and nodes[-1] in volatile:
            job.near = before
        elif volatile.intersection(graph.nodes[nodes[0] - 1].preds):
            job.near = None
        job.mask |= sum(1 << (node - 1) for node in nodes)
        job.fused.update(pairwise(nodes))
        del job.spots[nodes[0]]
        blobs = job.blobs + ([blob] if blob else [])
        if job.mask == (1 << len(graph.nodes)) - 1:
            self.end(job, "done", kept=[name for name, consumers in blobs if consumers == 0])
            return "k"
        job.blobs = [(name, c) for name, c in blobs if c == 0 or job.mask & c != c]
        if graph.linear:
            job.restart = (before if job.restart is None else job.restart) if job.blobs else None
            job.near = job.near if job.blobs else None
        self.open_up(job)
        return "k"

    def bury(self, job: Job) -> None:
        self.end(job, "failed")
        self.dead[job.id] = (deepcopy(job), "")

    def fail(self, fence: str, node: int, entry: tuple[str, int], most: int, delayed: bool) -> str:
        job = self.give_back(fence, entry)
        if job is None:
            return "s"
        spot = job.spots[node]
        spot.attempts += 1
        spot.suspect = False
        if spot.attempts >= most:
            self.bury(job)
            return "f"
        spot.at = "delayed" if delayed else "ready"
        return "r"

    def release(self, fence: str, node: int, entry: tuple[str, int]) -> str:
        job = self.give_back(fence, entry)
        if job is None:
            return "s"
        job.spots[node].at = "ready"
        return "r"

    def lose(self, fence: str, entry: tuple[str, int], makers: int) -> str:
        job = self.give_back(fence, entry)
        if job is None:
            return "s"
        linear = self.graphs[job.pipeline].linear
        if job.restart is None if linear else not job.mask:
            self.bury(job)
            return "f"
        job.gen += 1
        makers &= job.mask
        if linear and makers and job.near is not None and not makers & job.near:
            job.mask, job.near, job.spots = job.near, None, {}
            job.blobs = [(name, c) for name, c in job.blobs if job.mask >> (int(name.split(".")[1]) - 1) & 1]
        elif linear:
            job.mask, job.restart, job.near, job.blobs, job.spots = job.restart or 0, None, None, [], {}
        else:
            self.rerun(job, makers or job.mask)
        self.open_up(job)
        return "g"

    def rerun(self, job: Job, makers: int) -> None:
        """Clears these nodes of a fork and all behind them; what is held elsewhere is ready again."""
        cleared = makers
        for _ in job.fused:
            cleared |= sum(1 << (i - 1) for i, behind in job.fused.items() if cleared >> (behind - 1) & 1)
        for node in self.graphs[job.pipeline].nodes:  # each stands behind its predecessors
            cleared |= node.bit * any(p and cleared >> (p - 1) & 1 for p in node.preds)
        job.mask &= ~cleared
        job.fused = {i: behind for i, behind in job.fused.items() if not cleared >> (i - 1) & 1}
        job.blobs = [(name, c) for name, c in job.blobs if not cleared >> (int(name.split(".")[1]) - 1) & 1]
        job.spots = {n: spot for n, spot in job.spots.items() if not cleared >> (n - 1) & 1}
        for spot in job.spots.values():
            spot.at = "delayed" if spot.at == "delayed" else "ready"

    def return_grant(
        self, fence: str, started: set[tuple[str, int]] | None = None, solo: bool = False
    ) -> tuple[int, int]:
        """A grant is reaped (started None), or its worker died computing `started`. Returns (made ready, buried)."""
        back = buried = 0
        grant = self.grants[fence]
        for entry in list(grant.entries):
            job = self.give_back(fence, entry)
            if job is None:
                continue
            spot = job.spots[grant.node]
            if started and entry in started:
                spot.suspect = True
                spot.strikes += solo
            if started and entry in started and solo and spot.strikes >= 3:
                self.bury(job)
                buried += 1
            else:
                spot.at = "ready"
                back += 1
        return back, buried

    def retire(self, worker: str, started: set[tuple[str, int]]) -> list[int]:
        self.retired.add(worker)
        fences = [f for f, g in self.grants.items() if g.worker == worker]
        returned = [self.return_grant(f, started, len(started) == 1) for f in fences]
        return [sum(r[0] for r in returned), sum(r[1] for r in returned)]

    def redrive(self, job_id: str) -> str:
        if job_id not in self.dead:
            return ""
        old, again = self.dead[job_id]
        if again:
            return again
        stem, _, number = job_id.partition("~")
        new = deepcopy(old)
        new.id, new.key, new.gen, new.overdue, new.spots = f"{stem}~{int(number or 0) + 1}", None, 0, False, {}
        new.near = None
        self.dead[job_id] = (old, new.id)
        self.live[new.id] = new
        self.open_up(new)
        return new.id

    def drop(self, job_id: str) -> str:
        return job_id if self.dead.pop(job_id, None) else ""

    def forget(self, job_id: str) -> None:
        """A swept result: its key is free, its blobs are gone."""
        del self.ended[job_id]
        del self.kept[job_id]
        key = self.key_of.get(job_id)
        if key is not None and self.keys.get(key, ("", ""))[1] == job_id:
            del self.keys[key]

    def wanted(self, name: str) -> bool:
        """Whether a block of shared memory of this name is: the job that it is named after lists it, and Redis has no
        copy. A job that just died waits for one."""
        job_id = name.split(".")[0]
        dead, again = self.dead.get(job_id, (None, ""))
        live = self.live.get(job_id)
        job = live or (None if again else dead)
        listed = job is not None and name in {n for n, _ in job.blobs}
        return listed and (name in self.hosts if live else self.hosts.get(name, "") != "")

    def blobs(self) -> set[str]:
        """Names of every blob that must be there for good."""
        of_live = [name for j in self.live.values() for name, _ in j.blobs]
        of_dead = [name for job, again in self.dead.values() if not again for name, _ in job.blobs]
        found = {*of_live, *of_dead, *(name for names in self.kept.values() for name in names)}
        return found - self.hosts.keys()
