"""Columns too large to travel inline: HASHes of 1 MiB chunks, written and read by plain pipelined commands.

A blob lives for ten minutes until the script that records its ref makes it permanent (rule 6 of the transport), so
what a dead writer left behind goes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import redis
from redis.exceptions import OutOfMemoryError, ResponseError

from torchrelay.errors import BytesLost, QueueFull
from torchrelay.queues.codec import HostMessage, join
from torchrelay.queues.job import CHUNK_BYTES, Ref
from torchrelay.queues.registry import run
from torchrelay.queues.scripts import explain
from torchrelay.queues.transitions import Transitions

UNRECORDED_TTL_MS = 600_000
_PIPELINE_BYTES = 32 << 20


def write_blobs(
    client: redis.Redis, lane: Transitions, blobs: dict[str, HostMessage], *, must_pass: bool = False
) -> None:
    """Writes blobs by name, many in one round trip.

    Out of memory, a worker's write (`must_pass`) goes by script, so that the queue drains; a producer's raises
    QueueFull.
    """
    try:
        for part in _parts(blobs):
            _write(client, lane, part)
    except OutOfMemoryError as error:
        if not must_pass:
            raise QueueFull(
                "the server is at its maxmemory; wait for workers to drain it, or raise maxmemory"
            ) from error
        for name, message in blobs.items():
            data = join(message)
            for number, at in enumerate(range(0, len(data), CHUNK_BYTES)):
                run(client, lane.put_chunk(name, number, data[at : at + CHUNK_BYTES], UNRECORDED_TTL_MS))
    except ResponseError as error:
        raise explain("blob", str(error)) from error


def _parts(blobs: dict[str, HostMessage]) -> Iterator[dict[str, HostMessage]]:
    """Groups of blobs, each small enough to be held once more by the connection."""
    part: dict[str, HostMessage] = {}
    size = 0
    for name, data in blobs.items():
        if part and size + len(data) > _PIPELINE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = data
        size += len(data)
    yield part


def _write(client: redis.Redis, lane: Transitions, blobs: dict[str, HostMessage]) -> None:
    pipe = client.pipeline(transaction=False)
    for name, message in blobs.items():
        key = lane.keys.blob(name)
        view = memoryview(join(message))
        pipe.delete(key)
        for number, at in enumerate(range(0, len(view), CHUNK_BYTES)):
            pipe.hset(key, str(number), view[at : at + CHUNK_BYTES])
        pipe.pexpire(key, UNRECORDED_TTL_MS)
    pipe.execute()


def read_blobs(client: redis.Redis, lane: Transitions, refs: list[Ref]) -> list[bytes]:
    """The bytes behind the refs, in order. Raises BytesLost naming the first that is incomplete."""
    out: list[bytes] = []
    for ref, data in zip(refs, fetch_blobs(client, lane, refs), strict=True):
        if data is None:
            raise BytesLost(f"the bytes of {ref.name} are gone or cut ({ref.nbytes} bytes expected)")
        out.append(data)
    return out


def fetch_blobs(client: redis.Redis, lane: Transitions, refs: list[Ref]) -> list[bytes | None]:
    """The bytes that Redis holds of the refs, in order, in one round trip; None for one that is gone or cut."""
    pipe = client.pipeline(transaction=False)
    for ref in refs:
        for number in range(ref.chunks):
            pipe.hget(lane.keys.blob(ref.name), str(number))
    chunks = iter(pipe.execute())
    out: list[bytes | None] = []
    for ref in refs:
        parts = [next(chunks) for _ in range(ref.chunks)]
        if not parts or any(p is None for p in parts) or sum(map(len, parts)) != ref.nbytes:
            out.append(None)
        else:
            out.append(parts[0] if len(parts) == 1 else b"".join(parts))
    return out
