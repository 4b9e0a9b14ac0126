"""What hosts offer and who runs where: plain values that agents and the coordinator exchange through Redis as JSON.

A *slot* is a device of a host that can hold workers: one GPU (`cuda:0`), or the host's processors (`cpu`).
Bytes are bytes, shares of a GPU are 0 to 1, processors are cores and may be fractions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, TypeVar

from torchrelay.errors import DecodeError

__all__ = ["CPU", "Assignment", "Desired", "Gpu", "HostReport", "Need", "SlotTrouble", "set_aside_s"]

CPU = "cpu"
T = TypeVar("T")
_FIRST_ASIDE_S, _LONGEST_ASIDE_S = 10.0, 600.0


def set_aside_s(failures: int) -> float:
    """How long after its last failure a stage is not started again on a slot."""
    return min(_FIRST_ASIDE_S * 2.0 ** min(max(failures, 1) - 1, 10), _LONGEST_ASIDE_S)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a host. `utilisation` is 0 to 1, None where the driver does not tell."""

    index: int
    uuid: str
    name: str
    memory: int
    free: int
    utilisation: float | None = None

    @property
    def slot(self) -> str:
        """How assignments name it."""
        return f"cuda:{self.index}"


@dataclass(frozen=True, slots=True)
class Need:
    """What one worker takes of its slot: `compute` and `memory` of a GPU, `cpus` and `host_memory` of its host."""

    compute: float = 0.0
    memory: int = 0
    cpus: float = 0.0
    host_memory: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """One worker that a host is to run: this stage (and what is fused to it) of this version, on this slot.

    `id` stays the same while the worker stays where it is; the worker's heartbeats carry it. `shard` of `shards` counts
    from 0; workers of one `group` belong together. `why` says to people how the choice was made.
    """

    id: str
    host: str
    slot: str
    ref: str
    stage: str
    shard: int = 0
    shards: int = 1
    group: str = ""
    need: Need = Need()
    why: str = ""

    def is_worker(self, other: Assignment | None) -> bool:
        """Whether the other one is the very same worker; what it takes and why it is there may differ."""
        return other is not None and replace(self, need=other.need, why=other.why) == other


@dataclass(frozen=True, slots=True)
class Desired:
    """All that one host is to run, as the leader of this epoch decided; `number` grows with every change."""

    host: str
    epoch: int
    number: int
    workers: tuple[Assignment, ...] = ()

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """What `encode` wrote; raises DecodeError."""
        return _decode(text, "desired state", cls._read)

    @classmethod
    def _read(cls, found: dict[str, Any]) -> Self:
        workers = tuple(Assignment(**{**one, "need": Need(**one["need"])}) for one in found["workers"])
        return cls(str(found["host"]), int(found["epoch"]), int(found["number"]), workers)


@dataclass(frozen=True, slots=True)
class SlotTrouble:
    """A worker that did not start, or kept dying, on this slot. `since` is its last failure, by Redis's clock, in
    seconds."""

    slot: str
    ref: str
    stage: str
    failures: int
    since: float
    reason: str


@dataclass(frozen=True, slots=True)
class HostReport:
    """What an agent tells of its host with each heartbeat.

    `name` is unique in the namespace, `incarnation` tells one agent process of that name from the next. `host_id` is
    the identity by which shared memory is told apart, '' for none. `refs` are the versions that its files give.
    `links` are groups of GPU indices that reach each other over NVLink. `applied` is the `number` of the desired state
    that the agent last made true. With `allow_cpu` its processors may serve stages that want a GPU it has not.
    """

    name: str
    incarnation: str
    pid: int
    cpus: float
    memory: int
    free_memory: int
    host_id: str = ""
    gpus: tuple[Gpu, ...] = ()
    links: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()
    draining: bool = False
    applied: int = 0
    trouble: tuple[SlotTrouble, ...] = ()
    allow_cpu: bool = False
    seen_at: float = field(default=0.0, compare=False)

    @property
    def slots(self) -> tuple[str, ...]:
        """Every slot of the host."""
        return (CPU, *(gpu.slot for gpu in self.gpus))

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """What `encode` wrote; raises DecodeError."""
        return _decode(text, "host's report", cls._read)

    @classmethod
    def _read(cls, found: dict[str, Any]) -> Self:
        lists: dict[str, Any] = {
            "gpus": tuple(Gpu(**gpu) for gpu in found["gpus"]),
            "links": tuple(tuple(int(i) for i in group) for group in found["links"]),
            "labels": tuple(found["labels"]),
            "refs": tuple(found["refs"]),
            "trouble": tuple(SlotTrouble(**one) for one in found["trouble"]),
        }
        return cls(**{**found, **lists})


def _decode(text: str | bytes, what: str, read: Callable[[dict[str, Any]], T]) -> T:
    try:
        return read(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DecodeError(f"this is no {what}: {error!r:.100}", length=len(text)) from error
