"""A real server for the whole session, a namespace for each test, and ways to build pipelines and run workers."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import redis

from tests.cli_server import COMMANDS
from torchrelay import Relay
from torchrelay.config import Pipeline, Settings
from torchrelay.queues.registry import Registry
from torchrelay.queues.server import server_command, server_program
from torchrelay.testing.serving import await_ready, fresh_namespace
from torchrelay.workers.supervisor import Supervisor

# Worker processes are many here and the cores few: threads of torch that wait for each other would only burn them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("torchrelay", deadline=None)
hypothesis.settings.load_profile("torchrelay")


def pytest_collection_finish() -> None:
    """What the imports made stays: no collection need look at it again, in this process or in a fork of it."""
    gc.collect()
    gc.freeze()


@dataclass
class PrivateServer:
    """A server process of the tests' own, on a Unix socket in a folder of its own."""

    folder: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "s.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> PrivateServer:
        command = [*server_command(server_program(), self.socket, self.folder), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis(unix_socket_path=str(self.socket))

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

        wait_until(answers, 10.0)
        client.close()
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def wait_until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Waits for a condition; fails the test when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {condition}")
        time.sleep(0.01)


@contextmanager
def private_server(*options: str) -> Iterator[PrivateServer]:
    """A server with extra options (`"--maxmemory", "64mb"`), gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="trs-") as folder:
        server = PrivateServer(Path(folder), options)
        try:
            yield server.start()
        finally:
            server.stop()


@pytest.fixture(scope="session")
def arena_dir() -> Iterator[Path]:
    """The session's own place for shared memory."""
    folder = tempfile.mkdtemp(prefix="trs-arena-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    os.environ["TORCHRELAY_ARENA_DIR"] = folder
    yield Path(folder)
    del os.environ["TORCHRELAY_ARENA_DIR"]
    shutil.rmtree(folder)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False) if os.getuid() == 0 else None
    if made is None or made.returncode:
        pytest.skip(f"may not mount a tmpfs here: {'not root' if made is None else made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def await_no_shared_memory(arena_dir: Path) -> None:
    """Whatever tests do, and whoever dies in them: once their processes are gone, so is their shared memory."""
    wait_until(lambda: not list(arena_dir.rglob("*.data")), 5.0)


@pytest.fixture(autouse=True)
def no_shared_memory_left(arena_dir: Path) -> Iterator[None]:
    """After each test; a module whose workers serve all its tests overrides this with one that looks at its end."""
    yield
    await_no_shared_memory(arena_dir)


@pytest.fixture(scope="session")
def server() -> Iterator[PrivateServer]:
    with private_server() as made:
        yield made


@pytest.fixture(scope="session")
def server_url(server: PrivateServer) -> str:
    return server.url


@pytest.fixture
def redis_client(server_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(server_url)
    yield client
    client.close()


@pytest.fixture
def namespace() -> str:
    return fresh_namespace()


@pytest.fixture
def registry(redis_client: redis.Redis, namespace: str) -> Registry:
    made = Registry(redis_client, namespace, 1)
    made.open()
    return made


@pytest.fixture
def relay(server_url: str, namespace: str) -> Iterator[Relay]:
    with Relay(server_url, namespace=namespace) as made:
        yield made


MakePipeline = Callable[..., Path]


@pytest.fixture
def make_pipeline(tmp_path: Path) -> MakePipeline:
    """`make_pipeline(yaml, code)` writes `pipeline.yaml` and `stages.py` beside it, and returns the YAML's path."""

    def make(yaml: str, code: str = "", name: str = "pipeline.yaml") -> Path:
        (tmp_path / "stages.py").write_text(textwrap.dedent(code))
        path = tmp_path / name
        path.write_text(textwrap.dedent(yaml))
        return path

    return make


class Workers:
    """Supervisors in threads of the test's process, their children real processes."""

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._namespace = namespace
        self._stack = ExitStack()
        self.fleets: list[object] = []

    def start(
        self,
        path: Path,
        *,
        stage: str | None = None,
        lease_ms: int = 15_000,
        ready_s: float = 30.0,
        device: str = "auto",
    ) -> list[Supervisor]:
        """Starts one worker per stage (or of one stage), and waits until they are ready."""
        from torchrelay.up import Fleet

        os.environ["TORCHRELAY_LEASE_MS"] = str(lease_ms)
        try:
            fleet = Fleet(self._url, self._namespace, allow_cpu=True)
        finally:
            del os.environ["TORCHRELAY_LEASE_MS"]
        fleet.add(Pipeline.load(path), stage=stage, device=device)
        self._stack.enter_context(fleet)
        await_ready(fleet, ready_s)
        return fleet.supervisors

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def workers(server_url: str, namespace: str) -> Iterator[Workers]:
    made = Workers(server_url, namespace)
    yield made
    made.stop()


@pytest.fixture
def settings(server_url: str, namespace: str) -> Settings:
    return Settings(redis_url=server_url, namespace=namespace)


def run_cli(*arguments: str, cwd: Path | None = None, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """The command line as a real process."""
    return COMMANDS.run(arguments, cwd, timeout_s)
