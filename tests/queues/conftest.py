"""A lane under test: short names for its transitions, and an audit that compares every key of it with every other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

import msgpack
import pytest
import redis

from torchrelay.config.graph import Graph, Node
from torchrelay.queues.channel import Channel
from torchrelay.queues.job import (
    FLAG_CHECKPOINT,
    FLAG_HISTORY,
    FLAG_KEYED,
    FLAG_SUBSCRIBED,
    HEAD,
    TERMINAL,
    Entry,
    Failure,
    Terminal,
    decode_payloads,
    encode_payload,
    refs_of,
    split_entries,
    split_reply,
)
from torchrelay.queues.keys import IdSource, LaneKeys, new_token
from torchrelay.queues.transitions import (
    ClaimLimits,
    Grant,
    NewJob,
    Output,
    Reader,
    Session,
    Submitted,
    Transitions,
    pack_graph,
)

WHY = Failure("stage", "ValueError", "it broke")
PLENTY = (10**6, 10**9)


def graph_of(preds: dict[str, tuple[int, ...]], volatile: Collection[str] = ()) -> Graph:
    """A graph of nodes, each with the numbers of its predecessors (0 is the input)."""
    nodes = []
    for index, (name, before) in enumerate(preds.items(), 1):
        after = tuple(i for i, p in enumerate(preds.values(), 1) if index in p)
        kept_for = sum(1 << (i - 1) for i in after) if name in volatile else 0
        nodes.append(Node(index, name, before, after, None, {}, None, kept_for=kept_for))
    return Graph(tuple(nodes), None, {})


class Worker:
    """One incarnation: claims under fences of its own and gives back."""

    def __init__(self, lane: Lane, incarnation: str, pipeline: int, host: str = "") -> None:
        self.lane = lane
        self.reader = Reader(host, 0)
        self.incarnation = incarnation
        self.pipeline = pipeline
        self.session = Session(incarnation)
        self.fences = 0

    def ask(
        self, node: int, jobs: int = 256, *, rows: int = 10**6, nbytes: int = 1 << 20, lease_ms: int = 60_000
    ) -> Any:
        """The call of a claim, not sent yet."""
        self.fences += 1
        fence = f"{self.incarnation}-{self.fences:x}"
        limits = ClaimLimits(jobs, rows, nbytes, lease_ms)
        return self.lane.t.claim(self.session, fence, self.incarnation, self.pipeline, node, limits, self.reader)

    def claim(self, node: int, jobs: int = 256, **limits: int) -> Grant:
        return self.lane.run(self.ask(node, jobs, **limits))

    def outputs(self, node: int, entries: Sequence[Entry], **more: Any) -> list[Output]:
        """Outputs that say which node made them, of which generation."""
        made = encode_payload({f"o{node}": bytes([node])})
        return [Output(e.packed, made, **more) for e in entries]

    def committing(
        self, grant: Grant, node: int, entries: Sequence[Entry] | None = None, last: int | None = None, **more: Any
    ) -> Any:
        """With `last`, of a worker that ran the nodes up to that one too."""
        given = grant.entries if entries is None else entries
        outputs = self.outputs(last or node, given, **more)
        return self.lane.t.commit(self.session, grant.fence, self.pipeline, (node, last or node), outputs)

    def commit(self, grant: Grant, node: int, entries: Sequence[Entry] | None = None, **more: Any) -> str:
        return self.lane.run(self.committing(grant, node, entries, **more))

    def fail(
        self, grant: Grant, node: int, entries: Sequence[Entry] | None = None, *, delay_ms: float = 0, most: int = 3
    ) -> str:
        given = grant.entries if entries is None else entries
        charges = [(e.packed, delay_ms, WHY) for e in given]
        return self.lane.run(self.lane.t.fail(self.session, grant.fence, self.pipeline, node, charges, most))

    def release(self, grant: Grant, entries: Sequence[Entry] | None = None) -> str:
        given = grant.entries if entries is None else entries
        return self.lane.run(self.lane.t.release(self.session, grant.fence, [e.packed for e in given]))

    def lost(self, grant: Grant, entries: Sequence[Entry] | None = None, *, makers: int = 0) -> str:
        given = grant.entries if entries is None else entries
        masks = [makers] * len(given)
        return self.lane.run(self.lane.t.lost(self.session, grant.fence, [e.packed for e in given], WHY, masks))

    def die(self, computing: Sequence[Entry] = ()) -> list[int]:
        """It crashed while it was computing these, and somebody saw it."""
        return self.lane.run(self.lane.t.retire(self.incarnation, b"".join(e.packed for e in computing), WHY))

    def step(self, node: int, jobs: int = 256) -> list[str]:
        """Claims and commits; the ids, in the order granted."""
        grant = self.claim(node, jobs)
        if grant.entries:
            assert self.commit(grant, node) == "k" * len(grant.entries)
        return [e.job_id for e in grant.entries]


class Lane:
    """One lane of a namespace of its own, with a client that submits to it."""

    CHAIN: ClassVar = {"s1": (0,), "s2": (1,), "s3": (2,)}
    LONG: ClassVar = {"s1": (0,), "s2": (1,), "s3": (2,), "s4": (3,)}
    DIAMOND: ClassVar = {"a": (0,), "b": (1,), "c": (1,), "d": (2, 3)}
    SIDES: ClassVar = {"a": (0,), "b": (1,), "c": (0,), "d": (2, 3)}
    WHY = WHY

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self.redis = client
        self.keys = LaneKeys(namespace, 0)
        self.t = Transitions(self.keys)
        self.channel = Channel(client, patience_s=10.0)
        self.ids = IdSource(0)
        self.session = Session(self.ids.client)
        self.graphs: dict[int, Graph] = {}
        self.refs: dict[int, str] = {}
        self.workers = 0
        self.lost_blobs = False
        self.run(self.t.init(1))

    def run(self, call: Any) -> Any:
        return self.channel.run(call)

    def define(
        self,
        shape: dict[str, tuple[int, ...]],
        *,
        marks: dict[str, tuple[int, int]] | None = None,
        volatile: Collection[str] = (),
    ) -> int:
        """Makes a pipeline known and returns its number; `marks` by node's name. What `volatile` nodes make may be lost
        with their workers."""
        number = len(self.graphs) + 1
        self.graphs[number], self.refs[number] = graph_of(shape, volatile), f"p{number}@v"
        self.mark(number, marks or {})
        return number

    def mark(self, number: int, marks: dict[str, tuple[int, int]]) -> None:
        graph = self.graphs[number]
        packed = pack_graph(self.refs[number], graph, [marks.get(n.name, PLENTY) for n in graph.nodes])
        self.run(self.t.define(number, packed))

    def redefine(self, number: int, volatile: Collection[str]) -> None:
        """The same pipeline with other tuning, as a worker that starts with a changed file makes it known."""
        nodes = self.graphs[number].nodes
        self.graphs[number] = graph_of({n.name: n.preds for n in nodes}, volatile)
        self.mark(number, {})

    def worker(self, pipeline: int, host: str = "") -> Worker:
        """`host` is whose shared memory it reads; others have no time to find workers for what lies in theirs."""
        self.workers += 1
        return Worker(self, f"w{self.workers:07x}", pipeline, host)

    def job(self, *, payload: bytes | None = None, ids: IdSource | None = None, **options: Any) -> NewJob:
        data = encode_payload({"x": b"input"}) if payload is None else payload
        return NewJob(
            (ids or self.ids).take(), data, options.pop("rows", 1), options.pop("nbytes", len(data)), **options
        )

    def submitting(
        self,
        pipeline: int,
        jobs: Sequence[NewJob],
        *,
        session: Session | None = None,
        budget: int = 1 << 40,
        share: str = "",
    ) -> Any:
        return self.t.submit(session or self.session, pipeline, jobs, budget, share)

    def push(self, pipeline: int, jobs: Sequence[NewJob], **more: Any) -> Submitted:
        return self.run(self.submitting(pipeline, jobs, **more))

    def submit(self, pipeline: int, n: int = 1, **options: Any) -> list[str]:
        """Submits n alike jobs and returns their ids."""
        jobs = [self.job(**options) for _ in range(n)]
        assert self.push(pipeline, jobs).statuses == "n" * n
        return [j.id for j in jobs]

    def server_ms(self) -> float:
        seconds, micros = self.redis.time()
        return seconds * 1000 + micros // 1000

    def node_key(self, pipeline: int, node: int) -> str:
        return f"{self.refs[pipeline]}/{self.graphs[pipeline].nodes[node - 1].name}"

    def ready(self, pipeline: int, node: int) -> list[str]:
        """Ids that are ready at a node, in order."""
        return [i.decode() for i in self.redis.zrange(self.keys.ready(self.node_key(pipeline, node)), 0, -1)]

    def load(self, field: str) -> int:
        return int(self.redis.hget(self.keys.load, field) or 0)

    def tokens(self, pipeline: int, node: int) -> int:
        return self.redis.llen(self.keys.wake(self.node_key(pipeline, node)))

    def record(self, job_id: str) -> bytes | None:
        return self.redis.hget(self.keys.bucket(job_id), job_id[14:])

    def terminal(self, job_id: str) -> Terminal | None:
        record = self.redis.hget(self.keys.done, job_id)
        return None if record is None else Terminal.decode(record)

    def status(self, job_id: str) -> str | None:
        ended = self.terminal(job_id)
        return ended.status if ended else None

    def result(self, job_id: str) -> dict[str, Any]:
        ended = self.terminal(job_id)
        assert ended is not None
        return decode_payloads(ended.payload)[0]

    def replies(self, client: str | None = None) -> list[tuple[str, Terminal]]:
        """What was pushed to a client so far, in order."""
        elements = self.redis.lrange(self.keys.reply(client or self.ids.client), 0, -1)
        return [(i, Terminal.decode(record)) for element in elements for i, record in split_reply(element)]

    def blob(self, name: str, chunks: int = 1, *, ttl_ms: int = 60_000) -> str:
        """Writes a blob as a producer or worker does before it is recorded; returns its name."""
        key = self.keys.blob(name)
        self.redis.hset(key, mapping={str(i): b"bytes" for i in range(chunks)})
        self.redis.pexpire(key, ttl_ms)
        return name

    def blobs(self) -> dict[str, int]:
        """Name -> time to live, -1 for ever."""
        prefix = self.keys.tag + "blob:"
        names = [k.decode() for k in self.redis.scan_iter(match=prefix + "*", count=1000)]
        return {n[len(prefix) :]: self.redis.pttl(n) for n in names}

    def until(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        """Repeats until it returns something true, and returns that."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, "not true in time"
            time.sleep(0.002)
        return value

    def drain(self, pipeline: int) -> None:
        """Works until nothing is ready at any node."""
        worker = self.worker(pipeline)
        while sum(len(worker.step(n.index)) for n in self.graphs[pipeline].nodes):
            pass

    def audit(self) -> None:
        """Every key of the lane agrees with every other, and `recount` finds nothing."""
        assert self.run(self.t.recount()) == []
        Audit(self).check()


class Audit:
    """Reads a whole lane and says what does not fit."""

    def __init__(self, lane: Lane) -> None:
        self.lane, r, keys = lane, lane.redis, lane.keys
        self.live: dict[str, tuple[Any, ...]] = {}
        self.raw: dict[str, bytes] = {}
        self.extras: dict[str, set[str]] = {}
        self.checkpoints: dict[str, bytes] = {}
        for bucket in r.scan_iter(match=keys.tag + "j:*", count=1000):
            stem = bucket.decode()[len(keys.tag) + 2 :]
            for field, value in r.hgetall(bucket).items():
                tail, _, extra = field.decode().partition("#")
                if extra:
                    self.extras.setdefault(stem + tail, set()).add(extra)
                    if extra == "0":
                        self.checkpoints[stem + tail] = value
                else:
                    self.live[stem + tail], self.raw[stem + tail] = HEAD.unpack_from(value), value
        self.delayed = Counter(m.decode() for m in r.zrange(keys.delayed, 0, -1))
        self.deadlines = {i.decode(): s for i, s in r.zrange(keys.tag + "deadline", 0, -1, withscores=True)}
        self.done = {i.decode(): v for i, v in r.hgetall(keys.done).items()}
        self.dead = {
            i.decode(): msgpack.unpackb(v, strict_map_key=False, raw=True) for i, v in r.hgetall(keys.dead).items()
        }
        self.held: Counter[tuple[str, int, int]] = Counter()
        for value in r.hvals(keys.grants):
            place, _, tokens = value.split(b"|", 2)
            node = int(place.split(b".")[1])
            self.held.update((t[:-1].decode(), t[-1] - 128, node) for t in split_entries(tokens))

    def check(self) -> None:
        r, keys = self.lane.redis, self.lane.keys
        assert set(r.hkeys(keys.grants)) == set(r.zrange(keys.lease, 0, -1))
        doneq = {i.decode() for i in r.zrange(keys.tag + "doneq", 0, -1)}
        assert {i for i in doneq if not i.startswith("dead:")} == set(self.done)
        assert not self.live.keys() & self.done.keys()
        assert self.deadlines == {i: h[1] for i, h in self.live.items() if h[1] > 0}
        assert set(self.extras) <= set(self.live)
        for key in r.scan_iter(match=keys.tag + "wake:*", count=1000):
            assert r.llen(key) <= 1
        for value in r.hvals(keys.tag + "keys"):
            assert value[16:].decode() in self.live.keys() | self.done.keys()
        for field, n in r.hgetall(keys.load).items():
            assert int(n) >= 0, field
        for number, ref in self.lane.refs.items():
            waiting = [d for d in self.dead.values() if d[6].decode() == ref and d[7] == b""]
            assert self.lane.load(f"{ref}.dead") == len(waiting), number
        self._check_places()
        self._check_blobs()

    def _check_places(self) -> None:
        ready: dict[tuple[str, int, int], float] = {}
        for number, graph in self.lane.graphs.items():
            for node in graph.nodes:
                zset = self.lane.keys.ready(self.lane.node_key(number, node.index))
                for member, rank in self.lane.redis.zrange(zset, 0, -1, withscores=True):
                    ready[member.decode(), number, node.index] = rank
        expected_delayed: set[str] = set()
        for job_id, head in self.live.items():
            rank, mask, number, gen, flags = head[0], head[4], head[6], head[10], head[11]
            graph = self.lane.graphs[number]
            kept, fused = set(), set()
            for node in graph.nodes:
                needs = sum(1 << (p - 1) for p in node.preds if p)
                is_open = not mask & node.bit and mask & needs == needs
                at_ready = ready.pop((job_id, number, node.index), None)
                at_delayed = f"{job_id}|{node.index}" in self.delayed
                at_grant = self.held[job_id, gen, node.index]
                places = (at_ready is not None) + at_delayed + at_grant
                assert places == is_open, (job_id, node.name, at_ready, at_delayed, at_grant)
                assert at_ready is None or at_ready == rank
                if at_delayed:
                    expected_delayed.add(f"{job_id}|{node.index}")
                if not graph.linear and (is_open or mask & node.bit):
                    kept.add(str(node.index))
                if len(node.succs) == 1 and mask & 1 << (node.succs[0] - 1):
                    fused.add(str(node.index))  # if it was committed together with that one, it has no entry
            named = {"k": FLAG_KEYED, "h": FLAG_HISTORY, "s": FLAG_SUBSCRIBED, "0": FLAG_CHECKPOINT}
            kept |= {name for name, flag in named.items() if flags & flag}
            if graph.linear and flags & FLAG_CHECKPOINT:
                kept, fused = kept | {"p"}, fused | {"p"}  # behind a volatile node, where there was a longer way back
            extras = self.extras.get(job_id, set())
            assert kept - fused <= extras <= kept, job_id
        assert not ready
        assert set(self.delayed) == expected_delayed

    def _check_blobs(self) -> None:
        texts = [refs_of(record) for record in self.raw.values()]
        for record in self.done.values():
            _, flags, _, _, _, _, _, _, length = TERMINAL.unpack_from(record)
            at = TERMINAL.size + (16 if flags & FLAG_KEYED else 0)
            texts.append(record[at : at + length].decode())
        texts += [refs_of(d[2]) for d in self.dead.values() if d[7] == b""]
        refs = [ref.split(":") for text in texts for ref in text.split(",") if ref]
        # With a host, Redis has nothing of it.
        wanted = {parts[0] for parts in refs if len(parts) == 4}
        blobs = self.lane.blobs()
        assert {n for n, ttl in blobs.items() if ttl == -1} == wanted & blobs.keys()
        assert self.lane.lost_blobs or wanted <= blobs.keys()


@pytest.fixture
def make_lane(redis_client: redis.Redis) -> Iterator[Callable[[], Lane]]:
    """Makes lanes, each in a namespace of its own."""
    made: list[Lane] = []

    def make(client: redis.Redis | None = None) -> Lane:
        # Not by `random`: hypothesis seeds it alike for each example.
        made.append(Lane(client or redis_client, "q" + new_token(10)))
        return made[-1]

    yield make
    for lane in made:
        lane.channel.close()


@pytest.fixture
def lane(make_lane: Callable[[], Lane]) -> Iterator[Lane]:
    """A lane that is audited when the test is over."""
    made = make_lane()
    yield made
    made.audit()


@pytest.fixture
def chain(lane: Lane) -> int:
    """The number of a pipeline s1 -> s2 -> s3."""
    return lane.define(Lane.CHAIN)


@pytest.fixture
def diamond(lane: Lane) -> int:
    """The number of a pipeline a -> (b, c) -> d."""
    return lane.define(Lane.DIAMOND)
