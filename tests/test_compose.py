"""docker-compose.yml: a durable Redis that never evicts, a coordinator, and agents for the example."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrelay import Pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_redis_keeps_jobs_and_never_evicts(compose: dict[str, Any]) -> None:
    """The server writes an append-only file and runs with noeviction, as `check_server` demands."""
    command = compose["services"]["redis"]["command"]
    pairs = dict(zip(command[1::2], command[2::2], strict=True))
    assert pairs["--appendonly"] == "yes"
    assert pairs["--maxmemory-policy"] == "noeviction"
    assert compose["services"]["redis"]["volumes"]


FILE = "examples/docsearch/pipeline.yaml"


def test_a_coordinator_and_agents_serve_every_stage(compose: dict[str, Any]) -> None:
    """One agent has the GPU that a stage wants, others are scaled; all know the same file, which is in the image."""
    services = {name: s for name, s in compose["services"].items() if name != "redis"}
    assert {name: s["command"] for name, s in services.items()} == {
        "coordinator": ["coordinator"],
        "agent": ["agent", FILE],
        "cpu": ["agent", FILE, "--slots", "cpu=2"],
    }
    assert {stage.device for stage in Pipeline.load(ROOT / FILE).spec.stages} == {"cpu", "gpu"}
    assert services["agent"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert services["cpu"]["deploy"]["replicas"] >= 2
    assert len({s["environment"]["TORCHRELAY_NAMESPACE"] for s in services.values()}) == 1


def test_the_image_holds_every_room(compose: dict[str, Any]) -> None:
    """A room that the image lacks would be missed only when it runs."""
    copied = {line.split()[1] for line in (ROOT / "deploy/Dockerfile").read_text().splitlines() if line[:4] == "COPY"}
    assert {link.name for link in (ROOT / "src/torchrelay").iterdir() if link.is_symlink()} <= copied


@pytest.mark.parametrize("name", ["agent", "coordinator"])
def test_units_of_systemd_start_a_command_that_there_is(name: str) -> None:
    """They drain for longer than a batch may take, and are started again."""
    lines = (ROOT / f"deploy/torchrelay-{name}.service").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert told["ExecStart"].split()[:2] == ["/srv/torchrelay/bin/torchrelay", name]
    assert (told["Restart"], told["KillMode"], told["KillSignal"]) == ("always", "mixed", "SIGTERM")
    assert int(told["TimeoutStopSec"]) > 30


COMPOSE = (("docker", "compose"), ("docker-compose",))


def test_docker_compose_accepts_the_file() -> None:
    """Where a client is installed, as docker's plug-in or on its own, its `config` reads the file without complaint."""
    there = (client for client in COMPOSE if _runs(*client, "version"))
    if (client := next(there, None)) is None:
        pytest.skip("docker compose is not installed; the tests above parse the file")
    done = subprocess.run([*client, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _runs(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
