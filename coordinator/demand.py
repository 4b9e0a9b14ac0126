"""How many workers one group of stages wants for what it has to do. Pure; one group at a time.

The need, in workers that compute all the time, is what arrives plus what must be caught up. What is caught up is not
the backlog of now, but the one that will be left when a worker that were started now is ready: those that are there or
still load clear the rest, and one more would come too late for it.

A group that catches up sends more than what comes to the pipeline. Those behind it take that for a backlog that moves
to them, not for a rate that lasts: else each would catch up on top of the one before, and all of them idle soon after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchrelay.config.fleet import Need
from torchrelay.coordinator.loads import NodeLoad
from torchrelay.coordinator.signals import sane
from torchrelay.queues.waiting import CLASSES

__all__ = ["LOAD_S", "Coming", "Demand", "Limits", "demand_of", "staff"]

LOAD_S = 10.0
"""How long a worker loads, while none of its stage has."""
# From an arrival to the decision that it causes: heartbeats come every 2 s, and so do decisions.
_LOOK_S = 3.0
# Shares of their time that workers should compute at most: with a target of delay, that adds what it takes.
_BUSY_AT_MOST, _BUSY_WITH_TARGET = 0.82, 0.88
# Of the allowed delay, the part that the queue may take on average.
_MEAN_OF_TARGET = 0.5
_CATCH_UP_S = 10.0
# What catching up may add to what comes: workers that load for long would be idle soon after. So much where that takes
# no longer than _CATCH_UP_S, and in proportion less else.
_MOST_CATCHING_UP, _LEAST_CATCHING_UP = 1.0, 0.25
# What a rise may add until a new worker is ready.
_MOST_RISE = 0.5
_DELAY_S = 1.0
# A change of the need by so much is noise, and by so much of a need that was alike for long.
_MORE, _LESS, _CLEARLY_LESS = 0.95, 1.08, 1.13
_MOST_SPREAD = 50.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What is fixed about one group of stages that a worker serves: usually one stage, named `stage`.

    `stages` are all of the group and `after` the first stages of the groups before it, in the same version. `delay_ms`
    is the wished delay by class of priority. A `pinned` number of workers, which a user set, goes before `min` and
    `max`. `whole` is the stage that it is a part of (`shards`), whose parts have as many workers each.
    """

    ref: str
    stage: str
    stages: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    min: int = 1
    max: int = 1
    device: str = "cpu"
    need: Need = field(default_factory=Need)
    delay_ms: Mapping[str, float] = field(default_factory=dict)
    pinned: int | None = None
    whole: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.ref, self.stage

    @property
    def least(self) -> int:
        return max(self.min if self.pinned is None else self.pinned, 0)

    @property
    def most(self) -> int:
        return max(self.max if self.pinned is None else self.pinned, self.least)

    def clamp(self, replicas: int) -> int:
        return min(max(replicas, self.least), self.most)


@dataclass(frozen=True, slots=True)
class Coming:
    """What the groups before one are about to send it, in its own rows: so many per second at least, so many at most
    for long, and above that the rows that stand before it."""

    least: float = 0.0
    most: float = math.inf
    queued: float = 0.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What a group wants now. `more` is the number of workers if that is above what there is, `less` if it is below;
    of a number that stands for long already, `less` if there are more than `slack`. `lasting` would be `less` if
    nothing had to be caught up.

    `need` counts workers that never rest, of which `late` catch up; `flow` are the rows per second that will come for
    long, as far as the group can do them, None while unknown; `queued` are the rows that wait at it and before it.
    `behind` is the class of priority whose jobs wait longer than they should, and `behind_rows` what stands before a
    new one. `known` is False before anything was measured.
    """

    more: int
    less: int
    slack: int = 0
    lasting: int = 0
    need: float = 0.0
    late: float = 0.0
    flow: float | None = None
    queued: float = 0.0
    behind: str = ""
    behind_rows: float = 0.0
    known: bool = True
    why: str = ""


def staff(need: float, spread: float, batch_s: float, delay_s: float | None) -> int:
    """The fewest workers that are busy at most as long as they may, and let batches wait at most half the delay.

    The wait is that of a queue with many servers: Sakasegawa's approximation for M/M/m, times the `spread`, which is
    half the sum of the arrivals' dispersion and the service's (Allen and Cunneen).
    """
    need = sane(need)
    if need <= 0:
        return 0
    workers = max(math.ceil(need / (_BUSY_AT_MOST if delay_s is None else _BUSY_WITH_TARGET) - 1e-9), 1)
    if delay_s is None or batch_s <= 0 or workers > 100_000:
        return workers
    seconds, most = max(sane(spread, _MOST_SPREAD), 0.5) * batch_s, 2 * workers + 4
    while workers < most and _wait_s(need, workers, seconds) > _MEAN_OF_TARGET * delay_s:
        workers += 1
    return workers


def _wait_s(need: float, workers: int, seconds: float) -> float:
    busy = need / workers
    return seconds * busy ** (math.sqrt(2.0 * (workers + 1)) - 1.0) / (workers * (1.0 - busy)) if busy < 1 else math.inf


def demand_of(limits: Limits, loads: Sequence[NodeLoad], current: int, coming: Coming = Coming()) -> Demand:
    """What the group wants.

    Args:
        loads: of its stages, the first one first.
        current: how many workers it was given.
        coming: from the groups before it.
    """
    first = loads[0]
    backlog = sum(sane(n.ready_rows) for n in loads)
    standing = backlog + sum(sane(n.held_rows) for n in loads)
    seen = sane(first.arrivals_per_s)
    now, arrivals = min(seen, coming.most), max(min(seen, coming.most), sane(coming.least))
    queued = backlog + sane(coming.queued)
    row_s = sane(first.seconds_per_row, 1e9)
    if standing < 1 and arrivals * (_CATCH_UP_S + LOAD_S) < 0.5:
        return Demand(0, 0, flow=0.0, queued=queued, known=row_s > 0, why="nothing to do")
    if row_s <= 0:
        # One tells what a row costs; until then more would be a guess, and so would less.
        return Demand(
            1, max(current, 1), max(current, 1), queued=queued, known=False, why="what a row costs is not known yet"
        )
    load_s = sane(first.load_s, 3600.0) or LOAD_S
    delay_s = _slowest_s(limits)
    horizon_s = load_s + _LOOK_S
    done = _done_s(first, current, horizon_s, load_s) / row_s
    # What is only coming piles up at the groups before, until they have their workers; what they catch up comes.
    moves = min((seen - now) * horizon_s, sane(coming.queued))
    left = max(backlog + moves + now * horizon_s - done - now * (_DELAY_S if delay_s is None else delay_s), 0.0)
    catch_up_s = max(_CATCH_UP_S, horizon_s, 2.0 * (delay_s or 0.0))
    rise = min(sane(first.trend) * horizon_s, _MOST_RISE * now)
    lasting = min(max(now + rise, arrivals), max(coming.most, arrivals))
    steady = lasting * row_s
    part = max(_MOST_CATCHING_UP * _CATCH_UP_S / horizon_s, _LEAST_CATCHING_UP)
    late = min(left * row_s / catch_up_s, max(part * steady, 1.0))
    need = steady + late
    ready = min(first.ready, current)
    behind, behind_rows = _behind(limits, loads, ready, row_s)
    spread = (max(sane(first.dispersion), 1.0) + sane(first.cv2)) / 2.0
    more, enough, less, slack, lasts = (
        max(staff(workers, spread, sane(first.seconds_per_batch), delay_s), 1)
        for workers in (_MORE * need, need, _LESS * need, _CLEARLY_LESS * need, _LESS * steady)
    )
    if more > current:
        more = enough
    return Demand(
        more=more,
        less=less,
        slack=slack,
        lasting=lasts,
        need=need,
        late=late,
        flow=min(lasting, limits.most / row_s),
        queued=queued,
        behind=behind,
        behind_rows=behind_rows,
        why=_why(arrivals, row_s, backlog, ready, current, coming.least > seen),
    )


def _slowest_s(limits: Limits) -> float | None:
    """The delay that most jobs are to keep: of the lowest class that has one. Better ones overtake."""
    found = [sane(limits.delay_ms[name]) / 1000.0 for name in CLASSES if sane(limits.delay_ms.get(name, 0.0))]
    return found[-1] if found else None


def _done_s(load: NodeLoad, current: int, horizon_s: float, load_s: float) -> float:
    """Worker-seconds that those who are there, or will be, have within the horizon."""
    ready = min(load.ready, current)
    ages = [sane(age) for age in load.loading_s[: max(current - ready, 0)]]
    unseen = max(current - ready - len(ages), 0)
    loading = sum(horizon_s - max(load_s - age, 0.0) for age in ages)
    return ready * horizon_s + loading + unseen * (horizon_s - load_s)


def _behind(limits: Limits, loads: Sequence[NodeLoad], ready: int, row_s: float) -> tuple[str, float]:
    """The class whose jobs wait too long, and what stands before a new one of it."""
    before = 0.0
    for name in CLASSES:
        before += sum(sane(n.waiting[name].rows) for n in loads if name in n.waiting)
        delay_s = sane(limits.delay_ms.get(name, 0.0)) / 1000.0
        # What a single batch makes wait is no queue.
        if delay_s and before * row_s / max(ready, 1) > max(delay_s, sane(loads[0].seconds_per_batch)):
            return name, before
    return "", 0.0


def _why(arrivals: float, row_s: float, backlog: float, ready: int, current: int, coming: bool) -> str:
    texts = [f"{arrivals:.3g} rows/s {'are coming' if coming else 'come'}, a worker does {1.0 / row_s:.3g}"]
    if backlog >= 1:
        texts.append(f"{backlog:.0f} wait")
    if current > ready:
        texts.append(f"{current - ready} of {current} workers still load")
    return ", ".join(texts)
