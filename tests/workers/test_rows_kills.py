"""A forking pipeline that expands, joins and regroups, under kills, zombies and lost bytes: every result is exact."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Workers, wait_until
from torchrelay import Relay
from torchrelay.errors import JobError, JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry, run

MakePipeline = Callable[..., Path]

FORK = """
    pipeline: fork
    input: {x: int64, note: str}
    output: [note, sums, doubled, first]
    stages:
      - {name: cut, use: "stages.py:cut", after: input, inputs: [x], outputs: {part: int64, wide: WIDE}, rows: expand}
      - {name: one, use: "stages.py:one", after: cut, inputs: [part, wide], outputs: {a: WIDE}, TUNING}
      - {name: two, use: "stages.py:two", after: cut, inputs: [part, note], outputs: {b: str}, TUNING}
      - {name: join, use: "stages.py:join", after: [one, two], inputs: [a, b], outputs: {c: int64}}
      - name: fold
        use: stages.py:fold
        after: join
        inputs: [c, part]
        rows: {collapse: cut}
        outputs: {sums: int64}
      - {name: side, use: "stages.py:side", after: input, inputs: [x], outputs: {doubled: int64}}
      - {name: end, use: "stages.py:end", after: [fold, side], inputs: [a, doubled], outputs: {first: json}}
""".replace("TUNING", "batch: {max_rows: 16}, retry: {attempts: 2, backoff_s: [0, 0]}")
CODE = """
    import os
    import time
    from pathlib import Path

    import numpy as np

    from torchrelay import Expand


    def cut(batch):
        counts = [int(x) % 5 for x in batch["x"]]
        part = np.array([i for n in counts for i in range(n)], np.int64)
        return Expand({"part": part, "wide": np.repeat(part, WIDE).reshape(len(part), WIDE).astype(np.float32)}, counts)


    def one(batch):
        time.sleep(0.002)
        if (batch["wide"][:, 0] != batch["part"]).any():
            raise AssertionError("rows of two columns do not line up")
        return {"a": batch["wide"] * 3}


    def two(batch):
        for i, (part, note) in enumerate(zip(batch["part"], batch["note"])):
            if part == 2 and note.endswith("reject"):
                batch.reject(i, note)
            if part == 3 and note.endswith("raise"):
                raise ValueError(note)
        return {"b": [f"{note}/{part}" for part, note in zip(batch["part"], batch["note"])]}


    def join(batch):
        parts = [int(b.rpartition("/")[2]) for b in batch["b"]]
        assert [int(a[0]) for a in batch["a"]] == [3 * p for p in parts]
        return {"c": batch["a"][:, 0].astype(np.int64) + 1}


    def fold(batch):
        assert [len(c) for c in batch["c"]] == [len(p) for p in batch["part"]]
        return {"sums": [int(c.sum()) for c in batch["c"]]}


    def side(batch):
        return {"doubled": batch["x"] * 2}


    def end(batch):
        firsts = [[rows[0].tolist()[:1]] if len(rows) else [] for rows in batch["a"]]
        return {"first": [[*first, int(d)] for first, d in zip(firsts, batch["doubled"])]}
"""
NODES = ("cut", "one", "two", "join", "fold", "side", "end")


def expected(x: int, note: str) -> dict[str, Any]:
    n = x % 5
    first = [[0.0], 2 * x] if n else [2 * x]
    return {"note": note, "sums": sum(3 * p + 1 for p in range(n)), "doubled": 2 * x, "first": first}


def fails(x: int, note: str) -> str:
    if note.endswith("reject") and x % 5 > 2:
        return "Rejected"
    return "ValueError" if note.endswith("raise") and x % 5 > 3 else ""


class Load:
    """Single rows and tables, with rows that fail among them, and what must come of each."""

    def __init__(self, relay: Relay, jobs: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.jobs: list[tuple[Any, list[tuple[int, str]], str]] = []
        for n in range(jobs):
            kind = self.random.choice(["row", "row", "row", "keep", "raise"])
            rows = [self._row(n) for _ in range(1 if kind == "row" else self.random.randrange(0, 30))]
            if kind == "row":
                future: Any = relay.submit("fork", {"x": rows[0][0], "note": rows[0][1]})
            else:
                table = {"x": [x for x, _ in rows], "note": [note for _, note in rows]}
                future = relay.submit_table("fork", table, on_error=kind)
            self.jobs.append((future, rows, kind))

    def _row(self, n: int) -> tuple[int, str]:
        return self.random.randrange(1000), f"n{n} " + self.random.choices(["", "reject", "raise"], [20, 1, 1])[0]

    @property
    def done(self) -> int:
        return sum(future.done() for future, _, _ in self.jobs)

    def check(self, timeout_s: float = 60.0) -> int:
        """Compares every result with what it must be; returns how many jobs failed as they should."""
        failed = 0
        for future, rows, kind in self.jobs:
            bad = {i: why for i, row in enumerate(rows) if (why := fails(*row))}
            if kind != "keep" and bad:
                error = future.exception(timeout_s)
                assert isinstance(error, JobFailed)
                assert error.error_type in bad.values(), error
                if error.error_type == "Rejected":
                    first = next(i for i, why in bad.items() if why == "Rejected")
                    # Of a table, the submitted row; of a row alone, the one of its parts.
                    assert error.message == f"row {first if len(rows) > 1 else 2}: {rows[first][1]}"
                failed += 1
                continue
            good = [i for i in range(len(rows)) if i not in bad]
            try:
                result = future.result(timeout_s)
            except JobError as error:
                raise AssertionError(f"{future.id} of {kind} {rows}: {error!r}") from error
            if kind == "row":
                assert result == expected(*rows[0])
                continue
            wanted = [expected(*rows[i]) for i in good]
            table = {name: np.asarray(c).tolist() if name != "first" else c for name, c in result.items()}
            assert table == {name: [w[name] for w in wanted] for name in ("note", "sums", "doubled", "first")}
            assert future.source_rows.tolist() == good
            if kind == "keep":
                assert {i: e.error_type for i, e in future.errors.items()} == bad
        return failed


def start(make_pipeline: MakePipeline, relay: Relay, wide: int) -> Path:
    path = make_pipeline(FORK.replace("WIDE", f'"float32[{wide}]"'), CODE.replace("WIDE", str(wide)))
    relay.register(path)
    return path


def settled(registry: Registry) -> None:
    wait_until(lambda: not any(v for k, v in registry.loads().items() if k.endswith(("ready_rows", "held_rows"))))
    for lane in registry.lanes:
        wait_until(lambda lane=lane: registry.client.hlen(lane.keys.grants) == 0)
        assert run(registry.client, lane.recount()) == []


@pytest.mark.parametrize("wide", [2, 400])
def test_kills_at_random_lose_double_and_mix_up_nothing(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers, wide: int
) -> None:
    """Inline and out of band, with scripts flushed on the way: each job ends once, with exactly its result."""
    path = start(make_pipeline, relay, wide)
    supervisors = workers.start(path)
    kills, jobs = 12, 200
    load = Load(relay, jobs, seed=wide)
    for kill in range(1, kills + 1):
        wait_until(lambda at=kill: load.done >= at * jobs // (kills + 2), 60.0)
        pid = load.random.choice([s.child_pid for s in supervisors if s.child_pid])
        if kill % 4 == 0:
            registry.client.script_flush()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # its successor is not there yet
    failed = load.check()
    settled(registry)
    assert len(list(dead.scan(registry))) == failed
    loads = registry.loads()
    assert sum(v for k, v in loads.items() if k.endswith("/end.committed")) == jobs - failed


LINE = """
    pipeline: line
    input: {x: int64, note: str}
    output: [note, sums]
    stages:
      - {name: cut, use: "stages.py:cut", inputs: [x], outputs: {part: int64, wide: "float32[8]"}, rows: expand}
      - {name: two, use: "stages.py:two", inputs: [part, note], outputs: {b: str}, batch: {max_rows: 512}}
      - {name: again, use: "stages.py:cut", inputs: {x: part}, outputs: {part: int64, wide: "float32[8]"}, rows: expand}
      - {name: unfold, rows: {collapse: again}}
      - {name: fold, use: "stages.py:fold", inputs: {c: b, part: part}, rows: {collapse: cut}, outputs: {sums: json}}
"""
LINE_CODE = CODE.replace("WIDE", "8").replace(
    '{"sums": [int(c.sum()) for c in batch["c"]]}',
    '{"sums": [[len(c), sum(map(len, p))] for c, p in zip(batch["c"], batch["part"])]}',
)


def blobs_of(registry: Registry, column: str) -> list[bytes]:
    return [
        key
        for lane in registry.lanes
        for key in registry.client.scan_iter(match=lane.keys.blob("*"), count=10_000)
        if key.endswith(b"." + column.encode())
    ]


def halt(registry: Registry, node: str) -> Callable[[], bool]:
    """Whether all that is left waits at this node."""

    def waits() -> bool:
        rows = {k: v for k, v in registry.loads().items() if k.endswith(("ready_rows", "held_rows")) and v}
        return bool(rows) and all(k.endswith(f"/{node}.ready_rows") for k in rows)

    return waits


@pytest.mark.parametrize(
    ("column", "at"),
    [
        ("#1", "two"),
        ("#3", "unfold"),
        ("!2", "fold"),
    ],
)
def test_lost_bytes_of_a_chain_start_the_job_again(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers, column: str, at: str
) -> None:
    """Hidden columns among them: whichever column is gone when a node needs it, the result is exact."""
    path = make_pipeline(LINE, LINE_CODE)
    relay.register(path)
    names = ["cut", "two", "again", "unfold", "fold"]
    xs = [n % 7 for n in range(4000)]
    notes = [f"n{n} {'reject' if n % 2 else ''}" for n in range(4000)]
    future = relay.submit_table("line", {"x": xs, "note": notes}, on_error="keep")
    for name in names[: names.index(at)]:
        workers.start(path, stage=name)
    wait_until(halt(registry, at), 60.0)
    keys = blobs_of(registry, column)
    assert keys
    registry.client.delete(*keys)
    for name in names[names.index(at) :]:
        workers.start(path, stage=name)
    table = future.result(60)
    good = [n for n in range(4000) if not fails(xs[n], notes[n])]
    assert future.source_rows.tolist() == good
    assert sorted(future.errors) == [n for n in range(4000) if fails(xs[n], notes[n])]
    assert table["note"] == [notes[n] for n in good]
    assert table["sums"] == [[xs[n] % 5, sum(p % 5 for p in range(xs[n] % 5))] for n in good]
    settled(registry)


@pytest.mark.parametrize(
    ("column", "at", "reruns"),
    [
        ("#1", "join", {"cut", "one", "two"}),
        # What `two` reads is still there. What only `one` and `join` read went when they committed: it walks back.
        ("!3", "join", {"two"}),
        ("a", "join", {"cut", "one", "two"}),
        ("c", "fold", {"two", "join"}),
    ],
)
def test_lost_bytes_of_a_fork_start_its_lost_part_again(
    make_pipeline: MakePipeline,
    relay: Relay,
    registry: Registry,
    workers: Workers,
    column: str,
    at: str,
    reruns: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The makers of the lost bytes run again, as far back as their own inputs are gone; the result is exact."""
    # In shared memory what was released may still be there when it is asked for again, and then less runs again.
    monkeypatch.setenv("TORCHRELAY_ARENA_BYTES", "0")
    path = start(make_pipeline, relay, 16)
    for name in NODES:
        if name != at:
            workers.start(path, stage=name)
    xs = [n % 7 for n in range(4000)]
    notes = [f"n{n} {'reject' if n % 2 else ''}" for n in range(4000)]
    future = relay.submit_table("fork", {"x": xs, "note": notes}, on_error="keep")
    wait_until(halt(registry, at), 60.0)
    keys = blobs_of(registry, column)
    assert keys
    registry.client.delete(*keys)
    workers.start(path, stage=at)
    table = future.result(60)
    good = [n for n in range(4000) if not fails(xs[n], notes[n])]
    assert future.source_rows.tolist() == good
    wanted = [expected(xs[n], notes[n]) for n in good]
    assert table["first"] == [w["first"] for w in wanted]
    assert np.asarray(table["sums"]).tolist() == [w["sums"] for w in wanted]
    settled(registry)
    loads = registry.loads()
    runs = {name: sum(v for k, v in loads.items() if k.endswith(f"/{name}.committed")) for name in NODES}
    assert runs == {name: 1 + (name in reruns) for name in NODES}


def test_lost_bytes_of_the_input_end_the_job_in_words(
    make_pipeline: MakePipeline, relay: Relay, registry: Registry, workers: Workers
) -> None:
    """No restart brings them back: the job fails at the node that needs them, and is not run a hundred times."""
    path = start(make_pipeline, relay, 2)
    for name in NODES:
        if name != "two":
            workers.start(path, stage=name)
    future = relay.submit_table("fork", {"x": [4] * 200, "note": ["long" * 10] * 200}, on_error="keep")
    wait_until(halt(registry, "two"), 60.0)
    registry.client.delete(*blobs_of(registry, "note"))
    workers.start(path, stage="two")
    error = future.exception(30)
    assert isinstance(error, JobFailed)
    assert (error.stage, error.error_type) == ("two", "BytesLost")
    assert "submit the job again" in error.message
    assert sum(v for k, v in registry.loads().items() if k.endswith("/cut.committed")) == 1
    settled(registry)
