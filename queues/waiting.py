"""What is ready at every node of a namespace, told apart by priority, without a counter on the way of any job.

A job's place in the ready set is its rank: when it was submitted or due, less `boost` for each point of priority
(rule of `priority.py`). So the ready set itself, asked by ranges of rank, tells what would be taken before a job of
some priority that were submitted now. That is what such a job would wait for, whoever is in front of it: a low job that
is older than the boost of a high one stands before it, and is counted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrelay.queues.keys import LaneKeys
from torchrelay.queues.priority import Priority
from torchrelay.queues.registry import Registry

__all__ = ["CLASSES", "ReadyClass", "Standings", "standings"]

CLASSES: Mapping[str, Priority] = {"high": Priority.HIGH, "medium": Priority.MEDIUM, "low": Priority.LOW}
"""The classes in which what is ready is counted, in the order in which they are served."""


@dataclass(frozen=True, slots=True)
class ReadyClass:
    """Jobs that are taken before a new one of this priority, and not before a new one of the next higher.

    `oldest_ms` is how long ago a job of this priority was submitted that stands where the first of these does: the age
    of the oldest, as long as none waits longer than what separates two classes (30 s unless it was set otherwise).
    """

    jobs: int = 0
    oldest_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Standings:
    """A namespace at `at_s` (the server's clock): its load counters, summed over the lanes (`Registry.loads`), and what
    is ready at each node that has any, by class."""

    at_s: float
    counters: dict[str, int]
    ready: dict[str, dict[str, ReadyClass]] = field(default_factory=dict)


def standings(registry: Registry, boost_ms_per_point: float) -> Standings:
    """Reads all that a coordinator wants to know of queues, in two round trips (a Cluster: two for each of its nodes).

    Args:
        boost_ms_per_point: what producers place a job ahead, as in the settings that they share.
    """
    first = registry.client.pipeline(transaction=False)
    first.time()
    for lane in registry.lanes:
        first.hgetall(lane.keys.load)
    (seconds, micros), *loads = first.execute()
    now_ms = seconds * 1000.0 + micros / 1000.0
    counters: dict[str, int] = {}
    busy: list[tuple[LaneKeys, str]] = []
    for lane, fields in zip(registry.lanes, loads, strict=True):
        for key, value in fields.items():
            name, number = key.decode(), int(value)
            counters[name] = counters.get(name, 0) + number
            if number > 0 and name.endswith(".ready_rows"):
                busy.append((lane.keys, name.removesuffix(".ready_rows")))
    return Standings(now_ms / 1000.0, counters, _by_class(registry, busy, now_ms, boost_ms_per_point))


def _by_class(
    registry: Registry, busy: list[tuple[LaneKeys, str]], now_ms: float, boost_ms_per_point: float
) -> dict[str, dict[str, ReadyClass]]:
    ends = {name: now_ms - priority * boost_ms_per_point for name, priority in CLASSES.items()}
    second = registry.client.pipeline(transaction=False)
    for keys, node in busy:
        ready = keys.ready(node)
        second.zcard(ready)
        after = "-inf"
        for name, end in ends.items():
            second.zrangebyscore(ready, after, end, start=0, num=1, withscores=True)
            second.zcount(ready, "-inf", end)
            after = f"({end}" if name != "low" else "+inf"
    answers: list[Any] = second.execute() if busy else []
    found: dict[str, dict[str, ReadyClass]] = {}
    each = 1 + 2 * len(ends)
    for number, (_, node) in enumerate(busy):
        total, *rest = answers[number * each : (number + 1) * each]
        here = found.setdefault(node, dict.fromkeys(CLASSES, ReadyClass()))
        before = 0
        for (name, end), first, upto in zip(ends.items(), rest[::2], rest[1::2], strict=True):
            # What another clock placed a little ahead, or a tenant's turn behind, is of the last class.
            jobs = (total if name == "low" else upto) - before
            before = upto
            oldest_ms = end - float(first[0][1]) if first else 0.0
            old = here[name]
            here[name] = ReadyClass(old.jobs + max(jobs, 0), max(old.oldest_ms, oldest_ms, 0.0))
    return found
