"""Which blocks of shared memory each job in hand reads and has had written, until the server settles the job.

A commit that was accepted releases what the job read and publishes what was made of it; anything else lets go of the
former and frees the latter. What was made on a device is lost with this process: then what the job read is released
only when its readers have it. Where they never will, since it was lost to them or the job ended, that is not this
process's to say: the job may be on its way here again, and Redis knows whether it waits for those blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaWriter
from torchrelay.queues.job import Place
from torchrelay.workers.claimer import Held
from torchrelay.workers.device_importer import DeviceImporter


class Read(NamedTuple):
    """A block that a job reads: by which edges, which node made it, and whether its bytes are in Redis too. `exporter`
    is who has the bytes on a device, where the block only tells of them."""

    place: Place
    edges: tuple[int, ...]
    maker: int
    durable: bool
    exporter: str = ""


@dataclass(slots=True)
class _InHand:
    read: list[Read] = field(default_factory=list)
    made: list[Place] = field(default_factory=list)
    on_device: list[Place] = field(default_factory=list)


def makers_of(gone: Iterable[Read]) -> int:
    """The mask of the nodes that made these, as `lost` takes it; what came with the input counts for nothing there."""
    mask = 0
    for read in gone:
        # A forged ref may name any maker; the mask has 32 bits.
        mask |= 1 << (read.maker - 1) if 0 < read.maker <= 32 else 0
    return mask


class _Countdown:
    """Calls something at its n-th call, if all of them said yes."""

    def __init__(self, calls: int, at_last: Callable[[], object]) -> None:
        self._left = calls
        self._all = True
        self._at_last = at_last

    def __call__(self, yes: bool) -> None:
        self._left -= 1
        self._all = self._all and yes
        if self._left == 0 and self._all:
            self._at_last()


def _give_back(reader: ArenaReader, reads: Iterable[Read]) -> None:
    for read in reads:
        reader.give_back(read.place, *read.edges)


class Custody:
    """Blocks by the grant's fence and the job's token. `reader` and `writer` are None where there is no arena,
    `importer` where nothing is read from devices."""

    def __init__(
        self, reader: ArenaReader | None, writer: ArenaWriter | None, importer: DeviceImporter | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._importer = importer
        self._in_hand: dict[tuple[str, bytes], _InHand] = {}

    @property
    def empty(self) -> bool:
        """Whether no job in hand reads or has blocks."""
        return not self._in_hand

    def reads(self, held: Held, read: Read) -> None:
        """The job reads this block."""
        self._entry(held).read.append(read)

    def makes(self, held: Held, place: Place, *, on_device: bool = False) -> None:
        """This block was written for the job's output; `on_device`, its bytes are on this worker's device."""
        entry = self._entry(held)
        entry.made.append(place)
        if on_device:
            entry.on_device.append(place)

    def _entry(self, held: Held) -> _InHand:
        return self._in_hand.setdefault((held.fence, held.entry.packed), _InHand())

    def gone(self, held: Held) -> list[Read]:
        """What the job read that is no longer what its refs meant. Asked before anything made of it leaves."""
        entry = self._in_hand.get((held.fence, held.entry.packed))
        if entry is None or self._reader is None:
            return []
        return [read for read in entry.read if not (self._reader.intact(read.place) and self._is_there(read))]

    def _is_there(self, read: Read) -> bool:
        return not read.exporter or (self._importer is not None and self._importer.is_there(read.exporter))

    def settle(self, fence: str, tokens: Sequence[bytes], statuses: str = "") -> None:
        """The server answered: `statuses` has a letter a job, `k` for an accepted commit; '' says that none was."""
        if not self._in_hand:
            return
        for number, token in enumerate(tokens):
            entry = self._in_hand.pop((fence, token), None)
            if entry is not None:
                self._end(entry, statuses[number : number + 1] == "k")

    def _end(self, entry: _InHand, accepted: bool) -> None:
        if self._writer is not None and entry.made:
            self._told(entry.made, accepted)
        if self._reader is None:
            return
        waits = accepted and bool(entry.on_device)
        for read in entry.read:
            if accepted and read.edges and not waits:
                self._reader.release(read.place, *read.edges)
            else:
                self._reader.drop(read.place)
        if waits and self._writer is not None:
            give_back = partial(_give_back, self._reader, entry.read)
            self._writer.when_gone(entry.on_device, _Countdown(len(entry.on_device), give_back))

    def _told(self, made: Iterable[Place], accepted: bool) -> None:
        assert self._writer is not None  # nothing is made without one
        if accepted:
            self._writer.publish(made)
        else:
            self._writer.free(made)

    def close(self) -> None:
        """Removes what this process kept in shared memory, but for what jobs wait for.

        What was made for jobs that nobody settled may have been committed by a commit whose answer never came: the
        server is asked, and its keeper later, where the server is away.
        """
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            self._writer.publish(place for entry in self._in_hand.values() for place in entry.made)
            self._writer.close()
        self._in_hand.clear()
