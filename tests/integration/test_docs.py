"""The guides say what works: every pipeline in them checks, every program in them compiles, the last one runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import run_cli
from torchrelay import cutting
from torchrelay.config import Pipeline

GUIDE = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"), ids=range(len(blocks("yaml"))))
def test_every_pipeline_of_the_guide_checks(text: str, tmp_path: Path) -> None:
    """As printed, with a head where only the stages are shown, beside files of the named stages."""
    data = yaml.safe_load(text)
    whole = text if "pipeline" in data else "pipeline: shown\n" + text
    for use in re.findall(r"(\w+\.py):", text):
        (tmp_path / use).write_text("")
    for weights in re.findall(r"weights: (\S+)", text):
        (tmp_path / weights).write_bytes(b"")
    path = tmp_path / "pipeline.yaml"
    path.write_text(whole)
    pipeline = Pipeline.load(path)
    assert [s.name for s in pipeline.spec.stages] == [s["name"] for s in data["stages"]]


def test_every_option_in_the_guide_of_runs_is_one() -> None:
    """And so is every stage that it names."""
    guide = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    help_text = "".join(run_cli(command, "--help").stdout for command in ("run", "worker", "agent"))
    named = set(re.findall(r"--[a-z-]+", guide.replace("`rq info --url URL`", "")))
    assert {"--resume", "--key", "--stage"} <= named
    assert {name for name in named if name not in help_text} == set()
    (program,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    compile(program, "docs/runs.md", "exec")


def test_the_guide_of_shards_says_what_is_there(tmp_path: Path) -> None:
    """Its stages load, its programs compile, and the table of functions that cut is the one of the module."""
    guide = (Path(__file__).parents[2] / "docs" / "shards.md").read_text()
    (tmp_path / "pipeline.yaml").write_text("")
    for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL):
        for use in re.findall(r"(\w+\.py):", text):
            (tmp_path / use).write_text("")
        for weights in re.findall(r"weights: (\S+)", text):
            (tmp_path / weights).write_bytes(b"")
        path = tmp_path / "pipeline.yaml"
        path.write_text(f"pipeline: shown\nstages:\n{text}")
        Pipeline.load(path)
    for text in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        compile(text, "docs/shards.md", "exec")
    named = set(re.findall(r"^\| `(\w+)\(model, context", guide, re.MULTILINE))
    assert named == {name for name in cutting.__all__ if name not in ("cut_state", "pieces_of")}


def test_every_program_of_the_guide_compiles() -> None:
    """Whoever copies one gets no syntax error."""
    programs = blocks("python")
    assert len(programs) >= 4
    for text in programs:
        compile(text, "docs/pipelines.md", "exec")


def test_the_pipeline_in_python_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of the guide, beside a file with its stage."""
    (tmp_path / "stages.py").write_text(
        "import numpy as np\n"
        "from torchrelay import Stage\n\n"
        "class Encode(Stage):\n"
        "    def __init__(self, model: str) -> None:\n"
        "        self.value = len(model)\n\n"
        "    def forward(self, batch):\n"
        "        return {'vector': np.full((len(batch), 384), self.value, np.float32)}\n"
    )
    (tmp_path / "program.py").write_text(blocks("python")[-1])
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    program = importlib.import_module("program")
    [row] = program.rows
    assert row["vector"].shape == (384,)
    assert set(row["vector"].tolist()) == {6.0}


def test_the_torch_model_of_the_guide_computes() -> None:
    """As printed, without weights: one row of scores for each row of tokens."""
    from torchrelay import testing

    space: dict[str, object] = {"__name__": "guide"}
    exec(next(text for text in blocks("python") if "TorchStage" in text), space)
    table = {"tokens": [np.array([5, 7, 9]), np.array([3])]}
    made = testing.run_stage(space["Score"], table, args={"width": 8}, input={"tokens": "int64[*]"}, pad={"tokens": 0})
    assert isinstance(made, dict)
    assert made["logits"].shape == (2, 5)
