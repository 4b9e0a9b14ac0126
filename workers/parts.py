"""What both loops of a worker are made of, put together once. They differ in who calls which part, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import redis

from torchrelay.queues.channel import Channel
from torchrelay.queues.job import host_text
from torchrelay.queues.scripts import script
from torchrelay.queues.transitions import Session
from torchrelay.stages.runner import Runner
from torchrelay.workers.assemble import Assembler
from torchrelay.workers.batching import Planner
from torchrelay.workers.claimer import Claimer, Held
from torchrelay.workers.committer import Committer
from torchrelay.workers.custody import Custody
from torchrelay.workers.intake import Intake
from torchrelay.workers.node import NodeContext
from torchrelay.workers.patience import patiently
from torchrelay.workers.progress import ProgressPage
from torchrelay.workers.settling import Settler
from torchrelay.workers.status import Status
from torchrelay.workers.stop import Stop
from torchrelay.workers.storage import SharedMemory, Storage
from torchrelay.workers.work import Work


class Surroundings(NamedTuple):
    """Where one worker works: its node, the server, the page that its supervisor reads, shared memory, whether it is
    to end, and the most rows that a forward may have for now, 0 for what the stage allows."""

    context: NodeContext
    client: redis.Redis
    page: ProgressPage
    memory: SharedMemory
    stopping: Stop
    row_cap: int = 0


class Parts:
    """Jobs come in over `claims`, and leave over `commits`; one channel for both where one thread does both."""

    def __init__(self, around: Surroundings, *, threads: bool) -> None:
        context = around.context
        session = Session(context.incarnation)
        self.around = around
        self.claims = Channel(around.client, until=around.stopping)
        self.commits = Channel(around.client) if threads else self.claims
        memory = around.memory
        self.custody = Custody(memory.reader, memory.placer.writer, memory.importer)
        # Each thread numbers its own operations.
        committing = Session(f"{context.incarnation}o") if threads else session
        self.committer = Committer(context, self.commits, committing, self.custody.settle)
        host = "" if memory.reader is None else host_text(memory.reader.host)
        self.claimer = Claimer(context, self.claims, session, self.committer.opened, lambda: self.status.report(), host)
        self.storage = Storage(context, around.client, around.memory, self.custody)
        self._entrances = entrances = context.entrances()
        self._assemblers: list[Assembler[Held]] = [self._assembler(entrance) for entrance in entrances]
        self._planners: list[Planner[Held]] = [Planner(e.group.batch, e.group.types) for e in entrances]
        for planner in self._planners if around.row_cap else ():
            planner.cap.begin(around.row_cap)
        self.settler = Settler(context, self._assemblers, self.storage, self.committer, self.custody, self.claimer)
        self.status = Status(
            around.page,
            # In this order: a grant that is opened meanwhile is on both lists, and never on none.
            lambda: (*self.claimer.asked_fences, *self.committer.fences),
            memory.moved,
            lambda: self.committer.failures,
            memory.gpus,
            context.spec.batch.max_rows,
        )
        memory.placer.before_waiting = partial(self.committer.flush, everything=True)
        self._loaded_at = -1

    def _assembler(self, entrance: NodeContext) -> Assembler[Held]:
        pipeline, group = entrance.pipeline, entrance.group
        return Assembler(pipeline.graph, group.first, self.storage.fetch, pipeline.spec.limits.rows_per_job, group)

    def runner(self, runner: Runner, works: Sequence[Work[Held]]) -> Runner:
        """What runs these jobs, claimed at one entrance: the worker's stages, or what is left of them."""
        return runner.behind(self._entrances[works[0].job.entrance].passed if works else 0)

    def intake(self, rest: Callable[[], object], stopping: Callable[[], bool]) -> Intake:
        """The side on which jobs come in; `rest` is called before each wait for more."""
        return Intake(self.around.context, self.claimer, self._assemblers, stopping, rest)

    def planner(self, works: Sequence[Work[Held]]) -> Planner[Held]:
        """What cuts these jobs, claimed at one entrance, into batches."""
        return self._planners[works[0].job.entrance if works else 0]

    def something_better(self, works: Sequence[Work[Held]]) -> bool:
        """Whether a job is at hand that should go before what is left of these. Not while a suspect is computed: it has
        the worker to itself."""
        if any(work.job.entry.suspect for work in works):
            return False
        return self.claimer.has_better(max(work.job.entry.rank for work in works))

    def load_scripts(self) -> None:
        """A server that is new to them would refuse the first commit, and its answer may be read a forward later."""
        reconnects = self.claims.reconnects + self.commits.reconnects
        if self._loaded_at != reconnects:
            self._loaded_at = reconnects
            for name in ("claim", "commit", "fail", "release"):
                patiently(partial(self.around.client.script_load, script(name).source))

    def measured(self, rows: int, seconds: float) -> None:
        """So many rows took so long: the claimer sizes its window by the rate."""
        rate = rows / max(seconds, 1e-6)
        old = self.claimer.rows_per_s
        self.claimer.rows_per_s = rate if old == 0 else 0.8 * old + 0.2 * rate

    def close(self) -> None:
        """Gives back connections and shared memory."""
        self.claims.close()
        if self.commits is not self.claims:
            self.commits.close()
        self.custody.close()
        self.around.memory.close()


class Meter:
    """What `compute` tells of its forwards, and asks about their jobs."""

    def __init__(self, parts: Parts, between: Callable[[Sequence[Work[Held]]], object] | None = None) -> None:
        """`between` is called between two forwards of the same jobs."""
        self._parts = parts
        self._between = between
        self._number = 0

    def started(self, works: Sequence[Work[Held]]) -> None:
        self._number = self._parts.status.started([w.job for w in works])

    def stopped(self, rows: int) -> None:
        self._parts.status.stopped(self._number, rows)

    def ended(self, works: Sequence[Work[Held]]) -> Sequence[bool]:
        return self._parts.storage.ended([w.job for w in works])

    def goes_on(self, works: Sequence[Work[Held]]) -> bool:
        """Not after SIGTERM: a job of many forwards would outlast the grace time, and be killed and suspected."""
        if self._parts.around.stopping():
            return False
        if self._between is not None:
            self._between(works)
        return not self._parts.around.stopping() and not all(self.ended(works))
