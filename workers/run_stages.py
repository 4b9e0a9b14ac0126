"""What serves `@read` and `@write`: stages like the users', but for what they know of a run. See `config.run_graph`.

Reading and writing themselves are `stages.reading` and `stages.writing`, which know of no server; here they meet what
the server tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import redis

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.run_graph import READ
from torchrelay.queues.registry import run
from torchrelay.queues.transitions import Transitions
from torchrelay.stages import Stage
from torchrelay.workers.claimer import Held
from torchrelay.workers.patience import patiently

__all__ = ["StillHeld", "run_stage"]


class StillHeld:
    """Asks the server whether a job is still this worker's, and makes it so for one more lease."""

    def __init__(self, lease_ms: int) -> None:
        self._lease_ms = lease_ms
        self._client: redis.Redis | None = None
        self._lanes: Sequence[Transitions] = ()

    def connect(self, client: redis.Redis, lanes: Sequence[Transitions]) -> None:
        """From now on, there. Stages are built before anything is connected."""
        self._client, self._lanes = client, lanes

    def __call__(self, held: Held) -> bool:
        """Raises BrokerUnavailable when the server was away for half a minute."""
        assert self._client is not None  # connected before the first claim
        call = self._lanes[held.lane].renew(self._lease_ms, [held.fence])
        ((mine, revoked),) = patiently(partial(run, self._client, call))
        return mine and held.entry.packed not in revoked


def run_stage(name: str, twin: Pipeline, still_held: StillHeld, writer: str) -> Stage:
    """The stage that serves `@read` or `@write` of a run graph. `writer`: see `Settings.run_writer`."""
    from torchrelay.workers.run_reading import Read
    from torchrelay.workers.run_writing import Write

    return Read(twin) if name == READ else Write(twin, still_held, writer)
