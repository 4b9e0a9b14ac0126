"""Columns too large to travel inline: HASHes of 1 MiB chunks, written and read by plain pipelined commands.

A blob lives for ten minutes until the script that records its ref makes it permanent (rule 6 of the transport), so
what a dead writer left behind goes by itself.
"""

from __future__ import annotations

import redis
from redis.exceptions import OutOfMemoryError, ResponseError

from torchrelay.errors import BytesLost, QueueFull
from torchrelay.queues.job import CHUNK_BYTES, Ref
from torchrelay.queues.registry import run
from torchrelay.queues.scripts import explain
from torchrelay.queues.transitions import Transitions

UNRECORDED_TTL_MS = 600_000


def write_blobs(
    client: redis.Redis, lane: Transitions, blobs: dict[str, bytes], *, must_pass: bool = False
) -> dict[str, Ref]:
    """Writes blobs by name and returns their refs.

    Out of memory, a worker's write (`must_pass`) goes by script, so that the queue drains; a producer's raises
    QueueFull.
    """
    refs: dict[str, Ref] = {}
    pipe = client.pipeline(transaction=False)
    for name, data in blobs.items():
        key = lane.keys.blob(name)
        view = memoryview(data)
        pipe.delete(key)
        for number, at in enumerate(range(0, len(data), CHUNK_BYTES)):
            pipe.hset(key, str(number), view[at : at + CHUNK_BYTES])
        pipe.pexpire(key, UNRECORDED_TTL_MS)
        refs[name] = Ref.of(name, len(data))
    try:
        pipe.execute()
    except OutOfMemoryError as error:
        if not must_pass:
            raise QueueFull(
                "the server is at its maxmemory; wait for workers to drain it, or raise maxmemory"
            ) from error
        for name, data in blobs.items():
            for number, at in enumerate(range(0, len(data), CHUNK_BYTES)):
                run(client, lane.put_chunk(name, number, data[at : at + CHUNK_BYTES], UNRECORDED_TTL_MS))
    except ResponseError as error:
        raise explain("blob", str(error)) from error
    return refs


def read_blobs(client: redis.Redis, lane: Transitions, refs: list[Ref]) -> list[bytes]:
    """The bytes behind the refs, in order. Raises BytesLost naming the first that is incomplete."""
    pipe = client.pipeline(transaction=False)
    for ref in refs:
        for number in range(ref.chunks):
            pipe.hget(lane.keys.blob(ref.name), str(number))
    chunks = iter(pipe.execute())
    out = []
    for ref in refs:
        parts = [next(chunks) for _ in range(ref.chunks)]
        if any(p is None for p in parts) or sum(map(len, parts)) != ref.nbytes:
            raise BytesLost(f"the bytes of {ref.name} are gone or cut ({ref.nbytes} bytes expected)")
        out.append(parts[0] if len(parts) == 1 else b"".join(parts))
    return out
