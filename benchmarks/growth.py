"""Does a claim + commit cost more when more jobs wait? And how much memory does a waiting job take?

The same 20,000 hops at one node with 1,000, 1,000,000 and 1,900,000 ready jobs (there, the server is in mid-rehash).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import BenchServer, parse, parser, ratio_line
from benchmarks.transport import BareLane, server_cpu_s

SIZE = 100


def filled(server: BenchServer, folder: Path, jobs: int) -> tuple[BareLane, float]:
    """A lane with so many ready jobs, and the server's bytes per job."""
    server.restart_clean()
    lane = BareLane.open(server, folder, nodes=1)
    lane.submit(256, SIZE)
    lane.drain()
    before = lane.client.info("memory")["used_memory"]
    lane.submit(jobs, SIZE)
    return lane, (lane.client.info("memory")["used_memory"] - before) / jobs


def hop_cost_us(lane: BareLane, hops: int) -> tuple[float, float]:
    """(wall, server) microseconds per hop, with the ready set kept at its size."""
    cpu = server_cpu_s(lane.client)
    done, seconds = lane.drain(limit=hops)
    return 1e6 * seconds / done, 1e6 * (server_cpu_s(lane.client) - cpu) / done


def main() -> None:
    options = parse(parser(__doc__ or ""))
    small, large, rehash = (1_000, 100_000, 190_000) if options.quick else (1_000, 1_000_000, 1_900_000)
    hops = 5_000 if options.quick else 20_000
    with tempfile.TemporaryDirectory() as name, BenchServer() as a, BenchServer() as b:
        folder = Path(name)
        few, _ = filled(a, folder, small)
        for jobs in (large, rehash):
            many, per_job = filled(b, folder, jobs)
            ours, base = [], []
            for _ in range(options.rounds):
                ours.append(hop_cost_us(many, hops))
                spent, cost = 0, []
                while spent < hops:
                    few.submit(small, SIZE)
                    cost.append(hop_cost_us(few, small))
                    spent += small
                base.append((statistics.median(c[0] for c in cost), statistics.median(c[1] for c in cost)))
            ratio_line(f"growth.wall_us_per_hop/{jobs}", [o[0] for o in ours], [c[0] for c in base])
            ratio_line(f"growth.server_us_per_hop/{jobs}", [o[1] for o in ours], [c[1] for c in base])
            print(f"bytes_per_waiting_job/{jobs} {per_job:.0f}")


if __name__ == "__main__":
    main()
