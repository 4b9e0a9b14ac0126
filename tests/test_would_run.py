"""What `check --on` says of where the shards of a stage would go, and why they would not be together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from torchrelay import Pipeline
from torchrelay.would_run import described, views, would_run

Told = Callable[[str, int, Sequence[str]], str]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """What is said of a stage on GPUs with shards of this mode and count, on hosts so described."""

    def run(mode: str, count: int, hosts: Sequence[str]) -> str:
        (tmp_path / "s.py").write_text("S = None\n")
        path = tmp_path / "p.yaml"
        shards = f"{{count: {count}, mode: {mode}}}"
        path.write_text(
            "pipeline: p\ninput: {x: 'float32[12]'}\nstages:\n"
            f"  - {{name: s, use: 's.py:S', device: gpu, outputs: {{y: 'float32[12]'}}, shards: {shards}}}\n"
        )
        out = StringIO()
        console = Console(file=out, width=400)
        for part in views(would_run([Pipeline.load(path)], described(hosts))):
            console.print(part)
        return out.getvalue()

    return run


def test_a_group_of_ranks_is_on_one_host_or_it_is_said_why_not(told: Told) -> None:
    assert told("tensor", 4, ["2xL4:24GiB", "4xL4:24GiB"]).count("shards on one host, joined by NVLink") == 4
    apart = told("tensor", 3, ["1xL4:24GiB", "2xL4:24GiB"])
    assert apart.count("shards on 2 hosts, since none has room for all 3: host1 for 1, host2 for 2") == 3
    none = told("tensor", 4, ["1xL4:24GiB", "2xL4:24GiB"])
    assert "has no place stage s of p@" in none
    assert (
        "wants 4 shards at once, each 1 of a GPU's compute; on all hosts there is room for 3 (most on host2, 2)" in none
    )


def test_gathered_shards_are_on_one_host_or_it_is_said_why_not(told: Told) -> None:
    together = told("gather", 3, ["1xL4:24GiB", "4xL4:24GiB"])
    assert together.count("host2 ") == 4  # three shards, and what combines them
    assert "not beside" not in together
    apart = told("gather", 3, ["1xL4:24GiB", "2xL4:24GiB"])
    assert "not beside s.0, s.1 on host2, which lacks 1 of a GPU's compute" in apart
