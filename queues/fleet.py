"""The fleet of a namespace in Redis: which hosts live, who leads, what each is to run, and what was asked for.

Truth is what the leader of the present epoch wrote; scripts refuse everybody else, so that one who was paused and wakes
can do nothing. Workers and producers need none of this. Values are those of `config/fleet.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple, Self

import redis

from torchrelay.config.fleet import Desired, HostReport
from torchrelay.errors import DecodeError, InputError
from torchrelay.queues.control import ControlQueue
from torchrelay.queues.keys import ControlKeys, new_token
from torchrelay.queues.registry import run
from torchrelay.queues.scripts import Arg, Call, script

__all__ = [
    "HOST_TTL_S",
    "LEASE_S",
    "RECONCILE",
    "Aside",
    "FleetRecords",
    "FleetView",
    "Heard",
    "Leadership",
    "Wishes",
    "check_host_name",
    "enqueue_reconcile",
    "reconcile_queue",
]

RECONCILE: Final = "torchrelay.reconcile"
"""The one thing that a job of an agent's own queue calls. No module has this name: only agents know what it means."""

HOST_TTL_S: Final = 6.0
"""How long a host is taken to live after its agent was heard of."""
LEASE_S: Final = 3.0
"""How long a leader leads without renewing it; another one takes over within this and one look (half a second)."""
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_MOST_REPLICAS: Final = 10_000
# An agent that was away for so long has looked by itself.
_ASKED_S: Final = 60
_SHOWN_S: Final = 600


class Heard(NamedTuple):
    """What an agent hears when it reports: what its host is to run, None where nobody decided. `owner` is the
    incarnation of another agent of the same name that lives; nothing was written then."""

    desired: Desired | None
    owner: str


class Leadership(NamedTuple):
    """Who leads. `epoch` is the asker's, 0 where he does not lead; `holder` is '' where nobody does."""

    epoch: int
    holder: str
    left_s: float


@dataclass(frozen=True, slots=True)
class Aside:
    """A slot on which a stage failed, and where none of its workers is placed until then, seconds of Redis's clock."""

    host: str
    slot: str
    ref: str
    stage: str
    failures: int
    until: float
    reason: str

    @property
    def key(self) -> str:
        """One per slot and stage."""
        return f"{self.host} {self.slot} {self.ref}/{self.stage}"

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Self | None:
        """None for what is none of this version of torchrelay."""
        try:
            return cls(**json.loads(data))
        except (TypeError, ValueError, RecursionError):
            return None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What operators asked for: replicas of a stage (`NAME/STAGE` or `NAME@VERSION/STAGE`), hosts that are to be empty,
    versions that are to be served though no job takes them yet."""

    scale: Mapping[str, int] = field(default_factory=dict)
    drain: frozenset[str] = frozenset()
    serve: frozenset[str] = frozenset()

    def replicas(self, ref: str, stage: str) -> int | None:
        """How many were asked for; a wish for this version goes before one for all."""
        exact = self.scale.get(f"{ref}/{stage}")
        return self.scale.get(f"{ref.partition('@')[0]}/{stage}") if exact is None else exact


@dataclass(frozen=True, slots=True)
class FleetView:
    """The whole fleet at one moment; `now` is Redis's clock. `hosts` live. `leader` is '' while nobody leads."""

    now: float
    leader: str = ""
    epoch: int = 0
    hosts: tuple[HostReport, ...] = ()
    desired: Mapping[str, Desired] = field(default_factory=dict)
    aside: tuple[Aside, ...] = ()
    wishes: Wishes = Wishes()
    reasons: Mapping[str, Any] = field(default_factory=dict)


def reconcile_queue(namespace: str, host: str) -> str:
    """The RQ queue of one host's agent."""
    return f"{namespace}:agent-{host}"


def check_host_name(name: str) -> str:
    """The name; InputError for what cannot be one."""
    if not _HOST.fullmatch(name):
        raise InputError(f"{name!r:.120} is no name of a host: write 1 to 100 of A-Za-z0-9_.-")
    return name


def enqueue_reconcile(client: redis.Redis, namespace: str, state: Desired) -> str:
    """Asks the host's agent to look at what it is to run, which it also does by itself; returns the job's id."""
    queue = ControlQueue(reconcile_queue(namespace, state.host), client)
    job = queue.create_job(
        RECONCILE,
        kwargs={"epoch": state.epoch, "number": state.number},
        job_id=f"reconcile-{new_token(12)}",
        ttl=_ASKED_S,
        result_ttl=_SHOWN_S,
        failure_ttl=_SHOWN_S,
        description=f"{state.host} runs {len(state.workers)} workers",
    )
    queue.enqueue_job(job)
    return job.id


class FleetRecords:
    """Reads and writes them. Thread-safe, as the client's pool is."""

    def __init__(self, client: redis.Redis, control: ControlKeys) -> None:
        self._client = client
        self._control = control

    def _call(self, name: str, more: Sequence[str], args: Sequence[Arg]) -> Any:
        return run(self._client, Call(script(name), (*self._control.fleet, *more), args, lambda value: value))

    def beat(self, report: HostReport, *, leave: bool = False) -> Heard:
        """A host lives for six seconds from now, or is gone; raises InputError for a name that none can have."""
        text = "" if leave else report.encode()
        args: list[Arg] = [check_host_name(report.name), report.incarnation, _ms(HOST_TTL_S), text]
        mine, told = self._call("host", (self._control.desired,), args)
        if not mine:
            return Heard(None, _text(told))
        return Heard(_desired(told), "")

    def lead(self, candidate: str, lease_s: float = LEASE_S) -> Leadership:
        """Takes or keeps the lead for so long, unless another one has it; a lease of 0 gives it up."""
        epoch, holder, left_ms = self._call("lead", (), [candidate, _ms(lease_s), _ms(HOST_TTL_S)])
        return Leadership(int(epoch), _text(holder), int(left_ms) / 1000.0)

    def decree(
        self,
        holder: str,
        epoch: int,
        desired: Mapping[str, Desired | None],
        aside: Mapping[str, Aside | None],
        reasons: Mapping[str, Any] | None = None,
    ) -> bool:
        """Writes what hosts are to run and which slots are set aside; None takes an entry away, what is not named
        stays. False, with nothing written, where somebody else leads by now."""
        args: list[Arg] = [holder, epoch, "" if reasons is None else json.dumps(reasons), len(desired)]
        for host, state in desired.items():
            args += [host, "" if state is None else state.encode()]
        for key, one in aside.items():
            args += [key, "" if one is None else one.encode()]
        more = (self._control.desired, self._control.aside, self._control.reasons)
        return bool(self._call("decree", more, args))

    def _wish(self, what: str, value: str, last_s: float = 0.0) -> None:
        run(self._client, Call(script("wish"), (self._control.wishes,), [what, value, _ms(last_s)], int))

    def wish_scale(self, node: str, replicas: int | None) -> None:
        """Workers of `NAME[@VERSION]/STAGE`; None leaves them to the leader again."""
        if replicas is not None and not 0 <= replicas <= _MOST_REPLICAS:
            raise InputError(f"{replicas} workers: write a number from 0 to {_MOST_REPLICAS}, or auto")
        self._wish(f"scale {node}", "" if replicas is None else str(replicas))

    def wish_drain(self, host: str, *, on: bool = True) -> None:
        """A host that is to be empty, until that is taken back."""
        self._wish(f"drain {check_host_name(host)}", "1" if on else "")

    def wish_serve(self, ref: str, last_s: float) -> None:
        """A version that is to have workers for so long, as it soon takes jobs; 0 takes the wish back."""
        self._wish(f"serve {ref}", "1" if last_s else "", last_s)

    def desired_of(self, host: str) -> Desired | None:
        """What one host is to run."""
        return _desired(self._client.hget(self._control.desired, host))

    def led(self) -> str:
        """Who leads, '' for nobody."""
        return self.view().leader

    def view(self) -> FleetView:
        """Everything, in one round trip."""
        control = self._control
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall(control.leader)
            pipe.zrange(control.hosts_alive, 0, -1, withscores=True)
            for key in (control.hosts, control.desired, control.aside, control.wishes):
                pipe.hgetall(key)
            pipe.get(control.reasons)
            (seconds, micros), leader, alive, hosts, desired, aside, wishes, reasons = pipe.execute()
        now = seconds + micros / 1e6
        leads = float(leader.get(b"until", 0)) > now * 1000
        found = {_text(host): _desired(text) for host, text in desired.items()}
        return FleetView(
            now,
            _text(leader.get(b"holder")) if leads else "",
            int(leader.get(b"epoch", 0)),
            tuple(_living(now, alive, hosts)),
            {host: one for host, one in found.items() if one is not None},
            tuple(one for one in map(Aside.decode, aside.values()) if one is not None),
            _wishes(now, wishes),
            _reasons(reasons),
        )


def _living(now: float, alive: Iterable[tuple[bytes, float]], reports: Mapping[bytes, bytes]) -> Iterable[HostReport]:
    for name, ends_ms in sorted(alive):
        text = reports.get(name)
        if text is None or ends_ms <= now * 1000:
            continue
        try:
            yield replace(HostReport.decode(text), seen_at=ends_ms / 1000.0 - HOST_TTL_S)
        except DecodeError:
            continue  # of another version of torchrelay: it is given nothing, and harms nothing


def _desired(text: bytes | str | None) -> Desired | None:
    """None also for what is none: whoever wrote it will write it anew."""
    try:
        return Desired.decode(text) if text else None
    except DecodeError:
        return None


def _wishes(now: float, fields: Mapping[bytes, bytes]) -> Wishes:
    scale: dict[str, int] = {}
    named: dict[str, set[str]] = {"drain": set(), "serve": set()}
    for raw, text in fields.items():
        kind, _, what = _text(raw).partition(" ")
        value, _, until = _text(text).partition("|")
        if until and float(until) <= now * 1000:
            continue
        if kind == "scale" and value.isdecimal():
            scale[what] = int(value)
        elif kind in named:
            named[kind].add(what)
    return Wishes(scale, frozenset(named["drain"]), frozenset(named["serve"]))


def _reasons(text: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else (value or "")
