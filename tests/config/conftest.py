"""Pipeline files in a folder of their own, beside a stage file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchrelay.config import Pipeline
from torchrelay.errors import ConfigError

STAGES = """
class Stage:
    def __init__(self, size: int = 1, name: "str | None" = None, sizes: "tuple[int, ...]" = (), *, rate: float = 1.0):
        pass

def plain(batch, *, size: int):
    return {}

NOT_CALLABLE = 5
"""

Load = Callable[..., Pipeline]
Problems = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `s.py`."""
    (tmp_path / "s.py").write_text(STAGES)
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Load:
    """Writes a text as a pipeline file and loads it."""

    def run(text: str, overrides: dict[str, str] | None = None) -> Pipeline:
        path = folder / "p.yaml"
        path.write_text(text)
        return Pipeline.load(path, overrides)

    return run


@pytest.fixture
def problems(load: Load, folder: Path) -> Problems:
    """What is wrong with a text: its problems without the file's name."""

    def run(text: str, overrides: dict[str, str] | None = None) -> list[str]:
        found: tuple[str, ...] = ()
        try:
            load(text, overrides)
        except ConfigError as error:
            found = error.problems
        prefix = f"{folder / 'p.yaml'}:"
        assert all(line.startswith(prefix) for line in found)
        return [line.removeprefix(prefix) for line in found]

    return run
