"""Who leads: a lease in Redis with an epoch that only grows, taken, kept and given up by its clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from torchrelay.config.fleet import Desired
from torchrelay.queues.fleet import LEASE_S, Aside, FleetRecords

__all__ = ["LOOK_S", "Leader"]

log = logging.getLogger("torchrelay.coordinator")
LOOK_S = 0.5
"""How often the lead is renewed, and who waits looks whether it is free."""


class Leader:
    """One candidate's right to decide. `epoch` is 0 while somebody else, or nobody, leads."""

    def __init__(self, records: FleetRecords, name: str, lease_s: float = LEASE_S) -> None:
        self._records = records
        self._lease_s = lease_s
        self.name = name
        self.epoch = 0
        self.holder = ""
        self._until = 0.0

    @property
    def leads(self) -> bool:
        """Whether it may still lead, by our own clock; what is true the server says at each decree."""
        return self.epoch > 0 and time.monotonic() < self._until

    def renew(self) -> bool:
        """Takes or keeps the lead where it can; raises what the client raises while the server is away."""
        asked_at = time.monotonic()
        epoch, holder, _ = self._records.lead(self.name, self._lease_s)
        if epoch and epoch != self.epoch:
            log.info("%s leads in epoch %d", self.name, epoch)
        elif self.epoch and not epoch:
            log.warning("%s leads no longer: %s does", self.name, holder or "nobody")
        self.epoch, self.holder = epoch, holder
        self._until = asked_at + self._lease_s
        return epoch > 0

    def decree(
        self,
        desired: Mapping[str, Desired | None],
        aside: Mapping[str, Aside | None],
        reasons: Mapping[str, Any] | None,
    ) -> bool:
        """Writes what was decided; False, and the lead is lost, where somebody else took it meanwhile."""
        if self.epoch and self._records.decree(self.name, self.epoch, desired, aside, reasons):
            return True
        log.warning("%s decides nothing: it led in epoch %d, and leads no longer", self.name, self.epoch)
        self.epoch = 0
        return False

    def give_up(self) -> None:
        """Lets another one lead at once."""
        if self.epoch:
            self._records.lead(self.name, 0)
        self.epoch = 0
