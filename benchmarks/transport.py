"""The transport alone, for the benchmarks: a lane of a private server, jobs of a given size, and the bare hop loop."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import redis

from benchmarks.harness import BenchServer
from torchrelay.config import Pipeline
from torchrelay.queues.channel import Channel, Pending
from torchrelay.queues.codec import encode
from torchrelay.queues.job import decode_payload, encode_payload
from torchrelay.queues.keys import IdSource, LaneKeys
from torchrelay.queues.transitions import (
    MAX_JOBS_PER_CALL,
    ClaimLimits,
    NewJob,
    Output,
    Session,
    Transitions,
    pack_graph,
)

STAGE_FILE = """
from torchrelay import Stage


class Noop(Stage):
    def forward(self, batch):
        return {"data": batch["data"]}
"""
MARKS = (10**9, 10**12)


def write_pipeline(folder: Path, stages: int, max_rows: int = 256) -> Path:
    """A chain of no-op stages over one bytes column."""
    (folder / "stages.py").write_text(STAGE_FILE)
    lines = [
        f"  - {{name: s{i}, use: 'stages.py:Noop', inputs: [data], outputs: {{data: bytes}}, "
        f"batch: {{max_rows: {max_rows}}}, queue: {{max_rows: 100000000, max_bytes: 1TB}}}}"
        for i in range(1, stages + 1)
    ]
    path = folder / f"noop{stages}.yaml"
    path.write_text(f"pipeline: noop{stages}\ninput: {{data: bytes}}\nstages:\n" + "\n".join(lines) + "\n")
    return path


@dataclass
class BareLane:
    """One lane with a chain of nodes defined, and the client's side of it."""

    client: redis.Redis
    lane: Transitions
    number: int
    nodes: int
    ref: str

    @classmethod
    def open(cls, server: BenchServer, folder: Path, nodes: int) -> BareLane:
        client = server.client()
        lane = Transitions(LaneKeys("bench", 0))
        pipeline = Pipeline.load(write_pipeline(folder, nodes))
        with_channel = Channel(client)
        with_channel.run(lane.init(1))
        with_channel.run(lane.define(1, pack_graph(pipeline.ref, pipeline.graph, [MARKS] * nodes)))
        with_channel.close()
        return cls(client, lane, 1, nodes, pipeline.ref)

    def submit(self, count: int, size: int) -> None:
        """Makes so many jobs of so many bytes ready at the first node."""
        ids = IdSource(0)
        session = Session(ids.client)
        channel = Channel(self.client)
        payload = encode_payload({"data": encode([os.urandom(size)])})
        for at in range(0, count, MAX_JOBS_PER_CALL):
            jobs = [NewJob(ids.take(), payload, 1, len(payload)) for _ in range(min(MAX_JOBS_PER_CALL, count - at))]
            channel.send(self.lane.submit(session, self.number, jobs, 1 << 40))
            if channel.in_flight > 8:
                channel.receive()
        channel.drain()
        channel.close()

    def drain(self, limit: int | None = None, claim_jobs: int = 256, ahead: int = 2) -> tuple[int, float]:
        """Claims and commits through every node, decoding and encoding each payload: (hops, seconds)."""
        incarnation = IdSource(0).client
        session = Session(incarnation)
        channel = Channel(self.client)
        limits = ClaimLimits(claim_jobs, claim_jobs, 1 << 20, 60_000)
        hops = fences = 0
        started = time.perf_counter()
        for node in range(1, self.nodes + 1):
            queue: deque[tuple[bool, Pending]] = deque()

            def claim(node: int = node, queue: deque[tuple[bool, Pending]] = queue) -> None:
                nonlocal fences
                fences += 1
                call = self.lane.claim(session, f"{incarnation}-{fences:x}", incarnation, self.number, node, limits)
                queue.append((False, channel.send(call)))

            for _ in range(ahead):
                claim()
            taken = 0
            while queue:
                is_commit, pending = queue.popleft()
                answer = pending.result()
                if is_commit:
                    hops += answer.count("k")
                    continue
                if not answer.entries:
                    continue
                taken += len(answer.entries)
                outputs = [Output(e.packed, encode_payload(decode_payload(e.payloads[0])[0])) for e in answer.entries]
                commit = self.lane.commit(session, answer.fence, self.number, node, outputs)
                queue.append((True, channel.send(commit)))
                if limit is None or taken < limit:
                    claim()
        seconds = time.perf_counter() - started
        channel.close()
        return hops, seconds


def server_cpu_s(client: redis.Redis) -> float:
    """CPU seconds that the server used so far."""
    cpu = client.info("cpu")
    return float(cpu["used_cpu_sys"]) + float(cpu["used_cpu_user"])


def aof_bytes(client: redis.Redis) -> int:
    """Size of the append-only file, with what is still buffered."""
    info = client.info("persistence")
    return int(info.get("aof_current_size", 0)) + int(info.get("aof_buffer_length", 0))
