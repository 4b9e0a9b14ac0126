"""The coordinator's loop: lead, look, decide, write, ask agents to reconcile; and keep the lanes meanwhile.

Any number run; one leads. What it decides is pure and elsewhere (`versions.py`, `scale.py`, `allocate.py`); what is
written goes through the leader's epoch. Nothing depends on the loop for jobs to be done: it says who runs where.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis

from torchrelay.config.fleet import Assignment, Desired, HostReport, SlotTrouble, set_aside_s
from torchrelay.config.pipeline import Pipeline
from torchrelay.coordinator.allocate import Allocation, Unit, allocate, units_of
from torchrelay.coordinator.bounds import Bounds, agree
from torchrelay.coordinator.leader import LOOK_S, Leader
from torchrelay.coordinator.loads import Loads, LoadTracker, Node
from torchrelay.coordinator.observe import Observer, Snapshot
from torchrelay.coordinator.scale import Limits, Plan, State, decide, limits_of
from torchrelay.coordinator.totals import room_for
from torchrelay.coordinator.versions import Drains, Served, served_versions
from torchrelay.errors import BrokerError
from torchrelay.queues.fleet import Aside, FleetRecords, FleetView, Wishes, enqueue_reconcile
from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import Registry
from torchrelay.queues.upkeep import Upkeep

__all__ = ["Coordinator"]

log = logging.getLogger("torchrelay.coordinator")
DECIDE_S = 1.0


class Coordinator:
    """One candidate. `run()` blocks until the event is set; `poke()` makes it look now, from any thread."""

    def __init__(self, registry: Registry, name: str = "", boost_ms_per_point: float = 600.0) -> None:
        self._registry = registry
        self._records = FleetRecords(registry.client, registry.control)
        self.leader = Leader(self._records, name or f"{socket.gethostname()}-{os.getpid()}-{new_token(4)}")
        self._observer = Observer(registry, self._records, boost_ms_per_point)
        self._upkeep = Upkeep(registry, LOOK_S, leading=True)
        self._wake = threading.Event()
        self._decide_at = 0.0
        self._drains: Drains | None = None
        self.on_written: Callable[[], object] = int  # for an agent in the same process
        self._scaling: State | None = None
        self._bounds = Bounds()
        self._tracker = LoadTracker()

    @property
    def name(self) -> str:
        return self.leader.name

    def poke(self) -> None:
        """Something changed that it should look at before its time."""
        self._decide_at = 0.0
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Until then: leads when it can, and gives the lead up at the end."""
        while not stop.is_set():
            try:
                self.step()
            except (BrokerError, redis.RedisError, OSError) as away:
                log.warning("the server is away, the coordinator waits for it: %s", away)
            except Exception:
                log.exception("nothing was decided this time")
            self._wake.wait(LOOK_S)
            self._wake.clear()
        try:
            self.leader.give_up()
        except (BrokerError, redis.RedisError, OSError):
            pass  # it runs out by itself

    def step(self) -> bool:
        """One turn of the loop; whether it leads."""
        if not self.leader.renew():
            self._drains = self._scaling = None
            self._bounds = Bounds()
            return False
        self._upkeep.tick()
        if time.monotonic() >= self._decide_at:
            self._decide_at = time.monotonic() + DECIDE_S
            self._decide(self._observer.read())
        return True

    def _decide(self, seen: Snapshot) -> None:
        served = self._served(seen)
        aside = set_aside(seen.view)
        hosts = [placeable(host, seen.view, aside) for host in seen.view.hosts]
        at_s, loads = seen.standings.at_s, self._loads(seen)
        limits = limits_of_all(seen, served)
        number = self._number(seen.view)
        current = standing(seen.view, hosts, aside)

        def propose(most: Mapping[Node, int]) -> tuple[Plan, State]:
            return decide(loads, limits, room_for(limits, seen.pipelines, hosts, most), self._scaling, at_s)

        def place(proposed: tuple[Plan, State]) -> Allocation:
            units = units_for(seen.pipelines, proposed[0])
            stamp = f"{self.leader.epoch}.{number}"
            return allocate(hosts, units, current, stamp=stamp, now=seen.view.now)

        bounds = self._bounds.at(hosts, at_s)
        (plan, self._scaling), allocation, self._bounds = agree(propose, place, bounds, at_s)
        reasons = {
            "versions": {ref: why for ref, (why, _) in served.items()},
            "stages": {f"{ref}/{stage}": why for (ref, stage), why in told(plan, self._bounds, limits).items()},
            "refused": [_refusal(one) for one in allocation.refused],
        }
        self._write(seen.view, number, allocation, aside, reasons)

    def _number(self, view: FleetView) -> int:
        """Of what is written next: larger than all that any host has, or has made true."""
        return 1 + max([0, *(state.number for state in view.desired.values()), *(host.applied for host in view.hosts)])

    def _served(self, seen: Snapshot) -> dict[str, Served]:
        now = time.monotonic()
        if self._drains is None:
            # What an earlier leader gave workers may have jobs that nobody counted yet.
            running = {one.ref for state in seen.view.desired.values() for one in state.workers}
            self._drains = Drains(dict.fromkeys(running, now))
        served, self._drains = served_versions(
            list(seen.pipelines), seen.current, seen.view.wishes.serve, seen.jobs, self._drains, now
        )
        return served

    def _loads(self, seen: Snapshot) -> Loads:
        if self._scaling is None:
            # What an earlier leader wanted is where it goes on from.
            before = Counter((one.ref, one.stage) for state in seen.view.desired.values() for one in state.workers)
            self._scaling = State.of(before, seen.standings.at_s)
        standings = seen.standings
        return self._tracker.update(standings.at_s, seen.workers, standings.counters, standings.ready)

    def _write(
        self,
        view: FleetView,
        number: int,
        allocation: Allocation,
        aside: Sequence[Aside],
        reasons: Mapping[str, Any],
    ) -> None:
        by_host: dict[str, list[Assignment]] = {host.name: [] for host in view.hosts}
        for one in allocation.assignments:
            by_host[one.host].append(one)
        changed: dict[str, Desired | None] = {host: None for host in view.desired if host not in by_host}
        for host, workers in by_host.items():
            before = view.desired.get(host)
            if before is None or _essence(before.workers) != _essence(workers):
                changed[host] = Desired(host, self.leader.epoch, number, tuple(workers))
        known = {one.key: one for one in view.aside}
        now_aside = {one.key: one for one in aside}
        slots: dict[str, Aside | None] = {key: None for key in known if key not in now_aside}
        slots.update((key, one) for key, one in now_aside.items() if known.get(key) != one)
        news = None if reasons == view.reasons else reasons
        if not (changed or slots or news is not None):
            return
        if not self.leader.decree(changed, slots, news):
            return
        if changed:
            self.on_written()
        for host, state in changed.items():
            if state is not None:
                log.info("%s is to run %s", host, ", ".join(sorted(_text(one) for one in state.workers)) or "nothing")
                enqueue_reconcile(self._registry.client, self._registry.control.namespace, state)
            else:
                log.warning("%s is gone; its workers are placed elsewhere", host)


def set_aside(view: FleetView) -> list[Aside]:
    """Slots where a stage failed lately, as agents tell and as it is written down, until their time is over."""
    found = {one.key: one for one in view.aside if one.until > view.now}
    for host in view.hosts:
        for trouble in host.trouble:
            until = trouble.since + set_aside_s(trouble.failures)
            one = Aside(host.name, trouble.slot, trouble.ref, trouble.stage, trouble.failures, until, trouble.reason)
            if until > view.now and until >= found.get(one.key, one).until:
                found[one.key] = one
    return sorted(found.values(), key=lambda one: one.key)


def placeable(host: HostReport, view: FleetView, aside: Sequence[Aside]) -> HostReport:
    """The host as workers may be placed on it: empty when somebody wants that, without what is set aside there."""
    trouble = tuple(
        SlotTrouble(one.slot, one.ref, one.stage, one.failures, view.now, one.reason)
        for one in aside
        if one.host == host.name
    )
    return replace(host, trouble=trouble, draining=host.draining or host.name in view.wishes.drain)


def stage_limits(pipeline: Pipeline, wishes: Wishes, *, current: bool) -> list[Limits]:
    """Between which numbers each stage may have workers. One that takes no new jobs, yet or any more, has at least one
    everywhere: its jobs are not to wait for a stage to be noticed."""
    names = dict.fromkeys([*pipeline.stage_names, *(stage.name for stage in pipeline.written.stages)])
    pinned = {name: n for name in names if (n := wishes.replicas(pipeline.ref, name)) is not None}
    found = limits_of(pipeline, pinned)
    return [one if current else replace(one, min=max(one.min, 1), max=max(one.max, 1)) for one in found]


def limits_of_all(seen: Snapshot, served: Mapping[str, Served]) -> list[Limits]:
    """Of every stage that may have workers."""
    return [
        limit
        for ref, (_, current) in served.items()
        if ref in seen.pipelines
        for limit in stage_limits(seen.pipelines[ref], seen.view.wishes, current=current)
    ]


def units_for(pipelines: Mapping[str, Pipeline], plan: Plan) -> list[Unit]:
    """The workers of a plan: of fused stages, of the first."""
    wanted: dict[str, dict[str, int]] = {}
    for (ref, stage), count in plan.replicas.items():
        wanted.setdefault(ref, {})[stage] = count
    return [unit for ref in sorted(wanted) for unit in units_of(pipelines[ref], wanted[ref])]


def told(plan: Plan, bounds: Bounds, limits: Sequence[Limits]) -> dict[Node, str]:
    """Why each stage has so many workers, between which numbers, and why it cannot have more."""
    found = dict(plan.reasons)
    for limit in limits:
        if limit.pinned is None and limit.key in found:
            found[limit.key] += f"; replicas: {limit.least}" + (f" to {limit.most}" if limit.most > limit.least else "")
    for key, one in bounds.found.items():
        if key in found and plan.replicas[key] >= one.workers:
            why = one.why.removeprefix(f"stage {key[1]} of {key[0]} ")
            have, more = ("has", " more") if one.workers == 1 else ("have", " more" if one.workers else "")
            found[key] += f"; {one.workers or 'none'} {have} a place: one{more} {why}"
    return found


def standing(view: FleetView, hosts: Sequence[HostReport], aside: Sequence[Aside]) -> list[Assignment]:
    """What runs where it may stay: on hosts that live and are not to be empty, on slots that are not set aside."""
    living = {host.name for host in hosts if not host.draining}
    bad = {(one.host, one.slot, one.ref, one.stage) for one in aside}
    return [
        one
        for name, state in sorted(view.desired.items())
        if name in living
        for one in state.workers
        if (one.host, one.slot, one.ref, one.stage) not in bad
    ]


def _essence(workers: Sequence[Assignment]) -> list[Assignment]:
    """Without the words."""
    return sorted((replace(one, why="") for one in workers), key=lambda one: one.id)


def _text(one: Assignment) -> str:
    return f"{one.ref}/{one.stage} on {one.slot}"


def _refusal(one: Any) -> dict[str, Any]:
    return {"ref": one.unit.ref, "stage": one.unit.stage, "why": one.why}
