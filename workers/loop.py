"""The worker's main loop where one step follows the other: claim, assemble, forward, commit. See `overlap` for the one
that does them side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torchrelay.stages import Runner
from torchrelay.workers import progress
from torchrelay.workers.claimer import Held
from torchrelay.workers.compute import compute
from torchrelay.workers.intake import Intake, Taken
from torchrelay.workers.parts import Meter, Parts, Surroundings
from torchrelay.workers.work import Work

_SLOW_S = 0.02


class StageLoop:
    """Serves one node, or several that are fused, until `around.stopping()` says so, then gives back what it holds."""

    def __init__(self, around: Surroundings, runner: Runner) -> None:
        self._around = around
        self._runner = runner
        self._parts = Parts(around, threads=False)
        self._meter = Meter(self._parts, self._let_through)
        self._intake: Intake | None = None
        self._within = False
        self._aside_s = 0.0

    def run(self) -> None:
        """The loop. Returns after a drain; raises when the server or this worker is beyond help."""
        parts = self._parts
        self._intake = intake = parts.intake(self._rest, self._around.stopping)
        parts.status.watch_memory(self._runner.memory)
        parts.status.report()
        try:
            while not self._around.stopping():
                parts.load_scripts()
                self._serve(intake.next_batch())
                parts.committer.flush()
                self._around.memory.tend_written()
                self._around.memory.tend_read()
            parts.status.report(progress.DRAINING)
            parts.settler.turned_away(intake.surrender())
            parts.committer.drain()
        except Exception:
            parts.status.none_running()
            raise
        finally:
            parts.close()

    def _serve(self, taken: Taken | None) -> None:
        if taken is not None:
            self._parts.settler.turned_away(taken)
            if taken.ready:
                self._compute(taken.ready)

    def _let_through(self, works: Sequence[Work[Held]]) -> None:
        """Between two forwards of a long job, what is better in rank goes first."""
        if self._within or self._intake is None:
            return
        self._within, began = True, time.monotonic()
        try:
            while self._parts.something_better(works) and not self._around.stopping():
                self._serve(self._intake.next_batch(at_once=True))
                self._parts.committer.drain()
        finally:
            self._within = False
            self._aside_s += time.monotonic() - began

    def _rest(self) -> None:
        parts = self._parts
        parts.committer.drain()
        parts.status.report()

    def _compute(self, works: list[Work[Held]]) -> None:
        parts = self._parts
        if self._slow(sum(w.total for w in works)):
            # What is finished must not wait for a long forward to end.
            parts.committer.drain()
        started, aside_s = time.monotonic(), self._aside_s
        runner = parts.runner(self._runner, works)
        for group in compute(works, runner, parts.planner(works), self._meter):
            parts.settler.settle(group)
        seconds = time.monotonic() - started - (self._aside_s - aside_s)
        parts.measured(sum(w.job.entry.rows for w in works), seconds)
        parts.status.ended(len(works))

    def _slow(self, rows: int) -> bool:
        rate = self._parts.claimer.rows_per_s
        return rate == 0 or rows / rate > _SLOW_S
