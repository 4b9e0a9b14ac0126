"""A supervisor's part in a group: the place of a rank that was killed is waited for, that of a living one is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from torchrelay.queues.groups import GroupRecord, Member
from torchrelay.queues.registry import Registry
from torchrelay.workers import group
from torchrelay.workers.group import GroupWatch

ME = Member("g", 1, 2)


@pytest.fixture
def newcomer(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupWatch]:
    """Who waits for a rank for half a second."""
    monkeypatch.setattr(group, "_TAKEN_S", 0.5)
    watch = GroupWatch(registry, ME, "new", lambda: None)
    yield watch
    watch.stop()


def test_a_rank_whose_place_another_has_waits_and_then_has_it(
    registry: Registry, newcomer: GroupWatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once."""
    old = GroupRecord(registry.client, registry.control, ME, "old")
    old.tend(1)
    with caplog.at_level(logging.WARNING, "torchrelay.group"):
        assert newcomer.ready() is None
        assert newcomer.ready() is None
    assert newcomer.refused is None
    (said,) = caplog.messages
    assert "rank 1 of group 'g' is served by old; end that one first" in said
    assert "if it was killed, this one has its place in 3 s" in said
    old.tend(0, leave=True)
    newcomer.ready()
    assert newcomer.joined
    assert newcomer.refused is None


def test_a_rank_whose_place_a_living_one_keeps_is_refused(registry: Registry, newcomer: GroupWatch) -> None:
    old = GroupRecord(registry.client, registry.control, ME, "old")

    def refused() -> bool:
        old.tend(1)
        return newcomer.ready() is None and newcomer.refused is not None

    wait_until(refused, 5.0)
    assert "rank 1 of group 'g' is served by old; end that one first" in str(newcomer.refused)
    assert not newcomer.joined
