"""What a job of a run is told: which chunk it is, and how it is read and written. It travels as text in `@chunk`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Self

from torchrelay.config.runs import Chunk, ReadOptions, WriteOptions
from torchrelay.errors import DecodeError

__all__ = ["RunTask"]


@dataclass(frozen=True, slots=True)
class RunTask:
    """One job of a run.

    `round` counts how often rows that had failed were tried again; from the first time on, `only` are the numbers of
    those rows, each as (source, row), and None stands for all.
    """

    run: str
    chunk: Chunk
    read: ReadOptions
    write: WriteOptions
    round: int = 0
    only: tuple[tuple[int, int], ...] | None = None

    def encode(self) -> str:
        """One line of JSON."""
        parts = {"chunk": self.chunk.encode(), "read": self.read.encode(), "write": self.write.encode()}
        return json.dumps({"run": self.run, "round": self.round, "only": self.only, **parts})

    @classmethod
    def decode(cls, text: str) -> Self:
        """What `encode` wrote; raises DecodeError."""
        try:
            found = json.loads(text)
            only = found["only"]
            return cls(
                str(found["run"]),
                Chunk.decode(found["chunk"]),
                ReadOptions.decode(found["read"]),
                WriteOptions.decode(found["write"]),
                int(found["round"]),
                None if only is None else tuple((int(source), int(row)) for source, row in only),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DecodeError(f"this is no job of a run: {error!r:.100}", length=len(text)) from error
