"""pytest fixtures: `torchrelay_server`, `torchrelay_relay` and `running_pipeline`.

Switch them on in a conftest.py: `pytest_plugins = ["torchrelay.testing.fixtures"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from torchrelay.producer.relay import Relay
from torchrelay.testing.serving import fresh_namespace, running, server

__all__ = ["running_pipeline", "torchrelay_relay", "torchrelay_server"]


@pytest.fixture(scope="session")
def torchrelay_server() -> Iterator[str]:
    """The URL of a server that the test session has to itself."""
    with server() as url:
        yield url


@pytest.fixture
def torchrelay_relay(torchrelay_server: str) -> Iterator[Relay]:
    """A Relay in a namespace of this test alone."""
    with Relay(torchrelay_server, namespace=fresh_namespace()) as relay:
        yield relay


@pytest.fixture
def running_pipeline(torchrelay_server: str) -> Iterator[Callable[..., Relay]]:
    """`running_pipeline("embed.yaml", ...)` starts workers as `testing.running` does, until the test ends.

    It returns a Relay in a namespace of its own.
    """
    with ExitStack() as stack:

        def start(*pipelines: object, **options: object) -> Relay:
            given = {"url": torchrelay_server, **options}
            return stack.enter_context(running(*pipelines, **given))  # type: ignore[arg-type]  # running's own signature

        yield start
