"""The overlapped loop in a thread of the test's process, over a stage and a device that do what the test says."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import redis

from tests.conftest import wait_until
from tests.workers.fake_gpu import FakeGpu
from torchrelay import JobFuture
from torchrelay.config import Pipeline, Settings
from torchrelay.queues.keys import new_token
from torchrelay.queues.placement import open_home
from torchrelay.queues.registry import Registry
from torchrelay.stages import Stage
from torchrelay.stages.runner import Launched, Prepared, Runner
from torchrelay.workers.device_exporter import DeviceExporter
from torchrelay.workers.device_importer import DeviceImporter
from torchrelay.workers.node import NodeContext
from torchrelay.workers.overlap import OverlappedLoop
from torchrelay.workers.parts import Surroundings
from torchrelay.workers.progress import Progress, ProgressPage
from torchrelay.workers.stop import Stop
from torchrelay.workers.storage import SharedMemory

YAML = """
    pipeline: act
    input: {{n: str, do: str = ""}}
    output: [out]
    stages:
      - name: work
        use: stages.py:Nobody
        {options}
"""


class Act(Stage):
    """Calls `acts[do]` for each row that says so, then answers each `n` with `n!`. `forwards` holds what came."""

    def __init__(self, acts: dict[str, Callable[[], object]] | None = None) -> None:
        self.acts = acts or {}
        self.forwards: list[list[str]] = []

    def forward(self, batch: Any) -> dict[str, Any]:
        self.forwards.append(list(batch["n"]))
        for do in batch["do"]:
            self.acts.get(do, int)()
        return {"out": [n + "!" for n in batch["n"]]}


class _Departure:
    def __init__(self, arrived: Callable[[], object]) -> None:
        self.arrived = arrived

    def idle_s(self, before: object) -> float:
        return 0.0


class Device(Runner):
    """Like a GPU, it is done only once `finish` has waited: `computes()` takes its time, and may raise."""

    def __init__(self, stage: Stage, computes: Callable[[], object] = int) -> None:
        super().__init__(stage, "work")
        self.computes = computes

    def launch(self, prepared: Prepared, exports: Any = None) -> Launched:
        made = super().launch(prepared).made

        def arrived() -> object:
            self.computes()
            return made

        return Launched(None, _Departure(arrived), lambda outputs: outputs)  # type: ignore[arg-type, return-value]


class InProcess:
    """One worker's loop, of the stage of this number. `stop()` drains it; `error` is what ended it. With a `gpu` it
    hands columns over on that device, within `settings`."""

    def __init__(
        self,
        registry: Registry,
        url: str,
        path: Path,
        runner: Runner,
        ahead: int = 2,
        *,
        stage: int = 0,
        gpu: FakeGpu | None = None,
        **settings: Any,
    ) -> None:
        pipeline = Pipeline.load(path)
        number = registry.register(pipeline).number
        self.incarnation = new_token(8)
        group = pipeline.groups[stage]
        context = NodeContext(pipeline, number, group, registry.lanes, self.incarnation, "in-process", lease_ms=15_000)
        self.client = redis.Redis.from_url(url)
        self.page = ProgressPage.create(10_000)
        mine = Settings(redis_url=url, namespace=registry.control.namespace, **settings)
        self.memory = SharedMemory.open(registry, mine)
        home = open_home(registry, mine)
        if gpu is not None and home is not None:
            self.memory.importer = DeviceImporter(gpu, home.folder)
            if group.stages[-1].handoff == "device":
                self.memory.exporter = DeviceExporter(gpu, home.folder, mine.device_arena_bytes)
        self.stopping = Stop()
        self.loop = OverlappedLoop(
            Surroundings(context, self.client, self.page, self.memory, self.stopping), runner, ahead
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def parts(self) -> Any:
        return self.loop._parts

    @property
    def progress(self) -> Progress:
        return self.page.read()

    def start(self) -> InProcess:
        self._thread.start()
        return self

    def result(self, future: JobFuture[Any]) -> Any:
        """The job's result; raises what ended the loop, if that is why there is none."""
        try:
            return future.result(20)
        except TimeoutError:
            raise self.error or AssertionError(f"{self.progress} {_stacks()}") from None

    def stop(self, timeout_s: float = 10.0) -> None:
        """Drains it, and looks whether anything is left."""
        self.stopping.set()
        self.ended(timeout_s)
        assert self.error is None, self.error
        assert self.parts.custody._in_hand == {}
        assert self.parts.committer.fences == ()

    def ended(self, timeout_s: float = 10.0) -> None:
        """Waits for its end, and for that of the threads that it started."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), _stacks()
        wait_until(lambda: not any(t.is_alive() for t in self.loop.threads))
        assert (self.progress.started, self.progress.forward_since) == (b"", 0.0)
        self.page.close(unlink=True)
        self.client.close()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error


def _stacks() -> str:
    frames = sys._current_frames()
    lines: Iterable[str] = (f"{t.name}: {frames.get(t.ident or 0)}" for t in threading.enumerate())
    return "\n".join(lines)


def jitter(rng: random.Random, most_s: float = 0.002) -> Callable[[], object]:
    """Waits for a random time."""
    return lambda: time.sleep(rng.random() * most_s)
