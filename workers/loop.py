"""The worker's main loop: claim, assemble, forward, commit. Runs in the child; everything it needs is handed to it."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import redis

from torchrelay.errors import BytesLost
from torchrelay.queues.channel import Channel
from torchrelay.queues.codec import Message
from torchrelay.queues.job import Failure
from torchrelay.queues.scripts import script
from torchrelay.queues.transitions import Output, Session
from torchrelay.workers import progress
from torchrelay.workers.assemble import Assembler
from torchrelay.workers.claimer import Claimer, Held
from torchrelay.workers.committer import Charge, Committer
from torchrelay.workers.compute import Failed, GivenUp, Outcome, Runs, compute, told
from torchrelay.workers.custody import Custody, makers_of
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import patiently
from torchrelay.workers.progress import Progress, ProgressPage
from torchrelay.workers.storage import SharedMemory, Storage
from torchrelay.workers.work import Incoming, Work

log = logging.getLogger("torchrelay.worker")
_SLOW_S = 0.02


class StageLoop:
    """Serves one node until `stopping()` says so, then gives back what it holds."""

    def __init__(
        self,
        context: NodeContext,
        runner: Runs,
        client: redis.Redis,
        page: ProgressPage,
        stopping: Callable[[], bool],
        memory: SharedMemory,
    ) -> None:
        session = Session(context.incarnation)
        channel = Channel(client)
        self._context = context
        self._runner = runner
        self._page = page
        self._stopping = stopping
        self._channel = channel
        self._client = client
        self.claimer = Claimer(context, channel, session)
        self._memory = memory
        self.custody = Custody(memory.reader, memory.placer.writer)
        self.committer = Committer(context, channel, session, self.custody.settle)
        memory.placer.before_waiting = partial(self.committer.flush, everything=True)
        self._storage = Storage(context, client, memory, self.custody)
        self._assembler: Assembler[Held] = Assembler(
            context.pipeline.graph, context.node, self._storage.fetch, context.pipeline.spec.limits.rows_per_job
        )
        self._loaded_at = -1
        self._jobs = self._rows = self._batches = 0
        self._busy_s = 0.0
        self._forward_at = 0.0

    def run(self) -> None:
        """The loop. Returns after a drain; raises when the server or this worker is beyond help."""
        self._report()
        try:
            while not self._stopping():
                self._load_scripts()
                batch = self._next_batch()
                if batch:
                    self._serve(batch)
                self.committer.flush()
                self._memory.tend()
            self._report(state=progress.DRAINING)
            self.committer.release(self.claimer.surrender())
            self.committer.drain()
        except Exception:
            # What ends the loop here is no fault of the jobs under way: none of them is a suspect.
            self._report()
            raise
        finally:
            self._channel.close()
            self.custody.close()

    def _load_scripts(self) -> None:
        """A server that is new to them would refuse the first commit, and its answer may be read a forward later."""
        if self._loaded_at != self._channel.reconnects:
            self._loaded_at = self._channel.reconnects
            for name in ("claim", "commit", "fail", "release"):
                patiently(partial(self._client.script_load, script(name).source))

    def _next_batch(self) -> list[Held]:
        """Jobs for one forward: a full batch, or what came within `max_wait_ms`. Empty after an idle second."""
        rules = self._context.spec.batch
        if not self.claimer.window:
            self._top_up()
            if not self.claimer.window:
                self.committer.drain()
                if self.claimer.idle():
                    self._report()
                    self.claimer.wait()
                return []
        deadline = self.claimer.window[0].claimed_at + rules.max_wait_ms / 1000.0
        while self.claimer.window_rows < rules.max_rows and not self._stopping():
            if self.claimer.ready_left and self._top_up():
                continue
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            self.committer.drain()
            self._report()
            self.claimer.wait(remaining)
        batch = self.claimer.take(rules.max_rows)
        self.claimer.ask_ahead()
        return batch

    def _top_up(self) -> bool:
        self.claimer.ask_ahead()
        before = len(self.claimer.window)
        got = self.claimer.collect()
        if got:
            self._note(before)
        return got

    def _note(self, start: int = 0) -> None:
        window = self.claimer.window
        self.committer.opened(window[i] for i in range(start, len(window)))

    def _serve(self, batch: list[Held]) -> None:
        now_ms = self.claimer.server_ms()
        late = [h for h in batch if 0 < h.entry.deadline_ms <= now_ms]
        if late:
            # Given back, they are ended by the next claim or by the upkeep; they must not start.
            self.committer.release(late)
            batch = [h for h in batch if not 0 < h.entry.deadline_ms <= now_ms]
        last = self._context.spec.retry.attempts - 1
        opened = self._assembler.open_all(
            Incoming(h, h.entry.payloads, h.entry.rows, h.entry.keep, h.entry.attempts >= last) for h in batch
        )
        # What does not decode may be bytes that were somebody else's by then.
        gone = [(h, read) for h, _ in opened.bad if (read := self.custody.gone(h))]
        if len(gone) < len(opened.bad):
            stale = {id(h) for h, _ in gone}
            faults = [(h, Failed(e, final=isinstance(e, BytesLost))) for h, e in opened.bad if id(h) not in stale]
            self._fail([self._charge(h, failed) for h, failed in faults])
        self._lose([*opened.lost, *((h, makers_of(read)) for h, read in gone)])
        if opened.ready:
            if self._slow(sum(w.total for w in opened.ready)):
                # What is finished must not wait for a long forward to end.
                self.committer.drain()
            self._compute(opened.ready)

    def _slow(self, rows: int) -> bool:
        rate = self.claimer.rows_per_s
        return rate == 0 or rows / rate > _SLOW_S

    def _compute(self, works: list[Work[Held]]) -> None:
        started = time.monotonic()
        for group in compute(works, self._runner, self._context.spec.batch.max_rows, self):
            self._settle(group)
        self._jobs += len(works)
        rate = sum(w.job.entry.rows for w in works) / max(time.monotonic() - started, 1e-6)
        claimer = self.claimer
        claimer.rows_per_s = rate if claimer.rows_per_s == 0 else 0.8 * claimer.rows_per_s + 0.2 * rate
        self._report()

    def _settle(self, group: Sequence[tuple[Work[Held], Outcome]]) -> None:
        """Writes the group's blobs in one go, then commits its jobs; charges those that failed."""
        later: list[tuple[Held, Output]] = []
        blobs: dict[int, dict[str, Message]] = {}
        failed: list[Charge] = []
        given_up: list[Held] = []
        lost: list[tuple[Held, int]] = []
        for work, outcome in group:
            if not self._intact(work.job, lost, given_up):
                # Whatever was computed, or raised, may come from bytes that were somebody else's by then.
                continue
            if isinstance(outcome, Failed):
                failed.append(self._charge(work.job, outcome))
                continue
            if isinstance(outcome, GivenUp):
                given_up.append(work.job)
                continue
            try:
                closed = self._assembler.close(work, outcome)
                output, large = self._storage.place(work.job, closed, work.riding.meta)
            except Exception as error:
                # The stage returned something that cannot travel: its failure, as if it had raised. Nothing of this
                # waits for the server, so whatever went wrong is this job's, and must not end the worker.
                failed.append(self._charge(work.job, Failed(error)))
                continue
            if large:
                blobs.setdefault(work.job.lane, {}).update(large)
                later.append((work.job, output))
            elif self._intact(work.job, lost, given_up):
                self.committer.commit(work.job, output)
        self._storage.write(blobs)
        for job, output in later:
            if self._intact(job, lost, given_up):
                self.committer.commit(job, output)
        self._lose(lost)
        if failed:
            self._fail(failed)
        if given_up:
            self.committer.release(given_up)

    def _intact(self, job: Held, lost: list[tuple[Held, int]], given_up: list[Held]) -> bool:
        """Whether what the job read is still what it was; asked again once its outputs, which may be views of that,
        were copied."""
        gone = self.custody.gone(job)
        if gone and all(read.durable for read in gone):
            given_up.append(job)
        elif gone:
            lost.append((job, makers_of(gone)))
        return not gone

    def _lose(self, lost: Sequence[tuple[Held, int]]) -> None:
        if lost:
            gone = Failed(None, error_type="BytesLost", message="the bytes of an input column are gone")
            self.committer.lose(lost, self._failure(gone))

    # What `compute` tells: it is this worker's Meter.

    def started(self, works: Sequence[Work[Held]]) -> None:
        self._forward_at = time.monotonic()
        self._report(works)

    def stopped(self, rows: int) -> None:
        """The forward is over: what follows may wait for the server, and is no fault of these jobs."""
        self._busy_s += time.monotonic() - self._forward_at
        self._batches += 1
        self._rows += rows
        self._report()

    def ended(self, works: Sequence[Work[Held]]) -> Sequence[bool]:
        return self._storage.ended([w.job for w in works])

    def goes_on(self, works: Sequence[Work[Held]]) -> bool:
        """Not after SIGTERM: a job of many forwards would outlast the grace time, and be killed and suspected."""
        return not self._stopping() and not all(self.ended(works))

    def _fail(self, failed: Sequence[Charge]) -> None:
        self.claimer.expect(self.committer.fail(failed))

    def _charge(self, held: Held, failed: Failed) -> Charge:
        return Charge(held, self._failure(failed), failed.final, failed.after_s)

    def _failure(self, failed: Failed) -> Failure:
        error = failed.error
        trace = "".join(traceback.format_exception(error)) if error else ""
        kind = failed.error_type or type(error).__name__
        message = failed.message or (told(error) if error else "")
        return Failure(self._context.node.name, kind, message, trace, self._context.worker)

    def _report(self, works: Sequence[Work[Held]] = (), state: int = progress.READY) -> None:
        self._page.write(
            Progress(
                state=state,
                forward_since=time.monotonic() if works else 0.0,
                beat=time.monotonic(),
                jobs=self._jobs,
                rows=self._rows,
                batches=self._batches,
                busy_s=self._busy_s,
                failures=self.committer.failures,
                moved=self._memory.moved(),
                fences=(*self.committer.fences, *self.claimer.asked_fences),
                started=b"".join([w.job.entry.packed for w in works]),
            )
        )
