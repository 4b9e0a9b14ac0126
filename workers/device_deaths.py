"""Whose fault it is when a device fails under one child after the other: a job's, or the device's own."""

from __future__ import annotations

from torchrelay.queues.job import split_entries

__all__ = ["DeviceDeaths"]

_JOBS = 3


class DeviceDeaths:
    """Deaths of a worker's children by their device, one after the other without a forward that passed between them.

    A job that fails on every device kills child after child by itself. When three jobs at least would have to be to
    blame, the device is.
    """

    def __init__(self) -> None:
        self._suspects: list[frozenset[bytes]] = []

    def note(self, started: bytes, forwards: int) -> None:
        """A child died of its device while it computed `started` (packed entries), after so many forwards."""
        if forwards:
            self.clear()
        # Without the generation: a restarted job is the same job.
        self._suspects.append(frozenset(entry[:-1] for entry in split_entries(started)))

    def clear(self) -> None:
        """A child ended otherwise."""
        self._suspects.clear()

    @property
    def bad_device(self) -> bool:
        """Whether so many deaths have no job in common, two by two."""
        apart: set[bytes] = set()
        count = 0
        for jobs in sorted(self._suspects, key=len):
            if jobs and apart.isdisjoint(jobs):
                apart |= jobs
                count += 1
        return count >= _JOBS
