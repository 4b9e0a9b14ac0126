"""`submit_many` of checked rows with their futures, against the other queues' bulk enqueue, in turns on one server."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import BenchServer, interleave, parse, parser, ratio_line, run_peer
from benchmarks.transport import write_pipeline
from torchrelay import Pipeline, Relay

PEERS = ("rq", "dramatiq", "arq", "celery")


def ours(server: BenchServer, folder: Path, jobs: int, size: int) -> float:
    """Jobs per second from rows in memory to the server's acknowledgement of the last."""
    server.restart_clean()
    rows = [{"data": bytes([i % 256]) * size} for i in range(jobs)]
    with Relay(server.url, namespace="bench") as relay:
        name = relay.register(Pipeline.load(write_pipeline(folder, 1)))
        relay.submit_many(name, rows[:256])  # the peers warm up with a batch too
        started = time.perf_counter()
        futures = relay.submit_many(name, rows)
        seconds = time.perf_counter() - started
        waiting = relay.registry.loads()[f"{name}/s1.ready_rows"]
    if len(futures) != jobs or waiting != jobs + min(256, jobs):
        raise SystemExit(f"{waiting} jobs wait, {jobs} were submitted")
    return jobs / seconds


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--size", type=int, default=100, help="bytes of a job's argument")
    options = parse(options_parser)
    ours_jobs = 10_000 if options.quick else 50_000
    with BenchServer() as server, tempfile.TemporaryDirectory() as name:
        cases = {"ours": lambda: ours(server, Path(name), ours_jobs, options.size)}
        for peer in PEERS:
            cases[peer] = lambda peer=peer: run_peer(peer, "enqueue", server, jobs=options.jobs, size=options.size)
        rates = interleave(cases, options.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    peers = {name: medians[name] for name in PEERS if name in medians}
    for peer, rate in peers.items():
        ratio_line(f"enqueue/{peer}", medians["ours"], rate)
    if peers:
        fastest = max(peers, key=lambda name: peers[name])
        ratio_line(f"enqueue/fastest({fastest})", medians["ours"], peers[fastest])


if __name__ == "__main__":
    main()
