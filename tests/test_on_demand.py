"""What reads and writes for `up`, on a fleet that only notes what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchrelay import on_demand
from torchrelay.on_demand import ReadersOnDemand


class Fleet:
    """Two pipelines, one of which has no runs; `loads` and `wanted` are the server's."""

    def __init__(self) -> None:
        from torchrelay.errors import ConfigError

        def none() -> Any:
            raise ConfigError("no runs")

        self.mine = SimpleNamespace(for_runs=lambda: SimpleNamespace(ref="p@v+run"))
        self.other = SimpleNamespace(for_runs=none)
        self.want: set[str] = set()
        self.loads: dict[str, int] = {}
        self.registry = SimpleNamespace(wanted=lambda: self.want, loads=lambda: self.loads)
        self.supervisors: list[Any] = []
        self.stopped: list[str] = []
        self._added: list[str] = []

    def pipelines(self) -> list[tuple[Any, dict[str, str]]]:
        return [(self.mine, {"work.batch": "1"}), (self.other, {})]

    def add(self, pipeline: Any, overrides: dict[str, str], *, stage: str) -> None:
        assert (pipeline, overrides) == (self.mine, {"work.batch": "1"})
        self._added.append(stage)

    def launch(self) -> None:
        for stage in self._added[len(self.supervisors) :]:
            self.supervisors.append(SimpleNamespace(stop=lambda stage=stage: self.stopped.append(stage)))


def test_what_is_wanted_is_served_until_it_was_idle_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither twice nor while something waits or is under way; and again when it is wanted anew."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(on_demand, "readers", lambda: 2)
    fleet = Fleet()
    demand = ReadersOnDemand(fleet)  # type: ignore[arg-type]

    def pass_time(seconds: float) -> None:
        for _ in range(int(seconds)):
            clock[0] += 1.0
            demand.tick()

    pass_time(100)
    assert fleet.supervisors == []
    fleet.want = {"p@v+run/@read", "q@v+run/@read"}
    pass_time(5)
    assert fleet._added == ["@read", "@read"]
    fleet.want, fleet.loads = set(), {"p@v+run/@read.held_rows": 1}
    pass_time(200)
    assert fleet.stopped == []
    fleet.loads = {"p@v+run/@read.held_rows": 0}
    pass_time(59)
    assert fleet.stopped == []
    pass_time(3)
    assert fleet.stopped == ["@read", "@read"]
    fleet.want = {"p@v+run/@write", "p@v+run/@read"}
    pass_time(2)
    assert fleet._added[2:] == ["@read", "@read", "@write", "@write"]
