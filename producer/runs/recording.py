"""Tells the namespace how a run stands while it is driven, and hears whether somebody wants it ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import redis

from torchrelay.errors import BrokerError
from torchrelay.queues.run_records import RunRecord, RunRecords

__all__ = ["Recorder"]

log = logging.getLogger("torchrelay.runs")
_EVERY_S = 1.0
_LAST_S = 5.0


class Recorder:
    """A clock of its own, since a driver may plan or merge for minutes. No failure of it is one of the run's.

    Args:
        records: of the namespace.
        standing: gives the record as of now.
        cancel: called once somebody asked for the run's end.
    """

    def __init__(self, records: RunRecords, standing: Callable[[], RunRecord], cancel: Callable[[], None]) -> None:
        self._records = records
        self._standing = standing
        self._cancel = cancel
        self._ended = threading.Event()
        self._told_of_failure = False
        self._thread = threading.Thread(target=self._work, name="torchrelay-run-record", daemon=True)

    def start(self) -> None:
        self._safely(lambda: self._records.begin(self._standing()))
        self._thread.start()

    def stop(self) -> None:
        """Writes the last record, as the run stands by now."""
        self._ended.set()
        self._thread.join(_LAST_S)  # while the server is away, nobody waits for a record
        self._safely(lambda: self._records.write(self._standing()))

    def _work(self) -> None:
        while not self._ended.wait(_EVERY_S):
            if self._safely(lambda: self._records.write(self._standing())):
                self._cancel()

    def _safely(self, write: Callable[[], bool | None]) -> bool:
        try:
            asked = bool(write())
        except (BrokerError, redis.RedisError, OSError) as away:
            if not self._told_of_failure:
                log.info("how the run stands is not written down: %s", away)
            self._told_of_failure = True
            return False
        self._told_of_failure = False
        return asked
