"""Jobs whose rows become more, fewer or none on their way: through real workers, kills and forks included."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Workers, wait_until
from tests.workers.support import assert_settled
from torchrelay import Relay
from torchrelay.errors import InputError, JobCancelled, JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry, run

MakePipeline = Callable[..., Path]

# Texts become words, words become letters; letters go back to words, words to texts.
TEXTS = """
    pipeline: texts
    input: {text: str, lang: str = en}
    output: [shouted, sizes, lang]
    stages:
      - {name: words, use: "stages.py:words", inputs: [text], outputs: {word: str, size: int64}, rows: expand}
      - {name: letters, use: "stages.py:letters", inputs: [word], outputs: {letter: str}, rows: expand}
      - name: shout
        use: stages.py:shout
        inputs: {letter: letter, lang: lang, whole: word}
        outputs: {loud: str}
        batch: {max_rows: 8}
        retry: {attempts: 2, backoff_s: [0, 0]}
      - {name: spell, rows: {collapse: letters}}
      - {name: glue, use: "stages.py:glue", inputs: [loud], outputs: {shouted: str}}
      - {name: regroup, use: "stages.py:regroup", inputs: [size], rows: {collapse: words}, outputs: {sizes: json}}
"""
TEXTS_CODE = """
    import os
    import time
    from pathlib import Path

    import numpy as np

    from torchrelay.stages import Expand


    def words(batch):
        parts = [text.split() for text in batch["text"]]
        for i, part in enumerate(parts):
            if "REJECT" in part:
                batch.reject(i, f"row {i} holds what is refused")
        found = [word for part in parts for word in part]
        return Expand({"word": found, "size": np.array([len(w) for w in found], np.int64)}, [len(p) for p in parts])


    def letters(batch):
        return Expand({"letter": [c for word in batch["word"] for c in word]}, [len(word) for word in batch["word"]])


    def shout(batch):
        assert len(batch) <= 8
        assert batch["lang"] == ["en"] * len(batch)
        gate = Path(__file__).parent / "gate"
        if "_" in batch["letter"]:
            with (Path(__file__).parent / "began").open("a") as file:
                file.write(f"{os.getpid()} ")
            while not gate.exists():
                time.sleep(0.005)
        if "!" in batch["letter"]:
            raise ValueError("not so loud")
        return {"loud": [c.upper() for c in batch["letter"]]}


    def glue(batch):
        return {"shouted": ["".join(group) for group in batch["loud"]]}


    def regroup(batch):
        return {"sizes": [sizes.tolist() for sizes in batch["size"]]}
"""


@pytest.fixture
def texts(make_pipeline: MakePipeline, relay: Relay, workers: Workers) -> Path:
    path = make_pipeline(TEXTS, TEXTS_CODE)
    relay.register(path)
    workers.start(path)
    return path


def test_rows_expand_twice_and_are_regrouped(texts: Path, relay: Relay, registry: Registry) -> None:
    """One row or a table, with texts of no words among them: each comes back with what was made of it, in order."""
    assert relay.infer("texts", {"text": "ab c"}, deadline_s=20) == {
        "lang": "en",
        "shouted": ["AB", "C"],
        "sizes": [2, 1],
    }
    assert list(relay.infer("texts", {"text": "a"}, deadline_s=20)) == ["shouted", "sizes", "lang"]  # as `output` lists
    assert relay.infer("texts", {"text": ""}, deadline_s=20) == {"lang": "en", "shouted": [], "sizes": []}
    lines = ["one two", "", "a b c d e f g h i j k l m", "   ", "end"]
    future = relay.submit_table("texts", {"text": lines}, deadline_s=20)
    table = future.result(20)
    assert table["shouted"] == [line.upper().split() for line in lines]
    assert table["sizes"] == [[len(w) for w in line.split()] for line in lines]
    assert future.source_rows.tolist() == [0, 1, 2, 3, 4]
    assert relay.submit_table("texts", {"text": []}, deadline_s=20).result(20)["shouted"] == []
    assert_settled(registry, dict.fromkeys(("words", "letters", "shout", "spell", "glue", "regroup"), 5))


def test_a_table_that_keeps_what_it_can_loses_only_the_rows_that_fail(
    texts: Path, relay: Relay, registry: Registry
) -> None:
    """Rejected by one stage, raised upon in another: both rows have their error, the rest its result, anywhere."""
    lines = ["fine", "a REJECT b", "good bad!", "zzzzzzzzzzzzzzzzzzzzzzz", "last"]
    future = relay.submit_table("texts", {"text": lines}, on_error="keep", deadline_s=20)
    assert future.result(20)["shouted"] == [["FINE"], ["Z" * 23], ["LAST"]]
    assert future.source_rows.tolist() == [0, 3, 4]
    first, second = future.errors[1], future.errors[2]
    assert (first.stage, first.error_type, first.message) == ("words", "Rejected", "row 1 holds what is refused")
    assert (second.stage, second.error_type, second.message) == ("shout", "ValueError", "not so loud")
    assert second.attempts == 1
    again = relay.submit_table("texts", {"text": lines}, on_error="keep", key="k", keep_s=60)
    again.result(20)
    elsewhere = relay.job(again.id)
    assert elsewhere.result(5)["shouted"] == [["FINE"], ["Z" * 23], ["LAST"]]
    assert sorted(elsewhere.errors) == [1, 2]
    assert list(dead.scan(registry)) == []


def test_every_row_may_fail_and_the_table_still_comes_back(texts: Path, relay: Relay) -> None:
    """No row passes, on no attempt: the result is empty and every row has its error."""
    future = relay.submit_table("texts", {"text": ["a!", "b!", "REJECT"]}, on_error="keep", deadline_s=20)
    assert future.result(20)["shouted"] == []
    assert {row: e.error_type for row, e in future.errors.items()} == {0: "ValueError", 1: "ValueError", 2: "Rejected"}


def test_a_rejected_row_fails_its_job_at_once_and_no_neighbour(texts: Path, relay: Relay, registry: Registry) -> None:
    """Without "keep" the job ends on its first attempt, with the reason; jobs beside it in the batch complete."""
    futures = relay.submit_many("texts", [{"text": "a"}, {"text": "REJECT"}, {"text": "b"}], deadline_s=20)
    assert [f.result(20)["shouted"] for f in (futures[0], futures[2])] == [["A"], ["B"]]
    error = futures[1].exception(20)
    assert isinstance(error, JobFailed)
    assert (error.stage, error.error_type, error.attempts) == ("words", "Rejected", 1)
    [letter] = dead.scan(registry)
    assert letter.job_id == futures[1].id
    # Its end was delivered and is not kept; the dead letter still tells of it.
    wait_until(lambda: not registry.client.hexists(registry.lanes[0].keys.done, futures[1].id))
    assert relay.job(futures[1].id).status() == "failed"
    error = relay.submit_table("texts", {"text": ["a", "b REJECT"]}, deadline_s=20).exception(20)
    assert isinstance(error, JobFailed)
    assert "row 1" in error.message


def test_a_kill_in_the_middle_of_an_expansion_repeats_rows_and_doubles_none(
    texts: Path, relay: Relay, registry: Registry
) -> None:
    """kill -9 while a large job is between two of its forwards: it starts again and commits once."""
    future = relay.submit_table("texts", {"text": ["abcdefghijkl", "x_y", "plain"]}, deadline_s=60)
    began = texts.parent / "began"
    wait_until(lambda: began.exists() and began.read_text().split())
    os.kill(int(began.read_text().split()[0]), signal.SIGKILL)
    (texts.parent / "gate").touch()
    assert future.result(30)["shouted"] == [["ABCDEFGHIJKL"], ["X_Y"], ["PLAIN"]]
    assert_settled(registry, dict.fromkeys(("words", "letters", "shout", "spell", "glue", "regroup"), 1))


def test_cancelling_a_job_is_seen_by_the_stage(make_pipeline: MakePipeline, relay: Relay, workers: Workers) -> None:
    """A long forward learns from `batch.cancelled` that nobody waits any more."""
    path = make_pipeline(
        """
        pipeline: patient
        input: {x: int64}
        stages: [{name: wait, use: "stages.py:wait"}]
        """,
        """
        import time
        from pathlib import Path

        def wait(batch):
            Path(__file__).with_name("began").touch()
            while not any(batch.cancelled):
                time.sleep(0.01)
            Path(__file__).with_name("seen").write_text(repr(batch.cancelled))
            return {"y": batch["x"]}
        """,
    )
    relay.register(path)
    workers.start(path)
    future = relay.submit_table("patient", {"x": [1, 2]})
    wait_until((path.parent / "began").exists)
    assert future.cancel()
    wait_until((path.parent / "seen").exists)
    assert (path.parent / "seen").read_text() == "[True, True]"
    assert isinstance(future.exception(10), JobCancelled)


def test_retry_later_waits_as_long_as_the_stage_says(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """The job is delayed, not hot-looped; it passes once what was away is back, and counts its attempts."""
    path = make_pipeline(
        """
        pipeline: later
        input: {x: int64}
        stages: [{name: ask, use: "stages.py:ask", retry: {attempts: 3, backoff_s: [0, 0]}}]
        """,
        """
        import time
        from pathlib import Path

        from torchrelay.errors import RetryLater

        def ask(batch):
            log = Path(__file__).with_name("asked")
            with log.open("a") as file:
                file.write(f"{time.time()} ")
            if len(log.read_text().split()) < 3 or batch["x"][0] < 0:
                raise RetryLater(0.4, "the database is away")
            return {"y": batch["x"]}
        """,
    )
    relay.register(path)
    workers.start(path)
    assert relay.infer("later", {"x": 5}, deadline_s=20) == {"y": 5}
    times = [float(t) for t in (path.parent / "asked").read_text().split()]
    assert len(times) == 3
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.39
    error = relay.submit("later", {"x": -1}).exception(20)
    assert isinstance(error, JobFailed)
    assert (error.error_type, error.message, error.attempts) == ("RetryLater", "the database is away", 3)
    assert registry.loads()["later@" + relay.registry.current()["later"].partition("@")[2] + "/ask.failed"] == 5


CASCADE = """
    pipeline: cascade
    input: {x: float32}
    output: [label, sure, detail, seen]
    stages:
      - {name: small, use: "stages.py:small", inputs: [x], outputs: {label: str, unsure: bool, sure: float32}}
      - name: large
        use: stages.py:large
        inputs: [x]
        outputs: {label: str, detail: "float32[2]?", seen: "int64?"}
        when: unsure
"""
CASCADE_CODE = """
    import numpy as np


    def small(batch):
        x = batch["x"]
        return {"label": [f"small {v:g}" for v in x], "unsure": np.abs(x) < 1, "sure": np.abs(x)}


    def large(batch):
        for i, v in enumerate(batch["x"]):
            if v == 0:
                batch.reject(i, "zero is neither")
        return {
            "label": [f"large {v:g}" for v in batch["x"]],
            "detail": [np.array([v, -v], np.float32) for v in batch["x"]],
            "seen": [len(batch)] * len(batch),
        }
"""


def test_rows_for_which_when_is_false_skip_the_stage(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers
) -> None:
    """A cascade: the large model sees only what the small one doubts; the others keep the small one's answer."""
    path = make_pipeline(CASCADE, CASCADE_CODE)
    relay.register(path)
    workers.start(path)
    sure = relay.infer("cascade", {"x": 3.0}, deadline_s=20)
    assert sure == {"label": "small 3", "sure": 3.0, "detail": None, "seen": None}
    future = relay.submit_table("cascade", {"x": [5.0, 0.5, 0.0, -0.25, -7.0]}, on_error="keep", deadline_s=20)
    table = future.result(20)
    assert table["label"] == ["small 5", "large 0.5", "large -0.25", "small -7"]
    assert table["seen"] == [None, 3, 3, None]
    assert [None if d is None else d.tolist() for d in table["detail"]] == [None, [0.5, -0.5], [-0.25, 0.25], None]
    assert {row: e.message for row, e in future.errors.items()} == {2: "zero is neither"}
    assert np.asarray(table["sure"]).dtype == np.float32


def test_rows_that_skip_an_expansion_make_no_rows(make_pipeline: MakePipeline, relay: Relay, workers: Workers) -> None:
    """And a regrouping that some rows skip leaves them what they had."""
    path = make_pipeline(
        """
        pipeline: maybe
        input: {text: str, cut: bool, join: bool}
        output: [words, text]
        stages:
          - {name: split, use: "stages.py:split", inputs: [text], outputs: {word: str}, rows: expand, when: cut}
          - name: regroup
            use: stages.py:regroup
            inputs: [word]
            outputs: {words: "json?", text: str}
            rows: {collapse: split}
            when: join
        """,
        """
        from torchrelay import Expand

        def split(batch):
            parts = [text.split() for text in batch["text"]]
            return Expand({"word": [w for part in parts for w in part]}, [len(part) for part in parts])

        def regroup(batch):
            return {"words": batch["word"], "text": ["+".join(words) for words in batch["word"]]}
        """,
    )
    relay.register(path)
    workers.start(path)
    rows = {"text": ["a b", "c d", "e f", ""], "cut": [True, False, True, True], "join": [True, True, False, True]}
    table = relay.submit_table("maybe", rows, deadline_s=20).result(20)
    assert table == {"words": [["a", "b"], [], None, []], "text": ["a+b", "", "e f", ""]}


FORK = """
    pipeline: fork
    input: {x: int64, note: str = ""}
    output: [total, x, note, parts]
    stages:
      - {name: split, use: "stages.py:split", after: input, inputs: [x], outputs: {part: int64}, rows: expand}
      - {name: square, use: "stages.py:square", after: split, inputs: [part], outputs: {part: int64}}
      - {name: gather, after: square, rows: {collapse: split}}
      - {name: double, use: "stages.py:double", after: input, inputs: [x], outputs: {x: int64, began: float64}}
      - name: join
        use: stages.py:join
        after: [gather, double]
        inputs: {part: part, x: x, was: input.x, other: square.part}
        outputs: {total: int64, parts: json}
"""
FORK_CODE = """
    import time
    from pathlib import Path

    import numpy as np

    from torchrelay.stages import Expand


    def split(batch):
        return Expand({"part": np.concatenate([np.arange(x) for x in batch["x"]] or [[]]).astype(np.int64)}, batch["x"])


    def square(batch):
        if 5 in batch["part"]:
            raise ValueError("five")
        return {"part": batch["part"] ** 2}


    def double(batch):
        return {"x": batch["x"] * 2, "began": [time.time()] * len(batch)}


    def join(batch):
        return {
            "total": [int(p.sum()) + int(x) for p, x in zip(batch["part"], batch["x"])],
            "parts": [[int(was), *p.tolist()] for p, was in zip(batch["other"], batch["was"])],
        }
"""


def test_branches_that_change_rows_and_columns_meet_again(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """One branch expands and regroups, the other makes a column anew: the join sees the newest, or what it names."""
    path = make_pipeline(FORK, FORK_CODE)
    relay.register(path)
    workers.start(path)
    row = relay.infer("fork", {"x": 4, "note": "n"}, deadline_s=20)
    assert row == {"total": 0 + 1 + 4 + 9 + 8, "x": 8, "note": "n", "parts": [4, 0, 1, 4, 9]}
    table = relay.submit_table("fork", {"x": [0, 2, 3], "note": ["a", "b", "c"]}, deadline_s=20).result(20)
    assert np.asarray(table["total"]).tolist() == [0, 1 + 4, 5 + 6]
    assert np.asarray(table["x"]).tolist() == [0, 4, 6]
    assert table["parts"] == [[0], [2, 0, 1], [3, 0, 1, 4]]
    kept = relay.submit_table("fork", {"x": [6, 1]}, on_error="keep", deadline_s=20)
    assert np.asarray(kept.result(20)["total"]).tolist() == [2]
    assert kept.errors[0].stage == "square"
    # The other branch of a job that fails is given up with it.
    error = relay.submit("fork", {"x": 7}, deadline_s=20).exception(20)
    assert isinstance(error, JobFailed)
    assert error.stage == "square"
    wait_until(lambda: not any(v for k, v in registry.loads().items() if k.endswith(("ready_rows", "held_rows"))))
    for lane in registry.lanes:
        assert run(registry.client, lane.recount()) == []


def test_branches_run_at_the_same_time_on_different_workers(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers
) -> None:
    """Each branch waits until the other has begun: one after the other would never end."""
    path = make_pipeline(
        """
        pipeline: meet
        input: {x: int64}
        output: [a, b]
        stages:
          - {name: a, use: "stages.py:meet", after: input, args: {me: a, other: b}, outputs: {a: int64}}
          - {name: b, use: "stages.py:meet", after: input, args: {me: b, other: a}, outputs: {b: int64}}
        """,
        """
        import os
        import time
        from pathlib import Path

        def meet(batch, *, me: str, other: str):
            folder = Path(__file__).parent
            (folder / me).touch()
            while not (folder / other).exists():
                time.sleep(0.005)
            return {me: [os.getpid()] * len(batch)}
        """,
    )
    relay.register(path)
    workers.start(path)
    row = relay.infer("meet", {"x": 1}, deadline_s=20)
    assert row["a"] != row["b"]


BIG = """
    pipeline: big
    input: {size: int64, tag: "uint8[*]"}
    output: [top, tag]
    limits: {rows_per_job: 20000}
    stages:
      - {name: grow, use: "stages.py:grow", inputs: [size], outputs: {v: "float32[16]"}, rows: expand}
      - {name: work, use: "stages.py:work", inputs: [v, tag], outputs: {w: "float32[16]"}, batch: {max_rows: 1000}}
      - {name: fold, use: "stages.py:fold", inputs: [w], rows: {collapse: grow}, outputs: {top: float32}}
"""
BIG_CODE = """
    import numpy as np

    from torchrelay.stages import Expand


    def grow(batch):
        total = int(sum(batch["size"]))
        return Expand({"v": np.arange(total * 16, dtype=np.float32).reshape(total, 16)}, batch["size"])


    def work(batch):
        assert len(batch) <= 1000
        return {"w": batch["v"] + np.array([len(t) for t in batch["tag"]], np.float32)[:, None]}


    def fold(batch):
        return {"top": [float(w.max()) if len(w) else -1.0 for w in batch["w"]]}
"""


def test_large_expansions_travel_out_of_band_and_within_their_limit(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """Counts and columns of many rows lie in blobs; they are freed with the job; above the limit a job fails."""
    path = make_pipeline(BIG, BIG_CODE)
    relay.register(path)
    workers.start(path)
    tags = [np.zeros(7, np.uint8), np.zeros(0, np.uint8), np.zeros(5000, np.uint8)]
    sizes = [5000, 0, 7000]
    future = relay.submit_table("big", {"size": sizes, "tag": tags}, deadline_s=30)
    table = future.result(30)
    assert np.asarray(table["top"]).tolist() == [5000 * 16 - 1 + 7, -1.0, 12000 * 16 - 1 + 5000]
    assert [len(tag) for tag in table["tag"]] == [7, 0, 5000]
    many = relay.submit_table("big", {"size": [1] * 1500, "tag": [tags[0]] * 1500}, deadline_s=30)
    assert len(many.result(30)["top"]) == 1500
    error = relay.submit("big", {"size": 20001, "tag": tags[0]}, deadline_s=30).exception(30)
    assert isinstance(error, JobFailed)
    assert "limits.rows_per_job (20000)" in error.message
    with pytest.raises(InputError, match="rows_per_job"):
        relay.submit_table("big", {"size": [1] * 20001, "tag": [tags[0]] * 20001})
    for lane in registry.lanes:
        wait_until(lambda lane=lane: not list(registry.client.scan_iter(match=lane.keys.blob("*"), count=1000)))
        assert run(registry.client, lane.recount()) == []


def test_jobs_of_many_sizes_at_once_keep_their_rows(texts: Path, relay: Relay) -> None:
    """Several clients and sizes share batches; nobody gets another's rows."""
    results: dict[int, Any] = {}

    def one(n: int) -> None:
        lines = [f"w{n} " * (n % 4) for _ in range(n)]
        results[n] = (lines, relay.submit_table("texts", {"text": lines}, deadline_s=60).result(60)["shouted"])

    threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert time.monotonic() - started < 60.0
    assert {n: shouted for n, (_, shouted) in results.items()} == {
        n: [line.upper().split() for line in lines] for n, (lines, _) in results.items()
    }
    assert len(results) == 12


def test_jobs_without_rows_fill_a_batch_too(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """Any number of jobs of no rows passes, in batches of bounded size and without a call."""
    path = make_pipeline(
        """
        pipeline: empty
        input: {x: int64}
        stages: [{name: work, use: "stages.py:work", outputs: {y: "float32[2]"}, batch: {max_rows: 4}}]
        """,
        """
        def work(batch):
            raise ValueError("called")
        """,
    )
    relay.register(path)
    futures = [relay.submit_table("empty", {"x": []}) for _ in range(300)]
    workers.start(path)
    for future in futures:
        y = future.result(20)["y"]
        assert isinstance(y, np.ndarray)
        assert y.shape == (0, 2)
    [report] = registry.workers()
    wait_until(lambda: registry.workers()[0].jobs == 300)
    assert report.failures == 0
    assert_settled(registry, {"work": 300})


def test_without_an_output_list_a_regrouping_returns_what_it_regroups(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """Inline or out of band: the columns made inside the expansion, as lists; older ones are no part of the result."""
    path = make_pipeline(
        """
        pipeline: pieces
        input: {text: str, size: int64}
        stages:
          - {name: cut, use: "stages.py:cut", outputs: {piece: str, pad: "uint8[*]"}, rows: expand}
          - {name: mark, use: "stages.py:mark", inputs: [piece], outputs: {marked: str}}
          - {name: regroup, rows: {collapse: cut}}
        """,
        """
        import numpy as np

        from torchrelay import Expand

        def cut(batch):
            parts = [text.split() for text in batch["text"]]
            pads = [np.zeros(size, np.uint8) for part, size in zip(parts, batch["size"]) for _ in part]
            return Expand({"piece": [p for part in parts for p in part], "pad": pads}, [len(p) for p in parts])

        def mark(batch):
            return {"marked": [piece + "." for piece in batch["piece"]]}
        """,
    )
    relay.register(path)
    workers.start(path)
    for size in (3, 20_000):
        row = relay.infer("pieces", {"text": "a b", "size": size}, deadline_s=20)
        assert [len(pad) for pad in row.pop("pad")] == [size, size]
        assert row == {"piece": ["a", "b"], "marked": ["a.", "b."]}
    assert relay.infer("pieces", {"text": "", "size": 1}, deadline_s=20) == {"piece": [], "pad": [], "marked": []}
    assert_settled(registry, dict.fromkeys(("cut", "mark", "regroup"), 3))
