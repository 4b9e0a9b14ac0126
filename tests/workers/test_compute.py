"""Which rows and jobs a failing forward is charged to. Real runners; nothing of Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.columns import Column
from torchrelay.config.spec import BatchSpec
from torchrelay.errors import RetryLater
from torchrelay.queues.job import Payload
from torchrelay.queues.levels import Levels
from torchrelay.stages import Batch, Expand, Runner, Stage
from torchrelay.workers.batching import Planner
from torchrelay.workers.compute import Failed, GivenUp, compute
from torchrelay.workers.work import Incoming, Output, Work


class Watch:
    """Notes every forward: (jobs, rows). After `stop_after` of them nobody waits any more."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.forwards: list[tuple[int, int]] = []
        self.stop_after = stop_after

    def started(self, works: Sequence[Work[int]]) -> None:
        self.forwards.append((len(works), 0))

    def stopped(self, rows: int) -> None:
        self.forwards[-1] = (self.forwards[-1][0], rows)

    def ended(self, works: Sequence[Work[int]]) -> list[bool]:
        return [w.job == 1 for w in works]

    def goes_on(self, works: Sequence[Work[int]]) -> bool:
        return self.stop_after is None or len(self.forwards) < self.stop_after


class Act(Stage):
    """Doubles x, but does as told where `do` says so."""

    def __init__(self, act: Callable[[Batch], Any] | None = None) -> None:
        self.buffer = np.zeros(1000, np.int64)
        self.act = act

    def forward(self, batch: Batch) -> Any:
        for i, order in enumerate(batch["do"]):
            if order == "raise":
                raise ValueError("told to raise")
            if order == "reject":
                batch.reject(i, "told to reject")
            if order == "later":
                raise RetryLater(7)
        if self.act is not None:
            return self.act(batch)
        # A stage may answer from a buffer that it uses again.
        out = self.buffer[: len(batch)]
        out[:] = batch["x"] * 2
        return {"y": out}


def job(number: int, orders: list[str], *, keep: bool = False, last: bool = False) -> Work[int]:
    table: dict[str, Column] = {"x": np.arange(len(orders)) + 100 * number, "do": list(orders)}
    incoming = Incoming(number, [], len(orders), keep, last)
    return Work(incoming, table, len(orders), len(orders), Payload({}), {}, Levels({}))


def results(
    works: Sequence[Work[int]],
    stage: Stage | None = None,
    max_rows: int = 100,
    stop_after: int | None = None,
    **runner: Any,
) -> tuple[dict[int, Any], Watch]:
    watch = Watch(stop_after)
    done: dict[int, Any] = {}
    planner: Planner[int] = Planner(BatchSpec(max_rows=max_rows))
    for group in compute(works, Runner(stage or Act(), "act", **runner), planner, watch):
        for work, outcome in group:
            assert work.job not in done
            if isinstance(outcome, Output):
                columns: Mapping[str, Any] = outcome.columns
                outcome = outcome._replace(columns={n: np.asarray(c).tolist() for n, c in columns.items()})
            done[work.job] = outcome
    return done, watch


orders = st.lists(st.sampled_from(["", "", "", "", "raise", "reject"]), max_size=12)


@given(st.lists(st.tuples(orders, st.booleans(), st.booleans()), min_size=1, max_size=5), st.integers(1, 8))
def test_every_row_ends_as_its_order_says(jobs: list[tuple[list[str], bool, bool]], max_rows: int) -> None:
    """Whatever stands beside it in the batch: good rows are computed, bad ones charged to their own job or row."""
    works = [job(n, do, keep=keep, last=last) for n, (do, keep, last) in enumerate(jobs)]
    done, _ = results(works, max_rows=max_rows)
    for n, (do, keep, last) in enumerate(jobs):
        outcome = done[n]
        good = [2 * (i + 100 * n) for i, order in enumerate(do) if not order]
        if not keep:
            if "raise" in do:
                assert isinstance(outcome, Failed)
                # A refusal that comes before the row that raises, in an earlier forward, is not yet known.
                assert outcome.final is False
            elif "reject" in do:
                assert outcome == Failed(None, True, None, "Rejected", outcome.message)
                assert outcome.message.endswith("told to reject")
            else:
                assert outcome.columns.get("y", []) == good
            continue
        if do and set(do) == {"raise"} and not last:
            assert isinstance(outcome, Failed)
            assert isinstance(outcome.error, ValueError)
            continue
        if isinstance(outcome, Failed):
            # The stage was given up before a row passed: that takes eight rows that raise.
            assert not last
            assert do.count("raise") >= 8
            continue
        kinds = {"ValueError": "raise", "Rejected": "reject"}
        assert {i: kinds[r.error_type] for i, r in outcome.rejected.items()} == {
            i: order for i, order in enumerate(do) if order
        }
        if good or do:
            assert outcome.columns.get("y", []) == good


def test_a_large_job_runs_in_slices_and_leaves_as_one() -> None:
    """No forward is larger than a batch, and a buffer that the stage uses again harms no earlier slice."""
    done, watch = results([job(0, [""] * 10)], max_rows=4)
    assert watch.forwards == [(1, 4), (1, 4), (1, 2)]
    assert done[0].columns == {"y": [2 * i for i in range(10)]}


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_no_forward_begins_once_nobody_waits(stop_after: int) -> None:
    """A job in slices, one whose rows are halved, jobs of a batch that is halved: each is given up whole."""
    done, watch = results([job(0, [""] * 12)], max_rows=2, stop_after=stop_after)
    assert done == {0: GivenUp()}
    assert len(watch.forwards) == stop_after
    done, watch = results([job(0, [*[""] * 15, "raise"], keep=True)], stop_after=stop_after)
    assert done == {0: GivenUp()}
    assert len(watch.forwards) == stop_after
    works = [job(n, ["raise" if n == 7 else ""]) for n in range(8)]
    done, watch = results(works, stop_after=stop_after)
    assert len(watch.forwards) == stop_after
    assert done.keys() == set(range(8))
    assert done[7] == GivenUp()


def test_slices_of_an_expanding_stage_count_on() -> None:
    """Counts of all slices stand in the order of the rows, with none for those that were rejected."""

    def expand(batch: Batch) -> Expand:
        counts = [int(x) % 3 for x in batch["x"]]
        return Expand({"y": np.repeat(batch["x"], counts)}, counts)

    do = ["", "", "", "", "reject", "", "raise", ""]
    done, _ = results([job(0, do, keep=True)], Act(expand), max_rows=3, expands=True)
    assert done[0].counts.tolist() == [0, 1, 2, 0, 0, 2, 0, 1]
    assert done[0].columns == {"y": [1, 2, 2, 5, 5, 7]}
    assert {i: r.attempts for i, r in done[0].rejected.items()} == {4: 1, 6: 1}


def test_rows_that_all_raise_are_the_stage_s_fault_until_the_last_attempt() -> None:
    """The job fails as a whole after eight of them; on its last attempt every row gets its error."""
    done, watch = results([job(0, ["raise"] * 64, keep=True)])
    assert isinstance(done[0], Failed)
    assert not done[0].final
    assert len(watch.forwards) < 32
    done, _ = results([job(0, ["raise"] * 64, keep=True, last=True)], expands=True)
    assert sorted(done[0].rejected) == list(range(64))
    assert done[0].counts.tolist() == [0] * 64


def test_batches_of_a_window_are_given_up_when_the_worker_is_to_end() -> None:
    """What was claimed beside the batch under way goes back unharmed."""
    done, watch = results([job(0, [""]), job(1, ["", ""]), job(2, [""])], max_rows=2, stop_after=2)
    assert [type(done[n]) for n in range(3)] == [Output, Output, GivenUp]
    assert watch.forwards == [(1, 1), (1, 2)]


def test_retry_later_puts_the_whole_batch_off_without_halving() -> None:
    """Something is away: no job of the batch is examined for it."""
    done, watch = results([job(0, ["", ""]), job(1, ["later"]), job(2, [""])])
    assert {n: (f.after_s, f.final) for n, f in done.items()} == dict.fromkeys(range(3), (7.0, False))
    assert watch.forwards == [(3, 4)]


def test_a_stage_may_ask_which_jobs_have_ended() -> None:
    """`batch.cancelled` has one truth value per row."""
    done, _ = results([job(0, ["", ""]), job(1, [""] * 3)], Act(lambda batch: {"y": batch.cancelled}))
    assert done[1].columns == {"y": [True] * 3}
    assert done[0].columns == {"y": [False] * 2}


@pytest.mark.parametrize("row", [-1, 2, 10**9, 0.7, True, "1", None, np.True_, np.array([True, False])])
def test_rejecting_a_row_that_is_not_there_fails_the_forward(row: Any) -> None:
    """A wrong number, or what is none, must not reject another row."""
    done, _ = results([job(0, ["", ""])], Act(lambda batch: batch.reject(row, "no")))
    assert "the batch has rows 0 to 1" in str(done[0].error)


def test_a_row_may_be_rejected_by_a_number_of_numpy() -> None:
    """Numbers often come from argwhere."""
    done, _ = results([job(0, ["", ""], keep=True)], Act(lambda b: [b.reject(np.uint8(1), "no"), {"y": b["x"]}][1]))
    assert list(done[0].rejected) == [1]


def test_a_rejection_after_its_forward_changes_nothing() -> None:
    """A stage that keeps its batches must not take rows out of what it returned before."""
    earlier: list[Batch] = []

    def act(batch: Batch) -> dict[str, Any]:
        for old in earlier:
            old.reject(0, "too late")
        earlier.append(batch)
        batch.reject(1, "in time")
        return {"y": batch["x"]}

    done, _ = results([job(0, [""] * 4, keep=True)], Act(act), max_rows=2)
    assert {i: r.message for i, r in done[0].rejected.items()} == {1: "in time", 3: "in time"}
    assert done[0].columns == {"y": [0, 2]}


def test_lists_that_a_stage_changes_in_place_are_whole_again_when_its_rows_are_halved() -> None:
    """What a failed forward did to its batch must not be seen by the next."""

    def act(batch: Batch) -> dict[str, Any]:
        words = batch["do"]
        for i, word in enumerate(words):
            words[i] = word + "!"
            if word == "bad":
                raise ValueError
        return {"y": words}

    done, _ = results([job(0, ["a", "b", "c", "bad"], keep=True), job(1, ["d"])], Act(act))
    assert done[0].columns == {"y": ["a!", "b!", "c!"]}
    assert done[1].columns == {"y": ["d!"]}


def test_forwards_of_one_job_that_return_different_columns_fail_it() -> None:
    """Which of them the result should have nobody can say; nothing is left out without a word."""
    for odd in (0, 2):
        stage = Act(lambda batch, odd=odd: {"y": batch["x"]} | ({"z": batch["x"]} if odd in batch["x"] else {}))
        done, _ = results([job(0, [""] * 4)], stage, max_rows=2)
        assert isinstance(done[0], Failed)
        assert "the stage returned y" in str(done[0].error)
        assert "return the same columns each time" in str(done[0].error)


@pytest.mark.parametrize("keep", [True, False])
def test_an_error_without_words_is_told_by_its_type(keep: bool) -> None:
    """An exception whose text cannot be made is charged like any other."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def act(batch: Batch) -> None:
        raise Mute

    done, _ = results([job(0, [""], keep=keep, last=True)], Act(act))
    if keep:
        assert done[0].rejected[0] == ("Mute", "(its text cannot be made: RuntimeError)", 1, "act")
    else:
        assert isinstance(done[0].error, Mute)


@pytest.mark.parametrize("do", ["", "reject"])
def test_a_column_may_be_any_sequence_whether_rows_are_rejected_or_not(do: str) -> None:
    """A stage must not fail only on the batches in which it rejects."""
    values = {"r": range(4), "v": {n: n for n in range(4)}.values(), "t": (0, 1, 2, 3)}
    done, _ = results([job(0, ["", do, "", ""], keep=True)], Act(lambda batch: values))
    expected = [0, 2, 3] if do else [0, 1, 2, 3]
    assert done[0].columns == dict.fromkeys("rvt", expected)


@pytest.mark.parametrize("rows", [4, 2])
def test_masked_arrays_are_refused_before_their_masks_are_lost(rows: int) -> None:
    """Joining slices would drop the mask, and show what it hid."""
    done, _ = results([job(0, [""] * rows)], Act(lambda b: {"y": np.ma.masked_array(b["x"], b["x"] > 0)}), max_rows=2)
    assert "masks are not carried" in str(done[0].error)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Expand({"y": [1]}, [1]), "one whole number from 0 for each of the 2 rows"),
        (Expand({"y": [1, 2]}, [3, -1]), "one whole number"),
        (Expand({"y": [1, 2]}, [1.0, 1.0]), "one whole number"),
        (Expand({"y": []}, [2**63, 2**63]), "one whole number"),
        (Expand({"y": []}, [2**62] * 2), "one whole number"),
        (Expand({"y": [1, 2]}, np.array([True, True])), "one whole number"),
        (Expand({"y": [1, 2, 3]}, [1, 1]), "needs 2 rows"),
        ({"y": [1, 2]}, "return Expand"),
        (Expand([1, 2], [1, 1]), "mapping of column"),  # type: ignore[arg-type]  # what a user may do
    ],
)
def test_what_an_expanding_stage_returns_wrongly_is_named(given: Any, says: str) -> None:
    """Counts and rows that do not fit each other are the stage's failure, in words."""
    done, _ = results([job(0, ["", ""])], Act(lambda batch: given), expands=True)
    assert says in str(done[0].error)


def test_expand_from_a_stage_that_is_not_declared_to_is_refused() -> None:
    """The message says what to declare."""
    done, _ = results([job(0, [""])], Act(lambda batch: Expand({"y": [1]}, [1])))
    assert "declare `rows: expand`" in str(done[0].error)
