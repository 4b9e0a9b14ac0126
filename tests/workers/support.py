"""A stage that does what each row tells it and logs every forward to a file, real worker processes, and an audit."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.cli_server import COMMANDS
from tests.conftest import wait_until
from torchrelay.queues.registry import Registry, WorkerReport, run

# A row's `do` is an order: raise, die (the process ends), hang, "wait PATH" (until the file is there),
# "raise-until PATH", "hang-until PATH", "sleep SECONDS", "exit STATUS", "return-junk", "lose TEXT" and
# "lose-until PATH TEXT" (CUDA fails with this text), "room N" (its memory takes N rows).
# Each forward is logged as "pid n,n,n" before it obeys.
CODE = """
    import os
    import time
    from pathlib import Path

    from torchrelay import Stage


    class Obey(Stage):
        def __init__(self, log: str) -> None:
            self.log = log

        def forward(self, batch):
            line = f"{os.getpid()} {','.join(batch['n'])}\\n"
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(descriptor, line.encode())
            os.close(descriptor)
            out = [n + "!" for n in batch["n"]]
            for order in batch["do"]:
                verb, _, rest = order.partition(" ")
                if verb == "raise" or (verb == "raise-until" and not Path(rest).exists()):
                    raise ValueError(f"told to raise \\x1b[31m[bold] {rest}")
                if verb == "lose":
                    raise RuntimeError(rest)
                if verb == "lose-until" and not Path(rest.partition(" ")[0]).exists():
                    raise RuntimeError(rest.partition(" ")[2])
                if verb == "room" and len(out) > int(rest):
                    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                if verb == "die":
                    os._exit(int(rest or 7))
                if verb == "exit":
                    raise SystemExit(int(rest))
                if verb == "hang" or (verb == "hang-until" and not Path(rest).exists()):
                    time.sleep(3600)
                if verb == "sleep":
                    time.sleep(float(rest))
                if verb == "return-junk":
                    return {"out": [object()] * len(out)}
                while verb == "wait" and not Path(rest).exists():
                    time.sleep(0.005)
            return {"out": out}
"""

YAML = """
    pipeline: obey
    input: {{n: str, do: str = ""}}
    output: [out]
    stages:
      - name: work
        use: stages.py:Obey
        args: {{log: "{log}"}}
        {options}
"""


class ForwardLog:
    """Every forward that began, in order: (pid, names of the rows)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def forwards(self) -> list[tuple[int, list[str]]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [(int(pid), names.split(",")) for pid, names in (line.split(" ") for line in lines)]

    def runs(self) -> Counter[str]:
        """Row -> how often a forward began with it."""
        return Counter(n for _, names in self.forwards() for n in names)

    def pids(self, name: str) -> list[int]:
        """The processes that began a forward with this row."""
        return [pid for pid, names in self.forwards() if name in names]


class WorkerProcess:
    """`torchrelay worker` as a process of its own; `pid` is the supervisor's, `child` the computing process's."""

    def __init__(
        self,
        registry: Registry,
        url: str,
        path: Path,
        *,
        stage: str = "work",
        more: Sequence[str] = (),
        **settings: str,
    ) -> None:
        self.registry = registry
        self.stderr_path = path.parent / f"worker-{len(list(path.parent.glob('worker-*')))}.log"
        namespace = registry.control.namespace
        command = ["worker", str(path), "--stage", stage, "--redis", url, "--namespace", namespace, *more]
        env = os.environ | {f"TORCHRELAY_{name.upper()}": value for name, value in settings.items()}
        with self.stderr_path.open("wb") as stderr:
            self.process = COMMANDS.start(command, stderr=stderr, env=env)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.stderr_path.read_text()

    def report(self) -> WorkerReport | None:
        return next((w for w in self.registry.workers() if f"-{self.pid}-" in w.worker), None)

    @property
    def child(self) -> int:
        report = self.report()
        assert report is not None, self.log
        return report.pid

    def ready(self) -> WorkerProcess:
        def is_ready() -> bool:
            report = self.report()
            return report is not None and report.state == "ready"

        wait_until(is_ready, 30.0)
        return self

    def signal(self, number: int) -> None:
        """Sends a signal to both processes, the computing one first."""
        for pid in (self.child, self.pid):
            os.kill(pid, number)

    def end(self) -> None:
        """Ends it whatever state it is in, and its child with it."""
        if self.process.poll() is None:
            report = self.report()
            self.process.kill()
            self.process.wait()
            if report is not None and report.pid and alive(report.pid):
                os.kill(report.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_settled(registry: Registry, committed: dict[str, int], waiting: int = 0) -> None:
    """Nothing runs and so many rows wait, no grant is left, counters agree with the records, and each node committed so
    often."""
    loads = registry.loads()
    assert sum(v for k, v in loads.items() if k.endswith("ready_rows")) == waiting
    kinds = ("held_rows",) if waiting else ("ready_bytes", "held_rows")
    assert {k: v for k, v in loads.items() if k.endswith(kinds) and v} == {}
    found = {k.rpartition("/")[2].removesuffix(".committed"): v for k, v in loads.items() if k.endswith(".committed")}
    assert {k: v for k, v in found.items() if v} == {k: v for k, v in committed.items() if v}
    for lane in registry.lanes:
        assert registry.client.hlen(lane.keys.grants) == 0
        assert registry.client.zcard(lane.keys.lease) == 0
        assert run(registry.client, lane.recount()) == []
