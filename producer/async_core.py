"""What AsyncRelay stands on: the core that both clients share, and the way between its threads and one event loop.

The loop never blocks: submits and cancels go to the sending thread, what else may take long to a small pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torchrelay.config.settings import Settings
from torchrelay.errors import InputError
from torchrelay.producer.async_futures import AsyncJobFuture
from torchrelay.producer.bridge import Bridge
from torchrelay.producer.core import Core, all_in
from torchrelay.producer.encoding import Draft, JobEncoder, SubmitOptions
from torchrelay.producer.futures import JobFuture
from torchrelay.producer.sender import Cancel, Request, Sender, orphans
from torchrelay.producer.waits import Waits

T = TypeVar("T")
_THREADS = 4
# All tasks share the sending thread: while one waits for room in shared memory, nobody sends.
_ROOM_S = 0.05


class AsyncCore:
    """The state of an AsyncRelay. Belongs to the loop in which it was started; every method is called there."""

    def __init__(self, settings: Settings) -> None:
        self.core = Core(settings, "AsyncRelay")
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._maps: set[asyncio.Event] = set()

    async def ready(self) -> asyncio.AbstractEventLoop:
        """The loop, once everything is opened. Raises InputError where `check` does."""
        if self._starting is None:
            if self.closed:
                raise self.core.is_closed()
            self._starting = asyncio.create_task(self._start())
        if self._loop is None:
            if self._starting.get_loop() is not asyncio.get_running_loop():
                raise self._wrong_loop()
            try:
                # Whoever is cancelled while it waits here does not take the others' start along.
                await asyncio.shield(self._starting)
            finally:
                if self._starting.done() and (self._starting.cancelled() or self._starting.exception()):
                    self._starting = None  # the next call tries again
        return self.check()

    def check(self) -> asyncio.AbstractEventLoop:
        """The running loop. Raises InputError in another loop than the one it was started in, and when closed."""
        if self.closed:
            raise self.core.is_closed()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            raise InputError("this AsyncRelay is not started; use `async with`, or await its start()")
        if loop is not self._loop:
            raise self._wrong_loop()
        return loop

    @staticmethod
    def _wrong_loop() -> InputError:
        return InputError("this AsyncRelay belongs to the event loop in which it was started; make one for each loop")

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.core.start)
        self.core.submitter.room_s = _ROOM_S
        self._pool = ThreadPoolExecutor(_THREADS, "torchrelay-io")
        self._bridge = Bridge(loop)
        self._waits = Waits(loop, self.core, self.run)
        self._sender = Sender(self.core)
        self.core.inbox.after_settling = self._settled
        self.core.inbox.start()
        self._sender.start()
        self._loop = loop

    async def close(self) -> None:
        """Ends every wait and disconnects; may be called again."""
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise self._wrong_loop()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._starting is not None and self._loop is None:
            await asyncio.wait((self._starting,))
        self.closed = True
        loop = asyncio.get_running_loop()
        if self._loop is not None:
            self.core.submitter.give_up()
            self._waits.close()
            self._wake_maps()
            # What was submitted before is answered, so that callers that are gone have cancelled what went in.
            await self._cancel(loop, [])
            await loop.run_in_executor(self._pool, self._sender.close)
        await loop.run_in_executor(None, self.core.close)
        if self._loop is not None:
            self._pool.shutdown(wait=False)

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Calls what may block in a thread of the pool."""
        return await self.check().run_in_executor(self._pool, fn, *args)

    def post(self, fn: Callable[[], object]) -> None:
        """Has `fn` called in the loop; from any thread."""
        self._bridge.post(fn)

    async def send(
        self, make: Callable[[], tuple[JobEncoder, list[Draft]]], options: SubmitOptions
    ) -> list[JobFuture[Any]]:
        """Submits what `make` encodes; raises as the synchronous client does. A cancelled caller leaves no job."""
        loop = await self.ready()
        answered: asyncio.Future[None] = loop.create_future()

        def answer() -> None:
            if answered.cancelled():
                self.cancel_soon(orphans(request))
            else:
                answered.set_result(None)

        request = Request(make, options, lambda _: self._bridge.post(answer))
        self._sender.put(request)
        try:
            await answered
        except BaseException:
            # Cancelled: before the answer, which then looks for orphans, or just after it came.
            answered.cancel()
            if answered.cancelled():
                request.gone = True
            else:
                self.cancel_soon(orphans(request))
            raise
        if request.error is not None:
            raise request.error
        return all_in(request.outcomes)

    async def cancel_jobs(self, ids: list[str]) -> list[bool]:
        """Ends these jobs; for each whether this call ended it."""
        return await self._cancel(await self.ready(), ids)

    async def _cancel(self, loop: asyncio.AbstractEventLoop, ids: list[str]) -> list[bool]:
        won: asyncio.Future[list[bool]] = loop.create_future()

        def answer(answer: list[bool] | Exception) -> None:
            if won.done():
                return
            if isinstance(answer, Exception):
                won.set_exception(answer)
            else:
                won.set_result(answer)

        self._sender.put(Cancel(ids, lambda given: self._bridge.post(answer, given)))
        return await won

    def cancel_soon(self, ids: list[str]) -> None:
        """Ends jobs whose caller is gone; nobody hears of the answer."""
        if ids and self._loop is not None and not self.core.closed:
            self._sender.put(Cancel(ids))

    def wait_begins(self, future: AsyncJobFuture[Any]) -> None:
        self._waits.begin(future)

    def wait_ends(self, future: AsyncJobFuture[Any]) -> None:
        self._waits.end(future)

    # For maps: an event is set whenever jobs ended.

    def map_begins(self, changed: asyncio.Event) -> None:
        self._maps.add(changed)

    def map_ends(self, changed: asyncio.Event) -> None:
        self._maps.discard(changed)

    async def wait_changed(self, changed: asyncio.Event, oldest: JobFuture[Any] | None) -> None:
        """Waits for a map's event; raises InputError when the client is closed meanwhile."""
        ref = "" if oldest is None else oldest.pipeline
        self._waits.begin_for(ref)
        try:
            await changed.wait()
        finally:
            self._waits.end_for(ref)
        if self.closed:
            raise self.core.is_closed() if oldest is None else self.core.closed_while_waiting(oldest)

    def _settled(self) -> None:
        if self._maps:
            self._bridge.post(self._wake_maps)

    def _wake_maps(self) -> None:
        for changed in self._maps:
            changed.set()
