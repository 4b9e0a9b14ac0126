"""Plain reads that the synchronous client makes: where a job is, and what it means when the server does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchrelay.errors import BrokerUnavailable
from torchrelay.queues.channel import LOST
from torchrelay.queues.job import Terminal
from torchrelay.queues.keys import job_field, lane_of
from torchrelay.queues.registry import Registry


@contextmanager
def reached() -> Iterator[None]:
    """Turns the driver's errors of a lost server into ours."""
    try:
        yield
    except LOST as error:
        raise BrokerUnavailable(f"no answer from the server: {error}; is it running?") from error


def find_status(registry: Registry, job_id: str) -> str:
    """waiting, delayed, running, done, failed, cancelled, expired or unknown, as the records say."""
    lane = registry.lanes[lane_of(job_id)]
    keys, client = lane.keys, registry.client
    record: Any = client.hget(keys.done, job_id)
    if record:
        return Terminal.decode(record).status
    if not client.hexists(keys.bucket(job_id), job_field(job_id)):
        # The news of its end was taken; that of a failed job's stays among the dead letters.
        return "failed" if client.hexists(keys.dead, job_id) else "unknown"
    token = job_id.encode()
    grants: Any = client.hvals(keys.grants)
    for value in grants:
        at = value.find(token)
        if at >= 0 and value[at + len(token)] >= 128:
            return "running"
    nodes = range(1, 31)
    due = client.zmscore(keys.delayed, [f"{job_id}|{n}" for n in nodes])
    return "delayed" if any(score is not None for score in due) else "waiting"
