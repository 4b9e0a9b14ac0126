"""Who waits in an AsyncRelay's loop, and what is done for them meanwhile: warnings, looks for other clients' jobs."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from torchrelay.producer.async_futures import AsyncJobFuture
from torchrelay.producer.core import FOREIGN_POLL_S, WARN_AFTER_S, Core

log = logging.getLogger("torchrelay.producer")


class Waits:
    """Futures that are awaited. Its methods are called in the loop; `run` takes a function to a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, core: Core, run: Callable[..., Awaitable[Any]]) -> None:
        self._loop = loop
        self._core = core
        self._run = run
        self._futures: Counter[AsyncJobFuture[Any]] = Counter()
        self._refs: Counter[str] = Counter()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._foreign: asyncio.Task[None] | None = None
        self._poll_s = FOREIGN_POLL_S[0]

    def begin(self, future: AsyncJobFuture[Any]) -> None:
        """A task begins to wait for this future."""
        self._futures[future] += 1
        self.begin_for(future.pipeline)
        if future.job.foreign:
            self._poll_s = FOREIGN_POLL_S[0]
            if self._foreign is None or self._foreign.done():
                self._foreign = self._loop.create_task(self._read_foreign())

    def end(self, future: AsyncJobFuture[Any]) -> None:
        """A task waits for it no longer."""
        self._futures[future] -= 1
        if not self._futures[future]:
            del self._futures[future]
        self.end_for(future.pipeline)

    def begin_for(self, ref: str) -> None:
        """Somebody begins to wait for jobs of this pipeline version."""
        self._refs[ref] += 1
        if ref and ref not in self._timers:
            self._timers[ref] = self._loop.call_later(WARN_AFTER_S, self._overdue, ref)

    def end_for(self, ref: str) -> None:
        self._refs[ref] -= 1
        if not self._refs[ref]:
            del self._refs[ref]
            if ref in self._timers:
                self._timers.pop(ref).cancel()

    def close(self) -> None:
        """Ends every wait with an error."""
        for future in list(self._futures):
            future.wake(self._core.closed_while_waiting(future.job))
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for task in (*self._tasks, *([self._foreign] if self._foreign else [])):
            task.cancel()

    def _overdue(self, ref: str) -> None:
        self._timers[ref] = self._loop.call_later(WARN_AFTER_S, self._overdue, ref)
        task = self._loop.create_task(self._warn(ref))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _warn(self, ref: str) -> None:
        for text in await self._run(self._core.unserved_hints, ref):
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    async def _read_foreign(self) -> None:
        """All jobs of other clients that are waited for, in few round trips, ever more seldom."""
        while foreign := [f for f in self._futures if f.job.foreign]:
            try:
                await self._run(self._core.read_foreign, [f.job for f in foreign])
            except Exception as error:
                for future in foreign:
                    future.wake(error)
            await asyncio.sleep(self._poll_s)
            self._poll_s = min(self._poll_s * 2, FOREIGN_POLL_S[1])
