"""The two ends of a hand-off from one GPU to another, for `benchmarks.gpu.handoff`: a sender's process, and a receiver.

Both go the way of the workers: what a stage made is copied out, a block of shared memory holds it or tells where it
lies, its place is told, and it is copied to the receiver's device, checked and released. Here a pipe tells the places;
what telling them through Redis costs is measured elsewhere (`benchmarks.hops`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from typing import Any

import numpy as np
import torch

from torchrelay.config.device_rows import DeviceRows
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter
from torchrelay.queues.codec import HostMessage, decode, message, on_host
from torchrelay.queues.job import Place
from torchrelay.queues.tickets import Ticket, is_ticket
from torchrelay.workers.device_exporter import DeviceExporter
from torchrelay.workers.device_importer import DeviceImporter
from torchrelay.workers.pins import cuda_memory, pins_for

Told = tuple[Place, int]
"""A block of shared memory, and how many bytes it holds."""
BYTE = np.dtype(np.uint8)
NAME_BYTES = 64
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """One measurement: `jobs` tensors of so many bytes by the `road` "device" or "host", `ahead` of them under way. The
    clock runs from the arrival of the first `warm`."""

    road: str
    nbytes: int
    ahead: int
    warm: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Joint:
    """Where both ends meet, and how much memory each takes at most."""

    home: ArenaHome
    sender: str
    receiver: str
    max_bytes: int


def send(joint: Joint, slots: Semaphore, pipe: Connection) -> None:
    """The sender's process: carries out each order; None ends it."""
    torch.cuda.set_device(joint.sender)
    sender = _Sender(joint, slots, pipe)
    while (order := pipe.recv()) is not None:
        sender.run(order)
    sender.close()


class _Sender:
    def __init__(self, joint: Joint, slots: Semaphore, pipe: Connection) -> None:
        self._device = joint.sender
        self._slots = slots
        self._pipe = pipe
        self._writer = ArenaWriter(joint.home, ArenaLimits(joint.max_bytes), lambda lane, names: [True] * len(names))
        self._exporter = DeviceExporter(cuda_memory(joint.sender), joint.home.folder, joint.max_bytes)

    def run(self, order: Order) -> None:
        source = torch.arange(order.nbytes, device=self._device).to(torch.uint8)
        start, tell = (self._leave, self._tell) if order.road == "device" else (self._bring, self._put)
        under_way: deque[tuple[Any, torch.cuda.Event]] = deque()
        for _ in range(order.jobs):
            # As a worker does: the next one is launched before the last is waited for, if there is one to launch.
            if not self._slots.acquire(block=False):
                self._tell_all(under_way, tell)
                if not self._slots.acquire(timeout=_PATIENCE_S):
                    raise SystemExit("the receiver stopped; what it printed says why")
            made = start(source)
            event = torch.cuda.Event(blocking=True)
            event.record()
            self._tell_all(under_way, tell)
            under_way.append((made, event))
        self._tell_all(under_way, tell)

    def _tell_all(self, under_way: deque[tuple[Any, torch.cuda.Event]], tell: Callable[[Any], Told]) -> None:
        while under_way:
            made, event = under_way.popleft()
            event.synchronize()
            self._pipe.send(tell(made))

    def _leave(self, source: torch.Tensor) -> DeviceRows:
        run = self._exporter.take(source.nbytes)
        while run is None:
            self._writer.collect()
            run = self._exporter.take(source.nbytes)
        run.write(source.data_ptr(), source.nbytes, torch.cuda.current_stream().cuda_stream)
        return DeviceRows(run, 0, BYTE, (source.nbytes,))

    def _tell(self, rows: DeviceRows) -> Told:
        ticket = self._exporter.ticket(rows)
        assert ticket is not None  # they lie here
        return self._placed(ticket, rows.memory)

    def _bring(self, source: torch.Tensor) -> torch.Tensor:
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)

    def _put(self, host: torch.Tensor) -> Told:
        return self._placed(on_host(message(host.numpy())))

    def _placed(self, made: HostMessage, keeps: object = None) -> Told:
        place = None
        if len(made) > self._writer.max_bytes - NAME_BYTES:
            raise SystemExit(f"no block of shared memory holds {len(made)} bytes")
        while place is None:
            self._writer.collect()
            place = self._writer.put("job.1.f.column", 0, made, 1, keeps=keeps)
        self._writer.publish([place])
        return place, len(made)

    def close(self) -> None:
        self._exporter.close()
        self._writer.close()


class Receiver:
    """Copies to its device what the sender's process tells of."""

    def __init__(self, joint: Joint, slots: Semaphore, pipe: Connection) -> None:
        self._device = joint.receiver
        self._slots = slots
        self._pipe = pipe
        self._reader = ArenaReader(joint.home, pins_for(joint.receiver))
        self._importer = DeviceImporter(cuda_memory(joint.receiver), joint.home.folder)
        self._stream = torch.cuda.Stream(joint.receiver)

    def run(self, order: Order) -> float:
        """GB/s, 10^9 bytes a second; ends the program where what came is not what was sent."""
        expected = torch.arange(order.nbytes, device=self._device).to(torch.uint8)
        targets = [torch.zeros_like(expected) for _ in range(order.ahead)]
        for _ in range(order.ahead):
            self._slots.release()
        self._pipe.send(order)
        under_way: deque[tuple[Place, torch.cuda.Event]] = deque()
        started_s, come, done = 0.0, 0, 0
        while done < order.jobs:
            # A copy is started as soon as it can be, and waited for when there is nothing else to do.
            if come < order.jobs and (not under_way or self._pipe.poll()):
                place, nbytes = self._pipe.recv()
                under_way.append((place, self._start(place, nbytes, targets[come % order.ahead])))
                come += 1
                continue
            place, event = under_way.popleft()
            event.synchronize()
            if not self._reader.intact(place):
                raise SystemExit("a block changed while it was copied")
            self._reader.release(place, 0)
            self._slots.release()
            done += 1
            if done == order.warm:
                started_s = time.perf_counter()
        seconds = time.perf_counter() - started_s
        for _ in range(order.ahead):
            self._slots.acquire()
        if not all(torch.equal(target, expected) for target in targets):
            raise SystemExit(f"what came by {order.road} is not what was sent")
        return order.nbytes * (order.jobs - order.warm) / seconds / 1e9

    def _start(self, place: Place, nbytes: int, target: torch.Tensor) -> torch.cuda.Event:
        view = self._reader.view(place, nbytes)
        if view is None:
            raise SystemExit("the bytes of a hand-off are gone")
        with torch.cuda.stream(self._stream):
            if is_ticket(view):
                rows = self._importer.rows(Ticket.decode(view))
                if rows is None:
                    raise SystemExit("the sender's device memory cannot be opened")
                rows.copy_to(target.data_ptr(), self._stream.cuda_stream)
            else:
                array = np.asarray(decode(view))
                target.copy_(torch.from_numpy(array), non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        return event

    def close(self) -> None:
        self._importer.close()
        self._reader.close()
