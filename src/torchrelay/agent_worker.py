"""The RQ worker of an agent: takes jobs off the control plane's queues and executes them here, one after the other.

RQ's own bookkeeping stays: registries, retries, history, commands. What is different is that a job calls nothing but
the entries that were given, in this very process and thread; that whoever executes it is asked to end, and is not
killed; and that no job and no command, however made, ends the agent.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Literal, cast

import redis
from rq import Queue
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.suspension import is_suspended
from rq.timeouts import BaseDeathPenalty
from rq.worker import BaseWorker, WorkerStatus
from rq.worker_registration import clean_worker_registry, register

from torchrelay.errors import BrokerError, UsageError
from torchrelay.queues.control import ControlJob, ControlQueue, Entry
from torchrelay.queues.keys import new_token

__all__ = ["AgentWorker", "GivenBack", "Stopped"]

log = logging.getLogger("torchrelay.agent")
_rq_log = logging.getLogger("torchrelay.agent.rq")
_rq_log.setLevel(logging.WARNING)  # what RQ does step by step is not of interest to operators
_POLL_S = 1.0
_RENEW_S = 5.0
_TIDY_S = 5.0
# An agent that was not heard of for so long is gone, and another one takes its job up.
_EXECUTION_S = 20
_WORKER_S = 60
_AWAY_S = 2.0
_MOST_ERROR = 1000


class GivenBack(Exception):
    """For entries to raise: the agent ends, and the job goes back to its queue, uncharged."""


class Stopped(Exception):
    """For entries to raise: somebody wanted the job ended, so it is not tried again."""


class _NoPenalty(BaseDeathPenalty):
    """Jobs end when they are done: no alarm goes off in the middle of something."""

    def setup_death_penalty(self) -> None:
        pass

    def cancel_death_penalty(self) -> None:
        pass


class AgentWorker(BaseWorker):
    """Takes jobs from these queues, the first first. `serve()` blocks until `stop()`, which any thread may call."""

    queue_class = ControlQueue  # type: ignore[assignment]  # whose constructor asks for less
    job_class = ControlJob
    death_penalty_class = _NoPenalty
    log_result_lifespan = False

    def __init__(
        self,
        queues: Sequence[str],
        connection: redis.Redis,
        entries: Mapping[str, Entry],
        wanted: Callable[[ControlJob], bool] = lambda job: True,
        announces: Mapping[str, str] | None = None,
    ) -> None:
        """`wanted` says which jobs it takes: the others wait for another agent. `announces` are fields of its record,
        for whoever looks for agents."""
        name = f"torchrelay-{socket.gethostname()}-{os.getpid()}-{new_token(4)}"
        super().__init__(
            [ControlQueue(q, connection) for q in queues],
            name=name,
            connection=connection,
            worker_ttl=_WORKER_S,
            job_monitoring_interval=_WORKER_S,
            serializer="json",
            log_job_description=False,
        )
        self.log = _rq_log
        self._entries = entries
        self._wanted = wanted
        self._announces = dict(announces or {})
        self._tidied_at = 0.0
        self.on_stop: Callable[[], object] = int

    def stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ends it soon: what is executed is asked to end, and goes back to its queue."""
        self._stop_requested = True
        self.on_stop()

    def ending(self, job: ControlJob) -> Literal["", "stopped", "given back"]:
        """For entries to look at now and then: why this job should end now, and which exception says that it did."""
        if self._stopped_job_id == job.id:
            return "stopped"
        return "given back" if self._stop_requested else ""

    def serve(self, *, signals: bool = True) -> None:
        """Registers, executes what comes, and says farewell. Only the main thread may take signals."""
        if signals:
            signal.signal(signal.SIGINT, self.stop)
            signal.signal(signal.SIGTERM, self.stop)
        self.register_birth()  # type: ignore[no-untyped-call]
        self.subscribe()  # type: ignore[no-untyped-call]
        try:
            while not self._stop_requested:
                try:
                    self._tidy()
                    taken = self._take()
                    if taken is not None:
                        self.execute_job(*taken)
                except (redis.ConnectionError, redis.TimeoutError, BrokerError, OSError) as away:
                    log.warning("the server is away, the agent waits for it: %s", away)
                    time.sleep(_AWAY_S)
                except Exception:
                    log.exception("a job could not be accounted for; it is taken up again later")
        finally:
            self.teardown()  # type: ignore[no-untyped-call]

    def _take(self) -> tuple[ControlJob, ControlQueue] | None:
        queues: list[Any] = self._ordered_queues
        if is_suspended(self.connection, self):
            time.sleep(_POLL_S)
            return None
        for queue in queues:
            if (job := queue.take_wanted(self._wanted)) is not None:
                return job, queue
        first = queues[0]
        if first.has_others:  # that wait for other agents, and would be taken again and again
            time.sleep(_POLL_S)
            return None
        # Who waits hears of the first queue at once, and of the others within a second.
        job = first.take(_POLL_S)
        if job is not None and not self._wanted(job):
            first.give_back(job)
            return None
        return None if job is None else (job, first)

    def serialize(self) -> dict[str, Any]:
        """Its record, as RQ writes it."""
        return super().serialize() | self._announces

    def _tidy(self) -> None:
        """What dead agents left is tried again or failed, as RQ does it; but for what RQ would unpickle meanwhile."""
        if time.monotonic() - self._tidied_at < _TIDY_S:
            return
        self._tidied_at = time.monotonic()
        with self.connection.pipeline() as pipe:  # a server that was away may have forgotten it
            pipe.hset(self.key, mapping=cast(Any, self.serialize()))
            register(self, pipe)
            pipe.execute()
        queue: Any
        for queue in self.queues:
            try:
                for kind in (StartedJobRegistry, FinishedJobRegistry, FailedJobRegistry):
                    kind(queue=queue, job_class=ControlJob, death_penalty_class=_NoPenalty).cleanup()
                queue.return_stuck()
                clean_worker_registry(queue)
            except (redis.ConnectionError, redis.TimeoutError):
                raise
            except Exception:
                log.exception("the registries of %s cannot be tidied", queue.name)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Executes a job in this thread. What it raises is the job's."""
        assert isinstance(job, ControlJob)
        if job._status == JobStatus.CANCELED:
            self.connection.lrem(queue.intermediate_queue_key, 1, job.id)
            return
        job.entries = self._entries
        self._stopped_job_id = None
        log.info("job %s of %s begins", job.id, queue.name)
        execution = self.prepare_execution(job)
        with _Renewal(self, job, execution):
            if self.perform_job(job, queue, execution):
                log.info("job %s is done", job.id)
        self.set_state(WorkerStatus.IDLE)

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        super().prepare_job_execution(job, remove_from_intermediate_queue=True)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return _EXECUTION_S

    def _finalize_failure(
        self,
        job: Job,
        queue: Queue,
        execution: Execution,
        exc_info: tuple[type[BaseException] | None, BaseException | None, TracebackType | None],
    ) -> None:
        error = exc_info[1]
        if isinstance(error, GivenBack):
            self._give_back(job, queue, execution)
            return
        if isinstance(error, Stopped):
            self._stopped_job_id = job.id
        elif isinstance(error, UsageError):
            job.retries_left = 0  # the next try would be refused as well
        job.meta["error"] = f"{type(error).__name__}: {error}"[:_MOST_ERROR]
        job.save_meta()  # type: ignore[no-untyped-call]
        super()._finalize_failure(job, queue, execution, exc_info)

    def _give_back(self, job: Job, queue: Queue, execution: Execution) -> None:
        log.info("job %s goes back to %s", job.id, queue.name)
        with self.connection.pipeline() as pipe:
            self.cleanup_execution(job, pipe, execution)
            queue._enqueue_job(job, pipeline=pipe, at_front=True)
            pipe.execute()

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        error = exc_info[1]
        expected = isinstance(error, UsageError | Stopped)
        log.error("job %s failed: %s: %s", job.id, type(error).__name__, error, exc_info=None if expected else exc_info)

    def handle_payload(self, message: dict[str, Any]) -> None:
        """A command of RQ's: stop-job, stop-execution, shutdown. What is none is dropped."""
        try:
            super().handle_payload(message)  # type: ignore[no-untyped-call]
        except Exception as error:  # it would end the thread that listens
            log.warning("a command cannot be read: %r", error)

    def kill_horse(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """There is no process to kill: who executes the job looks at `ending`."""

    def procline(self, message: str) -> None:
        pass

    def request_stop(self, signum: Any, frame: Any) -> None:
        self.stop()


class _Renewal:
    """Says that a job is being executed, every few seconds, for as long as it is."""

    def __init__(self, worker: AgentWorker, job: Job, execution: Execution) -> None:
        self._worker, self._job, self._execution = worker, job, execution
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="torchrelay-agent-renewal", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _work(self) -> None:
        while not self._over.wait(_RENEW_S):
            try:
                self._worker.maintain_heartbeats(self._job, self._execution)
            except (redis.RedisError, OSError) as away:
                log.warning("job %s: its execution cannot be renewed: %s", self._job.id, away)
