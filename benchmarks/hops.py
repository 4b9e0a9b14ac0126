"""Durable fenced hops (claim + commit) per second of one worker process, against other queues' drain rate.

Measured twice: the bare transport loop over three nodes, and the real worker with a no-op stage, end to end with its
results in the client. The peers drain no-op jobs with results stored, one worker process each. All on one private
server, in turns. Prints ratio lines: name, ours, alternative, ratio.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import BenchServer, interleave, parse, parser, ratio_line, run_peer
from benchmarks.transport import BareLane, aof_bytes, server_cpu_s, write_pipeline
from torchrelay import Pipeline, Relay
from torchrelay.up import Fleet

PEERS = ("dramatiq", "arq", "celery", "rq")


def bare(server: BenchServer, folder: Path, jobs: int, size: int) -> dict[str, float]:
    """The transport loop: rate, server time and AOF bytes per hop."""
    server.restart_clean()
    lane = BareLane.open(server, folder, nodes=3)
    lane.submit(jobs, size)
    cpu, aof = server_cpu_s(lane.client), aof_bytes(lane.client)
    hops, seconds = lane.drain()
    if hops != jobs * 3:
        raise SystemExit(f"{hops} hops of {jobs * 3} were committed")
    return {
        "per_s": hops / seconds,
        "server_us": 1e6 * (server_cpu_s(lane.client) - cpu) / hops,
        "aof_bytes": (aof_bytes(lane.client) - aof) / hops,
    }


def end_to_end(server: BenchServer, folder: Path, jobs: int, size: int) -> float:
    """Jobs per second through one real worker with a no-op stage, from its first claim to the last result.

    The jobs wait before the worker starts, as the peers' do; the clock runs from the first commit that is seen to the
    last result in the client, over the jobs in between.
    """
    server.restart_clean()
    pipeline = Pipeline.load(write_pipeline(folder, 1))
    payload = bytes(size)
    with Relay(server.url, namespace="bench") as relay:
        relay.register(pipeline)
        futures = relay.submit_many(pipeline.name, ({"data": payload} for _ in range(jobs)))
        fleet = Fleet(server.url, "bench")
        fleet.add(pipeline)
        with fleet:
            futures[0].result(timeout=60)
            started = time.perf_counter()
            done = sum(f.done() for f in futures)
            for future in futures:
                future.result(timeout=120)
            seconds = time.perf_counter() - started
    return (jobs - done) / seconds


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--size", type=int, default=100, help="bytes of a job's argument")
    options = parse(options_parser)
    ours_jobs = 10_000 if options.quick else 60_000
    details: list[dict[str, float]] = []

    def bare_case() -> float:
        details.append(bare(server, folder, ours_jobs // 3, options.size))
        return details[-1]["per_s"]

    with BenchServer() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = {"bare": bare_case, "worker": lambda: end_to_end(server, folder, ours_jobs, options.size)}
        for peer in PEERS:
            cases[peer] = lambda peer=peer: run_peer(peer, "drain", server, jobs=options.jobs, size=options.size)
        rates = interleave(cases, options.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    peers = {name: medians[name] for name in PEERS if name in medians}
    for name, rate in peers.items():
        ratio_line(f"hops.bare/{name}", medians["bare"], rate)
    if peers:
        fastest = max(peers, key=lambda name: peers[name])
        ratio_line(f"hops.bare/fastest({fastest})", medians["bare"], peers[fastest])
        ratio_line(f"hops.worker/fastest({fastest})", medians["worker"], peers[fastest])
    print(f"server_us_per_hop {statistics.median(d['server_us'] for d in details):.1f}")
    with BenchServer(appendonly=True) as server, tempfile.TemporaryDirectory() as name:
        runs = [bare(server, Path(name), ours_jobs // 3, options.size) for _ in range(options.rounds)]
        worker = statistics.median(
            end_to_end(server, Path(name), ours_jobs, options.size) for _ in range(min(3, options.rounds))
        )
    print(f"aof_everysec.bare_hops_per_s {statistics.median(r['per_s'] for r in runs):.0f}")
    print(f"aof_everysec.worker_jobs_per_s {worker:.0f}")
    print(f"aof_bytes_per_hop {statistics.median(r['aof_bytes'] for r in runs):.0f}")


if __name__ == "__main__":
    main()
