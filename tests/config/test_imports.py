"""Stage code: found beside the file or installed, imported in private, its arguments checked, its source digested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchrelay.config.imports import bind_args, import_use, source_digest
from torchrelay.errors import ConfigError


def test_siblings(folder: Path) -> None:
    """A stage file imports its siblings, and the folder does not stay on the path."""
    (folder / "sibling_of_t.py").write_text("VALUE = 7")
    (folder / "t.py").write_text("import sibling_of_t\nclass T:\n    value = sibling_of_t.VALUE\n")
    before = list(sys.path)
    assert import_use("t.py:T", folder).value == 7
    assert sys.path == before
    assert "t" not in sys.modules
    assert import_use("t.py:T", folder) is import_use("t.py:T", folder)


def test_module(folder: Path) -> None:
    """An installed module is imported by its name."""
    from xml.dom.minidom import Document

    assert import_use("xml.dom.minidom:Document", folder) is Document


@pytest.mark.parametrize(
    ("source", "use", "says"),
    [
        ("raise SystemExit(3)", "u.py:U", "importing it raised SystemExit"),
        ("import nothing_of_this_name", "u.py:U", "ModuleNotFoundError"),
        ("class U(:", "u.py:U", "SyntaxError"),
        ("class Upper: pass", "u.py:Uper", "did you mean 'Upper'"),
        ("U = 5", "u.py:U", "is int, not a stage"),
        ("", "not.there:U", "ModuleNotFoundError"),
    ],
)
def test_import_refused(folder: Path, source: str, use: str, says: str) -> None:
    """What cannot be imported is a ConfigError with the reason, and leaves nothing half imported."""
    (folder / "u.py").write_text(source)
    before = list(sys.path)
    with pytest.raises(ConfigError, match=says):
        import_use(use, folder)
    assert sys.path == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, None),
        ({"size": 3, "name": None, "sizes": [1, 2], "rate": 1}, None),
        ({"siz": 3}, "unknown argument 'siz'; did you mean 'size'"),
        ({"size": "3"}, "'size': .*integer"),
        ({"size": True}, "'size': .*integer"),
        ({"size": 1.0}, "'size': .*integer"),
        ({"name": 5}, "'name': "),
        ({"sizes": ["1"]}, "'sizes': "),
    ],
)
def test_arguments(folder: Path, args: dict[str, object], says: str | None) -> None:
    """Arguments are checked against annotations, strictly and at any depth."""
    found = bind_args(import_use("s.py:Stage", folder), args)
    assert found == [] if says is None else re.search(says, found[0])


def test_function_arguments(folder: Path) -> None:
    """A function's batch is not an argument; what it needs is reported when missing."""
    plain = import_use("s.py:plain", folder)
    assert bind_args(plain, {}) == ["argument 'size' is missing"]
    assert bind_args(plain, {"size": 1}) == []


def test_digest_imports_nothing(folder: Path) -> None:
    """Digesting a module's source runs neither it nor its parent packages."""
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "pack" / "m.py").write_text("raise SystemExit('imported')")
    code = (
        "from pathlib import Path; from torchrelay.config.imports import source_digest; import sys;"
        "source_digest('pack.m:M', Path('.')); assert 'pack' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_digest_follows_source(folder: Path) -> None:
    """The digest changes with the file's bytes, and a module without a file has one too."""
    first = source_digest("s.py:Stage", folder)
    with (folder / "s.py").open("a") as file:
        file.write("# changed")
    assert source_digest("s.py:Stage", folder) != first
    assert source_digest("sys:exit", folder)


def test_config_needs_neither_torch_nor_redis() -> None:
    """Importing the room loads neither torch nor redis."""
    code = "import sys, torchrelay.config, torchrelay.config.columns; assert not {'torch', 'redis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
