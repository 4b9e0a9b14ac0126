"""The page that a child writes and its supervisor reads: what it is doing, and since when.

A child cannot prove its own liveness (a kernel launch may hold the interpreter lock), so the supervisor renews leases
from this page. One writer, one reader, in two processes: a sequence number around each write tells a torn read.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torchrelay.queues.histogram import FILL_BUCKETS, SERVICE_BUCKETS, fill_bucket, service_bucket

_HEAD = struct.Struct("<QddQQQddQIII6Q")
_SEQUENCE = struct.Struct("<Q")
PAGE_BYTES = 65536
# What one job may add: its entry, and a fence when it was granted alone.
_BYTES_PER_JOB = 48
_MOST_GPUS = 64
# Words behind the sequence number that are written one by one: forwards by their time, batches by their fill, memory.
_FILLS_AT = 1 + SERVICE_BUCKETS
_MEMORY_AT = _FILLS_AT + FILL_BUCKETS
_TALLIES_END = _MEMORY_AT + 3
_HEAD_AT = 8 * _TALLIES_END

LOADING, READY, DRAINING = 0, 1, 2
STATES = ("loading", "ready", "draining")


@dataclass(frozen=True, slots=True)
class Progress:
    """`forward_since` is time.monotonic() from which on a forward is waited for, 0 while none is.

    `started` holds the packed entries of all forwards under way, `fences` the grants in hand, `moved` bytes of columns
    in the order of `placement.MOVED`, `idle_s` how long a GPU stood still between forwards, as its own events say,
    `gpus` the devices from which it copies.
    """

    state: int = LOADING
    forward_since: float = 0.0
    beat: float = 0.0
    jobs: int = 0
    rows: int = 0
    batches: int = 0
    busy_s: float = 0.0
    failures: int = 0
    fences: tuple[str, ...] = ()
    started: bytes = b""
    moved: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    idle_s: float = 0.0
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Tallies:
    """What only grows: `service` counts forwards by their time, `fills` batches by how full they were (`histogram`).
    With the device's memory, in bytes: what this process holds, what all processes use, and what there is."""

    service: tuple[int, ...] = (0,) * SERVICE_BUCKETS
    fills: tuple[int, ...] = (0,) * FILL_BUCKETS
    memory: tuple[int, int, int] = (0, 0, 0)


class ProgressPage:
    """A file of one page's data, mapped by both processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map)[: 8 * _TALLIES_END].cast("Q")
        self._sequence = 0
        self._last = Progress()

    @classmethod
    def create(cls, jobs: int = 0) -> ProgressPage:
        """A page with room for so many jobs in hand."""
        descriptor, name = tempfile.mkstemp(prefix="torchrelay-progress-")
        os.ftruncate(descriptor, PAGE_BYTES + jobs * _BYTES_PER_JOB)
        os.close(descriptor)
        return cls(Path(name))

    def write(self, p: Progress) -> None:
        fences = ",".join(p.fences).encode()
        body = _HEAD.pack(
            p.state,
            p.forward_since,
            p.beat,
            p.jobs,
            p.rows,
            p.batches,
            p.busy_s,
            p.idle_s,
            p.failures,
            len(fences),
            len(p.started),
            len(p.gpus),
            *p.moved,
        )
        body += fences + p.started + struct.pack(f"<{len(p.gpus)}Q", *p.gpus)
        if len(body) + _HEAD_AT > len(self._map):
            raise ValueError(f"progress of {len(body)} bytes does not fit its page")
        self._sequence += 1
        self._map[0:8] = _SEQUENCE.pack(self._sequence)
        self._map[_HEAD_AT : _HEAD_AT + len(body)] = body
        self._sequence += 1
        self._map[0:8] = _SEQUENCE.pack(self._sequence)

    def read(self, *, dead: bool = False) -> Progress:
        """The last whole state. `dead` says that the writer is gone: a state cut off by its death is read as it is."""
        for _ in range(1000):
            before = self._map[0:8]
            numbers = _HEAD.unpack_from(self._map, _HEAD_AT)
            fences_length, started_length, gpus = numbers[9:12]
            at = _HEAD_AT + _HEAD.size
            started_at = at + fences_length
            gpus_at = started_at + started_length
            fences = self._map[at:started_at]
            started = self._map[started_at:gpus_at]
            known = self._map[gpus_at : gpus_at + 8 * min(gpus, _MOST_GPUS)]
            if (before == self._map[0:8] and before[0] % 2 == 0) or dead:
                break
        else:
            return self._last  # the writer was stopped in the middle of its words
        state, since, beat, jobs, rows, batches, busy_s, idle_s, failures = numbers[:9]
        text = fences.decode("ascii", "replace")
        self._last = Progress(
            min(state, 2),
            since,
            beat,
            jobs,
            rows,
            batches,
            busy_s,
            failures,
            tuple(text.split(",")) if text else (),
            started,
            numbers[12:],
            idle_s,
            struct.unpack(f"<{len(known) // 8}Q", known[: len(known) // 8 * 8]),
        )
        return self._last

    # Each tally is one aligned word: its reader sees the old number or the new one, and needs no sequence around it.

    def tally(self, seconds: float, rows: int, max_rows: int) -> None:
        """Counts one forward of so many rows."""
        self._words[1 + service_bucket(seconds)] += 1
        self._words[_FILLS_AT + fill_bucket(rows, max_rows)] += 1

    def tell_memory(self, held: int, used: int, total: int) -> None:
        """Bytes of the device: what this process holds, what is in use by all, what there is."""
        for word, nbytes in enumerate((held, used, total), _MEMORY_AT):
            self._words[word] = nbytes

    def tallies(self) -> Tallies:
        words = self._words.tolist()
        held, used, total = words[_MEMORY_AT:_TALLIES_END]
        return Tallies(tuple(words[1:_FILLS_AT]), tuple(words[_FILLS_AT:_MEMORY_AT]), (held, used, total))

    def close(self, *, unlink: bool = False) -> None:
        self._words.release()
        self._map.close()
        if unlink:
            self.path.unlink(missing_ok=True)
