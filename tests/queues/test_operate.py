"""Pause, resume, purge, the census of live versions, and which version is current, on a real server."""

from __future__ import annotations

import copy
import threading

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.queues.conftest import PLENTY, Lane, Worker, graph_of
from torchrelay.config import Pipeline
from torchrelay.errors import BrokerMisconfigured, ConfigError, InputError, PipelineNotFound, QueueFull
from torchrelay.queues import operate
from torchrelay.queues.channel import Channel
from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import Registry, run
from torchrelay.queues.transitions import pack_graph

CODE = """
    from torchrelay import Stage


    class Same(Stage):
        def forward(self, batch):
            return {}
"""
CHAIN = """
    pipeline: {name}
    input: {{n: str}}
    stages:
      - {{name: first, use: "stages.py:Same", retry: {{attempts: {attempts}}}, args: {args}}}
      - {{name: second, use: "stages.py:Same"}}
"""
FORK = """
    pipeline: fork
    input: {n: str}
    stages:
      - {name: left, use: "stages.py:Same", after: input, outputs: {l: str}}
      - {name: right, use: "stages.py:Same", after: input, outputs: {r: str}}
      - {name: join, use: "stages.py:Same", after: [left, right]}
"""


@pytest.fixture
def known(lane: Lane, make_pipeline):
    """Registers pipelines in the lane's namespace: (registry, register(yaml) -> number)."""
    registry = Registry(lane.redis, lane.keys.namespace, 1)

    def register(yaml: str, **options) -> int:
        pipeline = Pipeline.load(make_pipeline(yaml, CODE))
        number = registry.register(pipeline, **options).number
        lane.graphs[number], lane.refs[number] = pipeline.graph, pipeline.ref
        return number

    return registry, register


def chain_yaml(name: str = "chain", version: int = 0) -> str:
    """A chain first -> second; each number makes another version."""
    # Stages are not imported here, so any args do.
    return CHAIN.format(name=name, attempts=3, args="{}" if not version else f"{{v: {version}}}")


# Pause and resume.


def test_a_paused_node_grants_nothing_and_what_is_held_is_committed(lane, chain):
    """Its claims come back empty with the flag set, other nodes go on, and a resume wakes its workers."""
    lane.submit(chain, 5)
    worker = lane.worker(chain)
    held = worker.claim(1, 2)
    assert (held.gated, held.paused) == (False, False)
    assert lane.run(lane.t.pause("p1", "", "s1", True)) == ["p1@v/s1"]
    empty = worker.claim(1)
    assert (empty.entries, empty.gated, empty.paused, empty.left) == ([], True, True, 3)
    assert worker.commit(held, 1) == "kk"
    assert len(worker.step(2)) == 2
    lane.submit(chain, 2)
    lane.redis.delete(lane.keys.wake("p1@v/s1"))
    assert lane.run(lane.t.pause("p1", "", "s1", True)) == ["p1@v/s1"]
    assert lane.tokens(chain, 1) == 0
    assert lane.run(lane.t.pause("p1", "", "s1", False)) == ["p1@v/s1"]
    assert lane.tokens(chain, 1) == 1
    assert not lane.redis.exists(lane.keys.paused)
    assert len(worker.step(1)) == 5


def test_submits_go_on_while_paused_until_the_queue_is_full(lane):
    """A pause is no back-pressure of its own: the entry's mark is."""
    pipeline = lane.define({"only": (0,)}, marks={"only": (3, 10**9)})
    lane.run(lane.t.pause("p1", "", "", True))
    lane.submit(pipeline, 3)
    with pytest.raises(QueueFull):
        lane.submit(pipeline)


def test_a_claim_from_before_the_pause_is_answered_as_the_first_time(lane, chain):
    """Its reply was lost: the grant is there, and pausing must not hide it until the lease runs out."""
    [job] = lane.submit(chain)
    worker = lane.worker(chain)
    asked = worker.ask(1)
    lane.run(asked)
    lane.run(lane.t.pause("p1", "", "", True))
    again = lane.run(asked)
    assert [e.job_id for e in again.entries] == [job]
    assert worker.commit(again, 1) == "k"


def test_delayed_jobs_become_ready_at_a_paused_node_and_stay(lane, chain):
    """They are granted after the resume, not before."""
    lane.run(lane.t.pause("p1", "v", "", True))
    [job] = lane.submit(chain, delay_ms=10)
    worker = lane.worker(chain)
    lane.until(lambda: worker.claim(1).entries == [] and lane.ready(chain, 1) == [job])
    assert worker.claim(1).paused
    lane.run(lane.t.pause("p1", "v", "", False))
    assert [e.job_id for e in worker.claim(1).entries] == [job]


def test_a_foreign_key_in_place_of_the_paused_nodes_is_named(lane, chain):
    """A claim is refused with the reason, nothing is taken; it goes on when the key is gone."""
    lane.submit(chain)
    lane.redis.set(lane.keys.paused, "x")
    with pytest.raises(BrokerMisconfigured, match="another type"):
        lane.worker(chain).claim(1)
    lane.redis.delete(lane.keys.paused)
    assert len(lane.worker(chain).step(1)) == 1


OPERATION = st.tuples(
    st.sampled_from("ab"), st.sampled_from(["", "1", "2", "3"]), st.sampled_from(["", "s", "s.1", "t"]), st.booleans()
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.one_of(OPERATION, st.sampled_from(["1", "2", "3"])), max_size=12))
def test_the_latest_word_about_a_node_holds_also_for_later_versions(make_lane, steps):
    """Against a model that replays every pause and resume for each version, known or to come. `s` is cut into two
    parts, which its name stands for."""
    lane = make_lane()
    said: list[tuple[str, str, str, bool]] = []
    known: list[str] = []

    def is_paused(name: str, version: str, stage: str, words: list[tuple[str, str, str, bool]]) -> bool:
        state = False
        for n, v, s, on in words:
            if n == name and v in ("", version) and (s in ("", stage) or stage.startswith(f"{s}.")):
                state = on
        return state

    for number, step in enumerate(steps, 1):
        if isinstance(step, str):
            for name in "ab":
                ref = f"{name}@{step}"
                if ref in known:
                    continue
                # What is said of a version before it is there counts for nothing; the command refuses it.
                said = [w for w in said if (w[0], w[1]) != (name, step)]
                graph = pack_graph(ref, graph_of({"s.0": (0,), "s.1": (0,), "t": (1, 2)}), [PLENTY] * 3)
                lane.run(lane.t.define(2 * number + (name == "b"), graph))
                known.append(ref)
        else:
            said.append(step)
            lane.run(lane.t.pause(*step))
    fields = lane.redis.hgetall(lane.keys.paused)
    for ref in known:
        for stage in ("s.0", "s.1", "t"):
            expected = is_paused(*ref.split("@"), stage, said)
            assert (fields.get(f"{ref}/{stage}".encode()) == b"1") == expected, (ref, stage, said)
    if said and not said[-1][3] and not any(on for *_, on in said):
        assert fields == {}


# Purge.


def test_a_purge_ends_what_waits_and_leaves_what_is_held(lane, known):
    """Ready, delayed and retried jobs are cancelled and their clients hear of it; held ones and other nodes go on."""
    registry, register = known
    pipeline, other = register(chain_yaml()), register(chain_yaml("other"))
    worker = lane.worker(pipeline)
    behind = lane.submit(pipeline, 2)
    worker.step(1)
    retried = lane.submit(pipeline, 2)
    assert worker.fail(worker.claim(1), 1, delay_ms=3_600_000) == "rr"
    held_jobs = lane.submit(pipeline, 3)
    held = worker.claim(1)
    ready = lane.submit(pipeline, 300, refs="", deadline_ms=3_600_000)
    delayed = lane.submit(pipeline, 2, delay_ms=3_600_000)
    elsewhere = [*lane.submit(other, 2), *lane.submit(other, 2, delay_ms=3_600_000)]
    told: list[int] = []
    assert operate.purge(registry, operate.Target.find(registry, "chain/first"), told.append) == 304
    assert told[-1] == 304
    assert len(told) == 2, "in slices"
    gone = {*retried, *ready, *delayed}
    assert {i for i, t in lane.replies() if t.status == "cancelled"} == gone
    assert all(lane.status(i) == "cancelled" for i in gone)
    assert all(lane.record(i) for i in [*behind, *held_jobs, *elsewhere])
    lane.audit()
    assert worker.commit(held, 1) == "kkk"
    assert operate.purge(registry, operate.Target.find(registry, "chain/first")) == 0
    assert operate.purge(registry, operate.Target.find(registry, "chain")) == 5


def test_a_purge_of_one_branch_ends_the_job_in_the_other_too(lane, known):
    """A job has one end: what another branch's worker holds of it is stale then."""
    registry, register = known
    pipeline = register(FORK)
    lane.submit(pipeline, 3)
    worker = lane.worker(pipeline)
    right = worker.claim(2, 2)
    assert operate.purge(registry, operate.Target.find(registry, "fork/left")) == 3
    assert worker.commit(right, 2) == "ss"
    lane.submit(pipeline, 2)
    worker.step(1)
    # Half-joined: they wait at the right branch alone.
    assert operate.purge(registry, operate.Target.find(registry, "fork/join")) == 0
    assert operate.purge(registry, operate.Target.find(registry, "fork/left")) == 0
    assert operate.purge(registry, operate.Target.find(registry, "fork/right")) == 2


def test_a_purge_opens_the_gate_of_the_stage_before(lane, known):
    """The worker that waited for room is woken."""
    registry, register = known
    pipeline = register(chain_yaml())
    lane.mark(pipeline, {"second": (2, 10**9)})
    lane.submit(pipeline, 4)
    worker = lane.worker(pipeline)
    assert worker.commit(worker.claim(1, 3), 1) == "kkk"
    assert worker.claim(1).gated
    lane.redis.delete(lane.keys.wake(lane.node_key(pipeline, 1)))
    assert operate.purge(registry, operate.Target.find(registry, "chain/second")) == 3
    assert lane.tokens(pipeline, 1) == 1
    assert len(worker.step(1)) == 1


def test_purges_beside_claims_lose_and_double_nothing(lane, known, server_url):
    """Two purges, a submitter and two workers at once: every job ends once, done or cancelled; the counters hold."""
    registry, register = known
    pipeline = register(FORK)
    jobs = lane.submit(pipeline, 200)
    for _ in range(9):
        jobs += lane.submit(pipeline, 200)
    target = operate.Target.find(registry, "fork")
    problems: list[BaseException] = []
    purged: list[int] = []

    def worker_thread() -> None:
        own = copy.copy(lane)
        own.channel = Channel(redis.Redis.from_url(server_url))
        worker = Worker(own, new_token(8), pipeline)
        idle = 0
        while idle < 3:
            granted = 0
            for node in (1, 2, 3):
                grant = worker.claim(node, 16)
                granted += len(grant.entries)
                if grant.entries:
                    assert set(worker.commit(grant, node)) <= {"k", "s"}
            idle = 0 if granted else idle + 1
        own.channel.close()

    def purge_thread() -> None:
        purged.append(operate.purge(registry, target))

    def guarded(body) -> None:
        try:
            body()
        except BaseException as error:
            problems.append(error)

    threads = [
        threading.Thread(target=guarded, args=(body,))
        for body in (worker_thread, worker_thread, purge_thread, purge_thread)
    ]
    for thread in threads:
        thread.start()
    for _ in range(5):
        jobs += lane.submit(pipeline, 100)
    for thread in threads:
        thread.join()
    assert problems == []
    lane.drain(pipeline)
    statuses = [lane.status(i) for i in jobs]
    assert set(statuses) <= {"done", "cancelled"}
    assert sum(purged) == statuses.count("cancelled") > 0
    assert sorted(i for i, _ in lane.replies()) == sorted(jobs)


# What stands where.


def test_the_census_counts_jobs_where_they_stand(lane, known):
    """Ready, held and delayed by node; delayed ones in pages; nothing where nothing is."""
    registry, register = known
    pipeline, other = register(chain_yaml()), register(FORK)
    assert operate.census(registry) == {}
    lane.submit(pipeline, 5, rows=0)
    lane.submit(other, 1)
    for _ in range(3):
        lane.submit(other, 250, delay_ms=3_600_000)
    worker = lane.worker(pipeline)
    worker.claim(1, 2)
    ref, fork = lane.refs[pipeline], lane.refs[other]
    assert operate.census(registry) == {
        f"{ref}/first": operate.Standing(3, 2, 0),
        f"{fork}/left": operate.Standing(1, 0, 750),
        f"{fork}/right": operate.Standing(1, 0, 750),
    }
    assert operate.census(registry, 10)[f"{fork}/left"].delayed < 10


def test_a_version_is_stranded_for_every_stage_that_its_jobs_still_need(lane, known):
    """Stages behind them count, stages that they have passed do not."""
    registry, register = known
    old = register(chain_yaml())
    lane.submit(old)
    lane.worker(old).step(1)
    new = register(chain_yaml(version=2))
    lane.submit(new)
    found = {v.ref: v for v in operate.live_versions(registry, operate.census(registry), [])}
    assert found[lane.refs[old]].missing == ("second",)
    assert not found[lane.refs[old]].current
    assert found[lane.refs[new]].missing == ("first", "second")
    assert found[lane.refs[new]].current
    [command, _] = found[lane.refs[new]].commands
    assert command.startswith("torchrelay worker /")
    assert command.endswith("pipeline.yaml --stage first")
    assert not found[lane.refs[new]].draining


def test_a_path_with_odd_characters_is_quoted_in_the_command():
    """What is shown is there to be copied into a shell."""
    assert operate.worker_command("host:/a b/$(x).yaml", "s") == "torchrelay worker '/a b/$(x).yaml' --stage s"
    assert operate.worker_command("", "s") == "torchrelay worker FILE --stage s"


# Which version is current.


def test_only_the_first_version_becomes_current_unasked(lane, known):
    """A worker's registration changes nothing for new jobs once the name has a version."""
    registry, register = known
    first = register(chain_yaml(), current=False)
    assert registry.current() == {"chain": lane.refs[first]}
    second = register(chain_yaml(version=2), current=False)
    assert registry.current() == {"chain": lane.refs[first]}
    registry.make_current(lane.refs[second])
    assert registry.find("chain").number == second
    register(chain_yaml(), current=False)
    assert registry.current() == {"chain": lane.refs[second]}


def test_the_history_leads_back_and_is_bounded(lane, known):
    """Newest first, with the time; a switch to what is current is no entry."""
    registry, register = known
    refs = [lane.refs[register(chain_yaml(version=v))] for v in (1, 2, 2)]
    reigns = registry.history("chain")
    assert [r.ref for r in reigns] == [refs[1], refs[0]]
    assert abs(reigns[0].since - lane.server_ms() / 1000) < 60
    assert operate.previous_version(registry, "chain") == refs[0]
    for _ in range(15):
        registry.make_current(refs[0])
        registry.make_current(refs[1])
    assert len(registry.history("chain")) == 20
    assert registry.history("nobody") == []


def test_a_namespace_without_a_history_can_be_rolled_back(lane, known):
    """What was current before there was one is its first entry."""
    registry, register = known
    old = lane.refs[register(chain_yaml())]
    for key in (registry.control.history("chain"), registry.control.sources):
        lane.redis.delete(key)
    assert (registry.history("chain"), registry.sources()) == ([], {})
    with pytest.raises(PipelineNotFound, match="no other current version"):
        operate.previous_version(registry, "chain")
    register(chain_yaml(version=2))
    assert [r.ref for r in registry.history("chain")][1:] == [old]
    assert registry.history("chain")[1].since == 0
    assert operate.previous_version(registry, "chain") == old


def test_an_unknown_version_is_not_made_current(lane, known):
    """Nothing is written for it."""
    registry, register = known
    register(chain_yaml())
    before = registry.current()
    with pytest.raises(PipelineNotFound, match="chain@00000000"):
        registry.make_current("chain@00000000")
    assert registry.current() == before
    assert "chain@00000000" not in registry.versions()


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("chian", PipelineNotFound, "did you mean 'chain'"),
        ("chain@00000000", PipelineNotFound, "has no version"),
        ("chain/secnod", ConfigError, "did you mean 'second'"),
        ("chain/", InputError, "PIPELINE/STAGE"),
        ("a/b/c", InputError, "PIPELINE/STAGE"),
        ("", InputError, "PIPELINE/STAGE"),
        ("*", PipelineNotFound, "chain"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(lane, known, text, error, says):
    """Names are taken as they are; none is a pattern."""
    registry, register = known
    register(chain_yaml())
    with pytest.raises(error, match=says):
        operate.Target.find(registry, text)


def test_a_target_means_the_versions_that_have_the_stage(lane, known):
    """All of them for a bare name, one for name@version."""
    registry, register = known
    one, two = register(chain_yaml()), register(chain_yaml(version=2))
    assert set(operate.Target.find(registry, "chain").masks()) == {one, two}
    target = operate.Target.find(registry, f"{lane.refs[two]}/second")
    assert (target.masks(), target.nodes()) == ({two: 2}, [f"{lane.refs[two]}/second"])
    assert operate.pause(registry, target) == target.nodes()
    assert operate.paused_nodes(registry) == set(target.nodes())
    assert run(registry.client, lane.t.recount()) == []
