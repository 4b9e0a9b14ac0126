"""What the parts of a worker hand each other about one job: as it comes, ready, computed, as it leaves. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.queues.codec import Message
from torchrelay.queues.job import Origins, Packed, Payload
from torchrelay.queues.levels import Levels

J = TypeVar("J")
Index = np.ndarray[Any, np.dtype[np.int64]]


class Incoming(NamedTuple, Generic[J]):
    """One job as it comes to a node: `job` is the caller's own handle of it. `last`: this is its last attempt;
    `attempts`: of so many before."""

    job: J
    payloads: Sequence[bytes]
    rows: int
    keep: bool = False
    last: bool = False
    attempts: int = 0


@dataclass(slots=True)
class Work(Generic[J]):
    """One job made ready for its stage: `table` holds the `rows` rows that enter, of `total` that the job has here.

    `active` are their numbers, None for all. `before` are the values that output columns had, for rows that skip. `at`
    is the stack that these rows stand at, `entry` that of those to which failures are charged.
    """

    incoming: Incoming[J]
    table: dict[str, Column]
    rows: int
    total: int
    riding: Payload
    fields: dict[str, Any]
    levels: Levels
    active: Index | None = None
    skips: bool = False
    before: Mapping[str, Column] | None = None
    at: tuple[int, ...] = ()
    entry: tuple[int, ...] = ()

    @property
    def job(self) -> J:
        return self.incoming.job

    @property
    def submitted(self) -> int:
        """How many rows the job was submitted with; of a chunk, how many were read."""
        return self.levels.outer_rows(self.at[len(self.entry) :], self.total)

    def entry_rows(self) -> Index:
        """Which of these each row that enters came from."""
        entry = self.levels.entry_rows(self.at, self.total, self.entry)
        return entry if self.active is None else entry[self.active]


class Rejection(NamedTuple):
    """Why one row goes no further. `stage` is '' where only one could have refused it."""

    error_type: str
    message: str
    attempts: int
    stage: str = ""


class Output(NamedTuple):
    """One job's part of a batch: columns of the rows that were made, and by row number those that were not.

    `counts` has an entry per row that entered, None unless the stage expands; `beside` are columns of those rows that
    an expanding stage makes beside those of what it makes of them.
    """

    columns: Mapping[str, Column]
    counts: Index | None
    rejected: Mapping[int, Rejection]
    beside: Mapping[str, Column] = {}  # never changed


class Closed(NamedTuple):
    """What a node leaves of a job: columns that it made, those that ride along, and how many rows there are now."""

    made: dict[str, Message]
    riding: dict[str, Packed]
    origins: Origins | None
    rows: int


class Opened(NamedTuple, Generic[J]):
    """A batch of jobs, ready or not: one bad job harms no other.

    `lost` holds, with each job whose bytes are gone, the mask of the nodes that made them; 0 when that is unknown.
    """

    ready: list[Work[J]]
    bad: list[tuple[J, Exception]]
    lost: list[tuple[J, int]]
