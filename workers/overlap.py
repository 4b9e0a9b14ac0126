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
from torchrelay.workers.compute import Failed, GivenUp, Outcome, compute, judged
from torchrelay.workers.handoff import Handoff
from torchrelay.workers.intake import Taken
from torchrelay.workers.parts import Meter, Parts, Surroundings
from torchrelay.workers.pieces import Part, cut
from torchrelay.workers.work import Work

LAUNCHED = 2
_FAULTS = (Exception, SystemExit)
_LEAVING = 8
_SWITCH_S = 0.0002
_JOIN_S = 0.005
_IDLE_S = 0.5

Works = list[Work[Held]]


@dataclass(slots=True)
class _Batch:
    """Jobs, or parts of jobs, on their way through the threads; `alone`, they take the way of `compute`. `fault` is
    what they raised."""

    parts: list[Part[Held]]
    prepared: Prepared | None = None
    launched: Launched | None = None
    fault: BaseException | None = None
    number: int = -1
    started_at: float = 0.0
    alone: bool = False

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
        self._ready: Handoff[_Batch] = Handoff(ahead)
        self._again: Handoff[_Batch] = Handoff(1 << 30)
        self._leaving: Handoff[_Leaving] = Handoff(_LEAVING)
        # How many batches may be launched and not finished.
        self._room = threading.Semaphore(LAUNCHED)
        self._error: BaseException | None = None
        self._finished_at = 0.0

    def run(self) -> None:
        """The loop. Returns after a drain; raises when the server or this worker is beyond help."""
        parts = self._parts
        # A thread that computes in Python would keep the device thread from launching for the usual 5 ms.
        sys.setswitchinterval(_SWITCH_S)
        self._runner.overlap()
        parts.load_scripts()
        parts.status.report()
        threads = [
            threading.Thread(target=self._guarded, args=(side,), name=f"torchrelay-{name}", daemon=True)
            for name, side in (("input", self._take_in), ("output", self._let_out))
        ]
        for thread in threads:
            thread.start()
        try:
            self._guarded(self._drive)
            while (left := self._ready.get(0.0)) is not None:
                self._give_up(left)  # the input thread may be waiting for its place on the device
            for thread in threads:
                thread.join()
            if self._error is not None:
                parts.status.none_running()
                raise self._error
        finally:
            parts.close()

    def _guarded(self, side: Callable[[], None]) -> None:
        """Whichever thread cannot go on ends the others."""
        try:
            side()
        except BaseException as error:
            self._error = self._error or error
            self._ready.close()
            self._again.close()
            self._leaving.close()

    # The input thread.

    def _take_in(self) -> None:
        parts, intake = self._parts, self._parts.intake(lambda: parts.status.report())
        while not self._stopping():
            parts.load_scripts()
            self._around.memory.tend_read()
            taken = intake.next_batch()
            if taken is None:
                continue
            if taken.bad or taken.lost or taken.given_back:
                self._leaving.put(_Leaving(turned_away=Taken([], taken.bad, taken.lost, taken.given_back)))
            for pieces in self._cut(taken.ready):
                batch = self._prepared(pieces)
                if not self._ready.put(batch):
                    self._give_up(batch)
        self._leaving.put(_Leaving(turned_away=intake.surrender()))
        self._ready.close()

    def _cut(self, works: Works) -> list[list[Part[Held]]]:
        if self._around.context.node.rows == "expand":
            # What becomes of each row is not as many rows for all, so a job is not put together from parts.
            return [[Part(w) for w in batch] for batch in self._parts.planner.batches(works)]
        return cut(works, self._parts.planner)

    def _prepared(self, pieces: list[Part[Held]]) -> _Batch:
        one = pieces[0].work if len(pieces) == 1 and pieces[0].chosen is None else None
        if one is not None and (one.incoming.keep or self._parts.planner.too_large(one)):
            return _Batch(pieces, alone=True)
        works = [piece.work for piece in pieces]
        try:
            prepared = self._runner.prepare(
                [piece.table for piece in pieces],
                [piece.rows for piece in pieces],
                [w.fields for w in works],
                lambda: self._meter.ended(works),
            )
        except Exception:
            # Whose fault it is, `compute` finds out, on the thread that may call the stage.
            return _Batch(pieces, alone=True)
        return _Batch(pieces, prepared)

    def _stopping(self) -> bool:
        return self._error is not None or self._around.stopping()

    # The device thread.

    def _drive(self) -> None:
        while True:
            again = self._again.get(0.0)
            batch = again or self._ready.get(_IDLE_S)
            if batch is None:
                if self._ready.over and self._all_finished():
                    break
                continue
            if again is None and (self._stopping() or self._is_useless(batch)):
                self._give_up(batch)
            elif batch.alone or batch.prepared is None:
                self._compute(batch)
            else:
                self._launch(batch, batch.prepared)
        self._again.close()
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
        """Waits for what is launched; False when some of it is to be computed again."""
        if self._error is not None:
            return True
        for _ in range(LAUNCHED):
            while not self._room.acquire(timeout=_IDLE_S):
                if self._error is not None:
                    return True
        for _ in range(LAUNCHED):
            self._room.release()
        return self._again.empty

    def _launch(self, batch: _Batch, prepared: Prepared) -> None:
        while not self._room.acquire(timeout=_IDLE_S):
            if self._error is not None:
                prepared.discard()
                return
        batch.number = self._parts.status.started(batch.jobs)
        batch.started_at = time.monotonic()
        try:
            batch.launched = self._runner.launch(prepared)
        except _FAULTS as error:
            batch.fault = _remembered(error)
            batch.prepared = None
            self._parts.status.stopped(batch.number, 0)
            self._room.release()
        else:
            self._leaving.put(_Leaving(batch))
            return
        # Out of the except block: an exception that is being handled holds the memory of the calls it came through.
        self._compute(batch)

    def _compute(self, batch: _Batch) -> None:
        """One step after the other, with nothing else on the device."""
        self._all_finished()
        works, started = batch.take_back(), time.monotonic()
        for group in compute(works, self._runner, self._parts.planner, self._meter, batch.fault):
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
        parts, launched = self._parts, batch.launched
        assert launched is not None  # put there by the device thread
        try:
            made = self._runner.finish(launched)
        except _FAULTS as error:
            parts.status.stopped(batch.number, 0)
            batch.alone, batch.fault = True, _remembered(error)
            self._again.put(batch)
            self._room.release()
            return
        parts.status.stopped(batch.number, batch.rows, self._runner.idle_s)
        self._room.release()
        now = time.monotonic()
        parts.measured(batch.rows, now - max(batch.started_at, self._finished_at))
        self._finished_at = now
        parts.planner.cap.fitted(batch.rows)
        done = [outcome for part, m in zip(batch.parts, made, strict=True) for outcome in _outcomes(part, m)]
        parts.settler.settle(done)
        parts.status.ended(len(done))


def _remembered(fault: BaseException) -> BaseException | None:
    """What a batch raised, so that it need not be tried as a whole again; nothing where memory was full for once."""
    if not is_out_of_memory(fault):
        return fault
    let_go(fault)
    return None


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
