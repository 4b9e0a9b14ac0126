"""Which blocks of shared memory each job in hand reads and has had written, until the server settles the job.

A commit that was accepted releases what the job read and publishes what was made of it; anything else lets go of the
former and frees the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaWriter
from torchrelay.queues.job import Place
from torchrelay.workers.claimer import Held


@dataclass(slots=True)
class _InHand:
    read: list[tuple[Place, int | None]] = field(default_factory=list)
    made: list[Place] = field(default_factory=list)
    durable: bool = True


class Custody:
    """Blocks by the grant's fence and the job's token. `reader` and `writer` are None where there is no arena."""

    def __init__(self, reader: ArenaReader | None, writer: ArenaWriter | None) -> None:
        self._reader = reader
        self._writer = writer
        self._in_hand: dict[tuple[str, bytes], _InHand] = {}

    def reads(self, held: Held, place: Place, edge: int | None, *, durable: bool) -> None:
        """The job reads this block; `durable`: the same bytes are in Redis."""
        entry = self._entry(held)
        entry.read.append((place, edge))
        entry.durable = entry.durable and durable

    def makes(self, held: Held, place: Place) -> None:
        """This block was written for the job's output."""
        self._entry(held).made.append(place)

    def _entry(self, held: Held) -> _InHand:
        return self._in_hand.setdefault((held.fence, held.entry.packed), _InHand())

    def intact(self, held: Held) -> bool:
        """Whether everything that the job read still was what its refs meant. Asked before its output leaves."""
        entry = self._in_hand.get((held.fence, held.entry.packed))
        if entry is None or self._reader is None:
            return True
        return all(map(self._reader.intact, (place for place, _ in entry.read)))

    def again(self, held: Held) -> bool:
        """Of a job that is not intact: whether all that it read is in Redis too, so that it need not be restarted."""
        entry = self._in_hand.get((held.fence, held.entry.packed))
        return entry is not None and entry.durable

    def settle(self, fence: str, tokens: Sequence[bytes], statuses: str = "") -> None:
        """The server answered: `statuses` has a letter a job, `k` for an accepted commit; '' says that none was."""
        if not self._in_hand:
            return
        for number, token in enumerate(tokens):
            entry = self._in_hand.pop((fence, token), None)
            if entry is not None:
                self._end(entry, statuses[number : number + 1] == "k")

    def _end(self, entry: _InHand, accepted: bool) -> None:
        if self._reader is not None:
            for place, edge in entry.read:
                if accepted and edge is not None:
                    self._reader.release(place, edge)
                else:
                    self._reader.drop(place)
        if self._writer is not None and entry.made:
            self._told(entry.made, accepted)

    def _told(self, made: Iterable[Place], accepted: bool) -> None:
        assert self._writer is not None  # nothing is made without one
        if accepted:
            self._writer.publish(made)
        else:
            self._writer.free(made)

    def close(self) -> None:
        """Frees what was made for jobs that nobody settled, and removes what this process kept in shared memory."""
        for key in list(self._in_hand):
            self.settle(key[0], [key[1]])
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            self._writer.close()
