"""Names of everything in Redis: one function per key, and the ids from which keys follow.

Keys of a lane share the hash tag `{tr:<namespace>:<lane>}`, so that one script touches one slot of a Redis Cluster;
keys of the namespace share `{tr:<namespace>:ctl}`. Imports nothing of Redis; performs no I/O.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass, field
from itertools import count

from torchrelay.errors import InputError

ID_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
MAX_LANES = len(ID_ALPHABET)
FIXED = ("meta", "graph", "grants", "lease", "load", "delayed", "deadline", "done", "doneq", "keys", "dead")


@dataclass(frozen=True)
class LaneKeys:
    """Keys of one lane. `fixed` are the eleven that every transition declares, in the order of lib.lua."""

    namespace: str
    lane: int
    tag: str = field(init=False)
    fixed: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        tag = f"{{tr:{self.namespace}:{self.lane}}}:"
        object.__setattr__(self, "tag", tag)
        object.__setattr__(self, "fixed", tuple(tag + name for name in FIXED))

    @property
    def meta(self) -> str:
        return self.fixed[0]

    @property
    def grants(self) -> str:
        return self.fixed[2]

    @property
    def lease(self) -> str:
        return self.fixed[3]

    @property
    def load(self) -> str:
        return self.fixed[4]

    @property
    def delayed(self) -> str:
        return self.fixed[5]

    @property
    def done(self) -> str:
        return self.fixed[7]

    @property
    def dead(self) -> str:
        return self.fixed[10]

    def bucket(self, job_id: str) -> str:
        """HASH of up to 256 jobs; the field is `job_field`."""
        return f"{self.tag}j:{job_id[:14]}"

    def ready(self, node_key: str) -> str:
        """ZSET of ids by rank; `node_key` is `pipeline@version/stage`."""
        return f"{self.tag}ready:{node_key}"

    def wake(self, node_key: str) -> str:
        """LIST of at most one token; `node@host` for workers of that host alone, `@host` for who copies its memory."""
        return f"{self.tag}wake:{node_key}"

    def session(self, client: str) -> str:
        """HASH ring of 16 operation results."""
        return f"{self.tag}sess:{client}"

    def reply(self, client: str) -> str:
        """LIST of packed terminal records for one client."""
        return f"{self.tag}reply:{client}"

    def retired(self, incarnation: str) -> str:
        """STRING that stands while a dead worker's late claims must be refused."""
        return f"{self.tag}retired:{incarnation}"

    @property
    def paused(self) -> str:
        """HASH of paused nodes, and of rules for versions to come; absent while nothing is paused."""
        return self.tag + "paused"

    @property
    def tenants(self) -> str:
        """HASH tenant -> weight, where it is not 1."""
        return self.tag + "tenants"

    def fair(self, ref: str) -> str:
        """HASH of the virtual times of one pipeline version's tenants; absent while none submits."""
        return f"{self.tag}fair:{ref}"

    def present(self, host: str) -> str:
        """STRING that stands while somebody of this host copies what others wait for."""
        return f"{self.tag}host:{host}"

    def spill(self, host: str) -> str:
        """ZSET of what others wait for and lies in this host's shared memory: `id|node|mask` -> when it is due."""
        return f"{self.tag}spill:{host}"

    def blob(self, name: str) -> str:
        """HASH of chunks; `name` is `<id>.<node>.<fence>.<column>`."""
        return f"{self.tag}blob:{name}"


@dataclass(frozen=True)
class ControlKeys:
    """Keys of the namespace: registered pipelines and who is alive."""

    namespace: str

    @property
    def tag(self) -> str:
        return f"{{tr:{self.namespace}:ctl}}:"

    @property
    def current(self) -> str:
        """HASH pipeline name -> name@version that new jobs take."""
        return self.tag + "current"

    @property
    def records(self) -> str:
        """HASH name@version -> record (JSON)."""
        return self.tag + "records"

    @property
    def numbers(self) -> str:
        """HASH name@version -> number by which job records name it."""
        return self.tag + "numbers"

    @property
    def sources(self) -> str:
        """HASH name@version -> host:path that it was registered from; it is shown, never opened."""
        return self.tag + "sources"

    def history(self, name: str) -> str:
        """LIST of `ms name@version`: when which version of a pipeline was made current, the latest first."""
        return f"{self.tag}history:{name}"

    @property
    def alive(self) -> str:
        """ZSET worker -> expiry, ms of the server's clock."""
        return self.tag + "alive"

    @property
    def workers(self) -> str:
        """HASH worker -> its last report (JSON)."""
        return self.tag + "workers"

    @property
    def leader(self) -> str:
        """HASH: who decides for all hosts (holder, epoch, until), and when anybody of the fleet was heard of."""
        return self.tag + "leader"

    @property
    def hosts_alive(self) -> str:
        """ZSET host -> expiry, ms of the server's clock."""
        return self.tag + "hosts-alive"

    @property
    def hosts(self) -> str:
        """HASH host -> its agent's last report (JSON)."""
        return self.tag + "hosts"

    @property
    def host_owners(self) -> str:
        """HASH host -> incarnation of the agent that has the name."""
        return self.tag + "host-owners"

    @property
    def fleet(self) -> tuple[str, ...]:
        """What every script of the fleet declares, in the order of fleet_lib.lua."""
        return self.leader, self.hosts_alive, self.hosts, self.host_owners

    @property
    def desired(self) -> str:
        """HASH host -> what it is to run (JSON), written by the leader of the present epoch alone."""
        return self.tag + "desired"

    @property
    def aside(self) -> str:
        """HASH slot that no worker of a stage is placed on for a while -> what is known of it (JSON)."""
        return self.tag + "aside"

    @property
    def reasons(self) -> str:
        """STRING: why the leader decided as it did (JSON)."""
        return self.tag + "reasons"

    @property
    def wishes(self) -> str:
        """HASH what an operator asked for -> how much."""
        return self.tag + "wishes"

    @property
    def wanted(self) -> str:
        """ZSET node that reads or writes, and that a run lacks -> until when it asks, ms of the server's clock."""
        return self.tag + "wanted"

    def plans(self, ref: str) -> str:
        """HASH of one pipeline version: stage, count and balance -> how the stage's model is split (text). Who drops a
        version drops this with it."""
        return f"{self.tag}plans:{ref}"

    def plan_maker(self, ref: str, which: str) -> str:
        """STRING that stands while somebody makes this split plan: who."""
        return f"{self.tag}plan-maker:{ref}:{which}"

    @property
    def runs(self) -> str:
        """ZSET run id -> when it began, ms of its driver's clock."""
        return self.tag + "runs"

    def run(self, run: str) -> str:
        """STRING: how the run stands, as its driver last wrote it (JSON)."""
        return f"{self.tag}run:{run}"

    def run_alive(self, run: str) -> str:
        """STRING that stands while the run's driver lives."""
        return f"{self.tag}run-alive:{run}"

    def run_cancel(self, run: str) -> str:
        """STRING that stands while the run's driver is asked to end it."""
        return f"{self.tag}run-cancel:{run}"

    def group(self, name: str) -> str:
        """HASH: which ranks of a group live, in which epoch it is, and where they meet."""
        return f"{self.tag}group:{name}"

    @property
    def schedules(self) -> str:
        """HASH id -> a run that is repeated (JSON)."""
        return self.tag + "schedules"


def job_field(job_id: str) -> str:
    """The field of a job inside its bucket."""
    return job_id[14:]


def lane_of(job_id: str) -> int:
    """The lane that a job id names; raises InputError for what is no job id."""
    stem, _, redrive = job_id.partition("~")
    if (
        len(stem) != 16
        or not stem.isascii()
        or not stem.isalnum()
        or (redrive and not redrive.isdigit())
        or len(redrive) > 4
    ):
        raise InputError(f"{job_id[:40]!r} is not a job id: 16 letters and digits are expected; take it from future.id")
    return ID_ALPHABET.index(stem[7])


def new_token(length: int) -> str:
    """Random letters and digits: a client's nonce, a worker's incarnation."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(length))


class IdSource:
    """Job ids of one client on one lane: 7 random characters, the lane's letter, 8 hex digits that count up."""

    def __init__(self, lane: int) -> None:
        self.client = new_token(7) + ID_ALPHABET[lane]
        self._next = count()

    def take(self) -> str:
        return f"{self.client}{next(self._next):08x}"
