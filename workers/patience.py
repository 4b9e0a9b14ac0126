"""Repeats plain, idempotent commands while the server is away, as the channel does with transitions; and what comes due
every so often."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from torchrelay.errors import BrokerUnavailable
from torchrelay.queues.channel import LOST

T = TypeVar("T")
PATIENCE_S = 30.0


class Every:
    """Says, when asked often, that so many seconds are over again."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def patiently(act: Callable[[], T]) -> T:
    """What `act` returns; raises BrokerUnavailable once the server was away for half a minute."""
    deadline, pause_s = time.monotonic() + PATIENCE_S, 0.02
    while True:
        try:
            return act()
        except LOST as error:
            if time.monotonic() > deadline:
                raise BrokerUnavailable(f"no answer from the server for {PATIENCE_S:.0f} s ({error})") from error
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.5)
