"""The driver's loop over a client that does what the test says: what is sent again, what is given up, when it stops."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from torchrelay.config.run_graph import CHUNK, RESULT
from torchrelay.config.run_task import RunTask
from torchrelay.config.runs import Chunk, ReadOptions, WriteOptions
from torchrelay.errors import BrokerUnavailable, JobCancelled, JobError, JobFailed, QueueFull, TorchrelayError
from torchrelay.producer.futures import JobFuture
from torchrelay.producer.runs import driver as driving
from torchrelay.producer.runs.driver import Driver
from torchrelay.producer.runs.options import RunOptions
from torchrelay.producer.runs.works import Work

Answer = JobError | TorchrelayError | int | None
"""What becomes of a job: rows that it wrote, an error, a refusal, or None for one that never ends."""


class Future(JobFuture[Any]):
    """Ended from the start, but for one that never ends."""

    def __init__(self, job_id: str, answer: Answer) -> None:
        super().__init__(SimpleNamespace(), job_id, "p@v+run")  # type: ignore[arg-type]  # it asks nobody
        self.answer = answer

    def done(self) -> bool:
        return self.answer is not None

    def exception(self, timeout: float | None = None) -> JobError | None:
        return self.answer if isinstance(self.answer, JobError) else None

    def result(self, timeout: float | None = None) -> Any:
        return {RESULT: [{"name": f"part-{self.id}", "rows": self.answer, "failed": 1}]}


class Client:
    """Stands for the client's core and its encoder: `answers(chunk, how often it was sent)`."""

    def __init__(self, answers: Callable[[int, int], Answer]) -> None:
        self.answers = answers
        self.sent: Counter[int] = Counter()
        self.keys: list[str] = []
        self.most_under_way = self.under_way = 0
        self.cancelled: list[str] = []
        self.settled = threading.Condition()
        self.closed, self.opened = False, True
        self.registry = SimpleNamespace(workers=list, loads=dict)
        self.joined: set[int] = set()

    def encoder(self, ref: str) -> Client:
        return self

    def table(self, columns: dict[str, Any], on_error: str, key: str) -> int:
        assert on_error == "keep"
        self.keys.append(key)
        return RunTask.decode(columns[CHUNK][0]).chunk.number

    def send_each(self, encoder: Any, drafts: list[int], options: Any) -> list[Any]:
        out: list[Any] = []
        for chunk in drafts:
            self.sent[chunk] += 1
            answer = self.answers(chunk, self.sent[chunk])
            if isinstance(answer, TorchrelayError) and not isinstance(answer, JobError):
                out.append(answer)
                continue
            future = Future(f"{chunk}.{self.sent[chunk]}", answer)
            future.joined = chunk in self.joined and self.sent[chunk] == 1
            out.append(future)
        return out

    def cancel(self, ids: list[str]) -> None:
        self.cancelled += ids


class Folder:
    def __init__(self) -> None:
        self.committed: dict[int, str] = {}
        self.output = SimpleNamespace()

    def commit(self, chunk: int, name: str, round_: int) -> None:
        assert chunk not in self.committed
        self.committed[chunk] = name

    def part(self, chunk: int, round_: int) -> int:
        return chunk

    def renew(self) -> None: ...


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Driver, Client, Folder]]:
    dropped: list[str] = []
    monkeypatch.setattr(driving, "drop", lambda registry, ids: dropped.extend(ids))
    monkeypatch.setattr(driving, "find", lambda output, part: None)

    def make(answers: Callable[[int, int], Answer], chunks: int = 10, **options: Any) -> tuple[Driver, Client, Folder]:
        def works() -> Iterator[Work]:
            for number in range(chunks):
                chunk = Chunk(number, 0, "/d.parquet", "parquet", 10 * number, 10 * number + 10, "rows", 10 * number)
                yield Work(RunTask("r", chunk, ReadOptions(), WriteOptions("/out")))

        client, folder = Client(answers), Folder()
        twin: Any = SimpleNamespace(ref="p@v+run", base=SimpleNamespace(ref="p@v"), graph=SimpleNamespace(nodes=()))
        made = Driver(client, twin, folder, works(), RunOptions.parse("/out", options))  # type: ignore[arg-type]
        return made, client, folder

    return make


def test_a_chunk_that_failed_in_a_session_before_is_tried_anew(drive: Any) -> None:
    """Its failed job is still known then; what was in its way may be gone."""
    died = JobFailed("it died", job_id="old", error_type="WorkerDied")
    made, client, folder = drive(lambda chunk, times: died if (chunk, times) == (2, 1) else 9, chunks=4)
    client.joined = {2}
    assert made.run() == "done"
    assert (client.sent[2], len(folder.committed), made.failures) == (2, 4, [])
    assert len(set(client.keys)) == 5


def test_rows_in_memory_are_few_at_a_time(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are bounded by bytes, not only by chunks, both in this process and at the server."""
    made, client, _ = drive(lambda chunk, times: None if chunk < 3 else 9, in_flight=8)
    works = made._works
    drawn: list[int] = []

    def large() -> Iterator[Work]:
        for work in works:
            drawn.append(work.place[0])
            yield work._replace(rows=bytes(50))

    made._works = large()
    monkeypatch.setattr(driving, "_PART_BYTES", 100)
    monkeypatch.setattr(driving, "_MOST_BYTES", 120)
    sizes: list[int] = []
    client.settled.wait_for = lambda over, timeout: (sizes.append(len(made._flights)), made.cancel())  # type: ignore[method-assign]
    assert made.run() == "cancelled"
    assert (sizes, drawn) == ([4], [0, 1, 2, 3])


def failed(kind: str) -> JobFailed:
    return JobFailed("why", job_id="j", stage="s", attempts=3, error_type=kind)


def test_every_chunk_is_sent_once_and_counted(drive: Any) -> None:
    made, client, folder = drive(lambda chunk, times: 9)
    assert made.run() == "done"
    assert set(client.sent.values()) == {1}
    assert len(set(client.keys)) == len(folder.committed) == 10
    assert (made.rows, made.failed_rows, made.progress().chunks_done) == (90, 10, 10)


def test_what_found_no_room_is_sent_again(drive: Any) -> None:
    """Any of those that were sent together, not only the last ones."""
    made, client, folder = drive(lambda chunk, times: QueueFull("full") if chunk % 2 and times < 3 else 10)
    assert made.run() == "done"
    assert sorted(folder.committed) == list(range(10))
    assert {client.sent[1], client.sent[2]} == {3, 1}
    assert folder.committed[3] == "part-3.3"


def test_a_server_that_is_away_ends_it(drive: Any) -> None:
    made, _, _ = drive(lambda chunk, times: BrokerUnavailable("gone") if chunk == 5 else 10)
    with pytest.raises(BrokerUnavailable):
        made.run()
    assert made.status == "cancelled"


@pytest.mark.parametrize("error", [failed("BytesLost"), JobCancelled("cancelled")])
def test_what_is_not_the_chunks_fault_is_tried_again_under_another_key(drive: Any, error: JobError) -> None:
    """Three times, then it is given up."""
    made, client, folder = drive(lambda chunk, times: error if chunk == 4 and times < 3 else 10)
    assert made.run() == "done"
    assert (client.sent[4], len(set(client.keys)), len(folder.committed)) == (3, 12, 10)
    made, client, _ = drive(lambda chunk, times: error if chunk == 4 else 10)
    assert made.run() == "failed"
    assert client.sent[4] == 3
    assert [(f.chunk, f.rows) for f in made.failures] == [(4, 10)]


def test_what_a_stage_refuses_is_not_tried_again(drive: Any) -> None:
    made, client, folder = drive(lambda chunk, times: failed("ValueError") if chunk == 4 else 10)
    assert made.run() == "failed"
    (failure,) = made.failures
    assert (failure.chunk, failure.stage, failure.error, failure.text, failure.attempts) == (
        4,
        "s",
        "ValueError",
        "why",
        3,
    )
    assert (client.sent[4], len(folder.committed)) == (1, 9)


def test_a_stage_that_kills_whatever_it_gets_is_not_searched_for_rows_without_end(drive: Any) -> None:
    """Of the first chunk a few halves are tried; no other chunk is searched, and all of them fail."""
    made, client, folder = drive(lambda chunk, times: failed("WorkerDied"), chunks=20, in_flight=1)
    assert made.run() == "failed"
    assert (len(made.failures), folder.committed) == (20, {})
    assert sum(client.sent.values()) <= 20 + 16


def test_a_job_that_was_there_before_and_whose_part_is_gone_is_sent_anew(drive: Any) -> None:
    made, client, folder = drive(lambda chunk, times: 10)
    client.joined = {2}
    assert made.run() == "done"
    assert (client.sent[2], folder.committed[2]) == (2, "part-2.2")


def test_too_many_errors_call_off_what_is_under_way(drive: Any) -> None:
    made, client, _ = drive(lambda chunk, times: None if chunk == 3 else 9, max_errors=2, in_flight=4)
    assert made.run() == "stopped"
    assert client.cancelled == ["3.1"]
    assert max(client.sent) == 3


def test_no_more_than_asked_for_are_under_way_and_cancel_ends_it(drive: Any) -> None:
    made, client, folder = drive(lambda chunk, times: None, in_flight=3)
    thread = threading.Thread(target=made.run)
    thread.start()
    while len(client.sent) < 3:
        pass
    made.cancel()
    thread.join(5)
    assert (made.status, sorted(client.cancelled), folder.committed) == ("cancelled", ["0.1", "1.1", "2.1"], {})
    assert len(client.sent) == 3
