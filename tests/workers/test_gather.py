"""Gathered stages on real workers: a process for each shard, of which any may be killed."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import models
from tests.conftest import MakePipeline, Workers, wait_until
from tests.gather_stages import write_chain
from tests.workers.support import ForwardLog, assert_settled
from torchrelay import Pipeline, Relay
from torchrelay.errors import JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry

# Each shard logs "pid shard/n,.." and returns its half of x, and x times its number from 1. A row whose `at` is its
# shard waits until the file of its `do` is there, or raises.
CODE = """
    import os
    import time
    from pathlib import Path

    import numpy as np
    from torchrelay import Stage


    class Shares(Stage):
        def __init__(self, log: str) -> None:
            self.log = log

        def load(self, context):
            self.shard, self.shards = context.shard, context.shards

        def forward(self, batch):
            names = ",".join(f"{self.shard}/{n}" for n in batch["n"])
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(descriptor, f"{os.getpid()} {names}\\n".encode())
            os.close(descriptor)
            for at, do in zip(batch["at"], batch["do"]):
                if at == self.shard and do == "raise":
                    raise ValueError("told to")
                while at == self.shard and do and not Path(do).exists():
                    time.sleep(0.005)
            x = np.asarray(batch["x"])
            return {"part": np.array_split(x, self.shards, axis=1)[self.shard], "total": x * (self.shard + 1)}
"""
YAML = """
    pipeline: halves
    input: {{n: str, x: "float32[{size}]", at: "int64 = -1", do: str = ""}}
    output: [part, total]
    stages:
      - name: s
        use: stages.py:Shares
        args: {{log: "{log}"}}
        outputs: {{part: "float32[{size}]", total: "float32[{size}]"}}
        batch: {{max_rows: 4}}
        retry: {{attempts: 2, backoff_s: [0, 0]}}
        shards: {{count: 2, mode: gather, combine: {{total: sum}}}}
"""


@pytest.fixture
def halves(make_pipeline: MakePipeline, forward_log: ForwardLog) -> Path:
    """Columns of 8 KiB, which lie in shared memory between the workers."""
    return make_pipeline(YAML.format(log=forward_log.path, size=2048), CODE)


def row(number: int, at: int = -1, do: str = "") -> dict[str, Any]:
    return {"n": str(number), "x": np.full(2048, number, np.float32), "at": at, "do": do}


def assert_made(result: dict[str, Any], number: int) -> None:
    np.testing.assert_array_equal(result["part"], np.full(2048, number))
    np.testing.assert_array_equal(result["total"], np.full(2048, 3 * number))


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_is_killed_in_mid_work_loses_and_doubles_nothing(
    relay: Relay,
    registry: Registry,
    workers: Workers,
    halves: Path,
    forward_log: ForwardLog,
    tmp_path: Path,
    shard: int,
) -> None:
    """kill -9 of its computing process: its jobs run again there, the other shard's are not repeated, all end once."""
    relay.register(halves)
    workers.start(halves)
    gate = tmp_path / "gate"
    futures = relay.submit_many("halves", [row(0, shard, str(gate)), *(row(i) for i in range(1, 40))])
    name = f"{shard}/0"
    wait_until(lambda: forward_log.pids(name))
    os.kill(forward_log.pids(name)[0], signal.SIGKILL)
    wait_until(lambda: len(forward_log.pids(name)) == 2)
    gate.touch()
    for number, future in enumerate(futures):
        assert_made(future.result(30), number)
    runs = forward_log.runs()
    assert {runs[f"{1 - shard}/{i}"] for i in range(40)} == {1}
    assert_settled(registry, {"s.0": 40, "s.1": 40, "s.combine": 40})


def test_what_fails_in_one_shard_fails_that_job_alone(
    relay: Relay, registry: Registry, workers: Workers, halves: Path
) -> None:
    """After its attempts, as a job of the shard that raised; its neighbours in the batch are done."""
    relay.register(halves)
    workers.start(halves)
    futures = relay.submit_many("halves", [row(i, 1, "raise" if i == 3 else "") for i in range(8)])
    with pytest.raises(JobFailed, match="told to") as raised:
        futures[3].result(20)
    assert (raised.value.stage, raised.value.attempts) == ("s.1", 2)
    for number in {*range(8)} - {3}:
        assert_made(futures[number].result(20), number)
    assert [letter.stage for letter in dead.scan(registry)] == ["s.1"]


def test_a_dataset_goes_through_shards(
    relay: Relay, registry: Registry, workers: Workers, halves: Path, tmp_path: Path
) -> None:
    """Chunks too pass each shard and what combines them; a row that one shard refuses costs no other."""
    for stage in (None, "@read", "@write"):
        workers.start(halves, stage=stage)
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(np.arange(20, dtype=np.float32), 2048)), 2048)
    do = ["raise" if i == 7 else "" for i in range(20)]
    data = {"n": [str(i) for i in range(20)], "x": x, "at": [1] * 20, "do": do}
    pq.write_table(pa.table(data), tmp_path / "d.parquet")
    run = relay.run("halves", input=tmp_path / "d.parquet", output=tmp_path / "out", keep=["n"], chunk_rows=8)
    rows = list(run.rows())
    assert [int(r["n"]) for r in rows] == [i for i in range(20) if i != 7]
    for made in rows:
        assert_made({c: np.asarray(made[c]) for c in ("part", "total")}, int(made["n"]))
    (error,) = pq.read_table(tmp_path / "out" / "_run" / "errors.parquet").to_pylist()
    assert (error["_row"], error["stage"]) == (7, "s.1")


def committed(registry: Registry, node: str) -> int:
    return registry.loads().get(f"{node}.committed", 0)


def test_a_model_of_torch_in_shards_gives_what_the_whole_gives_also_when_shards_are_killed(
    relay: Relay, registry: Registry, workers: Workers, tmp_path: Path
) -> None:
    """Two gathered stages, on six workers, rows of many lengths; kill -9 of one shard of each under load."""
    path = write_chain(tmp_path, "bert", 2, most=2)
    rows = models.rows_of("bert", 600)
    expected = Pipeline.load(write_chain(tmp_path, "bert", 1, most=2)).run_local(rows)
    ref = relay.register(path)
    workers.start(path, ready_s=120.0)
    futures = relay.submit_many("bert", rows)
    for victim in ("bertembed.0", "bertattend.1"):
        node = f"{ref}/{victim}"
        wait_until(partial(committed, registry, node))
        (pid,) = [w.pid for w in registry.workers() if w.node == node]
        os.kill(pid, signal.SIGKILL)
    assert not all(f.done() for f in futures)
    for future, exact in zip(futures, expected, strict=True):
        np.testing.assert_allclose(future.result(60)["h"], exact["h"], rtol=1e-5, atol=1e-5)
    parts = [f"{stage}.{part}" for stage in ("bertembed", "bertattend") for part in ("0", "1", "combine")]
    assert_settled(registry, dict.fromkeys(parts, 600))
