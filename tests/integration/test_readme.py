"""What README shows is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import Workers
from torchrelay import Pipeline, Relay
from torchrelay.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(language: str, number: int = 0) -> str:
    """The n-th fenced block of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[number]


def test_the_smallest_pipeline_runs_as_printed(
    tmp_path: Path, relay: Relay, workers: Workers, server_url: str, namespace: str, monkeypatch
) -> None:
    """The YAML and the stage of README serve the calls of README."""
    (tmp_path / "shout.yaml").write_text(block("yaml"))
    (tmp_path / "shout.py").write_text(block("python", 0))
    (tmp_path / "lines.txt").write_text("a\nb\n")
    relay.register(Pipeline.load(tmp_path / "shout.yaml"))
    workers.start(tmp_path / "shout.yaml")
    monkeypatch.setenv("TORCHRELAY_REDIS_URL", server_url)
    monkeypatch.setenv("TORCHRELAY_NAMESPACE", namespace)
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    space = {"print": printed.append}
    exec(block("python", 1), space)  # the client of the same page
    assert printed == ["A\n", "B\n"]
    assert space["future"].result(timeout=10) == {"text": "HI"}


def test_the_commands_that_readme_lists_exist() -> None:
    """The list of commands in README is the command line's own."""
    listed = re.search(r"lists the commands: `([^`]+)`", README)
    assert listed is not None
    registered = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    registered |= {g.name for g in app.registered_groups}
    assert set(listed[1].split()) == registered
