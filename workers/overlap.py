"""The worker's main loop where the steps run side by side, so that a device never waits for claims, copies or commits.

    input thread    claim, open, put batches together, start their copies to the device      -> `ahead` batches prepared
    device thread   (the main thread: device and inference mode are per thread) forward      -> two batches launched
    output thread   wait for the device, split, write, commit; all that is given back goes through it

A batch that fails is computed again on the device thread by `compute`, which finds out whose fault it is; until then
nothing else is launched.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torchrelay.errors import InputError
from torchrelay.stages import Made
from torchrelay.stages.faults import is_out_of_memory, let_go
from torchrelay.stages.runner import Launched, Prepared, Runner
from torchrelay.workers import progress
from torchrelay.workers.claimer import Held
from torchrelay.workers.column_exports import ColumnExports
from torchrelay.workers.compute import Failed, GivenUp, Outcome, compute, judged
from torchrelay.workers.handoff import Handoff
from torchrelay.workers.intake import Intake, Taken
from torchrelay.workers.parts import Meter, Parts, Surroundings
from torchrelay.workers.pieces import Part, cut
from torchrelay.workers.work import Work

LAUNCHED = 2
_FAULTS = (Exception, SystemExit)
_LEAVING = 8
_SWITCH_S = 0.0002
_JOIN_S = 0.005
_IDLE_S = 0.5
# How long a worker that ends waits for those that copy from its device.
_HAND_OVER_S = 5.0

Works = list[Work[Held]]


@dataclass(slots=True)
class _Batch:
    """Jobs, or parts of jobs, on their way through the threads; where nothing is prepared, they take the way of
    `compute`. `fault` is what they raised, `number` that of their forward once there was one."""

    parts: list[Part[Held]]
    prepared: Prepared | None = None
    launched: Launched | None = None
    fault: BaseException | None = None
    number: int = -1
    started_at: float = 0.0

    def failed(self, fault: BaseException) -> None:
        """Lets go of what the forward took, and of the fault where memory was full for once: it may pass the next time.
        Anything else need not be tried as a whole again."""
        self.prepared = self.launched = None
        if is_out_of_memory(fault):
            let_go(fault)
        else:
            self.fault = fault

    @property
    def works(self) -> Works:
        return [part.work for part in self.parts]

    @property
    def jobs(self) -> list[Held]:
        return [part.work.job for part in self.parts]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def take_back(self) -> Works:
        """The jobs of which nobody is to use the other parts either; those that were taken back before are left out."""
        if any(part.gathering is not None for part in self.parts):
            self.fault = None  # what some rows of a job raised says nothing of the others
        return [p.work for p in self.parts if p.gathering is None or p.gathering.breaks()]


@dataclass(slots=True)
class _Leaving:
    """What the output thread is to settle: a launched batch, or what is known already."""

    batch: _Batch | None = None
    group: list[tuple[Work[Held], Outcome]] = field(default_factory=list)
    turned_away: Taken | None = None


class OverlappedLoop:
    """Serves one node until `around.stopping()` says so, then gives back what it holds."""

    def __init__(self, around: Surroundings, runner: Runner, ahead: int) -> None:
        self._around = around
        self._runner = runner
        self._parts = Parts(around, threads=True)
        self._meter = Meter(self._parts)
        self._exports = ColumnExports.of(around.context, around.memory, self._parts.storage)
        self._ready: Handoff[_Batch] = Handoff(ahead)
        self._leaving: Handoff[_Leaving] = Handoff(_LEAVING)
        # How many batches may be launched and not finished.
        self._room = threading.Semaphore(LAUNCHED)
        self._error: BaseException | None = None
        self._finished_at = 0.0
        self.threads = [
            threading.Thread(target=self._guarded, args=(side,), name=f"torchrelay-{name}", daemon=True)
            for name, side in (("input", self._take_in), ("output", self._let_out))
        ]

    def run(self) -> None:
        """The loop. Returns after a drain; raises when the server or this worker is beyond help."""
        parts = self._parts
        # A thread that computes in Python would keep the device thread from launching for the usual 5 ms.
        sys.setswitchinterval(_SWITCH_S)
        self._runner.overlap()
        parts.load_scripts()
        parts.status.watch_memory(self._runner.memory)
        parts.status.report()
        for thread in self.threads:
            thread.start()
        try:
            self._guarded(self._drive)
            if self._error is not None:
                parts.status.none_running()
            while (left := self._ready.get(0.0)) is not None:
                self._give_up(left)  # the input thread may be waiting for its place on the device
            for thread in self.threads:
                thread.join()
            if self._error is not None:
                raise self._error
            self._around.memory.hand_over(_HAND_OVER_S)
        finally:
            parts.close()

    def _guarded(self, side: Callable[[], None]) -> None:
        """Whichever thread cannot go on ends the others."""
        try:
            side()
        except BaseException as error:
            self._error = self._error or error
            self._ready.close()
            self._leaving.close()

    # The input thread.

    def _take_in(self) -> None:
        parts = self._parts
        intake = parts.intake(lambda: parts.status.report(), self._stopping)
        while not self._stopping():
            parts.load_scripts()
            self._around.memory.tend_read()
            self._make_ready(intake.next_batch(), intake)
        self._leaving.put(_Leaving(turned_away=intake.surrender()))
        self._ready.close()

    def _make_ready(self, taken: Taken | None, intake: Intake, *, within: bool = False) -> None:
        """In pieces; between those of a long job, what is better in rank goes first."""
        if taken is None:
            return
        if taken.bad or taken.lost or taken.given_back:
            self._leaving.put(_Leaving(turned_away=Taken([], taken.bad, taken.lost, taken.given_back)))
        for number, pieces in enumerate(self._cut(taken.ready)):
            while number and not within and not self._stopping() and self._parts.something_better(taken.ready):
                self._make_ready(intake.next_batch(at_once=True), intake, within=True)
            batch = self._prepared(pieces)
            if not self._ready.put(batch):
                self._give_up(batch)

    def _cut(self, works: Works) -> list[list[Part[Held]]]:
        """A suspect comes whole: it has the device to itself, so that if it kills the process, nobody else can have
        done it. So do jobs of a stage that makes more or fewer rows: they could not be put together from parts."""
        planner = self._parts.planner(works)
        if self._around.context.node.rows == "expand" or any(w.job.entry.suspect for w in works):
            return [[Part(w) for w in batch] for batch in planner.batches(works)]
        return cut(works, planner)

    def _prepared(self, pieces: list[Part[Held]]) -> _Batch:
        one = pieces[0].work if len(pieces) == 1 and pieces[0].chosen is None else None
        works = [piece.work for piece in pieces]
        if one is not None and (one.job.entry.suspect or self._parts.planner(works).too_large(one)):
            return _Batch(pieces)
        try:
            prepared = self._runner_of(works).prepare(
                [piece.table for piece in pieces],
                [piece.rows for piece in pieces],
                [w.fields for w in works],
                lambda: self._meter.ended(works),
            )
        except Exception:
            # Whose fault it is, `compute` finds out, on the thread that may call the stage.
            return _Batch(pieces)
        return _Batch(pieces, prepared)

    def _runner_of(self, works: Works) -> Runner:
        return self._parts.runner(self._runner, works)

    def _stopping(self) -> bool:
        return self._error is not None or self._around.stopping()

    # The device thread.

    def _drive(self) -> None:
        while not (self._ready.over and self._all_finished() and self._ready.empty):
            batch = self._ready.get(_IDLE_S)
            if batch is None:
                continue
            stops = self._error is not None or (self._around.stopping() and batch.number < 0)
            if stops or self._is_useless(batch):
                self._give_up(batch)
            elif batch.prepared is None:
                self._compute(batch)
            else:
                self._launch(batch, batch.prepared)
        self._leaving.close()

    def _is_useless(self, batch: _Batch) -> bool:
        """Whether nobody waits for these parts of jobs: they were taken back, or ended while others were computed."""
        gatherings = [part.gathering for part in batch.parts]
        if not all(gatherings):
            return False
        return all(g is not None and g.broken for g in gatherings) or all(
            self._meter.ended([part.work for part in batch.parts])
        )

    def _all_finished(self) -> bool:
        """Waits for what is launched; also true when nobody is there any more to finish it."""
        free = 0
        while free < LAUNCHED and self._error is None:
            free += self._room.acquire(timeout=_IDLE_S)
        for _ in range(free):
            self._room.release()
        return True

    def _launch(self, batch: _Batch, prepared: Prepared) -> None:
        while not self._room.acquire(timeout=_IDLE_S):
            if self._error is not None:
                self._give_up(batch)
                return
        status = self._parts.status
        batch.number = status.started(batch.jobs)
        batch.started_at = time.monotonic()
        try:
            exports = None if self._exports is None else self._exports.batch(batch.parts)
            batch.launched = self._runner_of(batch.works).launch(prepared, exports)
        except _FAULTS as error:
            batch.failed(error)
        if batch.launched is None:
            status.stopped(batch.number, 0)
            self._room.release()
            # Out of the except block: an exception that is being handled holds the memory of the calls it came through.
            self._compute(batch)
            return
        if batch.launched.arrived:
            status.stopped(batch.number, batch.rows)
        else:
            status.launched(batch.number)
        self._leaving.put(_Leaving(batch))

    def _compute(self, batch: _Batch) -> None:
        """One step after the other, with nothing else on the device."""
        self._all_finished()
        if self._error is not None:
            return
        works, started = batch.take_back(), time.monotonic()
        runner, planner = self._runner_of(works), self._parts.planner(works)
        for group in compute(works, runner, planner, self._meter, batch.fault):
            self._leaving.put(_Leaving(group=group))
        self._parts.status.ended(len(works))
        self._parts.measured(sum(w.rows for w in works), time.monotonic() - started)

    def _give_up(self, batch: _Batch) -> None:
        if batch.prepared is not None:
            batch.prepared.discard()
        self._leaving.put(_Leaving(group=[(w, GivenUp()) for w in batch.take_back()]))

    # The output thread.

    def _let_out(self) -> None:
        parts = self._parts
        while not self._leaving.over:
            leaving = self._leaving.get(_JOIN_S if parts.committer.waiting else _IDLE_S)
            if leaving is None:
                # Nothing is coming: what waits to be joined with more, or for its answer, waits no longer.
                parts.committer.drain()
            elif leaving.batch is not None:
                self._finish(leaving.batch)
            elif leaving.turned_away is not None:
                parts.settler.turned_away(leaving.turned_away)
            else:
                parts.settler.settle(leaving.group)
            parts.commits.poll()
            parts.committer.flush()
            self._around.memory.tend_written()
        parts.status.report(progress.DRAINING)
        parts.committer.drain()

    def _finish(self, batch: _Batch) -> None:
        parts, launched, works = self._parts, batch.launched, batch.works
        runner = self._runner_of(works)
        assert launched is not None  # put there by the device thread
        parts.status.awaited(batch.number)
        try:
            made = runner.finish(launched)
        except _FAULTS as error:
            parts.status.stopped(batch.number, 0)
            batch.failed(error)
            self._ready.put_first(batch)
            self._room.release()
            return
        parts.status.stopped(batch.number, batch.rows, runner.idle_s)
        parts.planner(works).cap.fitted(batch.rows)
        self._room.release()
        now = time.monotonic()
        parts.measured(batch.rows, now - max(batch.started_at, self._finished_at))
        self._finished_at = now
        done = [outcome for part, m in zip(batch.parts, made, strict=True) for outcome in _outcomes(part, m)]
        parts.settler.settle(done)
        parts.status.ended(len(done))


def _outcomes(part: Part[Held], made: Made) -> list[tuple[Work[Held], Outcome]]:
    """What is known of the part's job now: nothing before its last part is there."""
    gathering = part.gathering
    if gathering is None or part.chosen is None:
        return [(part.work, judged(part.work, made))]
    if not gathering.add(part.chosen, made):
        return []
    try:
        return [(part.work, judged(part.work, gathering.whole()))]
    except InputError as error:
        return [(part.work, Failed(error))]
