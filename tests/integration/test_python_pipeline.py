"""A pipeline that a Python module holds, through the command line and real workers."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.conftest import Workers, run_cli
from torchrelay import Pipeline, Relay, StageSpec
from torchrelay.errors import ConfigError
from torchrelay.up import Fleet

MODULE = """
    from torchrelay import Pipeline, Stage, StageSpec


    class Upper(Stage):
        def forward(self, batch):
            return {"out": [t.upper() for t in batch["t"]]}


    def repeat(batch, *, times: int = 2):
        return {"said": [o * times for o in batch["out"]]}


    loud = Pipeline(
        "loud",
        input={"t": "str"},
        stages=[
            StageSpec("upper", use=Upper, outputs={"out": "str"}),
            StageSpec("repeat", use=repeat, args={"times": 3}, outputs={"said": "str"}),
        ],
    )
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "flow.py"
    path.write_text(textwrap.dedent(MODULE))
    return path


def test_workers_load_it_anew(module: Path, workers: Workers, relay: Relay, namespace: str, server_url: str) -> None:
    """Workers, `submit` and `register` take module.py:name; rows pass through its class and its function."""
    workers.start(Path(f"{module}:loud"))
    assert relay.register(f"{module}:loud") == Pipeline.load(f"{module}:loud").ref
    assert relay.infer("loud", {"t": "ab"}, deadline_s=30) == {"said": "ABABAB"}
    where = ("--redis", server_url, "--namespace", namespace)
    done = run_cli("submit", "flow.py:loud", '{"t": "x"}', "--wait", *where, cwd=module.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["said"] == "XXX"


def test_check(module: Path) -> None:
    """`check` shows a good one, with overrides of its stages, and tells a bad argument with its stage."""
    (module.parent / "other.yaml").write_text("pipeline: o\nstages:\n  - {name: one, use: 'flow.py:repeat'}\n")
    good = run_cli("check", "flow.py:loud", "other.yaml", "--set", "upper.batch.max_rows=3", cwd=module.parent)
    assert good.returncode == 0, good.stderr
    module.write_text(module.read_text().replace('"times": 3', '"time": 3'))
    bad = run_cli("check", "flow.py:loud", "--json", cwd=module.parent)
    assert bad.returncode == 2
    (found,) = json.loads(bad.stdout)
    assert found["problems"] == [f"{module}:loud: stage 'repeat': unknown argument 'time'; did you mean 'times'?"]


def test_only_in_memory(tmp_path: Path) -> None:
    """Workers cannot load what is only in this process: refused before anything starts."""
    (tmp_path / "flow.py").write_text(textwrap.dedent(MODULE))
    pipeline = Pipeline("p", stages=[StageSpec("a", use="flow.py:Upper")], base_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"save it in a module and name it as module\.py:name"):
        Fleet("redis://nowhere").add(pipeline)
