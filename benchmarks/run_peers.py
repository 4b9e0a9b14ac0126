"""Measure the peers alone: jobs per second of each, drain and enqueue, on a private server."""

from __future__ import annotations

import statistics
from functools import partial

from harness import PEER_PYTHON, BenchServer, interleave, parse, parser, run_peer


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--aof", action="store_true", help="server with an append-only file, fsync every second")
    made.add_argument("--no-results", dest="results", action="store_false", help="peers store no results")
    args = parse(made)
    with BenchServer(appendonly=args.aof) as server:
        cases = {
            f"{peer}-{mode}": partial(run_peer, peer, mode, server, jobs=args.jobs, results=args.results)
            for mode in ("drain", "enqueue")
            for peer in PEER_PYTHON
        }
        for name, values in interleave(cases, args.rounds).items():
            if values:
                low, high = min(values), max(values)
                print(f"{name} {statistics.median(values):.0f} jobs/s ({low:.0f} to {high:.0f}, {len(values)} rounds)")
            else:
                print(f"{name} not-measured")


if __name__ == "__main__":
    main()
