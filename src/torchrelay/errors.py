"""Every error that torchrelay raises, in one tree split by who can act on it.

    TorchrelayError
    ├── UsageError              you: the call, the file or the command is wrong
    │   ├── ConfigError             a pipeline file, a setting, a missing extra
    │   ├── InputError              a row that does not fit the pipeline's declared columns (also a ValueError)
    │   ├── PipelineNotFound        a name or version that nobody registered
    │   └── RunConflict             the same key with other content
    ├── JobError                the job: it ended without a result
    │   ├── JobFailed               its stage raised on every attempt, or killed its workers
    │   ├── JobCancelled            somebody cancelled it
    │   ├── DeadlineExceeded        its deadline passed first (also a TimeoutError)
    │   └── ResultExpired           it ended, and its result is no longer kept
    ├── CapacityError           later, or with more machines
    │   ├── QueueFull               the entry queue is above its mark
    │   └── NoWorkers               nobody serves a stage
    ├── BrokerError             whoever runs Redis
    │   ├── BrokerUnavailable       it cannot be reached
    │   └── BrokerMisconfigured     it is reachable and unfit: eviction policy, version, schema
    ├── WireError               bytes that are not what they should be
    │   ├── DecodeError             they do not decode (with length and offset)
    │   └── BytesLost               they are gone
    ├── WorkerError             whoever runs the workers
    │   ├── StageLoadError          a stage's model does not load
    │   ├── StageHung               a forward ran past its time-out
    │   └── DeviceError             the device failed or is missing
    └── RetryLater              for stages to raise: not now, try these jobs again later

Imports nothing of torchrelay. Messages say what was wrong, where, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BrokerError",
    "BrokerMisconfigured",
    "BrokerUnavailable",
    "BytesLost",
    "CapacityError",
    "ConfigError",
    "DeadlineExceeded",
    "DecodeError",
    "DeviceError",
    "InputError",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "NoWorkers",
    "PipelineNotFound",
    "QueueFull",
    "ResultExpired",
    "RetryLater",
    "RunConflict",
    "StageHung",
    "StageLoadError",
    "TorchrelayError",
    "UsageError",
    "WireError",
    "WorkerError",
]


class TorchrelayError(Exception):
    """The root: catching it catches everything that torchrelay raises on purpose."""


class UsageError(TorchrelayError):
    """The call, file or command is wrong; nothing was done."""


class ConfigError(UsageError):
    """A pipeline file, a setting or the installation is wrong.

    `problems` holds one line per problem, each with its place where one is known.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = problems or (message,)


class InputError(UsageError, ValueError):
    """A row does not fit the columns that its pipeline declares, or an argument is out of range."""


class PipelineNotFound(UsageError):
    """Nobody registered this pipeline or version in this namespace."""


class RunConflict(UsageError):
    """The same key was already used with other content; `accepted` holds the futures of the jobs that went in."""

    def __init__(self, message: str, accepted: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.accepted = accepted


class JobError(TorchrelayError):
    """A job ended without a result. Everything about the failure is kept as text.

    `job_id`, `stage`, `error_type` and `traceback` may be empty; `attempts` counts how often the stage raised. `row` is
    the number of the row, from 0, where there is no job: in `run_local` and `testing.run_stage`.
    """

    def __init__(
        self,
        message: str,
        *,
        job_id: str = "",
        stage: str = "",
        attempts: int = 0,
        error_type: str = "",
        traceback: str = "",
        row: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.job_id = job_id
        self.stage = stage
        self.attempts = attempts
        self.error_type = error_type
        self.traceback = traceback
        self.row = row

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __str__(self) -> str:
        where = f" at stage {self.stage!r}" if self.stage else ""
        kind = f"{self.error_type}: " if self.error_type else ""
        tries = f" after {self.attempts} attempt{'s' if self.attempts != 1 else ''}" if self.attempts else ""
        who = f"job {self.job_id}" if self.job_id else "" if self.row is None else f"row {self.row}"
        return f"{who}{where}{tries}: {kind}{self.message}" if who else self.message


class JobFailed(JobError):
    """The stage raised on every attempt, or the job killed its workers; it lies among the dead letters."""


class JobCancelled(JobError):
    """The job was cancelled before it ended."""


class DeadlineExceeded(JobError, TimeoutError):
    """The job's deadline passed before it ended."""


class ResultExpired(JobError):
    """The job is known to have ended, or was never known; its result is not kept any more."""


class CapacityError(TorchrelayError):
    """There is no room or nobody to do the work now."""


class QueueFull(CapacityError):
    """The entry queue is above its mark; `accepted` holds the futures of the jobs that went in before."""

    def __init__(self, message: str, accepted: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.accepted = accepted


class NoWorkers(CapacityError):
    """No live worker serves a stage that the job needs."""


class BrokerError(TorchrelayError):
    """Something is wrong with Redis or Valkey."""


class BrokerUnavailable(BrokerError):
    """The server cannot be reached."""


class BrokerMisconfigured(BrokerError):
    """The server is reachable and unfit; the message names the setting and the value to use."""


class WireError(TorchrelayError):
    """Bytes from the server are not what they should be."""


class DecodeError(WireError):
    """A message does not decode; `length` and `offset` are in bytes where they are known."""

    def __init__(self, message: str, *, length: int | None = None, offset: int | None = None) -> None:
        where = "" if length is None else f" ({length} bytes" + (")" if offset is None else f", at offset {offset})")
        super().__init__(message + where)
        self.length = length
        self.offset = offset


class BytesLost(WireError):
    """The bytes behind a ref are gone."""


class WorkerError(TorchrelayError):
    """A worker cannot do its work."""


class StageLoadError(WorkerError):
    """A stage could not be imported, built or loaded."""


class StageHung(WorkerError):
    """A forward call ran past the stage's `timeout_s`."""


class DeviceError(WorkerError):
    """The device is missing or failed."""


class RetryLater(TorchrelayError):
    """For a stage to raise when something it needs is away: its batch is tried again, no sooner than in `after_s`.

    It counts as an attempt (`retry: {attempts: N}` of the stage), so that a job does not wait for ever.
    """

    def __init__(self, after_s: float, message: str = "") -> None:
        if isinstance(after_s, bool) or not isinstance(after_s, int | float) or not 0 <= after_s <= 30 * 86400:
            raise InputError(f"RetryLater({after_s!r:.40}): after_s is a number of seconds from 0 to 30 days")
        super().__init__(message or f"the stage asked to be tried again in {after_s:g} s")
        self.after_s = float(after_s)
