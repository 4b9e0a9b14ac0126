"""Hosts, leader, decrees and wishes: the epoch only grows, and who does not lead writes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from tests.conftest import private_server, wait_until
from torchrelay.config.fleet import Assignment, Desired, HostReport
from torchrelay.errors import BrokerMisconfigured, InputError
from torchrelay.queues.fleet import HOST_TTL_S, Aside, FleetRecords
from torchrelay.queues.keys import ControlKeys, new_token

REPORT = HostReport(name="a", incarnation="x1", pid=7, cpus=8.0, memory=2**36, free_memory=2**35)


def desired(host: str, epoch: int, number: int = 1) -> Desired:
    return Desired(host, epoch, number, (Assignment(f"w{number}", host, "cpu", "p@12345678", "s"),))


@pytest.fixture
def control(namespace: str) -> ControlKeys:
    return ControlKeys(namespace)


@pytest.fixture
def fleet(redis_client: redis.Redis, control: ControlKeys) -> FleetRecords:
    return FleetRecords(redis_client, control)


def set_back(client: redis.Redis, control: ControlKeys, seconds: float) -> None:
    """As if everything that was written had been written so long ago, and nobody was heard of since."""
    for name in (b"tick", b"until"):
        value = client.hget(control.leader, name)
        if value is not None:
            client.hset(control.leader, name, int(float(value) - seconds * 1000))
    for host, ends in client.zrange(control.hosts_alive, 0, -1, withscores=True):
        client.zadd(control.hosts_alive, {host: ends - seconds * 1000})


def test_a_host_that_reports_is_seen_until_it_leaves(fleet: FleetRecords) -> None:
    """With what it said, and when, by the server's clock."""
    before = fleet.view().now
    assert fleet.beat(REPORT) == (None, "")
    (seen,) = fleet.view().hosts
    assert seen == REPORT
    assert before - 0.01 <= seen.seen_at <= fleet.view().now + 0.01
    fleet.beat(REPORT, leave=True)
    assert fleet.view().hosts == ()


def test_a_host_that_falls_silent_is_gone_after_its_time(
    fleet: FleetRecords, redis_client: redis.Redis, control: ControlKeys
) -> None:
    """Others that beat meanwhile stay; the leader forgets it."""
    fleet.beat(REPORT)
    redis_client.zadd(control.hosts_alive, {"a": fleet.view().now * 1000 + 50})
    wait_until(lambda: fleet.view().hosts == (), 1.0)
    fleet.beat(replace(REPORT, name="b"))
    assert redis_client.hlen(control.hosts) == 2
    fleet.lead("me")
    assert [host.name for host in fleet.view().hosts] == ["b"]
    assert redis_client.hkeys(control.hosts) == redis_client.hkeys(control.host_owners) == [b"b"]


def test_a_name_has_one_agent_at_a_time(fleet: FleetRecords, redis_client: redis.Redis, control: ControlKeys) -> None:
    """A second one hears who has it, takes it over when that one is silent, and only the owner can take his leave."""
    fleet.beat(REPORT)
    second = replace(REPORT, incarnation="x2", pid=8)
    assert fleet.beat(second).owner == "x1"
    assert fleet.view().hosts == (REPORT,)
    redis_client.zadd(control.hosts_alive, {"a": 1})
    assert fleet.beat(second).owner == ""
    assert fleet.beat(REPORT, leave=True).owner == "x2"
    assert fleet.view().hosts == (second,)


@pytest.mark.parametrize("name", ["", "a b", "a\n", "ä", "a" * 101, "a/b", "{}"])
def test_what_is_no_name_of_a_host_is_refused(fleet: FleetRecords, name: str) -> None:
    with pytest.raises(InputError, match="name of a host"):
        fleet.beat(replace(REPORT, name=name))
    with pytest.raises(InputError, match="name of a host"):
        fleet.wish_drain(name)


def test_one_leads_and_the_epoch_grows_with_each_taking(fleet: FleetRecords) -> None:
    """Renewing keeps it; another one waits; giving up lets him in at once."""
    first = fleet.lead("one")
    assert (first.epoch, first.holder) == (1, "one")
    assert fleet.lead("one").epoch == 1
    refused = fleet.lead("two")
    assert (refused.epoch, refused.holder) == (0, "one")
    assert 0 < refused.left_s <= 3.0
    assert fleet.lead("two", 0).holder == "one"
    assert fleet.lead("one", 0) == (0, "", 0.0)
    assert fleet.view().leader == ""
    assert fleet.lead("two").epoch == 2
    assert fleet.lead("two", 0.03).epoch == 2
    time.sleep(0.06)
    assert fleet.lead("two").epoch == 3
    assert (fleet.view().leader, fleet.view().epoch) == ("two", 3)


def test_a_leader_who_was_paused_writes_nothing(fleet: FleetRecords) -> None:
    """Neither after another one took over, nor after his own time was over, nor with the epoch of somebody else."""
    paused = fleet.lead("one", 0.03)
    assert fleet.decree("one", paused.epoch, {"a": desired("a", paused.epoch)}, {}, {"by": "one"})
    time.sleep(0.06)
    assert not fleet.decree("one", paused.epoch, {"a": None}, {})
    now = fleet.lead("two")
    aside = Aside("a", "cpu", "p@12345678", "s", 1, 5.0, "no")
    for holder, epoch in (("one", paused.epoch), ("one", now.epoch), ("two", paused.epoch)):
        assert not fleet.decree(holder, epoch, {"a": desired("a", 9, 9)}, {aside.key: aside}, {"by": "a ghost"})
    view = fleet.view()
    assert (view.desired, view.aside, view.reasons) == ({"a": desired("a", 1)}, (), {"by": "one"})
    assert fleet.decree("two", now.epoch, {"a": None, "b": desired("b", 2)}, {aside.key: aside})
    view = fleet.view()
    assert (view.desired, view.aside, view.reasons) == ({"b": desired("b", 2)}, (aside,), {"by": "one"})
    assert fleet.decree("two", now.epoch, {}, {aside.key: None})
    assert fleet.view().aside == ()


def test_an_agent_hears_what_its_host_is_to_run(fleet: FleetRecords) -> None:
    """With its very first report."""
    epoch = fleet.lead("me").epoch
    fleet.decree("me", epoch, {"a": desired("a", epoch)}, {})
    assert fleet.beat(REPORT).desired == desired("a", epoch)
    assert fleet.desired_of("a") == desired("a", epoch)
    assert fleet.desired_of("b") is None


@pytest.mark.parametrize("gap_s", [60.0, -3600.0])
def test_an_outage_ages_nobody(
    fleet: FleetRecords, redis_client: redis.Redis, control: ControlKeys, gap_s: float
) -> None:
    """After a minute without a server, or a clock that went back an hour, hosts live and the leader leads; nobody lives
    for longer than a report from then on."""
    fleet.beat(REPORT)
    fleet.beat(replace(REPORT, name="b"))
    epoch = fleet.lead("one").epoch
    set_back(redis_client, control, gap_s)
    assert fleet.beat(replace(REPORT, name="b")).owner == ""
    assert {host.name for host in fleet.view().hosts} == {"a", "b"}
    assert fleet.lead("two").holder == "one"
    assert fleet.decree("one", epoch, {"a": desired("a", epoch)}, {})
    latest = max(ends for _, ends in redis_client.zrange(control.hosts_alive, 0, -1, withscores=True))
    assert latest <= fleet.view().now * 1000 + HOST_TTL_S * 1000
    assert fleet.lead("two").left_s <= 3.0


def test_a_short_gap_moves_nothing(fleet: FleetRecords, redis_client: redis.Redis, control: ControlKeys) -> None:
    """A leader who was silent for two seconds more than his lease is replaced."""
    fleet.lead("one", 0.5)
    set_back(redis_client, control, 2.0)
    assert fleet.lead("two").epoch == 2


def test_wishes_stand_until_they_are_taken_back(fleet: FleetRecords) -> None:
    """One for a version goes before one for the name; some last for a time."""
    fleet.wish_scale("p/s", 3)
    fleet.wish_scale("p@12345678/s", 0)
    fleet.wish_drain("a")
    fleet.wish_serve("p@12345678", 0.1)
    wishes = fleet.view().wishes
    assert (wishes.replicas("p@12345678", "s"), wishes.replicas("p@9", "s"), wishes.replicas("q@1", "s")) == (
        0,
        3,
        None,
    )
    assert (wishes.drain, wishes.serve) == ({"a"}, {"p@12345678"})
    wait_until(lambda: not fleet.view().wishes.serve, 2.0)
    fleet.wish_scale("p/s", None)
    fleet.wish_scale("p@12345678/s", None)
    fleet.wish_drain("a", on=False)
    assert fleet.view().wishes.scale == {}
    assert fleet.view().wishes.drain == set()
    for number in (-1, 10_001):
        with pytest.raises(InputError, match="from 0 to"):
            fleet.wish_scale("p/s", number)


def test_what_others_wrote_there_is_passed_over(
    fleet: FleetRecords, redis_client: redis.Redis, control: ControlKeys
) -> None:
    """Reports, states, wishes and reasons that are none; a key of another type is named, and nothing is written."""
    fleet.beat(REPORT)
    redis_client.zadd(control.hosts_alive, {"z": 1e14, "y": 1e14})
    redis_client.hset(control.hosts, mapping={"z": b"\xff", "y": b"[]"})
    redis_client.hset(control.desired, mapping={"z": b"no", b"\xff": b"{}"})
    redis_client.hset(control.aside, "z", b"{}")
    redis_client.hset(control.wishes, mapping={b"scale p/s": b"-1", b"\xff": b"1", b"scale": b"3", b"fly me": b"1"})
    redis_client.set(control.reasons, b"[" * 5000)
    view = fleet.view()
    assert (view.hosts, view.desired, view.aside, view.reasons) == ((REPORT,), {}, (), {})
    assert fleet.lead("me").epoch == 1
    redis_client.delete(control.hosts)
    redis_client.set(control.hosts, "a string")
    before = redis_client.hgetall(control.leader)
    for act in (lambda: fleet.beat(REPORT), lambda: fleet.lead("me")):
        with pytest.raises(BrokerMisconfigured, match="another type"):
            act()
    assert redis_client.hgetall(control.leader) == before


@pytest.fixture
def full_fleet() -> Iterator[tuple[redis.Redis, FleetRecords]]:
    with private_server("--maxmemory-policy", "noeviction") as server:
        client = redis.Redis.from_url(server.url)
        yield client, FleetRecords(client, ControlKeys("q" + new_token(10)))
        client.close()


def test_everything_passes_out_of_memory(full_fleet: tuple[redis.Redis, FleetRecords]) -> None:
    """A fleet that is to drain a full server must be led (rule 5)."""
    client, fleet = full_fleet
    client.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        client.set("probe", "x")
    fleet.beat(REPORT)
    epoch = fleet.lead("me").epoch
    assert fleet.decree("me", epoch, {"a": desired("a", epoch)}, {}, {"a": 1})
    fleet.wish_drain("b")
    fleet.wish_scale("p/s", 2)
    view = fleet.view()
    assert (view.leader, view.hosts, view.reasons, view.wishes.drain) == ("me", (REPORT,), {"a": 1}, {"b"})
    fleet.beat(REPORT, leave=True)
    assert fleet.lead("me", 0).holder == ""
