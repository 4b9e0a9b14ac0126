"""One forward of a batch, watched: tried again when the device's memory is full, and told from what else may fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import numpy as np

from torchrelay.config.columns import Column, describe
from torchrelay.stages import Made
from torchrelay.stages.faults import is_out_of_memory, let_go
from torchrelay.workers.batching import Planner
from torchrelay.workers.work import J, Work

__all__ = ["Forwards", "Meter", "NoRoom", "Runs", "told"]


class Runs(Protocol):
    """What computes a batch; see `stages.Runner`."""

    def run(
        self,
        tables: Sequence[Mapping[str, Column]],
        rows: Sequence[int],
        meta: Sequence[Mapping[str, Any]],
        ended: Any = None,
    ) -> list[Made]: ...

    def free_memory(self) -> None: ...


class Meter(Protocol[J]):
    """Is told of every forward, and knows which jobs have ended, and when this worker is to end."""

    def started(self, works: Sequence[Work[J]]) -> None: ...
    def stopped(self, rows: int) -> None: ...
    def ended(self, works: Sequence[Work[J]]) -> Sequence[bool]: ...
    def goes_on(self, works: Sequence[Work[J]]) -> bool:
        """Whether a further forward for these jobs is of use. Asked between two of one claim."""
        ...


class NoRoom(Exception):
    """A batch does not fit the device's memory, though it was freed: `error` is what the stage raised at last."""

    def __init__(self, error: Exception, shapes: str) -> None:
        super().__init__(f"{told(error)}; of the row's columns: {shapes}")
        self.error = error


def told(error: BaseException) -> str:
    """An error's text, whatever a stranger's `__str__` does."""
    try:
        return str(error)
    except Exception as fault:
        return f"(its text cannot be made: {type(fault).__name__})"


@dataclass(frozen=True, slots=True)
class Forwards(Generic[J]):
    """What is needed for the forwards of some jobs."""

    runner: Runs
    planner: Planner[J]
    meter: Meter[J]

    def run(
        self, works: Sequence[Work[J]], tables: Sequence[Mapping[str, Column]], rows: Sequence[int], *, again: bool
    ) -> list[Made]:
        """One forward, or two if memory is full and it may be tried `again`.

        Raises NoRoom if it still is; and whatever else `Runner.run` raises.
        """
        for last in (False, True) if again else (True,):
            try:
                made = self._once(works, tables, rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                full = error
            else:
                self.planner.cap.fitted(sum(rows))
                return made
            # Here the exception is handled; what it came through can be freed.
            let_go(full)
            self.runner.free_memory()
            if last:
                break
        self.planner.cap.too_many(sum(rows))
        raise NoRoom(full, _shapes(tables))

    def _once(
        self, works: Sequence[Work[J]], tables: Sequence[Mapping[str, Column]], rows: Sequence[int]
    ) -> list[Made]:
        self.meter.started(works)
        try:
            return self.runner.run(tables, rows, [w.fields for w in works], lambda: self.meter.ended(works))
        finally:
            self.meter.stopped(sum(rows))


def _shapes(tables: Sequence[Mapping[str, Column]]) -> str:
    """What the first row holds."""
    table = next((t for t in tables if any(map(len, t.values()))), {})
    return ", ".join(f"{name} {_shape(column[0])}" for name, column in table.items() if len(column)) or "none"


def _shape(value: Any) -> str:
    return describe(np.asarray(value) if isinstance(value, np.generic) else value)
