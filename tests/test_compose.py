"""docker-compose.yml: a durable Redis that never evicts, and a worker for every stage of the example."""

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


def test_each_stage_has_one_worker_and_only_gpu_stages_reserve_a_gpu(compose: dict[str, Any]) -> None:
    """Services and the pipeline file agree on stages and devices."""
    file = ROOT / "examples/docsearch/pipeline.yaml"
    stages = {s.name: s.device for s in Pipeline.load(file).spec.stages}
    workers = {name: s for name, s in compose["services"].items() if name != "redis"}
    assert set(workers) == set(stages)
    for name, service in workers.items():
        assert service["command"] == ["worker", "examples/docsearch/pipeline.yaml", "--stage", name]
        assert ("deploy" in service) == (stages[name] == "gpu")


def test_docker_compose_accepts_the_file() -> None:
    """Where the client is installed, `docker compose config` reads the file without complaint."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed; the tests above parse the file")
    done = subprocess.run([docker, "compose", "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
