"""Fused stages on real workers: the results are those of stages apart, and what only they read leaves no process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakePipeline, Workers, run_cli, wait_until
from tests.workers.support import WorkerProcess, assert_settled
from torchrelay import Relay
from torchrelay.config import Pipeline
from torchrelay.errors import JobFailed
from torchrelay.queues import dead

SIZE = 20_000
YAML = """
pipeline: sums
input: {{n: float32, do: "str", image: "float32[20000]"}}
output: [n, out, peak]
stages:
  - name: scale
    use: stages.py:scale
    inputs: [n, image]
    outputs: {{image: "float32[20000]"}}
  - name: embed
    use: middle.py:Embed
    inputs: [image, do]
    outputs: {{hidden: "float32[20000]", peak: float32}}
    batch: {{max_rows: 8, ahead: {ahead}}}
    retry: {{attempts: 2, backoff_s: [0, 0]}}
  - name: head
    use: middle.py:Head
    inputs: {{h: hidden, image: image, do: do}}
    outputs: {{vector: "float32[3]"}}
    batch: {{max_rows: 3}}
  - name: total
    use: stages.py:total
    inputs: [vector]
    outputs: {{out: float32}}
fuse: {fuse}
"""
CODE = """
def scale(batch):
    return {"image": batch["image"] * batch["n"][:, None]}


def total(batch):
    return {"out": batch["vector"].sum(1)}
"""
OBEY = """
import os
import time
from pathlib import Path


def obey(batch, stage):
    for row, order in enumerate(batch["do"]):
        who, _, verb = order.partition(":")
        verb, _, path = verb.partition(" ")
        if who != stage:
            continue
        if verb == "reject":
            batch.reject(row, f"{stage} will not")
        if verb == "raise" or (verb == "raise-unless" and not Path(path).exists()):
            raise ValueError(f"{stage} cannot")
        while verb == "wait" and not Path(path).exists():
            time.sleep(0.005)
        if verb == "die-unless" and not Path(path).exists():
            Path(path).touch()
            os._exit(9)
"""
PLAIN = """
import numpy as np
from torchrelay import Stage


class Embed(Stage):
    def forward(self, batch):
        obey(batch, "embed")
        image = batch["image"] + 1
        return {"hidden": image, "peak": image.max(1)}


class Head(Stage):
    def forward(self, batch):
        obey(batch, "head")
        h, image = batch["h"] * 2, batch["image"]
        return {"vector": np.stack([h[:, 0], h[:, -1], image.sum(1)], 1)}
"""
TORCH = """
import torch
from torchrelay import TorchStage


class Embed(TorchStage):
    def build(self, context):
        return torch.nn.Identity()

    def forward(self, batch):
        obey(batch, "embed")
        image = batch["image"]
        image += 1
        return {"hidden": image, "peak": image.max(1).values}


class Head(TorchStage):
    def build(self, context):
        return torch.nn.Identity()

    def forward(self, batch):
        obey(batch, "head")
        h, image = batch["h"], batch["image"]
        h *= 2
        return {"vector": torch.stack([h[:, 0], h[:, -1], image.sum(1)], 1)}
"""

Make = Callable[..., Path]


@pytest.fixture
def make(make_pipeline: MakePipeline, tmp_path: Path) -> Make:
    """Writes the pipeline, fused or not, with two stages of torch in the middle or two that load faster; those that are
    alike but for what is fused are of one version."""

    def write(fuse: str = "[[embed, head]]", ahead: int = 0, name: str = "pipeline.yaml", middle: str = PLAIN) -> Path:
        (tmp_path / "middle.py").write_text(OBEY + middle)
        return make_pipeline(YAML.format(fuse=fuse, ahead=ahead), CODE, name)

    return write


def rows(*orders: str) -> list[dict[str, Any]]:
    image = np.arange(SIZE, dtype=np.float32) / SIZE
    return [{"n": float(i), "do": do, "image": image + i} for i, do in enumerate(orders)]


def expected(path: Path, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of the same stages apart, in this process."""
    plain = [{**row, "do": ""} for row in given]
    return Pipeline.load(path).run_local(plain)


def settled(relay: Relay, count: int) -> None:
    assert_settled(relay.registry, dict.fromkeys(("scale", "embed", "head", "total"), count))


@pytest.mark.parametrize("ahead", [0, 2])
def test_results_are_those_of_stages_apart(make: Make, relay: Relay, workers: Workers, ahead: int) -> None:
    """One worker runs both, each row once and in batches of each one's size; every stage counts its commits; what only
    the second one reads is neither in Redis nor in shared memory, while what others read is."""
    apart = expected(make("[]", ahead, "apart.yaml", TORCH), given := rows(*[""] * 40))
    path = make(ahead=ahead, middle=TORCH)
    assert Pipeline.load(path).ref == Pipeline.load(path.parent / "apart.yaml").ref
    relay.register(path)
    assert [s.nodes[0].rpartition("/")[2] for s in workers.start(path)] == ["scale", "embed", "total"]
    futures = relay.submit_many("sums", given)
    assert [f.result(timeout=30) for f in futures] == apart
    settled(relay, 40)
    reports = {r.node.rpartition("/")[2]: r for r in relay.registry.workers()}
    assert [node.rpartition("/")[2] for node in reports["embed"].nodes] == ["embed", "head"] * 2
    assert relay.registry.unserved(Pipeline.load(path)) == []
    wait_until(lambda: {r.node[-5:]: r for r in relay.registry.workers()}["scale"].moved["arena"] >= 40 * 4 * SIZE)
    wait_until(lambda: {r.node[-5:]: r for r in relay.registry.workers()}["embed"].jobs == 40)
    [embed] = [r for r in relay.registry.workers() if r.node.endswith("/embed")]
    assert sum(embed.moved.values()) == 0
    shown = run_cli("status", "--json", "--redis", relay.url, "--namespace", relay.registry.control.namespace)
    assert '"node": "sums@' in shown.stdout
    assert '"workers": 0' not in shown.stdout


def test_tables_that_keep_what_they_can(make: Make, relay: Relay, workers: Workers) -> None:
    """Rows that either stage rejects or raises on carry its name; the others are whole."""
    orders = ["", "embed:reject", "head:reject", "", "head:raise", "embed:raise", ""]
    apart = expected(make("[]"), given := rows(*orders))
    relay.register(path := make())
    workers.start(path)
    table = {name: [row[name] for row in given] for name in given[0]}
    result = relay.submit_table("sums", table, on_error="keep")
    columns = result.result(timeout=30)
    kept = [0, 3, 6]
    assert columns["out"].tolist() == [apart[i]["out"] for i in kept]
    assert columns["peak"].tolist() == [apart[i]["peak"] for i in kept]
    told = [(row, e.stage, e.error_type) for row, e in sorted(result.errors.items())]
    assert told == [
        (1, "embed", "Rejected"),
        (2, "head", "Rejected"),
        (4, "head", "ValueError"),
        (5, "embed", "ValueError"),
    ]


def test_a_failure_names_the_stage_that_raised(make: Make, relay: Relay, workers: Workers, tmp_path: Path) -> None:
    """In the client's error and in the dead letter; attempts are the first stage's, and a redrive runs both again."""
    apart = expected(make("[]"), given := rows("", f"head:raise-unless {tmp_path / 'mended'}", "head:reject", ""))
    relay.register(path := make(ahead=2))
    workers.start(path)
    futures = relay.submit_many("sums", given)
    for number, kind, attempts in ((1, "ValueError", 2), (2, "Rejected", 1)):
        with pytest.raises(JobFailed) as raised:
            futures[number].result(timeout=30)
        assert (raised.value.stage, raised.value.error_type, raised.value.attempts) == ("head", kind, attempts)
    assert [futures[i].result(timeout=30) for i in (0, 3)] == [apart[0], apart[3]]
    letters = list(dead.scan(relay.registry))
    assert [letter.stage for letter in letters] == ["head", "head"]
    (tmp_path / "mended").touch()
    again = dead.redrive(relay.registry, [futures[1].id])[futures[1].id]
    assert relay.job(again).result(timeout=30)["out"] == apart[1]["out"]


@pytest.mark.parametrize("how", ["killed", "died"])
def test_a_death_between_the_stages_loses_and_doubles_nothing(
    make: Make, relay: Relay, workers: Workers, tmp_path: Path, how: str
) -> None:
    """kill -9 while the second stage runs, or its own death there: neither stage of those jobs is committed yet, both
    run again, and each commits once."""
    order = f"head:wait {tmp_path / 'go'}" if how == "killed" else f"head:die-unless {tmp_path / 'died'}"
    apart = expected(make("[]"), given := rows(*[""] * 10, order, *[""] * 10))
    relay.register(path := make())
    [supervisor] = [s for s in workers.start(path) if s.nodes[0].endswith("/embed")]
    pid = supervisor.child_pid
    futures = relay.submit_many("sums", given)
    if how == "killed":
        wait_until(lambda: futures[0].done())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: supervisor.child_pid not in (pid, 0))
        (tmp_path / "go").touch()
    assert [f.result(timeout=30) for f in futures] == apart
    settled(relay, 21)


def test_jobs_between_the_stages_are_not_stranded(
    make: Make, relay: Relay, workers: Workers, spawn: Callable[..., WorkerProcess]
) -> None:
    """Jobs that came to the second stage before it was fused are run from there, by whichever stage's name the worker
    was started, also while jobs come to the first."""
    apart = expected(alone := make("[]", name="apart.yaml"), given := rows(*[""] * 30))
    path = make()
    relay.register(alone)
    futures = relay.submit_many("sums", given[:20])
    for stage in ("scale", "embed"):
        worker = spawn(alone, stage=stage).ready()
        wait_until(
            lambda stage=stage: relay.registry.loads().get(f"{Pipeline.load(alone).ref}/{stage}.committed") == 20
        )
        worker.process.terminate()
        assert worker.process.wait(20) == 0
    spawn(path, stage="head").ready()
    workers.start(path, stage="scale")
    workers.start(path, stage="total")
    futures += relay.submit_many("sums", given[20:])
    assert [f.result(timeout=30) for f in futures] == apart
    settled(relay, 30)


def test_local_runs_fuse_too(make: Make) -> None:
    """`run_local` gives the same results and errors, with and without."""
    given = rows("", "embed:reject", "head:reject", "", "head:raise", "embed:raise", "")
    found = []
    for fuse in ("[]", "[[embed, head]]", "[[scale, embed, head, total]]"):
        results = Pipeline.load(make(fuse)).run_local(given, on_error="return")
        found.append([(r.row, r.stage, r.error_type, r.attempts) if isinstance(r, JobFailed) else r for r in results])
    assert found[0][4][1:] == ("head", "ValueError", 3)  # type: ignore[index,misc]
    assert found[1] == [r if i != 4 else (4, "head", "ValueError", 2) for i, r in enumerate(found[0])]
    assert found[2] == [r if i not in (4, 5) else (*r[:3], 3) for i, r in enumerate(found[1])]  # type: ignore[misc]


def test_check_shows_what_is_fused(make: Make) -> None:
    """`torchrelay check` names the stages that share a worker."""
    done = run_cli("check", str(make()))
    assert (done.returncode, "one worker runs embed and head" in done.stdout) == (0, True)


FORK = """
pipeline: fork
input: {{n: int64, do: str}}
output: [words, total, x]
stages:
  - {{name: pages, use: "fork.py:pages", after: input, inputs: [n], outputs: {{page: int64}}, rows: expand}}
  - {{name: one, use: "fork.py:one", after: pages, inputs: [page, do], outputs: {{x: int64, both: int64}}}}
  - name: two
    use: fork.py:two
    after: one
    inputs: {{first: one.x, page: page, both: both, do: do}}
    outputs: {{both: int64, words: str}}
    batch: {{max_rows: 2}}
  - {{name: side, use: "fork.py:side", after: pages, inputs: [page], outputs: {{both: int64}}}}
  - name: join
    use: fork.py:join
    after: [two, side]
    inputs: {{a: one.x, b: two.both, c: side.both}}
    outputs: {{total: int64}}
  - {{name: regroup, after: join, rows: {{collapse: pages}}}}
fuse: {fuse}
"""
FORKED = """
from torchrelay import Expand


def pages(batch):
    counts = [int(n) % 4 for n in batch["n"]]
    return Expand({"page": [100 * int(n) + i for n, count in zip(batch["n"], counts) for i in range(count)]}, counts)


def one(batch):
    for row, (page, do) in enumerate(zip(batch["page"], batch["do"])):
        if do == "one" and page % 100 == 1:
            batch.reject(row, "not this one")
    return {"x": batch["page"] + 1, "both": batch["page"] * 2}


def two(batch):
    for row, (page, do) in enumerate(zip(batch["page"], batch["do"])):
        if do == "two" and page % 100 == 0:
            batch.reject(row, "not this two")
    return {"both": batch["both"] + batch["first"], "words": [f"w{p}" for p in batch["page"]]}


def side(batch):
    return {"both": -batch["page"]}


def join(batch):
    return {"total": batch["a"] + 10 * batch["b"] + 1000 * batch["c"]}
"""


def plainly(results: list[Any]) -> list[Any]:
    """Results and errors as values that can be compared."""
    return [
        (r.row, r.stage, r.message) if isinstance(r, JobFailed) else {n: np.asarray(v).tolist() for n, v in r.items()}
        for r in results
    ]


def test_fused_stages_of_a_branch(make_pipeline: MakePipeline, relay: Relay, workers: Workers, tmp_path: Path) -> None:
    """In a fork, inside an expansion, with columns selected by their stage: who made a column is known as ever."""
    (tmp_path / "fork.py").write_text(FORKED)
    orders = ["", "", "one", "two", "", "one", "", "two", ""]
    given = [{"n": n, "do": do} for n, do in enumerate(orders)]
    apart = plainly(Pipeline.load(make_pipeline(FORK.format(fuse="[]"))).run_local(given, on_error="return"))
    path = make_pipeline(FORK.format(fuse="[[one, two]]"))
    assert plainly(Pipeline.load(path).run_local(given, on_error="return")) == apart
    assert [r[1] for r in apart if isinstance(r, tuple)] == ["one", "two", "two"]
    relay.register(path)
    workers.start(path)
    futures = relay.submit_many("fork", given)
    found = [f.exception(timeout=30) or f.result() for f in futures]
    assert [r[1] if isinstance(r, tuple) else r for r in plainly(found)] == [
        r[1] if isinstance(r, tuple) else r for r in apart
    ]
    done = len([r for r in apart if not isinstance(r, tuple)])
    loads = relay.registry.loads()
    committed = {k.rpartition("/")[2]: v for k, v in loads.items() if k.endswith(".committed")}
    assert (committed["one.committed"], committed["two.committed"], committed["join.committed"]) == (done,) * 3
