"""A fleet of real processes: agents with names of their own act as hosts, and coordinators decide for them."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import private_server, wait_until
from tests.integration.fleet_support import READY_S, Processes
from tests.workers.support import CODE, YAML, ForwardLog, alive
from torchrelay import JobFuture, Relay
from torchrelay.config.fleet import Assignment, Desired, HostReport, Need
from torchrelay.queues.control import ControlQueue
from torchrelay.queues.fleet import HOST_TTL_S, enqueue_reconcile, reconcile_queue
from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import WorkerReport

TAKEOVER_S = 5.0


@pytest.fixture
def log(tmp_path: Path) -> ForwardLog:
    return ForwardLog(tmp_path / "forwards.txt")


@pytest.fixture
def fleet(server_url: str, namespace: str, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(server_url, namespace, tmp_path)
    yield made
    made.end()


@pytest.fixture
def make_obey(make_pipeline: Callable[..., Path], log: ForwardLog) -> Callable[..., Path]:
    """A pipeline of one stage that obeys its rows; another name of the file may be another version."""

    def make(name: str = "obey.yaml", replicas: str = "2", more: str = "") -> Path:
        options = f"replicas: {replicas}{more}"
        return make_pipeline(YAML.format(log=log.path, options=options), CODE, name)

    return make


def test_workers_are_spread_over_the_hosts_and_do_the_work(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """Two agents and a coordinator, nothing else: the stages have their workers, and everybody sees where and why."""
    path = make_obey()
    fleet.two_hosts(path)
    fleet.await_serves("work", 2)
    assert fleet.placed() == {("a", "work"): 1, ("b", "work"): 1}
    futures = relay.submit_many("obey", [{"n": str(i)} for i in range(50)])
    assert [f.result(30)["out"] for f in futures] == [f"{i}!" for i in range(50)]
    told = fleet.cli("status", "--why")
    assert told["leader"] == "c1"
    assert [(h["name"], h["workers"]) for h in told["hosts"]] == [("a", 1), ("b", 1)]
    wait_until(lambda: all(h["applied"] for h in fleet.cli("status")["hosts"]))
    assert {(one["host"], one["state"]) for one in told["allocation"]} == {("a", "ready"), ("b", "ready")}
    assert all(one["why"] for one in told["allocation"])
    assert "new jobs take it" in told["why"]["versions"].values()


def submit(relay: Relay, count: int, do: str = "sleep 0.01") -> list[JobFuture]:
    return relay.submit_many("obey", [{"n": str(i), "do": do} for i in range(count)])


def assert_done(futures: list[JobFuture], timeout_s: float = 60.0) -> None:
    assert [f.result(timeout_s)["out"] for f in futures] == [f"{i}!" for i in range(len(futures))]


def pids(fleet: Processes) -> dict[str, int]:
    """The computing process of each worker that the leader placed."""
    return {w.assignment: w.pid for w in fleet.registry.workers() if w.assignment}


def other_leads(fleet: Processes, than: str) -> str:
    began = time.monotonic()
    wait_until(lambda: fleet.led_by() not in ("", than), 2 * TAKEOVER_S)
    assert time.monotonic() - began <= TAKEOVER_S
    return fleet.led_by()


def test_a_leader_that_is_killed_is_replaced_and_nobody_notices(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """Within five seconds; the workers stay what they are, and jobs are done all the time."""
    path = make_obey()
    fleet.coordinator("c1")
    wait_until(lambda: fleet.led_by() == "c1", 30)
    fleet.coordinator("c2")
    fleet.agent("a", path)
    fleet.await_serves("work", 2)
    epoch, before = fleet.view.epoch, pids(fleet)
    futures = submit(relay, 400)
    fleet.kill("c1")
    assert other_leads(fleet, "c1") == "c2"
    assert fleet.view.epoch == epoch + 1
    fleet.cli("scale", "obey/work", "3")
    fleet.await_serves("work", 3)
    assert before.items() <= pids(fleet).items()
    assert_done(futures)
    fleet.kill("c2")
    wait_until(lambda: not fleet.led_by(), TAKEOVER_S)
    assert_done(submit(relay, 50))
    fleet.coordinator("c3")
    wait_until(lambda: fleet.led_by() == "c3", 30)
    assert pids(fleet).keys() == {one.id for one in fleet.assignments()}
    assert before.items() <= pids(fleet).items()


def test_a_leader_that_was_paused_cannot_act_when_it_wakes(fleet: Processes, make_obey: Callable[..., Path]) -> None:
    """Another one led and decided meanwhile; what the sleeper had in hand changes nothing."""
    path = make_obey()
    fleet.coordinator("c1")
    wait_until(lambda: fleet.led_by() == "c1", 30)
    fleet.coordinator("c2")
    fleet.agent("a", path)
    fleet.await_serves("work", 2)
    fleet.signal("c1", signal.SIGSTOP)
    assert other_leads(fleet, "c1") == "c2"
    fleet.cli("scale", "obey/work", "1")
    fleet.await_serves("work", 1)
    desired, epoch = fleet.view.desired, fleet.view.epoch
    fleet.signal("c1", signal.SIGCONT)
    wait_until(lambda: "leads no longer" in fleet.log("c1"), 15)
    assert (fleet.view.leader, fleet.view.epoch, fleet.view.desired) == ("c2", epoch, desired)
    assert not fleet.records.decree("c1", epoch - 1, {"a": None}, {})


def test_the_workers_of_a_killed_agent_end_and_others_take_their_place(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """Once its host was silent for its time; a restarted agent is given work again, and no job is lost."""
    path = make_obey()
    fleet.two_hosts(path)
    fleet.await_serves("work", 2)
    on_b = {one.id for one in fleet.assignments() if one.host == "b"}
    children = [pid for worker, pid in pids(fleet).items() if worker in on_b]
    assert len(children) == 1
    futures = submit(relay, 300)
    fleet.kill("b")
    wait_until(lambda: not any(alive(pid) for pid in children), 10)
    began = time.monotonic()
    wait_until(lambda: fleet.placed() == {("a", "work"): 2}, HOST_TTL_S + TAKEOVER_S)
    assert time.monotonic() - began <= HOST_TTL_S + 2.0
    fleet.await_serves("work", 2)
    assert_done(futures)
    fleet.agent("b", path)
    wait_until(lambda: "b" in {host.name for host in fleet.view.hosts}, 30)
    fleet.cli("scale", "obey/work", "4")
    fleet.await_serves("work", 4)
    assert fleet.placed()[("b", "work")] == 2


def test_an_agent_that_is_terminated_drains_and_others_take_its_place(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay, log: ForwardLog
) -> None:
    """With exit status 0, and every row computed once."""
    path = make_obey()
    fleet.two_hosts(path)
    fleet.await_serves("work", 2)
    futures = submit(relay, 300)
    wait_until(lambda: len(log.runs()) > 20, 30)
    assert fleet.stop("b") == 0
    assert [host.name for host in fleet.view.hosts] == ["a"]
    fleet.await_serves("work", 2)
    assert fleet.placed() == {("a", "work"): 2}
    assert_done(futures)
    assert set(log.runs().values()) == {1}


def test_hosts_are_drained_and_stages_scaled_as_operators_ask(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """A drained host stays empty until that is taken back; what is asked for goes before what the file says."""
    path = make_obey(replicas="{min: 2, max: 8}")
    fleet.two_hosts(path)
    fleet.await_serves("work", 2)
    assert fleet.cli("scale", "obey/work", "4") == {"node": "obey/work", "workers": 4}
    fleet.await_serves("work", 4)
    assert fleet.placed() == {("a", "work"): 2, ("b", "work"): 2}
    futures = submit(relay, 300)
    assert fleet.cli("drain", "b") == {"host": "b", "draining": True}
    wait_until(lambda: fleet.placed() == {("a", "work"): 4}, 10)
    fleet.await_serves("work", 4)
    assert_done(futures)
    assert [h["draining"] for h in fleet.cli("status")["hosts"]] == [False, True]
    assert fleet.cli("drain", "b", "--undo") == {"host": "b", "draining": False}
    fleet.cli("scale", "obey/work", "6")
    wait_until(lambda: fleet.placed()[("b", "work")] == 2, 10)
    fleet.cli("scale", "obey/work", "0")
    wait_until(lambda: fleet.placed() == {}, 10)
    fleet.cli("scale", "obey/work", "auto")
    fleet.await_serves("work", 2)
    for wrong in (
        ("drain", "z"),
        ("scale", "obey", "2"),
        ("scale", "obey/nothing", "2"),
        ("scale", "obey/work", "2.5"),
    ):
        assert "error" in fleet.cli(*wrong, status=2), wrong


PICKY_YAML = """
    pipeline: picky
    input: {n: str}
    stages: [{name: work, use: "stages.py:Picky", outputs: {out: str}, replicas: 2}]
"""
PICKY_CODE = """
    import os
    from pathlib import Path

    from torchrelay import Stage


    class Picky(Stage):
        def load(self, context):
            if Path(os.environ.get("BROKEN", "/nowhere")).exists():
                raise OSError("this disk is broken \x1b[31m")

        def forward(self, batch):
            return {"out": [n + "!" for n in batch["n"]]}
"""


def test_a_slot_that_keeps_failing_is_set_aside_and_tried_again(
    fleet: Processes, make_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """Its workers go elsewhere, status shows an alert with the reason, and once it works it is used again."""
    path = make_pipeline(PICKY_YAML, PICKY_CODE)
    broken = tmp_path / "broken"
    broken.touch()
    fleet.coordinator("c1")
    fleet.agent("b", path, BROKEN=str(broken))
    wait_until(lambda: fleet.view.aside, 60)
    told = fleet.cli("status", "--why")
    (alert,) = told["alerts"]
    assert (alert["host"], alert["slot"], alert["failures"]) == ("b", "cpu", 1)
    assert alert["node"].endswith("/work")
    assert "does not start" in alert["reason"]
    assert alert["again_in_s"] > 0
    assert len(told["why"]["refused"]) == 2
    fleet.agent("a", path)
    fleet.await_serves("work", 2)
    assert fleet.placed() == {("a", "work"): 2}
    broken.unlink()
    fleet.cli("scale", "picky/work", "6")
    fleet.await_serves("work", 6)
    assert fleet.placed()[("b", "work")] >= 2
    wait_until(lambda: fleet.cli("status")["alerts"] == [], 15)


def test_a_file_that_changed_is_another_version_and_is_refused(
    fleet: Processes, make_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """The agent announced what it loaded; workers that would run other code end in an alert that says so."""
    path = make_pipeline(PICKY_YAML, PICKY_CODE)
    fleet.coordinator("c1")
    fleet.agent("a", path)
    fleet.await_serves("work", 2)
    make_pipeline(PICKY_YAML, PICKY_CODE.replace("!", "?"))
    before = pids(fleet)
    fleet.cli("scale", "picky/work", "3")
    wait_until(lambda: fleet.view.aside, 30)
    assert "changed since this worker was started" in fleet.log("a")
    assert pids(fleet).items() >= before.items()


def test_reconcile_jobs_that_are_lost_or_doubled_do_no_harm(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """Agents look every two seconds by themselves; a hundred requests, one of them twice there, change nothing."""
    path = make_obey()
    fleet.coordinator("c1")
    fleet.agent("a", path)
    fleet.await_serves("work", 2)
    queue = ControlQueue(reconcile_queue(fleet.namespace, "a"), fleet.client)
    fleet.client.set("rq:suspended", 1)

    def takes() -> bool:
        """Whether somebody who looked before still waits for a job. Nobody stops looking for this long."""
        time.sleep(0.05)
        return any(c["cmd"] == "blmove" and "b" in c["flags"] for c in fleet.client.client_list())

    wait_until(lambda: not takes() and not takes(), 10)
    try:
        fleet.cli("scale", "obey/work", "4")
        wait_until(lambda: fleet.client.llen(queue.key) == 1, 10)
        lost = fleet.client.rpop(queue.key).decode()
        fleet.await_serves("work", 4, timeout_s=20)
        assert fleet.client.hget(f"rq:job:{lost}", "status") == b"queued"
        before, state = pids(fleet), fleet.view.desired["a"]
        for _ in range(99):
            enqueue_reconcile(fleet.client, fleet.namespace, state)
        fleet.client.rpush(queue.key, *[enqueue_reconcile(fleet.client, fleet.namespace, state)] * 2)
    finally:
        fleet.client.delete("rq:suspended")
    wait_until(lambda: fleet.client.llen(queue.key) == 0, 60)
    assert_done(submit(relay, 20))
    assert pids(fleet) == before
    assert fleet.client.zcard(f"rq:finished:{queue.name}") >= 100


def test_hosts_and_workers_stay_what_they_are_while_the_server_is_away(
    make_obey: Callable[..., Path], tmp_path: Path
) -> None:
    """For longer than a host lives without a word: nobody is drained, replaced or doubled, and the leader leads on."""
    path = make_obey()
    with private_server() as server:
        fleet = Processes(server.url, "q" + new_token(8), tmp_path)
        try:
            fleet.two_hosts(path)
            fleet.await_serves("work", 2)
            before, assignments, epoch = pids(fleet), fleet.assignments(), fleet.view.epoch
            server.kill()
            away_until = time.monotonic() + HOST_TTL_S + 2
            wait_until(lambda: time.monotonic() > away_until, 30)
            assert all(alive(pid) for pid in before.values())
            server.start()
            with Relay(server.url, namespace=fleet.namespace) as relay:
                assert_done(submit(relay, 100))
                wait_until(lambda: len(pids(fleet)) == 2, 15)
                assert pids(fleet) == before
                assert fleet.assignments() == assignments
                wait_until(lambda: fleet.led_by() == "c1", 10)
                assert fleet.view.epoch == epoch
        finally:
            fleet.end()


def test_a_new_version_is_deployed_while_the_old_one_drains(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay, tmp_path: Path
) -> None:
    """The agents have both. Deploy gives the new one workers before it switches; the old one keeps its own until its
    last job has ended, however long that takes, and then has none. Rollback goes the same way back."""
    old = make_obey("old.yaml")
    new = make_obey("new.yaml", more="\n        outputs: {out: str}")
    go = tmp_path / "go"
    fleet.coordinator("c1")
    fleet.agent("a", old, new, slots="cpu=8")
    first = relay.register(old)
    fleet.await_serves("work", 2, first)
    futures = submit(relay, 40, f"wait {go}")
    (told,) = fleet.cli("deploy", str(new))
    second = f"obey@{told['version']}"
    assert second != first
    assert told["unserved"] == []
    assert told["previous"] == first.partition("@")[2]
    later = submit(relay, 20, "")
    assert_done(later)
    assert Counter(one.ref for one in fleet.assignments()) == {first: 2, second: 2}
    assert "it drains: " in fleet.cli("status", "--why")["why"]["versions"][first]
    go.touch()
    assert_done(futures)
    wait_until(lambda: Counter(one.ref for one in fleet.assignments()) == {second: 2}, 30)
    fleet.await_serves("work", 2, second)
    assert fleet.cli("rollback", "obey")[0]["version"] == first.partition("@")[2]
    assert_done(submit(relay, 20, ""))
    fleet.await_serves("work", 2, first)
    assert fleet.view.wishes.serve == set()
    assert relay.registry.current()["obey"] == first


def test_what_a_worker_takes_and_why_it_is_there_may_change_while_it_runs(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """It is the same worker, and the agent has made the new state true; one of another id takes its place."""
    ref = relay.register(make_obey())
    fleet.agent("a", fleet.folder / "obey.yaml")
    wait_until(lambda: fleet.view.hosts, READY_S)
    epoch = fleet.records.lead("t", 600.0).epoch

    def decree(number: int, worker: Assignment) -> None:
        assert fleet.records.decree("t", epoch, {"a": Desired("a", epoch, number, (worker,))}, {})
        wait_until(lambda: fleet.view.hosts[0].applied == number, READY_S)

    one = Assignment("w1", "a", "cpu", ref, "work")
    decree(1, one)
    fleet.await_serves("work", 1)
    before = pids(fleet)
    decree(2, replace(one, need=Need(cpus=0.5), why="it is as good as anywhere"))
    assert pids(fleet) == before
    decree(3, replace(one, id="w2"))
    wait_until(lambda: set(pids(fleet)) == {"w2"}, READY_S)
    assert pids(fleet)["w2"] != before["w1"]


def test_an_agent_serves_a_pipeline_that_cannot_be_run(
    fleet: Processes, make_pipeline: Callable[..., Path], relay: Relay
) -> None:
    """And says why it takes no runs of it."""
    text = """
        pipeline: apart
        input: {n: int64}
        stages:
          - {name: a, use: "stages.py:more", after: input, rows: expand, outputs: {x: int64}}
          - {name: b, use: "stages.py:same", after: a, inputs: [x], outputs: {y: int64}}
          - {name: c, use: "stages.py:other", after: input, inputs: [n], outputs: {z: int64}}
    """
    code = """
        from torchrelay import Expand
        def more(batch): return Expand({"x": batch["n"]}, [1] * len(batch))
        def same(batch): return {"y": batch["x"]}
        def other(batch): return {"z": batch["n"]}
    """
    path = make_pipeline(text, code)
    relay.register(path)
    fleet.coordinator("c1")
    fleet.agent("a", path)
    fleet.await_serves("c", 1)
    fleet.await_serves("b", 1)
    found = relay.submit("apart", {"n": 3}).result(30)
    assert found["z"] == 3
    assert "takes no runs: " in fleet.log("a")
    assert "b and c end with different ones" in fleet.log("a")


def beat(fleet: Processes, ref: str, hosts: int, turn: int) -> None:
    """What agents and workers of so many hosts say every two seconds."""
    now = time.time()
    for number in range(hosts):
        name = f"h{number}"
        report = HostReport(name, f"x{number}", 1, 32.0, 2**37, 2**36, refs=(ref,), applied=turn)
        heard = fleet.records.beat(report).desired
        for one in () if heard is None else heard.workers:
            worker = WorkerReport(
                worker=f"{name}-{one.id}",
                host=name,
                pid=turn,
                node=f"{ref}/{one.stage}",
                device="cpu",
                state="ready",
                started_at=1.0,
                jobs=100 * turn,
                rows=100 * turn,
                batches=10 * turn,
                busy_s=1.5 * turn,
                service=[0, 0, 5, 10 * turn],
                fills=[0, 10 * turn],
                assignment=one.id,
                sent_at=now,
            )
            fleet.registry.beat(worker)


@pytest.mark.slow
@pytest.mark.alone
def test_a_coordinator_of_a_hundred_workers_takes_a_twentieth_of_a_processor(
    fleet: Processes, make_obey: Callable[..., Path], relay: Relay
) -> None:
    """Ten hosts, their heartbeats from this process, with work at the stage that changes all the time."""
    ref = relay.register(make_obey(replicas="{min: 100, max: 200}"))
    fleet.coordinator("c1")
    wait_until(lambda: fleet.led_by() == "c1", 30)
    process, spent, began = fleet.running["c1"].pid, 0.0, 0.0
    for turn in range(1, 14):
        due = time.monotonic() + 2.0
        beat(fleet, ref, 10, turn)
        submit(relay, 20)
        if turn == 5:
            assert len(fleet.assignments()) == 100
            spent, began = cpu_seconds(process), time.monotonic()
        wait_until(lambda due=due: time.monotonic() > due)
    used = (cpu_seconds(process) - spent) / (time.monotonic() - began)
    assert len(fleet.assignments()) >= 100
    assert used < 0.05


def cpu_seconds(pid: int) -> float:
    """Of the process, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
