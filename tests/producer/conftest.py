"""A pipeline whose stage obeys its rows, served for a whole module of tests, and one that nobody serves."""

from __future__ import annotations

import random
import string
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PrivateServer, Workers
from torchrelay import Relay

CODE = """
    import time
    from pathlib import Path

    from torchrelay import Stage
    from torchrelay.errors import RetryLater


    class Echo(Stage):
        def forward(self, batch):
            out = []
            for n, do, meta in zip(batch["n"], batch["do"], batch.meta):
                verb, _, rest = do.partition(" ")
                if verb == "raise":
                    raise ValueError(rest)
                if verb == "later" and not Path(rest).exists():
                    raise RetryLater(0.05)
                if verb == "sleep":
                    time.sleep(float(rest))
                while verb == "wait" and not Path(rest).exists():
                    time.sleep(0.005)
                if verb == "log":
                    with open(rest, "a") as file:
                        file.write(n + " ")
                out.append(str(meta.get("tag", "")) + n + "!" if verb == "meta" else n + "!")
            return {"out": out}
"""
YAML = """
    pipeline: {name}
    input: {{n: str, do: str = "", x: "float32[*] = []"}}
    output: [out, x]
    stages:
      - {{name: echo, use: "stages.py:Echo", inputs: [n, do],
         retry: {{attempts: {attempts}}}, batch: {{max_rows: {rows}}}}}
"""


def write_pipeline(folder: Path, name: str = "echo", rows: int = 32, attempts: int = 1) -> Path:
    """The pipeline's files in this folder; returns the YAML's path."""
    (folder / "stages.py").write_text(textwrap.dedent(CODE))
    path = folder / f"{name}.yaml"
    path.write_text(textwrap.dedent(YAML.format(name=name, rows=rows, attempts=attempts)))
    return path


@pytest.fixture(scope="module")
def served(server: PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A namespace in which workers serve `echo`, and `one` with batches of one row; `idle` is served by nobody."""
    namespace = "m" + "".join(random.choices(string.ascii_lowercase, k=10))
    folder = tmp_path_factory.mktemp("served")
    workers = Workers(server.url, namespace)
    workers.start(write_pipeline(folder))
    workers.start(write_pipeline(folder, "one", 1))
    with Relay(server.url, namespace=namespace) as relay:
        relay.register(write_pipeline(folder, "idle"))
    yield namespace
    workers.stop()


@pytest.fixture
def near(server_url: str, served: str) -> Iterator[Relay]:
    """A client of that namespace."""
    with Relay(server_url, namespace=served) as relay:
        yield relay
