"""Random sequences of every transition, with replays and late commits, against a model of plain dicts."""

from __future__ import annotations

import hashlib
import struct
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.queues.model import Job, Model
from torchrelay.queues.job import FLAG_KEYED, HEAD, Entry, split_refs
from torchrelay.queues.keys import new_token
from torchrelay.queues.scripts import WorkerRetired
from torchrelay.queues.tenants import share_of
from torchrelay.queues.transitions import Copied, Grant, Output

PICK = st.integers(0, 10**6)
FEW = st.integers(0, 255)
BLOBS = st.sampled_from(["", "", "next", "kept", "result", "memory", "memory"])
HOSTS = ("", "aaaa", "bbbb")


def subset(items: list[Any], mask: int) -> list[Any]:
    """Those whose bit is set; all of them when none is."""
    return [x for i, x in enumerate(items) if mask >> i & 1] or list(items)


class LaneMachine(RuleBasedStateMachine):
    """One lane with a chain, a diamond, a fork with a chain in it and a chain with volatile nodes; two workers live at
    a time."""

    make_lane: ClassVar[Any]

    @initialize()
    def start(self) -> None:
        self.lane = type(self).make_lane()
        self.lane.define(self.lane.CHAIN)
        self.lane.define(self.lane.DIAMOND)
        self.lane.define(self.lane.SIDES)
        self.lane.define(self.lane.LONG, volatile={"s2"})
        self.lane.redis.hset(self.lane.keys.tenants, "a", 1000)
        self.model = Model(self.lane.graphs)
        self.workers = [self.lane.worker(1, host) for host in HOSTS]
        for host in HOSTS[1:]:
            self.lane.run(self.lane.t.spilling(host, 0, 3_600_000))
            self.model.answering.add(host)
        self.given: list[tuple[Any, Grant, int, int]] = []
        self.answered: list[tuple[Any, Any, Any]] = []
        self.submits = 0
        self.names: set[str] = set()
        for number in (1, 2, 3, 4, 1, 2, 3, 4):
            kinds = [(0.0, "", False), (100_000.0, "abcd"[number - 1], True), (0.0, "", True), (200_000.0, "", False)]
            self.submitted(number, kinds, "x", False, False)

    def teardown(self) -> None:
        if hasattr(self, "lane"):
            for host in HOSTS[1:]:
                self.lane.run(self.lane.t.spilling(host, 0, 0))  # what is left there is anyone's
            for number in self.lane.graphs:
                self.lane.redis.zadd(
                    self.lane.keys.delayed,
                    dict.fromkeys(self.lane.redis.zrange(self.lane.keys.delayed, 0, -1), 1) or {"x": 1},
                )
                self.lane.run(self.lane.t.promote())
                for fence in list(self.model.grants):
                    self.give_up_lease(fence)
                while any(self.lane.ready(number, n.index) for n in self.lane.graphs[number].nodes):
                    self.lane.drain(number)
            self.lane.audit()
            self.lane.channel.close()

    def run(self, owner: Any, call: Any, again: bool) -> Any:
        """Runs an operation, twice when its answer is to be lost; both answers must agree."""
        answer = self.lane.run(call)
        if again:
            assert self.lane.run(call) == answer
        self.answered.append((owner, call, answer))
        return answer

    @rule(
        number=st.sampled_from([1, 2, 3, 4]),
        kinds=st.lists(
            st.tuples(
                st.sampled_from([0.0, 100_000.0, 200_000.0]),
                st.sampled_from(["", "", "", "a", "b", "c", "d"]),
                st.booleans(),
            ),
            min_size=1,
            max_size=4,
        ),
        content=st.sampled_from("xy"),
        delayed=st.sampled_from([False, False, True]),
        again=st.booleans(),
        tenant=st.sampled_from(["", "", "a"]),
    )
    def submit(self, **options: Any) -> None:
        self.submitted(**options)

    def submitted(
        self,
        number: int,
        kinds: list[tuple[float, str, bool]],
        content: str,
        delayed: bool,
        again: bool,
        tenant: str = "",
    ) -> None:
        # A second apart by rank, so that the order does not hang on how fast the test runs. What has a tenant goes
        # first, one turn of it after the other, and turns are short.
        self.submits += 1
        jobs, expected, named = [], "", []
        keys = dict(self.model.keys)
        for boost, key, deadline in kinds:
            digests = hashlib.md5(key.encode()).digest() + hashlib.md5(content.encode()).digest() if key else b""
            job = self.lane.job(
                boost_ms=500_000.0 if tenant else boost - 1000.0 * self.submits,
                delay_ms=3_600_000.0 if delayed else 0.0,
                deadline_ms=36_000_000.0 if deadline else 0.0,
                flags=FLAG_KEYED if key else 0,
                key_digests=digests,
            )
            jobs.append(job)
            if key and key in keys:
                old_content, old = keys[key]
                named.append(old)
                expected += "x" if old_content != content else "e" if old in self.model.ended else "k"
                if expected[-1] == "e":
                    self.model.replies.append(old)
            else:
                expected += "n"
                if key:
                    keys[key] = (content, job.id)
        share = share_of(tenant, 50)
        answer = self.run(self.lane.session, self.lane.submitting(number, jobs, share=share), again)
        assert (answer.statuses, answer.named) == (expected, named)
        for job, status, (_, key, _) in zip(jobs, expected, kinds, strict=True):
            if status == "n":
                rank = HEAD.unpack_from(self.lane.record(job.id))[0]
                self.model.add(Job(job.id, number, rank, key or None), content, "delayed" if delayed else "ready")

    def places(self) -> list[tuple[int, int]]:
        """Where something is ready."""
        return [(p, n.index) for p, g in self.lane.graphs.items() for n in g.nodes if self.model.ready(p, n.index)]

    def granted(self, which: int, number: int, node: int, most: int, again: bool) -> None:
        worker = self.workers[which % len(self.workers)]
        worker.pipeline = number
        call = worker.ask(node, most)
        grant = self.lane.run(call)
        expected = self.model.claim(worker.incarnation, call.args[1], number, node, most, worker.reader.host)
        assert [self.key(e) for e in grant.entries] == expected
        for entry in grant.entries:
            spot = self.model.live[entry.job_id].spots[node]
            assert (entry.attempts, entry.strikes, entry.suspect) == (spot.attempts, spot.strikes, spot.suspect)
        if grant.entries:
            self.given.append((worker, grant, number, node))
            if again:
                replay = self.lane.run(call)
                assert (replay.fence, replay.entries) == (grant.fence, grant.entries)

    @precondition(lambda self: self.places())
    @rule(which=PICK, most=st.integers(1, 5), again=st.booleans())
    def claim(self, which: int, most: int, again: bool) -> None:
        number, node = self.places()[which % len(self.places())]
        self.granted(which, number, node, most, again)

    @rule(number=st.sampled_from([1, 2, 3, 4]), node=st.integers(1, 3))
    def claim_anywhere(self, number: int, node: int) -> None:
        self.granted(0, number, node, 2, False)

    @precondition(lambda self: self.places())
    @rule(which=PICK, most=st.integers(1, 5), blob=BLOBS, rounds=st.integers(1, 4), fused=st.integers(0, 2))
    def work(self, which: int, most: int, blob: str, rounds: int, fused: int) -> None:
        """Several hops without a mishap, so that jobs get far."""
        for turn in range(rounds):
            if places := self.places():
                number, node = places[(which + turn) % len(places)]
                before = len(self.given)
                self.granted(which, number, node, most, False)
                if len(self.given) > before:
                    self.committed(*self.given[-1], self.given[-1][1].entries, blob, False, fused=fused)

    @precondition(lambda self: self.places())
    @rule(which=PICK, most=st.sampled_from([1, 1, 3]), times=st.integers(1, 4))
    def crash(self, which: int, most: int, times: int) -> None:
        """Workers claim at one node and die computing, one after the other."""
        number, node = self.places()[which % len(self.places())]
        for _ in range(times):
            before = len(self.given)
            self.granted(which, number, node, most, False)
            if len(self.given) > before:
                worker, grant, *_ = self.given[-1]
                self.died(worker, number, node, grant.entries, False)

    @staticmethod
    def key(entry: Entry) -> tuple[str, int]:
        return entry.job_id, entry.packed[-1] - 128

    def pick(self, which: int, mask: int) -> tuple[Any, Grant, int, int, list[Entry]]:
        """Some entries of a grant, mostly of one that still holds something, else of any late one."""
        held = [g for g in self.given if g[1].fence in self.model.grants]
        known = held if held and which % 4 else self.given[-6:]
        worker, grant, number, node = known[which % len(known)]
        worker.pipeline = number
        return worker, grant, number, node, subset(grant.entries, mask)

    def committed(
        self,
        worker: Any,
        grant: Grant,
        number: int,
        node: int,
        entries: list[Entry],
        blob: str,
        again: bool,
        rows: int | None = None,
        fused: int = 0,
    ) -> None:
        """By a worker that ran up to `fused` nodes more."""
        outputs, expected = [], ""
        nodes = self.model.chain(number, node, fused)
        for made in worker.outputs(node, entries):
            added, ref = None, ""
            if blob:
                job_id = made.token[:-1].decode()
                later = self.readers(number, nodes[-1], kept=blob == "kept")
                added = (f"{job_id}.{nodes[-1]}.{grant.fence}.{len(self.answered)}", later if blob != "result" else 0)
                if blob == "memory" and later and worker.reader.host:
                    self.model.hosts[added[0]] = worker.reader.host
                    ref = f"{added[0]}:0:5:{added[1]}:{worker.reader.host},"
                else:
                    self.lane.blob(added[0])
                    ref = f"{added[0]}:1:5:{added[1]},"
            outputs.append(Output(made.token, made.payload, rows, ref))
            expected += self.model.commit(grant.fence, nodes, (made.token[:-1].decode(), made.token[-1] - 128), added)
        call = self.lane.t.commit(worker.session, grant.fence, number, (node, nodes[-1]), outputs)
        assert self.run(worker.session, call, again) == expected

    def readers(self, number: int, node: int, *, kept: bool) -> int:
        """The mask of the nodes behind this one; `kept`, with those behind them."""
        nodes = self.lane.graphs[number].nodes
        found = set(nodes[node - 1].succs)
        found |= {s for n in found for s in nodes[n - 1].succs} if kept else set()
        return sum(1 << (s - 1) for s in found)

    @rule(host=st.sampled_from(HOSTS[1:]), how=st.sampled_from(["whole", "whole", "cut", "gone"]), twice=st.booleans())
    def spill(self, host: str, how: str, twice: bool) -> None:
        """A host copies what others asked it for; its copies may be cut, or there may be nothing left to copy."""
        _, asked = self.lane.run(self.lane.t.spilling(host, 64, 3_600_000))
        copies, expected = [], ""
        for member, refs, _ in asked:
            job_id, node, _ = member.split("|")
            dead, again = self.model.dead.get(job_id, (None, ""))
            job = self.model.live.get(job_id) if node != "0" else dead
            assert job is not None
            assert not again or node != "0"
            assert node == "0" or job.spots[int(node)].at in ("ready", "delayed")
            for name in split_refs(refs):
                assert self.model.hosts[name] == host
                assert name in {n for n, _ in job.blobs}
                copy = "" if how == "gone" else self.lane.blob(f"spill.{new_token(8)}", ttl_ms=60_000)
                copies.append(Copied(member, name, copy, 2 if how == "cut" else 1))
                # The same ref may be asked for at two nodes of a fork.
                expected += "s" if how == "cut" or name in {c.name for c in copies[:-1]} else "u" if not copy else "k"
        calls = [self.lane.t.spill(host, copies)] if copies else []
        if twice and copies:
            # Somebody who was stopped in the middle records his own copies late.
            calls.append(
                self.lane.t.spill(
                    host, [c._replace(blob=self.lane.blob(f"spill.{new_token(8)}") if c.blob else "") for c in copies]
                )
            )
        for number, call in enumerate(calls):
            answer = self.lane.run(call)
            assert answer == (expected if not number else "s" * len(expected)) or how == "cut"
            for copy, letter in zip(copies, answer, strict=True):
                if letter == "k":
                    del self.model.hosts[copy.name]
                elif letter == "u":
                    self.model.hosts[copy.name] = ""
        if how == "cut" and copies:
            asked_for = self.lane.keys.spill(host)
            members = self.lane.redis.zrange(asked_for, 0, -1)
            self.lane.redis.zadd(asked_for, dict.fromkeys(members, 1))

    @rule(host=st.sampled_from(HOSTS[1:]))
    def host_falls_silent_or_answers(self, host: str) -> None:
        """What only a silent host has is anyone's to claim, and to find lost."""
        silent = host in self.model.answering
        self.lane.run(self.lane.t.spilling(host, 0, 0 if silent else 3_600_000))
        self.model.answering ^= {host}

    @rule(volatile=st.sampled_from([{"s2"}, {"s1", "s2"}, {"s3"}, set()]))
    def redefine(self, volatile: set[str]) -> None:
        """A worker starts whose file says otherwise where columns are handed over."""
        self.lane.redefine(4, volatile)

    @precondition(lambda self: self.given)
    @rule(
        which=PICK,
        mask=FEW,
        blob=BLOBS,
        again=st.booleans(),
        rows=st.sampled_from([None, None, 0, 1, 7]),
        fused=st.integers(0, 2),
    )
    def commit(self, which: int, mask: int, blob: str, again: bool, rows: int | None, fused: int) -> None:
        """An expanding or regrouping node leaves another number of rows; nodes that follow may be fused to it."""
        self.committed(*self.pick(which, mask), blob, again, rows, fused)

    @precondition(lambda self: self.given)
    @rule(which=PICK, mask=FEW, most=st.integers(1, 3), delayed=st.booleans(), again=st.booleans())
    def fail(self, which: int, mask: int, most: int, delayed: bool, again: bool) -> None:
        worker, grant, number, node, entries = self.pick(which, mask)
        charges = [(e.packed, 3_600_000.0 if delayed else 0.0, self.lane.WHY) for e in entries]
        call = self.lane.t.fail(worker.session, grant.fence, number, node, charges, most)
        expected = "".join(self.model.fail(grant.fence, node, self.key(e), most, delayed) for e in entries)
        assert self.run(worker.session, call, again) == expected

    @precondition(lambda self: self.given)
    @rule(which=PICK, mask=FEW, again=st.booleans())
    def release(self, which: int, mask: int, again: bool) -> None:
        worker, grant, _, node, entries = self.pick(which, mask)
        call = self.lane.t.release(worker.session, grant.fence, [e.packed for e in entries])
        expected = "".join(self.model.release(grant.fence, node, self.key(e)) for e in entries)
        assert self.run(worker.session, call, again) == expected

    @precondition(lambda self: self.given)
    @rule(which=PICK, mask=FEW, makers=st.lists(st.integers(0, 15), min_size=1, max_size=3), again=st.booleans())
    def lose(self, which: int, mask: int, makers: list[int], again: bool) -> None:
        """Whatever the mask of makers says, of nodes that are not done and of other branches too."""
        worker, grant, _, _, entries = self.pick(which, mask)
        self.lost(worker, grant, entries, [makers[i % len(makers)] for i in range(len(entries))], again)

    def lost(self, worker: Any, grant: Grant, entries: list[Entry], masks: list[int], again: bool) -> None:
        masks = masks[: len(entries)]
        call = self.lane.t.lost(worker.session, grant.fence, [e.packed for e in entries], self.lane.WHY, masks)
        expected = "".join(self.model.lose(grant.fence, self.key(e), m) for e, m in zip(entries, masks, strict=True))
        assert self.run(worker.session, call, again) == expected

    @rule(which=PICK, blobs=st.lists(BLOBS, min_size=2, max_size=3), makers=st.sampled_from([0, 1, 2, 2, 3, 4, 6]))
    def lose_behind_volatile(self, which: int, blobs: list[str], makers: int) -> None:
        """Jobs of the chain with volatile nodes come a way, and then their bytes are gone."""
        for node, blob in enumerate(blobs, 1):
            before = len(self.given)
            self.granted(which, 4, node, 3, False)
            if len(self.given) > before:
                self.committed(*self.given[-1], self.given[-1][1].entries, blob, False)
        before = len(self.given)
        self.granted(which, 4, len(blobs) + 1, 2, False)
        if len(self.given) > before:
            self.lost(*self.given[-1][:2], self.given[-1][1].entries, [makers, makers], False)

    @precondition(lambda self: self.given)
    @rule(which=PICK, mask=FEW, again=st.booleans())
    def retire(self, which: int, mask: int, again: bool) -> None:
        worker, _, number, node, entries = self.pick(which, mask)
        if worker in self.workers:
            self.died(worker, number, node, entries, again)

    def died(self, worker: Any, number: int, node: int, entries: list[Entry], again: bool) -> None:
        assert worker.die(entries) == self.model.retire(worker.incarnation, {self.key(e) for e in entries})
        if again:
            assert worker.die(entries) == [0, 0]
        worker.pipeline = number
        with pytest.raises(WorkerRetired):
            worker.claim(node)
        self.workers[self.workers.index(worker)] = self.lane.worker(1, worker.reader.host)

    def give_up_lease(self, fence: str) -> None:
        seconds, micros = self.lane.redis.time()
        self.lane.redis.hset(self.lane.keys.meta, "tick", seconds * 1000 + micros // 1000)
        self.lane.redis.zadd(self.lane.keys.lease, {fence: 1})
        back, _ = self.model.return_grant(fence)
        assert self.lane.run(self.lane.t.reap())[:2] == [back, 0]

    @precondition(lambda self: self.model.grants)
    @rule(which=PICK)
    def lease_runs_out(self, which: int) -> None:
        self.give_up_lease(sorted(self.model.grants)[which % len(self.model.grants)])

    @precondition(lambda self: self.model.grants)
    @rule()
    def renew(self) -> None:
        fences = sorted(self.model.grants)
        for fence, (held, revoked) in zip(fences, self.lane.run(self.lane.t.renew(60_000, fences)), strict=True):
            grant = self.model.grants[fence]
            gone = [e for e in grant.entries if e[0] not in self.model.live or self.model.live[e[0]].gen != e[1]]
            assert (held, [(t[:-1].decode(), t[-1] - 128) for t in revoked]) == (True, gone)

    @precondition(lambda self: any(s.at == "delayed" for j in self.model.live.values() for s in j.spots.values()))
    @rule()
    def delays_are_over(self) -> None:
        members = self.lane.redis.zrange(self.lane.keys.delayed, 0, -1)
        self.lane.redis.zadd(self.lane.keys.delayed, dict.fromkeys(members, 1))
        assert self.lane.run(self.lane.t.promote()) == [len(members), -1]
        for job in self.model.live.values():
            for spot in job.spots.values():
                spot.at = "ready" if spot.at == "delayed" else spot.at

    @precondition(lambda self: len(self.model.live) > 3)
    @rule(which=PICK)
    def deadline_passes(self, which: int) -> None:
        """Moves a job's deadline into the past; who meets the job next must end it."""
        job = list(self.model.live.values())[which % len(self.model.live)]
        record = self.lane.record(job.id)
        if HEAD.unpack_from(record)[1] > 0:
            patched = record[:8] + struct.pack("<d", 1.0) + record[16:]
            self.lane.redis.hset(self.lane.keys.bucket(job.id), job.id[14:], patched)
            self.lane.redis.zadd(self.lane.keys.tag + "deadline", {job.id: 1})
            job.overdue = True

    @rule()
    def expire(self) -> None:
        overdue = [j for j in self.model.live.values() if j.overdue]
        assert self.lane.run(self.lane.t.expire()) == len(overdue)
        for job in overdue:
            self.model.end(job, "expired")

    @precondition(lambda self: len(self.model.live) > 3)
    @rule(which=PICK)
    def cancel(self, which: int) -> None:
        known = [*self.model.live, *self.model.ended]
        job_id = known[which % len(known)]
        live = self.model.live.get(job_id)
        assert self.lane.run(self.lane.t.cancel([job_id])) == ("w" if live else "t")
        if live:
            self.model.end(live, "cancelled")

    @precondition(lambda self: self.model.ended)
    @rule(which=PICK)
    def sweep(self, which: int) -> None:
        job_id = list(self.model.ended)[which % len(self.model.ended)]
        self.lane.redis.zadd(self.lane.keys.tag + "doneq", {job_id: 1})
        assert self.lane.run(self.lane.t.sweep()) == 1
        self.model.forget(job_id)

    @precondition(lambda self: self.model.dead)
    @rule(which=PICK)
    def redrive(self, which: int) -> None:
        job_id = list(self.model.dead)[which % len(self.model.dead)]
        expected = self.model.redrive(job_id)
        assert self.lane.run(self.lane.t.redrive([job_id, job_id])) == [expected, expected]

    @precondition(lambda self: self.model.dead)
    @rule(which=PICK)
    def drop(self, which: int) -> None:
        job_id = list(self.model.dead)[which % len(self.model.dead)]
        assert self.lane.run(self.lane.t.drop_dead([job_id, job_id])) == [self.model.drop(job_id), ""]

    @precondition(lambda self: self.answered)
    @rule(which=PICK)
    def late_replay(self, which: int) -> None:
        """An operation of a while ago arrives again: it answers as it did, and writes nothing."""
        owner, call, answer = self.answered[-1 - which % min(len(self.answered), 8)]
        newest = max(c.args[0] for o, c, _ in self.answered if o is owner)
        if newest - call.args[0] < 8:
            assert self.lane.run(call) == answer

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "lane"):
            return
        lane, model = self.lane, self.model
        lane.audit()
        for number, graph in lane.graphs.items():
            for node in graph.nodes:
                assert lane.ready(number, node.index) == model.ready(number, node.index)
        assert {i.decode() for i in lane.redis.hkeys(lane.keys.done)} == set(model.ended)
        assert all(lane.status(i) == status for i, status in model.ended.items())
        assert sorted(i for i, _ in lane.replies()) == sorted(model.replies)
        assert {i.decode() for i in lane.redis.hkeys(lane.keys.dead)} == set(model.dead)
        assert {f.decode() for f in lane.redis.hkeys(lane.keys.grants)} == set(model.grants)
        assert {n for n, ttl in lane.blobs().items() if ttl == -1} == model.blobs()
        self.names |= model.blobs()
        asked = sorted(self.names)[-256:]
        assert lane.run(lane.t.holders(asked)) == [model.wanted(name) for name in asked]
        assert len(model.commits) == len(set(model.commits))
        committed = sum(
            lane.load(f"{lane.node_key(p, n.index)}.committed") for p, g in lane.graphs.items() for n in g.nodes
        )
        assert committed == len(model.commits)


def test_any_sequence_of_transitions_agrees_with_the_model(make_lane) -> None:
    """After every step ready order, ends, replies, grants, dead letters and blobs are the model's; recount is clean."""
    LaneMachine.make_lane = staticmethod(make_lane)
    run_state_machine_as_test(
        LaneMachine,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
