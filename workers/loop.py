"""The worker's main loop: claim, assemble, forward, commit. Runs in the child; everything it needs is handed to it."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import redis

from torchrelay.config.columns import Column
from torchrelay.errors import InputError
from torchrelay.queues.channel import Channel
from torchrelay.queues.job import Failure
from torchrelay.queues.scripts import script
from torchrelay.queues.transitions import Output, Session
from torchrelay.workers import progress
from torchrelay.workers.assemble import Assembler, Work
from torchrelay.workers.claimer import Claimer, Held
from torchrelay.workers.committer import Committer
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import patiently
from torchrelay.workers.progress import Progress, ProgressPage

log = logging.getLogger("torchrelay.worker")
_SLOW_S = 0.02


class Runs(Protocol):
    """What computes a batch: per-job tables in, per-job tables out."""

    def run(
        self, tables: Sequence[Mapping[str, Column]], rows: Sequence[int], meta: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Column]]: ...


class StageLoop:
    """Serves one node until `stopping()` says so, then gives back what it holds."""

    def __init__(
        self,
        context: NodeContext,
        runner: Runs,
        client: redis.Redis,
        page: ProgressPage,
        stopping: Callable[[], bool],
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
        self.committer = Committer(context, channel, session, client)
        self._assembler = Assembler(context, client)
        self._loaded_at = -1
        self._jobs = self._rows = self._batches = 0
        self._busy_s = 0.0

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
            self._report(state=progress.DRAINING)
            self.committer.release(self.claimer.surrender())
            self.committer.drain()
        except Exception:
            # What ends the loop here is no fault of the jobs under way: none of them is a suspect.
            self._report()
            raise
        finally:
            self._channel.close()

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
        ready, bad, lost = self._assembler.open_all(batch)
        if bad:
            self._fail([(h, self._failure(error)) for h, error in bad])
        if lost:
            self.committer.lose(lost, self._failure(None, "BytesLost", "the bytes of an input column are gone"))
        if ready:
            if self._slow(sum(w.held.entry.rows for w in ready)):
                # What is finished must not wait for a long forward to end.
                self.committer.drain()
            self._forward(ready)

    def _slow(self, rows: int) -> bool:
        rate = self.claimer.rows_per_s
        return rate == 0 or rows / rate > _SLOW_S

    def _forward(self, works: list[Work]) -> None:
        """Computes and commits; a batch that raises is halved until the jobs that raise stand alone."""
        self._report(works)
        started = time.monotonic()
        rows = [w.held.entry.rows for w in works]
        try:
            outputs = self._runner.run([w.table for w in works], rows, [w.fields for w in works])
        except (Exception, SystemExit) as error:
            self._busy_s += time.monotonic() - started
            self._report()
            if len(works) == 1:
                self._fail([(works[0].held, self._failure(error))])
            else:
                middle = len(works) // 2
                self._forward(works[:middle])
                self._forward(works[middle:])
            return
        elapsed = time.monotonic() - started
        # The forward is over: what follows may wait for the server, and is no fault of these jobs.
        self._report()
        self._commit(works, outputs)
        self._account(works, elapsed, time.monotonic() - started)

    def _commit(self, works: Sequence[Work], outputs: Sequence[Mapping[str, Column]]) -> None:
        """Writes the batch's blobs in one go, then commits its jobs."""
        closed: list[tuple[Held, Output]] = []
        blobs: dict[int, dict[str, bytes]] = {}
        for work, columns in zip(works, outputs, strict=True):
            try:
                output, large = self._assembler.close(work, columns)
            except InputError as error:
                # The stage returned something that cannot travel: its failure, as if it had raised.
                self._fail([(work.held, self._failure(error))])
                continue
            closed.append((work.held, output))
            if large:
                blobs.setdefault(work.held.lane, {}).update(large)
        for lane, named in blobs.items():
            self.committer.write_blobs(lane, named)
        for held, output in closed:
            self.committer.commit(held, output)

    def _account(self, works: list[Work], busy_s: float, total_s: float) -> None:
        rows = sum(w.held.entry.rows for w in works)
        self._jobs += len(works)
        self._rows += rows
        self._batches += 1
        self._busy_s += busy_s
        rate = rows / max(total_s, 1e-6)
        claimer = self.claimer
        claimer.rows_per_s = rate if claimer.rows_per_s == 0 else 0.8 * claimer.rows_per_s + 0.2 * rate
        self._report()

    def _fail(self, failed: Sequence[tuple[Held, Failure]]) -> None:
        self.claimer.expect(self.committer.fail(failed))

    def _failure(self, error: BaseException | None, kind: str = "", message: str = "") -> Failure:
        trace = "".join(traceback.format_exception(error)) if error else ""
        return Failure(
            self._context.node.name, kind or type(error).__name__, message or str(error), trace, self._context.worker
        )

    def _report(self, works: Sequence[Work] = (), state: int = progress.READY) -> None:
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
                fences=(*self.committer.fences, *self.claimer.asked_fences),
                started=b"".join([w.held.entry.packed for w in works]),
            )
        )
