"""The public names as type checkers see them: a wrong annotation breaks users' builds, not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USAGE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "typing").glob("*.py"))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )


def test_mypy_strict_accepts_programs_over_the_public_names():
    """The programs of tests/typing pass mypy --strict, with the exact types that they assert."""
    # With the options of `make check` it also reads what that left in the cache.
    done = _run("mypy", "--strict", *USAGE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_accepts_programs_over_the_public_names():
    """The same programs pass pyright."""
    try:
        started = _run("pyright", "--version")
    except subprocess.TimeoutExpired:
        started = None
    if started is None or started.returncode:
        # Its package on PyPI fetches the checker itself at the first run, which needs a network.
        reason = "pyright does not start here: " + (started.stderr[-300:] if started else "no answer")
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    done = _run("pyright", "--pythonpath", sys.executable, *USAGE)
    assert done.returncode == 0, done.stdout + done.stderr
