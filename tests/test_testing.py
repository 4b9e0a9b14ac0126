"""torchrelay.testing: stages as workers run them, real servers and workers for a block, and its guide as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrelay import Batch, Expand, Stage, StageContext, TorchStage, testing
from torchrelay.errors import ConfigError, InputError, JobFailed, StageLoadError
from torchrelay.queues import server as embedded
from torchrelay.testing import run_stage

GUIDE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
SHOUT = "{pipeline: shout, input: {text: str}, stages: [{name: shout, use: 'shout.py:shout', outputs: {text: str}}]}"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


class Scale(Stage):
    """Notes what is done to it."""

    def __init__(self, by: float = 2.0) -> None:
        self.by = by
        self.seen: list[str] = []

    def load(self, context: StageContext) -> None:
        self.seen.append(f"load {context.device} {context.base_dir.name}")

    def forward(self, batch: Batch) -> dict[str, Any]:
        self.seen.append(f"forward {len(batch)}")
        if not batch["x"].flags.writeable and batch["x"].size and batch["x"].max() > 100:
            batch.reject(int(batch["x"].argmax()), "too large")
        return {"y": batch["x"] * np.float32(self.by)}

    def close(self) -> None:
        self.seen.append("close")


def spread(batch: Batch) -> Expand:
    return Expand({"part": np.arange(batch["n"].sum())}, batch["n"])


def test_an_instance_is_loaded_run_in_batches_and_closed(tmp_path: Path) -> None:
    """As a worker does it."""
    stage = Scale(by=3)
    table = run_stage(stage, {"x": np.ones((5, 2), np.float32)}, max_rows=2, base_dir=tmp_path)
    assert stage.seen == [f"load cpu {tmp_path.name}", "forward 2", "forward 2", "forward 1", "close"]
    assert table["y"].dtype == np.float32
    assert table["y"].tolist() == [[3.0, 3.0]] * 5


def test_types_are_checked_on_both_sides() -> None:
    """Values are brought to the declared types, and those that do not fit are named."""
    table = run_stage(Scale, {"x": [1, 2]}, args={"by": 2}, input={"x": "float32"}, outputs={"y": "float32"})
    assert table["y"].tolist() == [2.0, 4.0]
    with pytest.raises(InputError, match="row 1: column 'x': float32 is expected, str of length 1 came"):
        run_stage(Scale, {"x": [1.0, "2"]}, input={"x": "float32"})
    with pytest.raises(InputError, match="stage 'scale' did not return column 'z'"):
        run_stage(Scale, {"x": [1.0]}, input={"x": "float32"}, outputs={"y": "float32", "z": "str"})
    with pytest.raises(InputError, match="column 'z': cannot encode"):
        run_stage(lambda batch: {"z": [object()]}, {"x": [1]})


def test_a_table_without_rows_gives_the_declared_columns() -> None:
    """No forward is called."""
    table = run_stage(Scale, {"x": []}, input={"x": "float32[2]"}, outputs={"y": "float32[2]"})
    assert table["y"].shape == (0, 2)


def test_rejected_rows_raise_or_are_collected() -> None:
    """They are named by their number in the table, also where it takes several forwards."""
    table = {"x": np.array([1, 2, 300, 4, 500], np.float32)}
    with pytest.raises(JobFailed, match="row 2 at stage 'scale' after 1 attempt: Rejected: too large"):
        run_stage(Scale, table, max_rows=2)
    rejected: dict[int, str] = {}
    made = run_stage(Scale, table, max_rows=1, rejected=rejected)
    assert rejected == {2: "too large", 4: "too large"}
    assert made["y"].tolist() == [2.0, 4.0, 8.0]


@pytest.mark.parametrize("max_rows", [None, 1, 2])
def test_an_expanding_stage_returns_what_it_expanded(max_rows: int | None) -> None:
    """Counts have an entry for each row of the table."""
    made = run_stage(
        spread, {"n": [2, 0, 1]}, input={"n": "int64"}, outputs={"part": "int64"}, rows="expand", max_rows=max_rows
    )
    assert made.counts.tolist() == [2, 0, 1]
    assert len(made.columns["part"]) == 3


def test_what_forward_raises_comes_out_and_the_stage_is_closed() -> None:
    """A test sees the stage's own error and traceback."""

    class Breaks(Scale):
        def forward(self, batch: Batch) -> dict[str, Any]:
            raise ZeroDivisionError("mine")

    stage = Breaks()
    with pytest.raises(ZeroDivisionError, match="mine"):
        run_stage(stage, {"x": [1]})
    assert stage.seen[-1] == "close"


def test_a_torch_stage_gets_private_tensors_and_its_options(tmp_path: Path) -> None:
    """Weights lie beside base_dir, and the caller's array is not written to."""

    class Linear(TorchStage):
        def build(self, context: StageContext) -> torch.nn.Module:
            return torch.nn.Linear(2, 1)

        def forward(self, batch: Batch) -> dict[str, Any]:
            batch["x"].add_(1)  # its own
            return {"y": self.model(batch["x"].to(self.dtype)), "pad": batch.lengths["ids"]}

    torch.save({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])}, tmp_path / "w.pt")
    x = np.zeros((2, 2), np.float32)
    made = run_stage(
        Linear,
        {"x": x, "ids": [np.arange(1), np.arange(3)]},
        pad={"ids": 0},
        torch={"dtype": "float16"},
        weights="w.pt",
        base_dir=tmp_path,
    )
    assert made["y"].dtype == np.float16
    assert made["y"].tolist() == [[3.5], [3.5]]
    assert made["pad"].tolist() == [1, 3]
    assert not x.any()


@pytest.mark.parametrize(
    ("stage", "options", "error", "text"),
    [
        (Scale(), {"args": {"by": 1}}, ConfigError, "args go with a class or a function"),
        (Scale, {"args": {"bye": 1}}, ConfigError, "unknown argument 'bye'; did you mean 'by'?"),
        (Scale, {"args": {"by": "x"}}, ConfigError, "argument 'by'"),
        (Scale, {"max_rows": -1}, ConfigError, "batch.max_rows: Input should be greater"),
        (Scale, {"rows": "both"}, ConfigError, "rows: write same, expand"),
        (Scale, {"torch": {"dtype": "float16"}}, ConfigError, "`weights` and `torch` are for a TorchStage"),
        (Scale, {"input": {"x": "flat32"}}, ConfigError, "input: type 'flat32'"),
        (Scale, {"meta": 3}, InputError, "meta must be a mapping"),
        (3, {}, ConfigError, "`use` must name a class"),
        (dict, {}, ConfigError, "must derive from torchrelay.Stage"),
        (Stage(), {}, ConfigError, "does not define forward"),
    ],
)
def test_wrong_use_is_named(stage: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        run_stage(stage, {"x": np.zeros((1, 1), np.float32)}, **options)


def test_a_server_of_ones_own_is_gone_afterwards() -> None:
    """It answers in the block, and neither the process nor its data stay."""
    import redis

    with testing.server() as url:
        client = redis.Redis.from_url(url)
        assert client.ping()
        folder = Path(client.config_get("dir")["dir"])
        assert folder.name == embedded.FOLDER
    with pytest.raises(redis.ConnectionError):
        client.ping()
    client.close()
    assert not folder.exists()


def test_a_stage_that_does_not_load_is_an_error_of_running(tmp_path: Path, server_url: str) -> None:
    """The wait ends as soon as the worker gives up."""
    (tmp_path / "shout.py").write_text("class Shout: pass")
    path = tmp_path / "shout.yaml"
    path.write_text("{pipeline: shout, stages: [{name: shout, use: 'shout.py:Shout'}]}")
    with pytest.raises(StageLoadError, match=r"shout@.*/shout gave up"), testing.running(path, url=server_url):
        pass


@pytest.fixture
def shout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's pipeline in the current folder; its stage is the function of the guide's first program."""
    function = blocks()[0].partition("table =")[0]
    (tmp_path / "shout.py").write_text(function)
    (tmp_path / "shout.yaml").write_text(SHOUT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_programs_of_the_guide_run_as_printed(shout: Path) -> None:
    """All of them but those for pytest, one after the other."""
    programs = [b for b in blocks() if "pytest" not in b and "def test" not in b]
    assert len(programs) == 4
    space: dict[str, Any] = {}
    for program in programs:
        exec(program, space)


def test_the_fixtures_of_the_guide_work_as_printed(shout: Path) -> None:
    """In a pytest run of its own, with the conftest and the test that the guide shows."""
    conftest, test = (b for b in blocks() if "pytest" in b or "def test" in b)
    (shout / "conftest.py").write_text(conftest)
    (shout / "test_shout.py").write_text(
        test
        + "\ndef test_it_is_alone(torchrelay_relay, torchrelay_server):\n"
        + "    assert torchrelay_relay.registry.current() == {}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(shout)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=shout,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_importing_it_imports_no_pytest() -> None:
    """It may be used where pytest is not installed."""
    code = "import sys; from torchrelay import testing; testing.run_stage; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


class Halves(Stage):
    """Its share of x, times what it is told; refuses what is negative in its share."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def load(self, context):
        self.shard, self.shards = context.shard, context.shards

    def forward(self, batch):
        part = np.split(np.asarray(batch["x"]), self.shards, axis=1)[self.shard]
        for row in np.flatnonzero((part < 0).any(axis=1)):
            batch.reject(int(row), f"negative in shard {self.shard}")
        return {"y": part * self.times, "n": part.sum(axis=1)}


@pytest.mark.parametrize("stage", [Halves(2), Halves])
def test_shards_are_run_one_by_one_and_combined(stage):
    """Each is told which it is; rows that one of them refuses are refused; the rest is as of the whole."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    x[1, 3] = -1
    how = {"outputs": {"y": "float32[4]", "n": "float32"}, "args": None if isinstance(stage, Stage) else {"times": 2}}
    shards = {"count": 2, "mode": "gather", "combine": {"n": "sum"}}
    rejected: dict[int, str] = {}
    made = run_stage(stage, {"x": x}, shards=shards, rejected=rejected, **how)
    np.testing.assert_array_equal(made["y"], 2 * x[[0, 2]])
    np.testing.assert_array_equal(made["n"], x[[0, 2]].sum(axis=1))
    assert rejected == {1: "negative in shard 1"}


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        (
            {"count": 3, "mode": "gather"},
            "stage 'halves': column 'y' is float32[4], whose dimension -1 of 4 does not divi",
        ),
        ({"count": 2, "mode": "tensor"}, "shards.mode: run_stage runs shards of mode gather, not tensor"),
        ({"mode": "gather"}, "shards.count: Field required"),
    ],
)
def test_shards_that_cannot_be_are_refused(shards, says):
    with pytest.raises(ConfigError) as raised:
        run_stage(Halves(), {"x": np.ones((1, 4))}, outputs={"y": "float32[4]"}, shards=shards)
    assert says in str(raised.value)
