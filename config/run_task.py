"""What a job of a run is told: which chunk it is, and how it is read and written. It travels as text in `@chunk`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torchrelay.config.runs import Chunk, ReadOptions, WriteOptions
from torchrelay.errors import DecodeError

__all__ = ["Charge", "RunTask"]


class Charge(NamedTuple):
    """Rows that are not computed, since they end their worker: those from `start` to before `end`, by their place among
    the rows that the job would read. The others are as the values of a `RowError`."""

    start: int
    end: int
    stage: str
    error: str
    text: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RunTask:
    """One job of a run.

    `round` counts how often rows that had failed were tried again; from the first time on, `only` are the numbers of
    those rows, each as (source, row), and None stands for all.

    A chunk that ends its workers is searched: a job with a `span` computes the rows from this place to before that one,
    as they follow each other, and writes nothing. When it is known which rows they are, a job with `charges` does the
    others.
    """

    run: str
    chunk: Chunk
    read: ReadOptions
    write: WriteOptions
    round: int = 0
    only: tuple[tuple[int, int], ...] | None = None
    span: tuple[int, int] | None = None
    charges: tuple[Charge, ...] = ()

    def encode(self) -> str:
        """One line of JSON."""
        parts: dict[str, Any] = {"chunk": self.chunk.encode(), "read": self.read.encode(), "write": self.write.encode()}
        if self.span is not None or self.charges:
            parts |= {"span": self.span, "charges": self.charges}
        return json.dumps({"run": self.run, "round": self.round, "only": self.only, **parts})

    @classmethod
    def decode(cls, text: str) -> Self:
        """What `encode` wrote; raises DecodeError."""
        try:
            found = json.loads(text)
            only, span = found["only"], found.get("span")
            return cls(
                str(found["run"]),
                Chunk.decode(found["chunk"]),
                ReadOptions.decode(found["read"]),
                WriteOptions.decode(found["write"]),
                int(found["round"]),
                None if only is None else tuple((int(source), int(row)) for source, row in only),
                None if span is None else (int(span[0]), int(span[1])),
                tuple(_charge(*values) for values in found.get("charges", ())),
            )
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise DecodeError(f"this is no job of a run: {error!r:.100}", length=len(text)) from error


def _charge(start: Any, end: Any, stage: Any, error: Any, text: Any, attempts: Any) -> Charge:
    return Charge(int(start), int(end), str(stage), str(error), str(text), int(attempts))
