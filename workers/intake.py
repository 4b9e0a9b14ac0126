"""How jobs come in: claims, batches of them, and what the stage reads of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchrelay.workers.assemble import Assembler
from torchrelay.workers.claimer import Claimer, Held
from torchrelay.workers.node import NodeContext
from torchrelay.workers.run_columns import HELD
from torchrelay.workers.work import Incoming, Work


@dataclass(slots=True)
class Taken:
    """A batch as it came: jobs ready for the stage, and those that never reach it."""

    ready: list[Work[Held]] = field(default_factory=list)
    bad: list[tuple[Held, Exception]] = field(default_factory=list)
    lost: list[tuple[Held, int]] = field(default_factory=list)
    given_back: list[Held] = field(default_factory=list)


class Intake:
    """Claims and opens; `assemblers` are those of each of the worker's entrances. `rest` is called before each wait for
    more."""

    def __init__(
        self,
        context: NodeContext,
        claimer: Claimer,
        assemblers: Sequence[Assembler[Held]],
        stopping: Callable[[], bool],
        rest: Callable[[], object],
    ) -> None:
        self._entrances = context.entrances()
        self._claimer = claimer
        self._assemblers = assemblers
        self._stopping = stopping
        self._rest = rest

    def next_batch(self, *, at_once: bool = False) -> Taken | None:
        """Jobs for one forward: a full batch, or what came within `max_wait_ms`; `at_once`, what is there. None after
        an idle second."""
        claimer = self._claimer
        if not claimer.window:
            claimer.top_up()
            if not claimer.window:
                self._rest()
                if claimer.idle():
                    claimer.wait()
                return None
        entrance = claimer.window[0].entrance
        rules = self._entrances[entrance].spec.batch
        deadline = claimer.window[0].claimed_at + rules.max_wait_ms / 1000.0
        while claimer.window_rows < rules.max_rows and not at_once and not self._stopping():
            if claimer.ready_left and claimer.top_up():
                continue
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            self._rest()
            claimer.wait(remaining)
        batch = claimer.take(claimer.rows_at_once(entrance))
        claimer.ask_ahead()
        return self._open(batch)

    def _open(self, batch: list[Held]) -> Taken:
        now_ms = self._claimer.server_ms()
        # Given back, they are ended by the next claim or by the upkeep; they must not start.
        late = [h for h in batch if 0 < h.entry.deadline_ms <= now_ms]
        if late:
            batch = [h for h in batch if not 0 < h.entry.deadline_ms <= now_ms]
        entrance = batch[0].entrance if batch else 0
        context = self._entrances[entrance]
        last, keeps = context.spec.retry.attempts - 1, context.keeps_rows
        opened = self._assemblers[entrance].open_all(
            Incoming(
                h, h.entry.payloads, h.entry.rows, h.entry.keep and keeps, h.entry.attempts >= last, h.entry.attempts
            )
            for h in batch
        )
        if context.node.gathers is not None:
            for work in opened.ready:
                # Before it makes its files visible, it asks whether the job is still this worker's.
                work.fields[HELD] = work.job
        return Taken(opened.ready, opened.bad, opened.lost, late)

    def surrender(self) -> Taken:
        """Everything that was claimed and not taken."""
        return Taken(given_back=self._claimer.surrender())
