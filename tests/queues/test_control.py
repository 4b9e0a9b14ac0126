"""Jobs of the control plane: any hash can be read as one, what is taken is not lost, and only entries are called."""

from __future__ import annotations

import json
import pickle
import random
import zlib
from typing import Any

import pytest
import redis
from rq.exceptions import NoSuchJobError

from torchrelay.errors import InputError
from torchrelay.queues import control
from torchrelay.queues.control import MOST_BYTES, ControlJob, ControlQueue

CALL = json.dumps(["entry", None, [], {"n": 1}]).encode()


@pytest.fixture
def queue(redis_client: redis.Redis, namespace: str) -> ControlQueue:
    return ControlQueue(f"{namespace}:runs-low", redis_client)


def job_of(queue: ControlQueue, data: bytes, **more: Any) -> ControlJob:
    job = ControlJob("a", connection=queue.connection)
    fields = {"data": data, "status": "queued", "origin": queue.name, **more}
    job.restore({k.encode(): v if isinstance(v, bytes) else str(v).encode() for k, v in fields.items()})
    job.entries = {"entry": lambda job, arguments: arguments["n"] + 1}
    return job


def test_a_job_calls_its_entry(queue: ControlQueue) -> None:
    """As RQ writes it, packed or not."""
    assert job_of(queue, CALL).perform() == 2
    assert job_of(queue, zlib.compress(CALL)).perform() == 2


def test_a_job_that_is_enqueued_is_taken_as_it_was(queue: ControlQueue) -> None:
    """With RQ's own means, in JSON; it lies aside until somebody registers that he has it."""
    made = queue.create_job(
        "entry", kwargs={"n": 4}, job_id=f"job-{queue.name[-20:].replace(':', '-').replace('.', '-')}"
    )
    queue.enqueue_job(made)
    raw = zlib.decompress(queue.connection.hget(made.key, "data"))
    assert json.loads(raw) == ["entry", None, [], {"n": 4}]
    taken = queue.take()
    assert taken is not None
    taken.entries = {"entry": lambda job, arguments: arguments["n"]}
    assert taken.perform() == 4
    assert queue.connection.lrange(queue.intermediate_queue_key, 0, -1) == [made.id.encode()]
    assert queue.take() is None
    assert queue.take(0.01) is None


def test_a_job_that_was_taken_and_forgotten_comes_back(queue: ControlQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before its taker had time to register it."""
    made = queue.create_job("entry", kwargs={})
    queue.enqueue_job(made)
    assert queue.take() is not None
    queue.return_stuck()
    assert queue.take() is None
    monkeypatch.setattr(control, "_STUCK_S", -1.0)
    queue.return_stuck()
    found = queue.take()
    assert found is not None
    assert found.id == made.id


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no call in JSON"),
        (b"null", "no call in JSON"),
        (pickle.dumps(("entry", None, (), {})), "no call in JSON"),
        (b"[" * 100_000, "no call in JSON"),
        (json.dumps(["os.system", None, [], {}]).encode(), "may be called"),
        (json.dumps([["entry"], None, [], {}]).encode(), "may be called"),
        (json.dumps(["entry", "os", [], {}]).encode(), "keyword arguments alone"),
        (json.dumps(["entry", None, [1], {}]).encode(), "keyword arguments alone"),
        (json.dumps(["entry", None, [], [1]]).encode(), "keyword arguments alone"),
        (zlib.compress(bytes(MOST_BYTES + 1)), "more than"),
    ],
)
def test_what_is_no_call_is_refused_with_its_reason(queue: ControlQueue, data: bytes, reason: str) -> None:
    job = job_of(queue, data)
    with pytest.raises(InputError, match=reason):
        job.perform()
    assert isinstance(job.func_name, str) or job.func_name == ["entry"]


def test_whatever_a_hash_names_is_neither_imported_nor_kept(queue: ControlQueue) -> None:
    """Callbacks, webhooks, dependencies, repetitions; a pickle as its meta."""
    names = {f"{when}_callback_name": "os.system" for when in ("success", "failure", "stopped")}
    webhooks = json.dumps([{"url": "http://127.0.0.1:1/", "job_status": "failed"}])
    meta = pickle.dumps({"a": 1})
    more: dict[str, Any] = {"webhooks": webhooks, "meta": meta, "dependency_ids": '["b"]', "repeats_left": 5}
    job = job_of(queue, CALL, **names, **more)
    assert (job.success_callback, job.failure_callback, job.stopped_callback) == (None, None, None)
    assert (job.webhooks, job.meta, job._dependency_ids, job.repeats_left) == ([], {}, [], None)
    assert job.perform() == 2


@pytest.mark.parametrize(
    "more",
    [
        {"status": "no-status"},
        {"retries_left": 10**9},
        {"retries_left": -1},
        {"retries_left": 1, "retry_intervals": "[]"},
        {"retries_left": 1, "retry_intervals": "5"},
        {"retries_left": 1, "retry_intervals": '["a"]'},
        {"timeout": "soon"},
        {"created_at": "yesterday"},
        {"description": b"\xff"},
    ],
)
def test_a_hash_with_other_values_is_refused_and_not_tried_again(queue: ControlQueue, more: dict[str, Any]) -> None:
    job = job_of(queue, CALL, **more)
    with pytest.raises(InputError, match="malformed"):
        job.perform()
    assert not job.should_retry


def test_no_hash_raises_when_it_is_read(queue: ControlQueue) -> None:
    """Random fields with random bytes: the job is fit to be executed or says why not."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    names = [b"data", b"status", b"origin", b"created_at", b"meta", b"timeout", b"ttl", b"retries_left", b"\xff", b"x"]
    for _ in range(500):
        fields = {n: rng.randbytes(rng.randrange(12)) for n in rng.sample(names, rng.randrange(len(names)))}
        job = ControlJob("a", connection=queue.connection)
        job.restore(fields)
        with pytest.raises(InputError):
            job.perform()


def test_what_is_no_job_is_dropped_from_a_queue(queue: ControlQueue) -> None:
    """Ids that are none, jobs that are not there or of another type; a queue that is no list stands still."""
    client = queue.connection
    client.set("rq:job:control-test-string", "no hash", ex=60)
    client.rpush(queue.key, b"\xff", b"a/b", b"x" * 500, b"not-there", b"control-test-string")
    for _ in range(5):
        assert queue.take() is None
    assert client.exists(queue.key, queue.intermediate_queue_key) == 0
    client.set(queue.key, "no list", ex=60)
    assert queue.take() is None


def test_a_job_that_is_too_long_is_not_even_fetched(queue: ControlQueue) -> None:
    client = queue.connection
    key = f"rq:job:long-{queue.name[-12:-9]}"
    client.hset(key, mapping={"data": b"1" * (MOST_BYTES + 1), "status": "queued"})
    client.expire(key, 60)
    job = ControlJob(key.removeprefix("rq:job:"), connection=client)
    job.refresh()
    with pytest.raises(InputError, match=f"at most {MOST_BYTES}"):
        job.perform()
    client.delete(key)
    with pytest.raises(NoSuchJobError):
        job.refresh()
