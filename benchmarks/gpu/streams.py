"""A steady stream of table jobs through workers: producer processes, and a timed window over what they tell."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.workloads import Workload
from benchmarks.harness import ROOT
from torchrelay import Relay

__all__ = ["STALL_S", "Producer", "Stream"]

STALL_S, _SAMPLE_S = 180.0, 0.1
Counts = dict[str, float]


class Producer:
    """A feeder process; `latest` is the last progress that it told."""

    def __init__(self, url: str, namespace: str, pipeline: str, load: Workload, in_flight: int, seed: int) -> None:
        argv = [sys.executable, "-m", "benchmarks.gpu.feeder", "--url", url, "--namespace", namespace]
        argv += ["--pipeline", pipeline, "--workload", load.encode(), "--in-flight", str(in_flight)]
        self._argv = [*argv, "--seed", str(seed)]
        self.in_flight = in_flight
        self.latest: Counts = {"at": 0.0, "jobs": 0, "units": 0, "wait_s": 0.0}
        self._told = threading.Condition()
        self._event = ""

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0, text=False
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.expect("ready")

    def tell(self, command: bytes) -> None:
        assert self._process.stdin is not None  # asked for by PIPE
        self._process.stdin.write(command)

    def expect(self, event: str) -> None:
        with self._told:
            if not self._told.wait_for(lambda: self._event in (event, "ended"), STALL_S) or self._event == "ended":
                raise SystemExit(f"the producer process said nothing, or ended, before it was {event}")

    def check(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"the producer process ended with status {self._process.returncode}; see above")

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None  # asked for by PIPE
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None  # asked for by PIPE
        for text in self._process.stdout:
            line = json.loads(text)
            event = line.pop("event")
            with self._told:
                if event == "progress":
                    self.latest = line
                self._event = event
                self._told.notify_all()
        with self._told:
            self._event = "ended"
            self._told.notify_all()


class Stream:
    """Producers that feed one pipeline while `measure` runs, and are idle else.

    Args:
        relay: of the namespace where the workers are.
        producers: started ones.
        seconds: what is timed, after at least `warm_s` and twice the jobs that may be under way.
    """

    def __init__(self, relay: Relay, producers: Sequence[Producer], warm_s: float, seconds: float) -> None:
        self._relay = relay
        self._producers = producers
        self._warm_s = warm_s
        self._seconds = seconds
        # Of each timed window: what the producers and the workers told.
        self.windows: list[dict[str, Any]] = []

    def measure(self) -> float:
        """Units per second over one timed window; the workers and producers are idle before and after it."""
        began = time.monotonic()
        before = [p.latest["jobs"] for p in self._producers]
        for producer in self._producers:
            producer.tell(b"g")
        while time.monotonic() - began < self._warm_s or not all(
            p.latest["jobs"] - jobs >= 2 * p.in_flight for p, jobs in zip(self._producers, before, strict=True)
        ):
            self._look(began)
        starts, reports = [p.latest for p in self._producers], _Reports(self._relay)
        started = time.monotonic()
        while time.monotonic() - started < self._seconds:
            reports.sample()
            self._look(began)
        ends = [p.latest for p in self._producers]
        for producer in self._producers:
            producer.tell(b"s")
        for producer in self._producers:
            producer.expect("stopped")
        changes = [{k: end[k] - start[k] for k in end} for start, end in zip(starts, ends, strict=True)]
        self.windows.append(
            {
                "producers": [{**c, "wait": c["wait_s"] / (c["at"] or 1.0)} for c in changes],
                "stages": reports.shares(),
            }
        )
        if not all(change["at"] for change in changes):
            raise SystemExit("a producer had no result in the timed window; give it more --seconds")
        return sum(change["units"] / change["at"] for change in changes)

    def _look(self, began: float) -> None:
        time.sleep(_SAMPLE_S)
        for producer in self._producers:
            producer.check()
        if time.monotonic() - began > STALL_S + self._seconds:
            raise SystemExit("no steady stream of results came; what the workers logged is above")


class _Reports:
    """The workers' heartbeats as they change; each is known to a tenth of a second."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._seen: dict[str, list[tuple[float, dict[str, Any]]]] = {}

    def sample(self) -> None:
        for report in self._relay.registry.workers():
            seen, fields = self._seen.setdefault(report.worker, []), asdict(report)
            if not seen or seen[-1][1] != fields:
                seen.append((time.monotonic(), fields))

    def shares(self) -> dict[str, dict[str, float]]:
        """Per stage: rows per batch over its max_rows, the busy share, and the share of every field about idling."""
        shares: dict[str, dict[str, float]] = {}
        for seen in self._seen.values():
            # The first was not seen to change: nobody knows how old it is.
            if len(seen) < 3:
                continue
            (at, first), (end, last) = seen[1], seen[-1]
            batches = last["batches"] - first["batches"]
            stage = shares.setdefault(last["node"].rpartition("/")[2], {})
            stage["fill"] = (last["rows"] - first["rows"]) / (batches * last["max_rows"]) if batches else 0.0
            stage["busy"] = (last["busy_s"] - first["busy_s"]) / (end - at)
            for name in last:
                if "idle" in name and name.endswith("_s"):
                    stage[name.removesuffix("_s")] = (last[name] - first[name]) / (end - at)
        return shares
