"""Stages are built, loaded, run and closed by a runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrelay.config.spec import BatchSpec, StageConfig, TorchSpec
from torchrelay.config.types import parse_type
from torchrelay.errors import ConfigError, InputError, StageLoadError
from torchrelay.stages import Batch, Runner, Stage, StageContext, make_runner, make_stage


class Double(Stage):
    def __init__(self, factor: int = 2) -> None:
        self.factor = factor
        self.calls = 0
        self.closed = 0

    def forward(self, batch: Batch) -> dict[str, Any]:
        self.calls += 1
        return {"y": batch["x"] * self.factor}

    def close(self) -> None:
        self.closed += 1


def test_tables_in_tables_out() -> None:
    """One forward serves several jobs, and each gets its own rows."""
    runner = Runner(make_stage(Double, {"factor": 3}), "double", outputs={"y": parse_type("int64")})
    runner.load(StageContext())
    out = runner.run([{"x": np.array([1])}, {"x": np.array([2, 3])}], [1, 2])
    assert [part.columns["y"].tolist() for part in out] == [[3], [6, 9]]  # type: ignore[union-attr]
    assert runner.stage.calls == 1  # type: ignore[attr-defined]


def test_no_rows_no_call() -> None:
    """Jobs of 0 rows pass without a call, with the declared columns."""
    runner = Runner(Double(), "double", outputs={"y": parse_type("float32[3]")})
    runner.load(StageContext())
    out = runner.run([{"x": []}, {"x": []}], [0, 0])
    assert [part.columns["y"].shape for part in out] == [(0, 3), (0, 3)]  # type: ignore[union-attr]
    assert runner.stage.calls == 0  # type: ignore[attr-defined]


def test_close_is_called_once_and_only_after_load() -> None:
    """close follows load, once."""
    runner = Runner(Double(), "double")
    runner.close()
    assert runner.stage.closed == 0  # type: ignore[attr-defined]
    runner.load(StageContext())
    runner.close()
    runner.close()
    assert runner.stage.closed == 1  # type: ignore[attr-defined]


def test_load_errors_name_the_stage() -> None:
    """Whatever load raises becomes a StageLoadError with the stage, type and message."""

    class Broken(Double):
        def load(self, context: StageContext) -> None:
            raise OSError("no such model")

    with pytest.raises(StageLoadError, match=r"'broken'.*OSError: no such model"):
        Runner(Broken(), "broken").load(StageContext())


def test_wrong_outputs_are_refused() -> None:
    """Outputs are checked against what is declared."""
    runner = Runner(Double(), "double", outputs={"y": parse_type("str")})
    runner.load(StageContext())
    with pytest.raises(InputError, match="double"):
        runner.run([{"x": np.array([1])}], [1])


def function() -> dict[str, Any]:
    return {}


async def slow(batch: Batch) -> dict[str, Any]:
    return {}


def scaled(batch: Batch, *, by: int = 2) -> dict[str, Any]:
    return {"y": batch["x"] * by}


class NoForward(Stage):
    pass


@pytest.mark.parametrize(
    ("obj", "says"),
    [
        (function, "takes no batch"),
        (slow, "async"),
        (NoForward, "forward"),
        (dict, "derive"),
        (3, "a class"),
        (Double(), "Double"),
    ],
)
def test_what_is_no_stage(obj: object, says: str) -> None:
    """Functions, classes without forward and other things are refused with the reason."""
    with pytest.raises(ConfigError, match=says):
        make_stage(obj, {}, "s")


def test_a_function_is_a_stage() -> None:
    """A plain function of a batch serves as a stage; its args come with each call."""
    ((out, *_),) = Runner(make_stage(scaled, {"by": 5}, "s"), "s").run([{"x": np.array([1, 2])}], [2])
    assert out["y"].tolist() == [5, 10]  # type: ignore[union-attr]  # an array


def test_init_errors_name_the_class() -> None:
    """Whatever __init__ raises becomes a StageLoadError."""
    with pytest.raises(StageLoadError, match=r"'s'.*Double.__init__ raised TypeError"):
        make_stage(Double, {"wrong": 1}, "s")


def test_make_runner_takes_what_the_yaml_says() -> None:
    """args, pad and declared types reach the stage, the batch and the checks."""
    spec = StageConfig(name="double", use="a.py:Double", args={"factor": 5}, batch=BatchSpec(pad={"x": 1}))
    runner = make_runner(Double, spec, {"x": parse_type("int64[*]")}, {"y": parse_type("int64[*]")})
    runner.load(StageContext())
    ((out, *_),) = runner.run([{"x": [np.array([1, 2]), np.array([3])]}], [2])
    assert [row.tolist() for row in out["y"]] == [[5, 10], [15, 5]]


@pytest.mark.parametrize("extra", [{"weights": "w.pt"}, {"torch": TorchSpec(compile=True)}])
def test_torch_keys_need_a_torch_stage(extra: dict[str, Any]) -> None:
    """weights and torch options of a plain stage are refused instead of ignored."""
    with pytest.raises(ConfigError, match="TorchStage"):
        make_runner(Double, StageConfig(name="double", use="a.py:Double", **extra))


def test_context_paths_lie_beside_the_yaml(tmp_path: Path) -> None:
    """context.path is relative to the pipeline's directory."""
    assert StageContext(base_dir=tmp_path).path("w.bin") == tmp_path / "w.bin"


def test_import_needs_no_torch() -> None:
    """The room imports without torch, a plain stage runs without it, and TorchStage says what to install."""
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
import torchrelay.stages as stages
from torchrelay.errors import ConfigError
class Plus(stages.Stage):
    def forward(self, batch):
        return {"y": batch["x"] + 1}
runner = stages.Runner(Plus(), "plus")
runner.load(stages.StageContext())
assert runner.run([{"x": np.arange(2)}], [2])[0].columns["y"].tolist() == [1, 2]
try:
    stages.TorchStage
except ConfigError as error:
    assert "torchrelay[worker]" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
