"""Keeps the lanes: expired leases, due jobs, deadlines and old results, each second, by whoever is there.

The leading coordinator does it twice a second. Every supervisor looks, and does it where nobody did for a while. Each
transition is safe to run twice and at once (rule 14 of the transport).
"""

from __future__ import annotations

import logging
import time

import redis

from torchrelay.errors import BrokerError
from torchrelay.queues.registry import Registry, run

log = logging.getLogger("torchrelay.upkeep")
TICK_S = 1.0
_UNLESS_KEPT_MS = 900


class Upkeep:
    """Call `tick()` often; it acts once a second, or every `each_s`. With `leading` False it leaves lanes alone that
    somebody kept within the last second."""

    def __init__(self, registry: Registry, each_s: float = TICK_S, *, leading: bool = False) -> None:
        self._registry = registry
        self._each_s = each_s
        self._unless_kept_ms = 0 if leading else _UNLESS_KEPT_MS
        self._next = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._each_s
        client = self._registry.client
        for lane in self._registry.lanes:
            try:
                back, moved, delayed, late, old = run(client, lane.reap(unless_kept_ms=self._unless_kept_ms))
                if back:
                    log.warning("took back %d jobs whose lease ran out", back)
                if moved:
                    log.warning(
                        "the lane was not kept for a while: %d leases were moved, nothing was taken back", moved
                    )
                while delayed and run(client, lane.promote())[0] == 256:
                    pass
                while late and run(client, lane.expire()) == 256:
                    pass
                while old and run(client, lane.sweep()) == 256:
                    pass
            except (BrokerError, redis.RedisError, OSError) as error:
                log.warning("upkeep: %s", error)
