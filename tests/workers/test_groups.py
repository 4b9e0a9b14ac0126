"""Stages that a group of processes computes: whichever rank dies, hangs or lacks memory, each job ends once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.workers.support import WorkerProcess, alive, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobFailed
from torchrelay.queues import dead
from torchrelay.queues.registry import Registry, WorkerReport

# A linear layer cut by columns. A row's `do`: "RANK VERB ARGUMENT" tells that rank to wait, raise, or lack memory.
CODE = """
    import os
    import time
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch import nn

    from torchrelay import TorchStage


    class Cut(TorchStage):
        def __init__(self, log: str) -> None:
            self.log = log

        def build(self, context):
            self.rank, self.size = context.rank, context.world_size
            torch.manual_seed(7)
            whole = nn.Linear(4, 8)
            part = nn.Linear(4, 8 // self.size)
            mine = slice(self.rank * 8 // self.size, (self.rank + 1) * 8 // self.size)
            part.load_state_dict({"weight": whole.weight[mine], "bias": whole.bias[mine]})
            return part

        def forward(self, batch):
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()} {self.rank} {','.join(batch['n'])}\\n")
            for order in batch["do"]:
                rank, _, told = order.partition(" ")
                if told and int(rank) in (self.rank, self.size):
                    self.obey(told, len(batch))
            mine = self.model(batch["x"])
            if self.size == 1:
                return {"y": mine}
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
            return {"y": torch.cat(parts, 1)}

        def obey(self, told, rows):
            verb, _, rest = told.partition(" ")
            while verb == "wait" and not Path(rest).exists():
                time.sleep(0.005)
            if verb == "raise":
                raise ValueError(rest)
            if verb == "room" and rows > int(rest):
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
"""

YAML = """
    pipeline: cut
    input: {{n: str, x: "float32[4]", do: str = ""}}
    output: [y]
    stages:
      - name: work
        use: stages.py:Cut
        args: {{log: "{log}"}}
        outputs: {{y: "float32[8]"}}
        shards: {{count: {count}, mode: tensor, plan: own}}
        {options}
"""
Spawn = Callable[..., WorkerProcess]
X = [[float(i + j) for j in range(4)] for i in range(8)]


class Group:
    """One pipeline with a tensor stage, its log of forwards, and what its results are to be."""

    def __init__(self, make: Callable[..., Path], folder: Path, registry: Registry, count: int, *options: str) -> None:
        self.log = folder / "forwards.txt"
        self.path = make(YAML.format(log=self.log, count=count, options="\n        ".join(options)), CODE)
        self.registry = registry

    def forwards(self) -> list[tuple[int, int, list[str]]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [line.split(" ") for line in lines if line.count(" ") == 2]
        return [(int(pid), int(rank), names.split(",")) for pid, rank, names in found]

    def pid(self, name: str, rank: int) -> int:
        """The last process that began a forward with this row as that rank, 0 for none."""
        return next((p for p, r, names in reversed(self.forwards()) if r == rank and name in names), 0)

    def ranks(self) -> list[WorkerReport]:
        return [r for r in self.registry.ranks() if r.state == "ready"]


@pytest.fixture
def group(make_pipeline: Callable[..., Path], tmp_path: Path, registry: Registry, relay: Relay) -> Callable[..., Group]:
    def make(count: int = 2, *options: str) -> Group:
        made = Group(make_pipeline, tmp_path, registry, count, *options)
        relay.register(made.path)
        return made

    return make


def expected(group: Group, rows: list[list[float]]) -> list[list[float]]:
    """What the whole layer gives."""
    import torch
    from torch import nn

    torch.manual_seed(7)
    whole: list[list[float]] = nn.Linear(4, 8)(torch.tensor(rows)).tolist()
    return whole


def check(result: dict[str, object], wanted: list[float]) -> None:
    assert list(result["y"]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # type: ignore[call-overload]


def test_a_rank_that_is_killed_ends_all_and_the_job_is_done_once_by_the_next_epoch(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn, tmp_path: Path
) -> None:
    """kill -9 in mid-forward of either rank: the other's process ends within a second."""
    made = group()
    spawn(made.path)
    for victim, name in enumerate("ab"):
        gate = tmp_path / name
        future = relay.submit("cut", {"n": name, "x": X[victim], "do": f"{victim} wait {gate}"})
        wait_until(lambda name=name: made.pid(name, 0) and made.pid(name, 1), 60.0)
        pids = [made.pid(name, rank) for rank in (0, 1)]
        os.kill(pids[victim], signal.SIGKILL)
        wait_until(lambda other=pids[1 - victim]: not alive(other), 3.0)
        gate.touch()
        check(future.result(60), expected(made, X)[victim])
        assert {made.pid(name, 0), made.pid(name, 1)}.isdisjoint(pids)
    assert_settled(registry, {"work": 2})
    assert len(registry.workers()) == 1
    # A follower's heartbeat may be up to two seconds behind.
    wait_until(lambda: [r.rank for r in made.ranks()] == [0, 1], 10.0)


def test_memory_that_one_rank_lacks_costs_no_strike_and_lowers_the_cap(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn
) -> None:
    """8 rows do not fit rank 1: the group forms anew and takes 4; a row that fits nowhere is an attempt each time."""
    made = group(2, "batch: {max_rows: 8}", "retry: {attempts: 2, backoff_s: [0.01, 0.02]}")
    futures = relay.submit_many("cut", [{"n": str(i), "x": X[i], "do": "1 room 4"} for i in range(8)])
    worker = spawn(made.path)
    for future, wanted in zip(futures, expected(made, X), strict=True):
        check(future.result(90), wanted)
    assert max(len(names) for _, rank, names in made.forwards() if rank == 0) == 8
    assert "ran out of memory" in worker.log
    assert not list(dead.scan(registry))
    lost = relay.submit("cut", {"n": "never", "x": X[0], "do": "1 room 0"})
    with pytest.raises(JobFailed, match="CUDA out of memory on rank 1") as raised:
        lost.result(90)
    assert raised.value.attempts == 2


def test_an_error_of_all_ranks_is_the_jobs_and_one_of_a_single_rank_names_it(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn
) -> None:
    """All raise alike: a plain attempt, and the group lives on. One alone: the group ends, the job is charged."""
    made = group(2, "retry: {attempts: 1}")
    worker = spawn(made.path)
    with pytest.raises(JobFailed, match="all alike"):
        relay.submit("cut", {"n": "a", "x": X[0], "do": "2 raise all alike"}).result(60)
    check(relay.submit("cut", {"n": "b", "x": X[1]}).result(20), expected(made, X)[1])
    assert made.pid("a", 0) == made.pid("b", 0)
    with pytest.raises(JobFailed, match="rank 1 alone raised ValueError"):
        relay.submit("cut", {"n": "c", "x": X[0], "do": "1 raise alone"}).result(90)
    assert "rank 1 raised ValueError" in worker.log
    check(relay.submit("cut", {"n": "d", "x": X[2]}).result(60), expected(made, X)[2])
    assert made.pid("d", 0) != made.pid("b", 0)


def test_a_stopped_follower_is_ended_with_its_group_after_the_forwards_time(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn
) -> None:
    """SIGSTOP of rank 1 between two batches: the next forward hangs, and all ranks are replaced."""
    made = group(2, "timeout_s: 2")
    spawn(made.path)
    relay.submit("cut", {"n": "a", "x": X[0]}).result(60)
    stopped = made.pid("a", 1)
    os.kill(stopped, signal.SIGSTOP)
    check(relay.submit("cut", {"n": "b", "x": X[1]}).result(60), expected(made, X)[1])
    assert not alive(stopped)
    assert_settled(registry, {"work": 2})


def test_ranks_started_apart_form_a_group_and_a_dead_supervisor_is_noticed(
    relay: Relay, registry: Registry, server_url: str, group: Callable[..., Group], tmp_path: Path
) -> None:
    """`worker --shard K --group NAME`; kill -9 of rank 1's supervisor; a new one joins; SIGTERM of one drains all."""
    made = group()
    processes = [_rank(registry, server_url, made.path, rank) for rank in (0, 1)]
    try:
        gate = tmp_path / "gate"
        future = relay.submit("cut", {"n": "a", "x": X[0], "do": f"0 wait {gate}"})
        wait_until(lambda: made.pid("a", 0) and made.pid("a", 1), 60.0)
        first = made.pid("a", 0)
        processes[1].process.kill()
        wait_until(lambda: not alive(first), 8.0)
        gate.touch()
        processes.append(_rank(registry, server_url, made.path, 1))
        check(future.result(60), expected(made, X)[0])
        processes[2].process.terminate()
        assert [processes[i].process.wait(20) for i in (0, 2)] == [0, 0]
        assert_settled(registry, {"work": 1})
    finally:
        for one in processes:
            one.end()


def _rank(registry: Registry, url: str, path: Path, rank: int) -> WorkerProcess:
    return WorkerProcess(registry, url, path, more=("--shard", str(rank), "--group", "hand"))


@pytest.mark.gpu
def test_two_gpus_form_an_nccl_group_and_a_killed_rank_is_replaced(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn
) -> None:
    """The same layer over NCCL with the overlapped loop; kill -9 of rank 1 between batches."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = group(2, "device: gpu")
    spawn(made.path)
    wanted = expected(made, X)
    for future, values in zip(relay.submit_many("cut", [{"n": "a", "x": x} for x in X]), wanted, strict=True):
        check(future.result(120), values)
    killed = made.pid("a", 1)
    os.kill(killed, signal.SIGKILL)
    for future, values in zip(relay.submit_many("cut", [{"n": "b", "x": x} for x in X]), wanted, strict=True):
        check(future.result(120), values)
    assert made.pid("b", 1) != killed
    assert_settled(registry, {"work": 16})
