"""How jobs leave: outputs written and committed, failures charged, the rest given back."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence

from torchrelay.errors import BytesLost
from torchrelay.queues.codec import HostMessage
from torchrelay.queues.job import Failure
from torchrelay.queues.transitions import Output
from torchrelay.workers.assemble import Assembler
from torchrelay.workers.claimer import Claimer, Held, weight
from torchrelay.workers.committer import Charge, Committer
from torchrelay.workers.compute import Failed, GivenUp, Outcome, told
from torchrelay.workers.custody import Custody, makers_of
from torchrelay.workers.intake import Taken
from torchrelay.workers.node import NodeContext
from torchrelay.workers.storage import Storage
from torchrelay.workers.work import Work


class Settler:
    """Settles jobs with the server, through one committer; `assemblers` are those of each of the worker's
    entrances. One thread calls it."""

    def __init__(
        self,
        context: NodeContext,
        assemblers: Sequence[Assembler[Held]],
        storage: Storage,
        committer: Committer,
        custody: Custody,
        claimer: Claimer,
    ) -> None:
        self._context = context
        self._entrances = context.entrances()
        self._assemblers = assemblers
        self._storage = storage
        self._committer = committer
        self._custody = custody
        self._claimer = claimer

    def turned_away(self, taken: Taken) -> None:
        """Jobs that never reached the stage."""
        if taken.given_back:
            self._committer.release(taken.given_back)
        # What does not decode may be bytes that were somebody else's by then.
        lost, again = list(taken.lost), list[Held]()
        sound = [(h, error) for h, error in taken.bad if self._intact(h, lost, again)]
        if again:
            self._committer.release(again)
        if sound:
            self._fail([self._charge(h, Failed(e, final=isinstance(e, BytesLost))) for h, e in sound])
        self._lose(lost)
        self._left([*taken.given_back, *(h for h, _ in taken.bad), *(h for h, _ in taken.lost)])

    def settle(self, group: Sequence[tuple[Work[Held], Outcome]]) -> None:
        """Writes the group's blobs in one go, then commits its jobs; charges those that failed."""
        later: list[tuple[Held, Output]] = []
        blobs: dict[int, dict[str, HostMessage]] = {}
        failed: list[Charge] = []
        given_up: list[Held] = []
        lost: list[tuple[Held, int]] = []
        # Most jobs are small, and touch no shared memory.
        reads = not self._custody.empty
        for work, outcome in group:
            job = work.job
            if reads and not self._intact(job, lost, given_up):
                # Whatever was computed, or raised, may come from bytes that were somebody else's by then.
                continue
            if isinstance(outcome, Failed):
                failed.append(self._charge(job, outcome))
                continue
            if isinstance(outcome, GivenUp):
                given_up.append(job)
                continue
            try:
                closed = self._assemblers[job.entrance].close(work, outcome)
                output, large = self._storage.place(job, closed, work.riding.meta)
            except Exception as error:
                # The stage returned something that cannot travel: its failure, as if it had raised. Nothing of this
                # waits for the server, so whatever went wrong is this job's, and must not end the worker.
                failed.append(self._charge(job, Failed(error)))
                continue
            if large:
                blobs.setdefault(job.lane, {}).update(large)
                later.append((job, output))
            elif not reads or self._intact(job, lost, given_up):
                self._committer.commit(job, output)
        self._storage.write(blobs)
        for job, output in later:
            if self._intact(job, lost, given_up):
                self._committer.commit(job, output)
        self._lose(lost)
        if failed:
            self._fail(failed)
        if given_up:
            self._committer.release(given_up)
        self._left(work.job for work, _ in group)

    def _left(self, held: Iterable[Held]) -> None:
        if self._claimer.in_hand.bounded:
            self._claimer.in_hand.left(sum(weight(h.entry) for h in held))

    def _intact(self, job: Held, lost: list[tuple[Held, int]], given_up: list[Held]) -> bool:
        """Whether what the job read is still what it was; asked again once its outputs, which may be views of that,
        were copied.

        Else there may be a copy in Redis by now, since somebody waited for it: whoever opens the job next finds it, or
        finds it lost. Of what lay on a device there is none.
        """
        gone = self._custody.gone(job)
        if any(read.exporter for read in gone):
            lost.append((job, makers_of(gone)))
        elif gone:
            given_up.append(job)
        return not gone

    def _fail(self, failed: Sequence[Charge]) -> None:
        self._claimer.expect(self._committer.fail(failed))

    def _lose(self, lost: Sequence[tuple[Held, int]]) -> None:
        if lost:
            gone = Failed(None, error_type="BytesLost", message="the bytes of an input column are gone")
            self._committer.lose(lost, self._failure(lost[0][0], gone))

    def _charge(self, held: Held, failed: Failed) -> Charge:
        return Charge(held, self._failure(held, failed), failed.final, failed.after_s)

    def _failure(self, held: Held, failed: Failed) -> Failure:
        error = failed.error
        trace = "".join(traceback.format_exception(error)) if error else ""
        kind = failed.error_type or type(error).__name__
        message = failed.message or (told(error) if error else "")
        stage = failed.stage or self._entrances[held.entrance].node.name
        return Failure(stage, kind, message, trace, self._context.worker)
