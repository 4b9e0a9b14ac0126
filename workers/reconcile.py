"""What an agent does so that its host runs what it is to run. Decisions alone: no I/O, no process, no clock of its own.

The caller starts and drains what a `Turn` says, all of it, and tells what becomes of the workers. How often it asks
changes nothing but the time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torchrelay.config.fleet import CPU, Assignment, Desired, SlotTrouble, set_aside_s
from torchrelay.config.pipeline import Pipeline
from torchrelay.workers.slots import Offer

__all__ = ["Reconciler", "Servable", "Turn"]

log = logging.getLogger("torchrelay.agent")
_FORGOTTEN_S = 3600.0
_MOST_REASON = 500


@dataclass(frozen=True)
class Servable:
    """A version that this host can run: its pipeline as it was loaded from a file, and what `--set` said of it."""

    pipeline: Pipeline
    overrides: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """Workers to drain, by id, and to start. `news`: the leader, or who waits for it, is to hear of it now."""

    drain: tuple[str, ...] = ()
    start: tuple[Assignment, ...] = ()
    news: bool = False


@dataclass(slots=True)
class _Running:
    assignment: Assignment
    began: float
    ready_at: float | None = None
    leaving: bool = False


@dataclass(slots=True)
class _Failures:
    """How often a stage failed on a slot, when last (by Redis's clock, and by ours), and why."""

    count: int = 0
    since: float = 0.0
    at: float = -math.inf
    reason: str = ""

    def may_start(self, now: float) -> bool:
        return not self.count or now >= self.at + set_aside_s(self.count)


class Reconciler:
    """Of one host. It never has two workers of one id, and starts none on a slot before what drains there leaves room.

    Args:
        servable: what the host can run, by ref.
        redis_time: seconds of Redis's clock, by which failures are told.
    """

    def __init__(self, servable: Mapping[str, Servable], redis_time: Callable[[], float]) -> None:
        self._servable = servable
        self._redis_time = redis_time
        self._workers: dict[str, _Running] = {}
        self._failures: dict[tuple[str, str, str], _Failures] = {}
        self.applied = 0
        """The number of the state that was last made true."""

    def trouble(self) -> tuple[SlotTrouble, ...]:
        """What failed here lately."""
        return tuple(
            SlotTrouble(slot, ref, stage, failed.count, failed.since, failed.reason)
            for (slot, ref, stage), failed in sorted(self._failures.items())
        )

    def ready(self, worker_id: str, now: float) -> None:
        """A worker is ready, still or again. Once it was for as long as its stage was set aside, that is forgotten: of
        a device that fails whenever it computes, the worker is ready each time."""
        worker = self._workers[worker_id]
        worker.ready_at = now if worker.ready_at is None else worker.ready_at
        failed = self._failures.get(_key(worker.assignment))
        if failed is not None and now >= max(worker.ready_at, failed.at) + set_aside_s(failed.count):
            del self._failures[_key(worker.assignment)]

    def ended(self, worker_id: str, failure: str, now: float) -> bool:
        """A worker is gone, after a `failure` or with ''; whether that counts: one that was to leave may fail."""
        worker = self._workers.pop(worker_id)
        if failure and not worker.leaving:
            self._fail(worker.assignment, failure, now, worker.began)
            return True
        return False

    def turn(self, desired: Desired | None, offer: Offer, now: float) -> Turn:
        """What is to be done now.

        Args:
            desired: what the host is to run; None where nobody decided, and where it is to run nothing.
            offer: its slots.
            now: seconds that grow.
        """
        for key, failed in list(self._failures.items()):
            if now > failed.at + _FORGOTTEN_S:
                del self._failures[key]
        wanted = {} if desired is None else {one.id: one for one in desired.workers}
        drain = tuple(self._leave(wanted))
        start, all_there, news = [], True, False
        for one in wanted.values():
            if one.id in self._workers or not self._may_start(one, now):
                continue
            if why := self._unfit(one, offer):
                self._fail(one, why, now)
                news = True
            elif self._room(one, offer):
                self._workers[one.id] = _Running(one, now)
                start.append(one)
            else:
                all_there = False
        if desired is not None and all_there and not any(worker.leaving for worker in self._workers.values()):
            news = news or self.applied != desired.number
            self.applied = desired.number
        return Turn(drain, tuple(start), news)

    def _leave(self, wanted: Mapping[str, Assignment]) -> list[str]:
        left = []
        for worker_id, worker in self._workers.items():
            now = wanted.get(worker_id)
            if now is not None and worker.assignment.is_worker(now):
                worker.assignment = now
            elif not worker.leaving:
                worker.leaving = True
                left.append(worker_id)
        return left

    def _may_start(self, one: Assignment, now: float) -> bool:
        """Where it failed a moment ago it is not to, and the leader knows that."""
        failed = self._failures.get(_key(one))
        return failed is None or failed.may_start(now)

    def _fail(self, one: Assignment, reason: str, now: float, began: float = math.inf) -> None:
        failed = self._failures.setdefault(_key(one), _Failures())
        failed.count += began > failed.at  # of several that were started together, the first one counts
        failed.at = now
        failed.since = self._redis_time()
        failed.reason = reason[:_MOST_REASON]
        aside_s = set_aside_s(failed.count)
        log.error("%s of %s is not started on %s for %g s: %s", one.stage, one.ref, one.slot, aside_s, reason)

    def _unfit(self, one: Assignment, offer: Offer) -> str:
        servable = self._servable.get(one.ref)
        if servable is None:
            mine = ", ".join(sorted(self._servable)) or "nothing"
            return f"this agent has {mine} and not {one.ref}: its files differ; start it with the files of that version"
        if one.stage not in servable.pipeline.stage_names:
            return f"{one.ref} has no stage {one.stage!r:.80}"
        if one.slot != CPU and one.slot not in {gpu.slot for gpu in offer.gpus}:
            return f"this host has no slot {one.slot!r:.80}"
        return ""

    def _room(self, one: Assignment, offer: Offer) -> bool:
        """Whether what still drains leaves room; without any that drains, the leader knows what fits."""
        beside = [worker for worker in self._workers.values() if worker.assignment.slot == one.slot]
        if not any(worker.leaving for worker in beside):
            return True
        needs = [one.need, *(worker.assignment.need for worker in beside)]
        gpu = next((gpu for gpu in offer.gpus if gpu.slot == one.slot), None)
        if gpu is None:
            return sum(need.cpus for need in needs) <= offer.cpus + 1e-6
        return sum(need.compute for need in needs) <= 1 + 1e-6 and sum(need.memory for need in needs) <= gpu.memory


def _key(one: Assignment) -> tuple[str, str, str]:
    return one.slot, one.ref, one.stage
