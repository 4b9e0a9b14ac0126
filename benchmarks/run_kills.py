"""Runs that are killed on their way, and what `--resume` makes of them: every row once, and no part written twice.

`torchrelay run` with a server and workers of its own; at 10, 50 and 90 % of its parts the driver, a random worker or
the server gets SIGKILL, a random moment later. Then `--resume` until the run is done. Ends with an error where a row is
missing or doubled, or where a part that was there changed. Prints a line a kill, and a ratio line (name, runs that
ended exact, runs, ratio).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import ROOT, parse, parser, ratio_line

ROWS, CHUNK_ROWS = 1500, 50
VICTIMS = ("driver", "worker", "server")
SHARES = (0.1, 0.5, 0.9)
_MOST_TRIES, _STALL_S = 4, 60.0


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below this one."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.name))
    found: dict[int, str] = {}
    todo = list(parents.get(pid, ()))
    while todo:
        child = todo.pop()
        todo += parents.get(child, ())
        try:
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def server_of(folder: Path) -> int:
    """The server whose files lie in this folder."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().replace("\0", " ")
            if "valkey-server" in command and str(folder) in command + os.readlink(path / "cwd"):
                return int(path.name)
        except OSError:
            continue
    raise SystemExit(f"no server runs in {folder}")


class Killed:
    """One run, in a folder of its own."""

    def __init__(self, folder: Path, source: Path) -> None:
        self._folder = folder
        self._out = folder / "out"
        (folder / ".torchrelay").mkdir(mode=0o700)
        self._command = [sys.executable, "-m", "torchrelay.cli", "run", f"{ROOT}/benchmarks/batch_stages.py:paused"]
        self._command += ["-i", str(source), "-o", str(self._out), "--chunk-rows", str(CHUNK_ROWS), "--json"]

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        silent = subprocess.DEVNULL
        return subprocess.Popen(
            [*self._command, *more], cwd=self._folder, env=environment, stdout=silent, stderr=silent
        )

    def parts(self) -> dict[str, int]:
        """Name -> when it was written."""
        return {path.name: path.stat().st_mtime_ns for path in self._out.glob("part-*.parquet")}

    def until(self, count: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _STALL_S
        while len(self.parts()) < count and process.poll() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"only {len(self.parts())} parts of {count} were written in {_STALL_S:g} s")
            time.sleep(0.01)

    def kill(self, victim: str, process: subprocess.Popen[bytes], rng: random.Random) -> None:
        if victim == "driver":
            process.kill()
        elif victim == "server":
            os.kill(server_of(self._folder), signal.SIGKILL)
        else:
            workers = [pid for pid, command in descendants(process.pid).items() if "workers.child" in command]
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """How often it had to be resumed."""
        for tries in range(_MOST_TRIES):
            try:
                status = process.wait(_STALL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status == 0:
                return tries
            process = self.start("--resume")
        raise SystemExit(f"the run was not done after {_MOST_TRIES} tries: exit status {status}")

    def check(self, before: dict[str, int]) -> None:
        rows = pq.read_table(self._out)["number"].to_numpy()
        if not np.array_equal(np.sort(rows), np.arange(ROWS)):
            raise SystemExit(f"{len(rows)} rows, {len(np.unique(rows))} of them different, came out of {ROWS}")
        changed = [name for name, at in before.items() if self.parts().get(name) != at]
        if changed:
            raise SystemExit(f"parts that were there were written again: {', '.join(changed)}")


def main() -> None:
    options = parse(parser(__doc__ or ""))
    rng = random.Random(0)
    runs = exact = 0
    with tempfile.TemporaryDirectory(prefix="trb-", dir="/tmp") as folder:
        source = Path(folder) / "rows.parquet"
        pq.write_table(pa.table({"number": np.arange(ROWS)}), source)
        for turn in range(options.rounds):
            for share in SHARES:
                for victim in VICTIMS:
                    mine = Path(folder) / f"{turn}-{share}-{victim}"
                    mine.mkdir()
                    run = Killed(mine, source)
                    process = run.start()
                    run.until(int(share * ROWS / CHUNK_ROWS), process)
                    time.sleep(rng.random() * 0.2)
                    run.kill(victim, process, rng)
                    before = run.parts() if victim == "driver" else {}
                    resumed = run.finish(process)
                    runs += 1
                    run.check(before)
                    exact += 1
                    print(f"# {victim} killed at {share:.0%}: resumed {resumed} times, exact", flush=True)
    ratio_line("run.kills.exact/runs", float(exact), float(runs))


if __name__ == "__main__":
    main()
