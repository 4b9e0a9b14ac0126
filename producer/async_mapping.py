"""`AsyncRelay.map`: tasks draw rows and submit them, the caller takes results; between them the flow of `mapping`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping
from typing import Any

from torchrelay.errors import QueueFull, RunConflict
from torchrelay.producer.async_core import AsyncCore
from torchrelay.producer.encoding import kept_row, kept_rows
from torchrelay.producer.mapping import Future, Window, accepted_of, some

Rows = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]
Submit = Callable[[list[Mapping[str, Any]], int], Awaitable[list[Future]]]


class Feeder:
    """Draws rows as there is room, and submits all that are there whenever the part before is in."""

    def __init__(self, rows: Rows, window: Window[Future], submit: Submit, changed: asyncio.Event) -> None:
        self._rows = rows
        self._window = window
        self._submit = submit
        self._changed = changed  # set when there is something new for the taker
        self._room = asyncio.Event()
        self._filled = asyncio.Event()
        self._buffer: list[Mapping[str, Any]] = []
        self._sent = 0

    def make_room(self) -> bool:
        """A result was taken: whether rows may be drawn now."""
        if not self._window.room():
            return False
        self._room.set()
        return True

    async def run(self) -> None:
        drawing = asyncio.create_task(self._draw())
        drawing.add_done_callback(lambda _: self._filled.set())
        try:
            while True:
                if self._buffer:
                    await self._send()
                elif drawing.done():
                    return drawing.result()
                else:
                    self._filled.clear()
                    await self._filled.wait()
        finally:
            drawing.cancel()
            self._changed.set()

    async def _draw(self) -> None:
        if isinstance(self._rows, AsyncIterable):
            left = await self._wait_for_room()
            async for row in self._rows:
                self._put([kept_row(row)])
                left -= 1
                if not left:
                    left = await self._wait_for_room()
        else:
            rows = iter(kept_rows(self._rows))
            while part := some(rows, await self._wait_for_room()):
                self._put(part)
                await asyncio.sleep(0)  # rows that come slowly must not keep others from running

    async def _wait_for_room(self) -> int:
        while not (room := self._window.room()):
            self._room.clear()
            await self._room.wait()
        return room

    def _put(self, part: list[Mapping[str, Any]]) -> None:
        self._window.sending += len(part)
        self._buffer += part
        self._filled.set()

    async def _send(self) -> None:
        part, self._buffer = self._buffer, []
        first, self._sent = self._sent, self._sent + len(part)
        try:
            self._window.add(await self._submit(part, first))
        except (QueueFull, RunConflict) as refused:
            self._window.add(accepted_of(refused))
            raise
        finally:
            self._window.sending -= len(part)
            self._changed.set()


async def map_rows_async(
    core: AsyncCore, rows: Rows, window: Window[Future], submit: Submit
) -> AsyncGenerator[Future, None]:
    """Yields the jobs of all rows as they are done. Whatever ends it early cancels the jobs under way."""
    await core.ready()
    changed = asyncio.Event()
    feeder = Feeder(rows, window, submit, changed)
    feeding = asyncio.create_task(feeder.run())
    core.map_begins(changed)
    try:
        while True:
            if feeder.make_room():
                await asyncio.sleep(0)  # where results are always there, rows would never be drawn
            # Looked at after every wait: it may have ended with an error meanwhile, which must not pass for the end.
            if feeding.done():
                feeding.result()
            if (job := window.pop()) is not None:
                yield job
            elif feeding.done() and not len(window):
                return
            else:
                changed.clear()
                # Jobs end in another thread, which sets the event after they are done.
                if not window.has_done():
                    await core.wait_changed(changed, window.oldest)
    finally:
        core.map_ends(changed)
        feeding.cancel()
        core.cancel_soon([job.id for job in window.pending()])
