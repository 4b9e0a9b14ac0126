"""A supervisor's part in a group of ranks: says that its rank lives, and ends its child when the group's epoch is over.

A thread of its own looks four times a second. Whoever's child dies ends the epoch at once; the others hear of it at
their next look, kill theirs, and all meet under the next one. While the server is away nothing is
known, and nothing is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import redis

from torchrelay.errors import BrokerError, ConfigError
from torchrelay.queues.groups import PRESENT_S, GroupRecord, GroupState, Kind, Member, RankTaken
from torchrelay.queues.registry import Registry

__all__ = ["GroupWatch"]

log = logging.getLogger("torchrelay.group")
_LOOK_S = 0.25
# A process that was killed has its rank so long; then it is another that lives.
_TAKEN_S = 2 * PRESENT_S
_FAULTS = (BrokerError, redis.RedisError, OSError)


class GroupWatch:
    """One rank's presence. `start()` begins it, `stop()` leaves the group.

    `changed` is called, by another thread, when an epoch is over or the group is to drain.
    """

    def __init__(self, registry: Registry, member: Member, who: str, changed: Callable[[], object]) -> None:
        self.member = member
        self.record = GroupRecord(registry.client, registry.control, member, who)
        self._changed = changed
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._state: GroupState | None = None
        # The epoch for which this rank is ready: it has no child of an older one.
        self._ready_for = 0
        self._draining = self._over = False
        self._thread = threading.Thread(target=self._loop, name=f"torchrelay-group-{member.rank}", daemon=True)
        self._taken_until = 0.0
        # Why this rank can never join: another process has it, or the group is of another size.
        self.refused: ConfigError | None = None
        self.joined = 0  # the epoch in which this rank came

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over = True
        self._news.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            self.record.tend(0, leave=True)
        except (ConfigError, *_FAULTS) as error:
            log.info("the group was not left: %s", error)

    @property
    def state(self) -> GroupState | None:
        """How the group stood at the last look."""
        return self._state

    def drain(self) -> None:
        """All ranks are to end."""
        self._draining = True
        self._news.set()

    def ready(self) -> GroupState | None:
        """This rank has no child: says so, and returns how the group stands once all ranks are; None before that."""
        state = self._look()
        if state is None:
            return None
        if self._ready_for != state.epoch:
            self._ready_for = state.epoch
            state = self._look()
        return (
            state if state is not None and state.epoch == self._ready_for and state.ready == self.member.size else None
        )

    def over(self, epoch: int) -> bool:
        """Whether this epoch is over, as far as is known."""
        return self._state is not None and self._state.epoch != epoch

    def end(self, epoch: int, kind: Kind, why: str, cap: int = 0) -> None:
        """Ends this epoch, unless it is over; while the server is away, the others notice by themselves."""
        try:
            self.record.end(epoch, kind, why, cap)
        except _FAULTS as error:
            log.warning("the group was not told that %s: %s", why, error)
        self._look()

    def _look(self) -> GroupState | None:
        with self._lock:
            try:
                self._state = self.record.tend(self._ready_for, drain=self._draining)
                self.refused, self._taken_until = None, 0.0
            except RankTaken as error:
                self._taken(error)
                return None
            except ConfigError as error:
                self.refused = error
                return None
            except _FAULTS as error:
                log.warning("the group cannot be looked at; its ranks run on as they are: %s", error)
                return None
            self.joined = self.joined or self._state.epoch
            return self._state

    def _taken(self, error: RankTaken) -> None:
        """Who has the rank may have been killed a moment ago: waits until that would be known."""
        now = time.monotonic()
        if not self._taken_until:
            self._taken_until = now + _TAKEN_S
            log.warning("%s; if it was killed, this one has its place in %g s", error, PRESENT_S)
        elif now >= self._taken_until:
            self.refused = error

    def _loop(self) -> None:
        told = (0, False)
        while not self._over:
            state = self._look()
            if state is not None and (state.epoch, state.draining) != told:
                told = (state.epoch, state.draining)
                self._changed()
            self._news.wait(_LOOK_S)
            self._news.clear()
