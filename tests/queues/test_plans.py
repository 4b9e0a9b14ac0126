"""Kept split plans: the first one counts, one worker makes it, and a dead maker holds nobody up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import redis

from tests.conftest import private_server, wait_until
from torchrelay.errors import BrokerUnavailable, DecodeError, StageLoadError
from torchrelay.queues import plans
from torchrelay.queues.keys import ControlKeys
from torchrelay.queues.plans import KeptPlans, SplitPlace

PLACE = SplitPlace("embed@00000001", "encode", 2, "time")


@pytest.fixture
def control(namespace: str) -> ControlKeys:
    return ControlKeys(namespace)


@pytest.fixture
def kept(redis_client: redis.Redis, control: ControlKeys) -> KeptPlans:
    return KeptPlans(redis_client, control)


@pytest.fixture
def full_server() -> Iterator[KeptPlans]:
    """On a server that has no room for anything."""
    with private_server("--maxmemory", "1mb") as server:
        client = redis.Redis.from_url(server.url)
        yield KeptPlans(client, ControlKeys("full"))
        client.close()


def test_the_first_plan_is_kept_and_given_to_all(kept: KeptPlans) -> None:
    """A second writer gets the first one's plan, and other counts and versions have plans of their own."""
    assert kept.find(PLACE) is None
    assert kept.keep(PLACE, "one") == "one"
    assert kept.keep(PLACE, "another") == "one"
    assert kept.find(PLACE) == "one"
    other = SplitPlace(PLACE.ref, PLACE.stage, 4, "time")
    assert kept.find(other) is None
    assert kept.keep(other, "four") == "four"
    kept.drop(PLACE.ref)
    assert kept.find(PLACE) is None
    assert kept.find(other) is None


def test_one_makes_it_while_the_others_wait(kept: KeptPlans, caplog: pytest.LogCaptureFixture) -> None:
    """Four workers that ask at the same time make one plan, and those that wait say for whom."""
    caplog.set_level("INFO", "torchrelay.worker")
    making, go_on, made = threading.Event(), threading.Event(), []

    def make() -> str:
        made.append(threading.current_thread().name)
        making.set()
        assert go_on.wait(10)
        return "the plan"

    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(kept.agree(PLACE, make, f"worker-{n}")), name=f"{n}")
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    assert making.wait(10)
    wait_until(lambda: sum("waiting for its split plan" in r.message for r in caplog.records) == 3)
    assert f"which worker-{made[0]} makes" in caplog.text
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == ["the plan"] * 4
    assert len(made) == 1
    assert kept.agree(PLACE, lambda: pytest.fail("it is there"), "late") == "the plan"


def test_what_its_maker_raises_frees_the_others(kept: KeptPlans) -> None:
    """Each of those that wait then tries by itself, and the claim is gone."""

    def fail() -> str:
        raise StageLoadError("cannot be traced")

    for _ in range(2):
        with pytest.raises(StageLoadError, match="cannot be traced"):
            kept.agree(PLACE, fail, "worker")
    assert kept.agree(PLACE, lambda: "now", "worker") == "now"


def _hang(url: str, namespace: str) -> None:
    plans.CLAIM_MS = 1500

    def make() -> str:
        print("making", flush=True)
        threading.Event().wait()
        return ""

    KeptPlans(redis.Redis.from_url(url), ControlKeys(namespace)).agree(PLACE, make, "hung")


def test_a_maker_that_is_killed_is_replaced(kept: KeptPlans, control: ControlKeys, server_url: str) -> None:
    """kill -9 of the worker that makes the plan: its claim runs out, and another makes one."""
    child = multiprocessing.get_context("spawn").Process(target=_hang, args=(server_url, control.namespace))
    child.start()
    key = control.plan_maker(PLACE.ref, PLACE.field)
    wait_until(lambda: kept._client.exists(key))
    # It is renewed while the maker lives, longer than it would last.
    ended = threading.Event()
    answers: list[str] = []
    waiting = threading.Thread(target=lambda: (answers.append(kept.agree(PLACE, lambda: "mine", "next")), ended.set()))
    waiting.start()
    assert not ended.wait(2.5)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    waiting.join(15)
    assert answers == ["mine"]


def test_a_plan_that_is_too_long_is_refused(kept: KeptPlans) -> None:
    """What comes of a broken splitter does not fill the server."""
    with pytest.raises(StageLoadError, match="over the limit"):
        kept.keep(PLACE, "x" * (plans.MAX_PLAN_BYTES + 1))
    assert kept.find(PLACE) is None


def test_a_kept_plan_that_is_no_text_is_named(kept: KeptPlans, control: ControlKeys) -> None:
    """Somebody else's bytes under the key are an error that says which."""
    kept._client.hset(control.plans(PLACE.ref), PLACE.field, b"\xff\xfe")
    with pytest.raises(DecodeError, match=r"split plan of embed@00000001/encode is no text \(2 bytes, at offset 0\)"):
        kept.find(PLACE)


def test_a_full_server_is_told_as_such(full_server: KeptPlans) -> None:
    """A worker that cannot keep the plan comes again, as for any other want of the server."""
    with pytest.raises(BrokerUnavailable, match="no room on the server for the split plan of 'encode'"):
        full_server.keep(PLACE, "plan")
