"""Dead letters: jobs that failed for good, with their history. Listed, shown, redriven and dropped from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from torchrelay.errors import DecodeError
from torchrelay.queues.job import HEAD, Failure, decode_payload
from torchrelay.queues.keys import lane_of
from torchrelay.queues.registry import Registry, run
from torchrelay.queues.scripts import Call


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead job. `died_at` is in seconds since the epoch; `redriven_as` the job that took its place, or ''."""

    job_id: str
    pipeline: str
    stage: str
    died_at: float
    history: list[Failure]
    redriven_as: str
    columns: list[str]

    @classmethod
    def decode(cls, job_id: str, data: bytes) -> DeadLetter:
        try:
            at, _, record, history, _, _, ref, redriven = msgpack.unpackb(data, raw=True)
            failures = Failure.decode_all(history)
            reflen = HEAD.unpack_from(record)[-1] if record else 0
            columns = sorted(decode_payload(record[HEAD.size + reflen :])[0]) if record else []
        except (ValueError, TypeError) as error:
            raise DecodeError(f"dead letter {job_id} does not decode: {error}", length=len(data)) from error
        stage = failures[-1].stage if failures else ""
        return cls(job_id, ref.decode(), stage, at / 1000.0, failures, redriven.decode(), columns)

    def summary(self) -> dict[str, Any]:
        """What a listing shows."""
        last = self.history[-1] if self.history else Failure(self.stage, "", "")
        return {
            "id": self.job_id,
            "pipeline": self.pipeline,
            "stage": self.stage,
            "died_at": self.died_at,
            "attempts": len(self.history),
            "error_type": last.error_type,
            "message": last.message,
            "redriven_as": self.redriven_as,
        }


def scan(registry: Registry, pipeline: str | None = None, *, redriven: bool = False) -> Iterator[DeadLetter]:
    """Dead letters of one pipeline (name or name@version) or of all; with `redriven`, also those that run again."""
    for lane in registry.lanes:
        for field, data in registry.client.hscan_iter(lane.keys.dead, count=200):
            letter = DeadLetter.decode(field.decode(), data)
            name = letter.pipeline.partition("@")[0]
            if (redriven or not letter.redriven_as) and pipeline in (None, letter.pipeline, name):
                yield letter


def find(registry: Registry, job_id: str) -> DeadLetter | None:
    """One dead letter, or None."""
    data: Any = registry.client.hget(registry.lane(job_id).keys.dead, job_id)
    return DeadLetter.decode(job_id, data) if data else None


def redrive(registry: Registry, ids: list[str]) -> dict[str, str]:
    """Old id -> id of the new job, '' where there is no such dead letter. Repeating it makes no second job."""
    return _each_lane(registry, ids, drop=False)


def drop(registry: Registry, ids: list[str]) -> dict[str, str]:
    """Old id -> itself, '' where there is no such dead letter. Its bytes are freed."""
    return _each_lane(registry, ids, drop=True)


def _each_lane(registry: Registry, ids: list[str], *, drop: bool) -> dict[str, str]:
    for job_id in ids:
        registry.lane(job_id)  # refuses the whole call before anything is moved
    out: dict[str, str] = {}
    for number, lane in enumerate(registry.lanes):
        mine = [i for i in ids if lane_of(i) == number]
        for at in range(0, len(mine), 128):
            part = mine[at : at + 128]
            call: Call[list[str]] = lane.drop_dead(part) if drop else lane.redrive(part)
            answers: list[str] = run(registry.client, call)
            out.update(zip(part, answers, strict=True))
    return out
