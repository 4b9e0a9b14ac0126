"""`torchrelay split`: where a stage would be cut, without a server, also for a stage that has no shards yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import MakePipeline
from tests.model_stages import write_pipeline
from tests.models import build
from torchrelay.cli import main

pytest.importorskip("torch", reason="models need torch")

# One line a message, however wide the terminal is taken to be.
pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_a_stage_without_shards_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part with its time, parameters, weights and what crosses; together they are the model."""
    path = write_pipeline(tmp_path, "bert")
    assert main(["split", str(path), "--stage", "model", "--parts", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["stage"], told["device"], told["balance"]) == ("model", "cpu", "time")
    first, last = told["parts"]
    assert (first["part"], last["part"]) == ("model.0", "model.1")
    whole = build("bert")
    numbers, buffers = sum(p.numel() for p in whole.parameters()), sum(b.nbytes for b in whole.buffers())
    assert first["parameters"] + last["parameters"] == numbers
    assert first["weight_bytes"] + last["weight_bytes"] == 4 * numbers + buffers
    assert first["crossing_bytes_per_row"] > 0
    assert last["crossing_bytes_per_row"] is None
    assert first["ms"] > 0
    assert first["share"] + last["share"] == pytest.approx(1, abs=1e-3)
    assert main(["split", str(path), "--stage", "model", "--parts", "2", "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "model in 2 parts of equal time, measured on cpu" in shown
    assert "to write at stage model: shards: {count: 2, mode: pipeline}" in shown
    assert all(word in shown for word in ("model.0", "model.1", "parameters", "bytes a row to the next"))


def test_the_file_says_how_many_parts_unless_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in what they are equal; values of --set are taken."""
    path = str(write_pipeline(tmp_path, "mlp", shards={"count": 2, "mode": "pipeline", "balance": "memory"}))
    counts = []
    for more in ([], ["--parts", "3"], ["--set", "model.shards.count=4"]):
        assert main(["split", path, "--stage", "model", "--json", *more]) == 0
        told = json.loads(capsys.readouterr().out)
        counts.append((len(told["parts"]), told["balance"]))
    assert counts == [(2, "memory"), (3, "memory"), (4, "memory")]
    assert main(["split", path, "--stage", "model", "--balance", "time"]) == 0
    shown = capsys.readouterr().out
    assert "model.1 begins with " in shown
    assert "shards: {count: 2, mode: pipeline}" in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--stage", "nope", "--parts", "2"], "no stage 'nope'; its stages are model"),
        (["--stage", "model"], "stage 'model' has no shards of mode pipeline; say how many with --parts"),
        (["--stage", "model", "--parts", "2", "--device", "cuda:0"], "no CUDA device here"),
    ],
)
def test_what_cannot_be_cut_so_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    """The message says what to write."""
    import torch

    if "--device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["split", str(write_pipeline(tmp_path, "mlp")), *options]) in (1, 2)
    assert expected in capsys.readouterr().err


def test_a_stage_without_a_model_is_told(make_pipeline: MakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain Stage, and a stage that is fused, cannot be split."""
    code = """
        from torchrelay import Stage

        class Plain(Stage):
            def forward(self, batch):
                return {"y": batch["x"]}
    """
    text = """
        pipeline: plain
        input: {x: int64}
        stages:
          - {name: a, use: "stages.py:Plain", outputs: {y: int64}}
          - {name: b, use: "stages.py:Plain", inputs: [x], outputs: {y: int64}}
    """
    path = make_pipeline(text, code)
    assert main(["split", str(path), "--stage", "a", "--parts", "2"]) == 2
    assert "mode: pipeline splits the model of a TorchStage, and Plain is a plain Stage" in capsys.readouterr().err
    fused = make_pipeline(f"{text}    fuse: [[a, b]]\n", code, "fused.yaml")
    assert main(["split", str(fused), "--stage", "a", "--parts", "2"]) == 2
    assert "stage 'a': is fused, and one worker cannot own all shards" in capsys.readouterr().err
