"""Runs that an agent drives: how they are asked for, as jobs of RQ's queues. What they say are plain values.

A run's id is its job's id. The queue tells its priority; the agent that takes the job drives the run with the pipeline
files that it was started with, and with no others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import redis
from rq import Retry
from rq.exceptions import DuplicateJobError
from rq.job import JobStatus
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from torchrelay.errors import InputError
from torchrelay.producer.runs.options import RunKeywords, RunOptions
from torchrelay.queues.control import ControlQueue
from torchrelay.queues.priority import Priority, parse_priority

__all__ = [
    "ENTRY",
    "LEVELS",
    "RunRequest",
    "announced",
    "enqueue",
    "level_of",
    "queue_of",
    "runs_queues",
    "versions_driven",
]

ENTRY: Final = "torchrelay.run"
"""The one thing that a job of these queues calls. No module has this name: only an agent knows what it means."""
LEVELS: Final = ("high", "medium", "low")
_ANNOUNCED: Final = "torchrelay_pipelines"
_OPTIONS = frozenset(RunKeywords.__annotations__) - {"on_progress", "run_id"}
_KEPT_S: Final = 30 * 24 * 3600
_RETRY_AFTER_S: Final = (5, 30, 120)
_LONGEST, _MOST_INPUTS = 4096, 10_000


def level_of(priority: str | int) -> str:
    """high, medium or low, whichever is nearest."""
    value = parse_priority(priority)
    near = min(Priority, key=lambda p: (abs(p - value), -p))
    return near.name.lower()


def queue_of(namespace: str, level: str) -> str:
    """The queue's name, as `rq info` shows it. RQ knows no namespaces."""
    return f"{namespace}:runs-{level}"


def runs_queues(client: redis.Redis, namespace: str, levels: Sequence[str] = LEVELS) -> list[ControlQueue]:
    return [ControlQueue(queue_of(namespace, level), client) for level in levels]


def announced(refs: Iterable[str]) -> dict[str, str]:
    """How an agent's record says which versions it drives runs of."""
    return {_ANNOUNCED: json.dumps(sorted(refs))}


def versions_driven(client: redis.Redis, queue: ControlQueue) -> set[str]:
    """The `name@version`s that agents which live and take from this queue have announced."""
    agents: Any = client.smembers(WORKERS_BY_QUEUE_KEY % queue.name)
    found: set[str] = set()
    for agent in agents:
        try:
            died, told = client.hmget(agent, "death", _ANNOUNCED)
            refs = [] if died or not told else json.loads(told)
        except (redis.ResponseError, ValueError, RecursionError):
            continue  # what is no record of an agent tells nothing
        if isinstance(refs, list):
            found.update(ref for ref in refs if isinstance(ref, str))
    return found


@dataclass(frozen=True)
class RunRequest:
    """One run as a job asks for it. `options` are those of `Relay.run`, `pipeline` is name@version."""

    pipeline: str
    input: tuple[str, ...]
    output: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls, pipeline: str, data: Sequence[str], output: str, options: Mapping[str, Any], folder: str = "."
    ) -> RunRequest:
        """As a user asks for it: relative paths are below `folder`. Raises InputError or ConfigError."""

        def absolute(text: str) -> str:
            return text if "://" in text else os.path.abspath(os.path.join(folder, os.path.expanduser(text)))

        given = {k: v for k, v in options.items() if v is not None and v is not False and v not in ([], {})}
        return cls.parse(
            {"pipeline": pipeline, "input": [*map(absolute, data)], "output": absolute(output), "options": given}
        )

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> RunRequest:
        """What a job says, whoever wrote it. Raises InputError or ConfigError that names what is wrong."""
        if arguments.keys() != {"pipeline", "input", "output", "options"}:
            raise InputError(f"a run has pipeline, input, output and options, not {sorted(arguments)!r:.200}")
        data, options = arguments["input"], arguments["options"]
        if not isinstance(data, list) or not 0 < len(data) <= _MOST_INPUTS:
            raise InputError(f"a run's input is a list of 1 to {_MOST_INPUTS} paths, not {data!r:.80}")
        for name, value in (("pipeline", arguments["pipeline"]), ("output", arguments["output"])):
            _need_text(name, value)
        for path in data:
            _need_text("input", path)
        if not isinstance(options, dict) or not options.keys() <= _OPTIONS:
            raise InputError(f"a run's options are among {', '.join(sorted(_OPTIONS))}, not {options!r:.200}")
        made = cls(arguments["pipeline"], tuple(data), arguments["output"], options)
        made.run_options("check")
        return made

    def run_options(self, run: str) -> RunOptions:
        """As the driver takes them, for the run of this id. Raises InputError or ConfigError."""
        try:
            return RunOptions.parse(self.output, {**self.options, "run_id": run})
        except (TypeError, ValueError) as error:
            raise InputError(f"a run's options: {error}") from error

    def arguments(self) -> dict[str, Any]:
        """What the job says."""
        return {**asdict(self), "input": list(self.input), "options": dict(self.options)}

    def into(self, output: str) -> RunRequest:
        """The same run, into another folder."""
        return replace(self, output=output)

    @property
    def level(self) -> str:
        """By its priority."""
        return level_of(self.options.get("priority", Priority.LOW))


def _retry(retries: int) -> Retry | None:
    # RQ counts intervals from the last one, so that there is one for each retry.
    after_s = [*_RETRY_AFTER_S, *[_RETRY_AFTER_S[-1]] * retries][:retries]
    return Retry(max=retries, interval=after_s) if retries else None


def _need_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST or "\0" in value:
        raise InputError(f"a run's {name} is a text of 1 to {_LONGEST} characters, not {value!r:.80}")


def enqueue(
    client: redis.Redis,
    namespace: str,
    request: RunRequest,
    run: str,
    *,
    at: float | None = None,
    retries: int = 0,
    schedule: str | None = None,
) -> bool:
    """Asks for a run of this id, now or `at` seconds since the epoch; False when there is one already.

    It is durable when this returns. `retries` is how often it is taken up again when it failed or its agent died, each
    time to go on with what is missing; `schedule` names the one that it is a repetition of.
    """
    queue = ControlQueue(queue_of(namespace, request.level), client)
    told = {"pipeline": request.pipeline, "input": " ".join(request.input)[:500], "output": request.output}
    job = queue.create_job(
        ENTRY,
        kwargs=request.arguments(),
        job_id=run,
        timeout=-1,
        result_ttl=_KEPT_S,
        failure_ttl=_KEPT_S,
        description=f"run {request.pipeline} into {request.output}"[:200],
        meta=told if schedule is None else {**told, "schedule": schedule},
        retry=_retry(retries),
        status=JobStatus.QUEUED if at is None else JobStatus.SCHEDULED,
    )
    try:
        if at is None:
            queue.enqueue_job(job, unique=True)
        else:
            queue.schedule_job(job, datetime.fromtimestamp(at, UTC), unique=True)
    except DuplicateJobError:
        return False
    return True
