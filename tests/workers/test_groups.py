"""Stages that a group of processes computes: whichever rank dies, hangs or lacks memory, each job ends once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import private_server, wait_until
from tests.workers.support import WorkerProcess, alive, assert_settled
from torchrelay import Relay
from torchrelay.errors import JobFailed
from torchrelay.queues import dead
from torchrelay.queues.groups import views
from torchrelay.queues.registry import Registry, WorkerReport

# A linear layer cut by columns. A row's `do`: "RANK VERB ARGUMENT" tells that rank, or with
# their number all, to wait, sleep, raise, or lack memory.
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
            # Rows of many lengths, and none.
            more = [0.0 if row is None else float(row.sum()) for row in batch["more"]]
            mine = self.model(batch["x"])
            mine = mine + mine.new_tensor(more)[:, None]
            if self.size == 1:
                return {"y": mine}
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
            return {"y": torch.cat(parts, 1)}

        def obey(self, told, rows):
            verb, _, rest = told.partition(" ")
            while verb == "wait" and not Path(rest).exists():
                time.sleep(0.005)
            if verb == "sleep":
                time.sleep(float(rest))
            if verb == "raise":
                raise ValueError(rest)
            if verb == "room" and rows > int(rest):
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
"""

YAML = """
    pipeline: cut
    input: {{n: str, x: "float32[4]", do: str = "", more: "float32[*]?"}}
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


def test_a_rank_that_raises_alone_or_is_killed_ends_all_and_each_job_ends_once(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn, tmp_path: Path
) -> None:
    """All raise alike: a plain attempt, and the group lives on. One alone: the group ends, the job is charged. kill -9
    in mid-forward of either rank: the other's process ends within a second, the job is done by the next epoch."""
    made = group(2, "retry: {attempts: 1}")
    worker = spawn(made.path)
    with pytest.raises(JobFailed, match="all alike"):
        relay.submit("cut", {"n": "e", "x": X[0], "do": "2 raise all alike"}).result(60)
    check(relay.submit("cut", {"n": "f", "x": X[1]}).result(20), expected(made, X)[1])
    assert made.pid("e", 0) == made.pid("f", 0)
    with pytest.raises(JobFailed, match="rank 1 alone raised ValueError"):
        relay.submit("cut", {"n": "g", "x": X[0], "do": "1 raise alone"}).result(90)
    assert "rank 1 raised ValueError" in worker.log
    for victim, name in enumerate("ab"):
        gate = tmp_path / name
        future = relay.submit("cut", {"n": name, "x": X[victim], "do": f"{victim} wait {gate}"})
        wait_until(lambda name=name: made.pid(name, 0) and made.pid(name, 1), 60.0)
        pids = [made.pid(name, rank) for rank in (0, 1)]
        assert made.pid("g", 0) not in pids
        os.kill(pids[victim], signal.SIGKILL)
        wait_until(lambda other=pids[1 - victim]: not alive(other), 3.0)
        gate.touch()
        check(future.result(60), expected(made, X)[victim])
        assert {made.pid(name, 0), made.pid(name, 1)}.isdisjoint(pids)
    assert_settled(registry, {"work": 3})
    assert len(registry.workers()) == 1
    # A follower's heartbeat may be up to two seconds behind.
    wait_until(lambda: [r.rank for r in made.ranks()] == [0, 1], 10.0)


def test_memory_that_one_rank_lacks_costs_no_strike_and_lowers_the_cap(
    relay: Relay, registry: Registry, group: Callable[..., Group], spawn: Spawn
) -> None:
    """8 rows do not fit rank 1: the group forms anew and takes 4; a row that fits nowhere is an attempt."""
    made = group(2, "batch: {max_rows: 8}", "retry: {attempts: 1}")
    more = [[float(i)] * i if i % 3 else None for i in range(8)]
    rows = [{"n": str(i), "x": X[i], "do": "1 room 4", "more": more[i]} for i in range(8)]
    futures = relay.submit_many("cut", rows)
    worker = spawn(made.path)
    for future, wanted, added in zip(futures, expected(made, X), more, strict=True):
        check(future.result(90), [y + sum(added or ()) for y in wanted])
    first, *others = [len(names) for _, rank, names in made.forwards() if rank == 0]
    assert (first, max(others), sum(others)) == (8, 4, 8)
    name = registry.ranks()[0].group
    state = views(registry.client, registry.control, [name])[name]
    assert (state.cap, state.why.partition(":")[0]) == (4, "rank 1 ran out of memory")
    assert "ran out of memory" in worker.log
    assert not list(dead.scan(registry))
    lost = relay.submit("cut", {"n": "never", "x": X[0], "do": "1 room 0"})
    with pytest.raises(JobFailed, match="CUDA out of memory on rank 1") as raised:
        lost.result(90)
    assert raised.value.attempts == 1


def test_ranks_started_apart_form_a_group_and_a_dead_supervisor_is_noticed(
    relay: Relay, registry: Registry, server_url: str, group: Callable[..., Group], tmp_path: Path
) -> None:
    """`worker --shard K --group NAME`; kill -9 of rank 1's supervisor; one that is started at once waits for its place
    and has it; SIGTERM of one drains all."""
    made = group()
    processes = [_rank(registry, server_url, made.path, rank) for rank in (0, 1)]
    try:
        gate = tmp_path / "gate"
        future = relay.submit("cut", {"n": "a", "x": X[0], "do": f"0 wait {gate}"})
        wait_until(lambda: made.pid("a", 0) and made.pid("a", 1), 60.0)
        first = made.pid("a", 0)
        processes[1].process.kill()
        processes.append(_rank(registry, server_url, made.path, 1))
        wait_until(lambda: not alive(first), 8.0)
        gate.touch()
        check(future.result(60), expected(made, X)[0])
        processes[2].process.terminate()
        assert [processes[i].process.wait(20) for i in (0, 2)] == [0, 0]
        assert_settled(registry, {"work": 1})
    finally:
        for one in processes:
            one.end()


def test_four_ranks_outlive_their_server_a_stopped_rank_and_drain_under_load(
    namespace: str, make_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """The server is killed under load: no epoch ends. SIGSTOP of rank 3: its forward's time ends them all. SIGTERM
    under load: what was claimed is done or given back."""
    with private_server() as server, Relay(server.url, namespace=namespace) as relay:
        registry = relay.registry
        made = Group(make_pipeline, tmp_path, registry, 4, "timeout_s: 3", "batch: {max_rows: 2}")
        relay.register(made.path)
        worker = WorkerProcess(registry, server.url, made.path)
        try:
            futures = [relay.submit("cut", {"n": f"a{i}", "x": X[i % 8], "do": "4 sleep 0.05"}) for i in range(40)]
            wait_until(lambda: made.pid("a5", 3), 60.0)
            server.kill()
            server.start()
            assert_all(futures, made)
            pids = {made.pid(name, 3) for name in ("a0", "a39")}
            assert len(pids) == 1
            (stopped,) = pids
            os.kill(stopped, signal.SIGSTOP)
            check(relay.submit("cut", {"n": "b", "x": X[1]}).result(60), expected(made, X)[1])
            assert not alive(stopped)
            futures = [relay.submit("cut", {"n": f"c{i}", "x": X[i % 8], "do": "4 sleep 0.05"}) for i in range(40)]
            wait_until(lambda: made.pid("c5", 3), 10.0)
            worker.process.terminate()
            assert worker.process.wait(20) == 0
            done = [f for f in futures if f.done()]
            assert 0 < len(done) < 40
            assert_all(done, made)
            assert_settled(registry, {"work": 41 + len(done)}, waiting=40 - len(done))
        finally:
            worker.end()


def assert_all(futures: list[Any], made: Group) -> None:
    for i, future in enumerate(futures):
        check(future.result(30), expected(made, X)[i % 8])


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
