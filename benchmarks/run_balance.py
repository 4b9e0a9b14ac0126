"""Two stages of 0.17 s and 0.21 s a row with four workers each, the slower ones ready 10 s late.

The rows of a file go through `torchrelay run`. Prints a ratio line (name, ours, ideal, ratio): rows a second from the
moment when the first workers are ready to the last part, against the rate of a plan without any overhead: the first
stage from the start, the second one from 10 s on, each at its workers' pace.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.batch_stages import LATE_S, SLOW_S
from benchmarks.harness import ROOT, BenchServer, parse, parser, ratio_line
from torchrelay import Pipeline, Relay
from torchrelay.testing.serving import await_ready
from torchrelay.up import Fleet

WORKERS, ROWS = 4, 400


def ideal_s(rows: int) -> float:
    """Seconds of the plan: the second stage never lacks rows but at the start."""
    return LATE_S + rows * SLOW_S / WORKERS


def main() -> None:
    options = parse(parser(__doc__ or ""))
    rows = ROWS // (4 if options.quick else 1)
    with BenchServer() as server, tempfile.TemporaryDirectory(prefix="trbench-", dir="/tmp") as folder:
        source = Path(folder) / "rows.parquet"
        pq.write_table(pa.table({"number": np.arange(rows)}), source)
        balance = Pipeline.load(ROOT / "benchmarks" / "batch_stages.py:balance")
        early, late = Fleet(server.url, "bench"), Fleet(server.url, "bench")
        for stage in ("@read", "@write", *("fast",) * WORKERS):
            early.add(balance, stage=stage)
        for _ in range(WORKERS):
            late.add(balance, stage="slow")
        with early:
            await_ready(early, 60.0)
            began = time.perf_counter()
            # Their load takes LATE_S, beside a second or so that a process takes to start.
            with late, Relay(server.url, namespace="bench") as relay:
                run = relay.run(balance, input=str(source), output=str(Path(folder) / "out"), chunk_rows=2)
                seconds = time.perf_counter() - began
                found = sorted(row["number"] for row in run.rows())
    if found != list(range(rows)):
        raise SystemExit("the rows that came out are not those that went in")
    ratio_line("run.balance.rows_per_s/ideal", rows / seconds, rows / ideal_s(rows))
    print(f"# {seconds:.1f} s for {rows} rows; ideal {ideal_s(rows):.1f} s")


if __name__ == "__main__":
    main()
