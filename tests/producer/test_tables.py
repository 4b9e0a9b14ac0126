"""Tables as jobs, results of several rows, and what map does with errors, through the synchronous client."""

from __future__ import annotations

import copy
import pickle
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import PrivateServer, Workers, wait_until
from tests.producer.conftest import write_pipeline
from torchrelay import Relay
from torchrelay.errors import InputError, JobCancelled, JobError, JobFailed, RunConflict

CODE = """
    import numpy as np

    from torchrelay import Expand, Stage


    class Words(Stage):
        def forward(self, batch):
            for i, text in enumerate(batch["text"]):
                if text.startswith("bad"):
                    batch.reject(i, f"{text} is bad")
            counts = [len(t.split()) for t in batch["text"]]
            return Expand({"word": [w for t in batch["text"] for w in t.split()]}, counts)


    class Length(Stage):
        def forward(self, batch):
            if "boom" in batch["word"]:
                raise ValueError("boom")
            return {"length": np.array([len(w) for w in batch["word"]], "int64")}
"""
YAML = """
    pipeline: words
    input: {text: str}
    output: [text, word, length]
    limits: {rows_per_job: 2000}
    stages:
      - {name: words, use: "stages.py:Words", outputs: {word: str}, rows: expand}
      - {name: length, use: "stages.py:Length", inputs: [word], outputs: {length: int64}, retry: {attempts: 1}}
"""


def row(n: object = "a", do: str = "") -> dict[str, Any]:
    return {"n": str(n), "do": do}


@pytest.fixture(scope="module")
def words(server: PrivateServer, tmp_path_factory: pytest.TempPathFactory, served: str) -> Iterator[str]:
    """The namespace of `served`, in which workers serve `words` too."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "stages.py").write_text(textwrap.dedent(CODE))
    (folder / "words.yaml").write_text(textwrap.dedent(YAML))
    workers = Workers(server.url, served)
    workers.start(folder / "words.yaml")
    yield served
    workers.stop()


def test_a_table_comes_back_as_a_table(near: Relay) -> None:
    """Arrays stay arrays, lists lists; each result row is of the row in its place."""
    xs = [np.arange(i, dtype="float32") for i in range(300)]
    future = near.submit_table("echo", {"n": [str(i) for i in range(300)], "x": xs})
    table = future.result(20)
    assert table["out"] == [f"{i}!" for i in range(300)]
    assert [len(x) for x in table["x"]] == list(range(300))
    assert future.errors == {}
    assert future.source_rows.tolist() == list(range(300))


def test_a_table_of_no_rows_is_a_job_too(words: str, near: Relay) -> None:
    """No stage is called; columns that stages declare are empty, in their types."""
    future = near.submit_table("words", {"text": []})
    table = future.result(10)
    assert (table["text"], table["word"], table["length"].dtype) == ([], [], np.dtype("int64"))
    assert future.source_rows.tolist() == list(table["length"]) == []


def test_one_row_of_a_table_fails_it_all_or_is_kept_apart(near: Relay) -> None:
    """on_error="raise" is a JobFailed; "keep" returns the others, and `errors` by the submitted row."""
    table = {"n": ["a", "b", "c"], "do": ["", "raise kaputt", ""]}
    failed = near.submit_table("one", table)
    with pytest.raises(JobFailed, match="kaputt"):
        failed.result(20)
    with pytest.raises(JobFailed, match="kaputt"):
        _ = failed.errors
    kept = near.submit_table("one", table, on_error="keep")
    assert list(kept.errors) == [1]
    error = kept.errors[1]
    assert isinstance(error, JobFailed)
    assert (error.job_id, error.stage, error.error_type, error.message) == (kept.id, "echo", "ValueError", "kaputt")
    assert kept.result()["out"] == ["a!", "c!"]
    assert kept.source_rows.tolist() == [0, 2]


def test_another_process_gets_the_same_table_by_its_id(near: Relay, server_url: str, served: str) -> None:
    """The record says that it is a table; its failed rows come along."""
    table = {"n": ["a", "b", "c"], "do": ["", "raise kaputt", ""]}
    mine = near.submit_table("one", table, on_error="keep", keep_s=60)
    with Relay(server_url, namespace=served) as other:
        theirs = other.job(mine.id)
        assert theirs.result(20)["out"] == mine.result(20)["out"] == ["a!", "c!"]
        assert list(theirs.errors) == [1]
        assert theirs.source_rows.tolist() == [0, 2]


def test_rows_that_an_expansion_made_come_with_their_source(words: str, near: Relay) -> None:
    """A table's result has one row for each; a single row's columns come as lists. Rejected rows are kept apart."""
    future = near.submit_table("words", {"text": ["one two", "bad", "", "three"]}, on_error="keep")
    assert future.result(20)["word"] == ["one", "two", "three"]
    assert future.result()["text"] == ["one two", "one two", "three"]
    assert future.result()["length"].tolist() == [3, 3, 5]
    assert future.source_rows.tolist() == [0, 0, 3]
    assert {i: e.error_type for i, e in future.errors.items()} == {1: "Rejected"}
    assert "bad is bad" in str(future.errors[1])
    single = near.infer("words", {"text": "one two"})
    assert (single["text"], list(single["word"]), list(single["length"])) == ("one two", ["one", "two"], [3, 3])
    with pytest.raises(JobFailed, match="bad is bad") as raised:
        near.infer("words", {"text": "bad"})
    assert (raised.value.error_type, raised.value.attempts) == ("Rejected", 1)


def test_large_tables_travel_as_blobs_and_leave_none(near: Relay) -> None:
    """Several MiB, bit for bit."""
    xs = [np.random.default_rng(i).random(50_000, dtype="float32") for i in range(20)]
    future = near.submit_table("echo", {"n": ["a"] * 20, "x": xs})
    for sent, came in zip(xs, future.result(30)["x"], strict=True):
        np.testing.assert_array_equal(sent, came)
    client, tag = near.registry.client, near.registry.lanes[0].keys.tag
    wait_until(lambda: not list(client.scan_iter(f"{tag.replace('{', '[{]')}blob:*", 1000)), 5.0)


BAD_TABLES: list[tuple[Any, str]] = [
    ({}, "column 'n' is missing"),
    ({"n": "abc"}, "an array or a list of one value per row"),
    ({"n": ["a", "b"], "do": ["x"]}, "has 1 rows"),
    ({"n": ["a", 5]}, "row 1"),
    ({"n": ["a"], "m": [1]}, "no column 'm'"),
    ([("n", ["a"])], "a table is a mapping"),
    ({"n": ["a"], "x": [[[1.0]]]}, "column 'x'"),
    (None, "a table is a mapping"),
]


@pytest.mark.parametrize(("table", "match"), BAD_TABLES, ids=lambda v: repr(v)[:30])
def test_a_table_that_does_not_fit_is_refused_before_anything_is_sent(near: Relay, table: Any, match: str) -> None:
    loads = near.registry.loads()
    with pytest.raises(InputError, match=match):
        near.submit_table("idle", table)
    assert near.registry.loads() == loads


def test_a_table_has_a_limit_of_rows_that_the_pipeline_sets(words: str, near: Relay) -> None:
    """The error names both numbers."""
    assert len(near.submit_table("words", {"text": ["x"] * 2000}).result(20)["word"]) == 2000
    with pytest.raises(InputError, match=r"2001 rows.*rows_per_job of 2000"):
        near.submit_table("words", {"text": ["x"] * 2001})
    with pytest.raises(InputError, match="on_error 'return'"):
        near.submit_table("words", {"text": []}, on_error="return")  # type: ignore[arg-type]


def test_a_key_stands_for_one_table_or_row_not_both(near: Relay) -> None:
    """The same table again is the same job; the same content as a row, or with errors kept, is a conflict."""
    first = near.submit_table("echo", {"n": ["a"]}, key="table-1")
    assert near.submit_table("echo", {"n": ["a"]}, key="table-1").id == first.id
    for act in (
        lambda: near.submit("echo", {"n": "a"}, key="table-1"),
        lambda: near.submit_table("echo", {"n": ["a"]}, key="table-1", on_error="keep"),
        lambda: near.submit_table("echo", {"n": ["b"]}, key="table-1"),
    ):
        with pytest.raises(RunConflict, match="table-1"):
            act()


def test_map_can_yield_errors_in_their_places(near: Relay) -> None:
    """The others' results come all the same."""
    rows = [row(i, "raise kaputt" if i % 3 == 0 else "") for i in range(12)]
    got = list(near.map("one", rows, in_flight=8, on_error="return"))
    for i, value in enumerate(got):
        if i % 3 == 0:
            assert isinstance(value, JobFailed)
            assert value.message == "kaputt"
        else:
            assert not isinstance(value, JobError)
            assert value["out"] == f"{i}!"
    with pytest.raises(InputError, match="on_error"):
        near.map("one", [], on_error="keep")  # type: ignore[call-overload]


def test_unordered_map_gives_results_as_they_come(relay: Relay, workers: Workers, tmp_path: Path) -> None:
    """The first row's job ends only when the gate opens, which is after all others' results came."""
    workers.start(write_pipeline(tmp_path, "patient", 1, attempts=100))
    gate = tmp_path / "gate"
    got: list[str] = []
    rows = [row("slow", f"later {gate}"), *map(row, range(40))]
    for result in relay.map("patient", rows, in_flight=8, ordered=False):
        got.append(result["out"])
        if len(got) == 40:
            gate.touch()
    assert got[-1] == "slow!"
    assert sorted(got[:-1]) == sorted(f"{i}!" for i in range(40))


def test_futures_are_sent_by_their_id(near: Relay) -> None:
    """Pickling or copying one says so."""
    future = near.submit("echo", row())
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InputError, match=rf"relay\.job\('{future.id}'\)"):
            act(future)
    future.result(10)


def test_an_unknown_option_is_refused_with_the_nearest_name(near: Relay) -> None:
    with pytest.raises(InputError, match="did you mean 'priority'"):
        near.submit("echo", row(), prority="high")  # type: ignore[call-arg]


def test_giving_up_on_a_job_that_was_there_leaves_it_alone(near: Relay) -> None:
    """infer with a key that another submitted before cancels nothing at its deadline."""
    first = near.submit("idle", row("a"), key="shared")
    with pytest.raises(TimeoutError):
        near.infer("idle", row("a"), key="shared", deadline_s=0.05)
    assert first.status() == "waiting"
    assert first.cancel()
    with pytest.raises(JobCancelled):
        first.result(5)


def test_a_large_batch_that_waits_for_room_goes_in_once(server_url: str, namespace: str, tmp_path: Path) -> None:
    """Several calls' worth of bytes meet a full queue: every job goes in, none twice."""
    path = write_pipeline(tmp_path)
    path.write_text(path.read_text().replace("batch: {", "queue: {max_rows: 100}, batch: {"))
    with Relay(server_url, namespace=namespace) as relay:
        ref = relay.register(path)
        workers = Workers(server_url, namespace)
        workers.start(path)
        try:
            rows = [{"n": f"{i:03}" + "x" * 3900} for i in range(600)]
            futures = relay.submit_many("echo", rows, wait_s=30)
            assert [f.result(20)["out"][:3] for f in futures] == [f"{i:03}" for i in range(600)]
        finally:
            workers.stop()
        assert relay.registry.loads()[f"{ref}/echo.committed"] == 600
