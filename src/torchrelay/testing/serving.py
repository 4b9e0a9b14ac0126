"""A private server, and pipelines on real workers, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import random
import string
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import NoWorkers, StageLoadError
from torchrelay.producer.relay import Relay
from torchrelay.queues import server as embedded
from torchrelay.up import Fleet

__all__ = ["await_ready", "fresh_namespace", "running", "server"]

_POLL_S = 0.01


@contextmanager
def server() -> Iterator[str]:
    """The URL of a new, empty server of this process's own; it and its data are gone afterwards.

    Raises ConfigError, which says what to install, when there is no server program.
    """
    with tempfile.TemporaryDirectory(prefix="torchrelay-", ignore_cleanup_errors=True) as name:
        # The folder's own, so that no folder further up is taken.
        (Path(name) / embedded.FOLDER).mkdir(mode=0o700)
        joined = embedded.find_or_start(Path(name))
        try:
            yield joined.url
        finally:
            joined.close()
            embedded.stop(Path(name))


@contextmanager
def running(
    *pipelines: str | os.PathLike[str] | Pipeline,
    url: str | None = None,
    namespace: str | None = None,
    overrides: Mapping[str, str] | None = None,
    device: str = "auto",
    ready_s: float = 60.0,
) -> Iterator[Relay]:
    """A Relay in a namespace where real workers serve every stage of these pipelines; they drain afterwards.

    Args:
        pipelines: files, `module.py:name`, or Pipelines that were loaded from such.
        url, namespace: default a server of its own, and a new namespace.
        overrides: STAGE.KEY -> YAML value, as `--set` takes them.
        device: auto (a GPU for stages that want one, where there is one), cpu, cuda or cuda:N.
        ready_s: how long the workers may take to load.

    Raises ConfigError for a pipeline that is wrong, StageLoadError when a stage does not load, NoWorkers when one is
    not ready in time.
    """
    loaded = [p if isinstance(p, Pipeline) else Pipeline.load(p, overrides) for p in pipelines]
    with ExitStack() as stack:
        fleet = Fleet(url or stack.enter_context(server()), namespace or fresh_namespace(), allow_cpu=True)
        for pipeline in loaded:
            fleet.add(pipeline, dict(overrides or {}), device=device)
        stack.enter_context(fleet)
        await_ready(fleet, ready_s)
        yield stack.enter_context(Relay(fleet.settings.redis_url, namespace=fleet.settings.namespace))


def await_ready(fleet: Fleet, ready_s: float) -> None:
    """Waits until every worker of a started fleet has loaded its stage. Raises StageLoadError and NoWorkers."""
    deadline = time.monotonic() + ready_s
    while True:
        ready = {node for report in fleet.registry.workers() if report.state == "ready" for node in report.nodes}
        if not (missing := fleet.nodes - ready):
            return
        if fleet.failed():
            raise StageLoadError(f"a worker of {', '.join(sorted(missing))} gave up; what it logged says why")
        if time.monotonic() > deadline:
            raise NoWorkers(f"{', '.join(sorted(missing))}: not ready within {ready_s:g} s; raise ready_s")
        time.sleep(_POLL_S)


def fresh_namespace() -> str:
    """A namespace that nobody has used."""
    return "t" + "".join(random.SystemRandom().choices(string.ascii_lowercase, k=10))
