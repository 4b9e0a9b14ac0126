"""How the runs of a namespace stand: one small record each, written by whoever drives the run, read by anybody.

A record tells; it decides nothing. What there is to know of a run lies in its output folder, and one whose record is
gone goes on as well. A driver renews its record about once a second, and is asked there to end its run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import redis

from torchrelay.queues.keys import ControlKeys

__all__ = ["LOST", "RUNNING", "RunRecord", "RunRecords"]

RUNNING: Final = "running"
LOST: Final = "lost"
"""The state of a run whose driver was not heard of for a while, and said no farewell."""
ALIVE_S: Final = 15
_KEPT_S: Final = 30 * 24 * 3600
_MOST: Final = 1000
_ASKED_S: Final = 24 * 3600
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as its driver sees it. Times are seconds since the epoch, by the driver's clock."""

    run: str
    pipeline: str
    """name@version."""
    input: str
    output: str
    host: str
    pid: int
    began: float
    state: str = RUNNING
    """running, done, failed (a chunk has no part), stopped (too many errors), cancelled; a reader also says lost."""
    seconds: float = 0.0
    rows: int = 0
    """Rows that were written, by earlier drivers of the same run too."""
    total_rows: int | None = None
    """None where nobody counted them."""
    chunks_done: int = 0
    chunks: int | None = None
    errors: int = 0
    """Rows that failed, and chunks that failed as a whole."""
    rows_per_s: float = 0.0
    eta_s: float | None = None
    error: str = ""
    """What made it impossible to go on."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes | None) -> RunRecord | None:
        """None for what is no record of this version of torchrelay: it is shown nowhere, and harms nothing."""
        if data is None:
            return None
        try:
            values: dict[str, Any] = json.loads(data)
            made = cls(**values)
        except (TypeError, ValueError, RecursionError):
            return None
        fits = all(isinstance(getattr(made, f.name), _KINDS[str(f.type)]) for f in fields(cls))
        return made if fits else None


class RunRecords:
    """The records of a namespace. Thread-safe, as the client's pool is."""

    def __init__(self, client: redis.Redis, control: ControlKeys) -> None:
        self._client = client
        self._control = control

    def begin(self, record: RunRecord) -> None:
        """A driver takes the run up; what an earlier one was asked is void."""
        with self._client.pipeline() as pipe:
            pipe.delete(self._control.run_cancel(record.run))
            pipe.zadd(self._control.runs, {record.run: int(record.began * 1000)})
            pipe.zremrangebyrank(self._control.runs, 0, -_MOST - 1)
            pipe.expire(self._control.runs, _KEPT_S)
            self._put(pipe, record)
            pipe.execute()

    def write(self, record: RunRecord) -> bool:
        """Renews the record; whether somebody asked that the run be ended. A record with another state than running is
        the last one."""
        with self._client.pipeline() as pipe:
            pipe.exists(self._control.run_cancel(record.run))
            self._put(pipe, record)
            return bool(pipe.execute()[0])

    def _put(self, pipe: Any, record: RunRecord) -> None:
        pipe.set(self._control.run(record.run), record.encode(), ex=_KEPT_S)
        alive = self._control.run_alive(record.run)
        if record.state == RUNNING:
            pipe.set(alive, b"1", ex=ALIVE_S)
        else:
            pipe.delete(alive)

    def cancel(self, run: str) -> None:
        """Asks whoever drives the run, now or soon, to end it."""
        self._client.set(self._control.run_cancel(run), b"1", ex=_ASKED_S)

    def cancel_asked(self, run: str) -> bool:
        """Whether somebody did."""
        return bool(self._client.exists(self._control.run_cancel(run)))

    def find(self, run: str) -> RunRecord | None:
        """The record of a run, `lost` where its driver is gone."""
        return self._read([run])[0]

    def all(self) -> list[RunRecord]:
        """The records that are kept, the latest first: at most 1000, for 30 days."""
        ids: Any = self._client.zrevrange(self._control.runs, 0, -1)
        return [r for r in self._read([i.decode("utf-8", "replace") for i in ids]) if r is not None] if ids else []

    def _read(self, runs: list[str]) -> list[RunRecord | None]:
        with self._client.pipeline(transaction=False) as pipe:
            for run in runs:
                pipe.get(self._control.run(run))
                pipe.exists(self._control.run_alive(run))
            answers = pipe.execute()
        records = [RunRecord.decode(data) for data in answers[::2]]
        return [
            replace(r, state=LOST, eta_s=None) if r is not None and r.state == RUNNING and not alive else r
            for r, alive in zip(records, answers[1::2], strict=True)
        ]
