"""An agent's part for its host: workers as the leader decided, and the RQ worker that is asked to reconcile.

RQ jobs only say "look now": whether one is lost, or comes twice, changes nothing but how soon the host looks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import redis

from torchrelay.agent_worker import AgentWorker
from torchrelay.errors import BrokerError
from torchrelay.queues.control import ControlJob, ControlQueue
from torchrelay.queues.fleet import RECONCILE, reconcile_queue
from torchrelay.queues.registry import Registry
from torchrelay.workers.host_agent import HostAgent

__all__ = ["HostService"]

log = logging.getLogger("torchrelay.agent")
_WAIT_S = 5.0
_AWAY_S = 2.0


class HostService:
    """Both, in threads of this process. `stop()` drains, `join()` waits for that."""

    def __init__(self, agent: HostAgent, registry: Registry) -> None:
        self.agent = agent
        self._client = registry.client
        self._queue = reconcile_queue(registry.control.namespace, agent.name)
        self._worker: AgentWorker | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="torchrelay-reconcile", daemon=True)

    def start(self) -> None:
        """Raises ConfigError for slots that are not there."""
        self.agent.start()
        self._thread.start()

    def stop(self) -> None:
        """Any thread may call it, and a handler of signals."""
        self._stopping.set()
        self.agent.stop()
        if self._worker is not None:
            self._worker.stop()

    def join(self) -> None:
        """Until its workers have drained."""
        self.agent.join()
        self._thread.join(_WAIT_S)

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                self._worker = AgentWorker([self._queue], self._client, {RECONCILE: self._reconcile})
                if not self._stopping.is_set():
                    self._worker.serve(signals=False)
            except (redis.RedisError, BrokerError, OSError) as away:
                log.info("the queue %s waits for the server: %s", self._queue, away)
            except Exception:
                log.exception("the queue %s is not served; the agent looks every two seconds all the same", self._queue)
            self._stopping.wait(_AWAY_S)
        try:
            ControlQueue(self._queue, self._client).delete(delete_jobs=True)
        except (redis.RedisError, OSError):
            pass  # what lies there runs out

    def _reconcile(self, job: ControlJob, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the job asks for; what else it says is only for people to read."""
        began = time.monotonic()
        applied = self.agent.poke(_WAIT_S)
        return {
            "applied": applied,
            "workers": len(self.agent.supervisors),
            "seconds": round(time.monotonic() - began, 3),
        }
