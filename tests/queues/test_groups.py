"""The record of a group of ranks: epochs end once, and none mixes with the next."""

from __future__ import annotations

import pytest

from torchrelay.errors import ConfigError
from torchrelay.queues.groups import GroupRecord, Member, RankTaken, views
from torchrelay.queues.registry import Registry


def record(registry: Registry, rank: int, who: str = "", size: int = 2) -> GroupRecord:
    return GroupRecord(registry.client, registry.control, Member("g", rank, size), who or f"w{rank}")


def test_an_epoch_forms_when_all_are_ready_for_it_and_ends_once(registry: Registry) -> None:
    """Two ranks that see the same death raise the epoch by one; the address goes with its epoch."""
    zero, one = record(registry, 0), record(registry, 1)
    epoch = zero.tend(0).epoch
    assert zero.tend(epoch).ready == 1
    assert one.tend(epoch).ready == 2
    assert zero.announce(epoch, "here")
    assert one.address(epoch) == "here"
    assert zero.end(epoch, "died", "rank 0 died") == epoch + 1
    assert one.end(epoch, "hung", "rank 1 says so too") == epoch + 1
    state = one.tend(epoch)
    assert (state.epoch, state.ready, state.kind, state.why, state.address) == (epoch + 1, 0, "died", "rank 0 died", "")


def test_what_is_late_for_its_epoch_is_refused(registry: Registry) -> None:
    """An address of an epoch that is over is not written, and nobody of that epoch reads the next one's."""
    zero, one = record(registry, 0), record(registry, 1)
    old = zero.tend(0).epoch
    zero.end(old, "died", "")
    assert not zero.announce(old, "late")
    assert zero.announce(old + 1, "new")
    assert one.address(old) is None
    assert one.address(old + 1) == "new"


def test_a_rank_has_one_process_and_a_group_one_size(registry: Registry) -> None:
    """A second one of the same rank is told who has it; one that left can be followed."""
    first = record(registry, 0)
    first.tend(1)
    with pytest.raises(ConfigError, match="rank 0 of group 'g' is served by w0"):
        record(registry, 0, "other").tend(1)
    with pytest.raises(ConfigError, match="has 2 ranks, not 3"):
        record(registry, 0, size=3).tend(1)
    first.tend(0, leave=True)
    assert record(registry, 0, "other").tend(0).epoch >= 1


def test_ranks_of_another_version_or_stage_do_not_join(registry: Registry) -> None:
    """They would compute another model, in shapes that may fit. Once all are gone, the name is free."""

    def of(rank: int, node: str) -> GroupRecord:
        return GroupRecord(registry.client, registry.control, Member("g", rank, 2, node), f"w{rank}-{node}")

    old = [of(rank, "p@1/s") for rank in (0, 1)]
    epoch = old[0].tend(0).epoch
    old[0].tend(epoch)
    assert old[1].tend(epoch).ready == 2
    assert old[0].end(epoch, "room", "", 4) == epoch + 1
    old[1].tend(0, leave=True)
    with pytest.raises(
        ConfigError, match=r"group 'g' computes p@1/s, and this rank is of p@2/s; end the ranks of that"
    ):
        of(1, "p@2/s").tend(epoch + 1)
    old[0].tend(0, leave=True)
    new = of(1, "p@2/s").tend(0)
    assert (new.ready, new.cap) == (0, 0)
    assert of(0, "p@2/s").tend(new.epoch).ready == 1
    assert of(1, "p@2/s").tend(new.epoch).ready == 2


def test_a_rank_that_is_silent_ends_its_epoch_and_an_outage_does_not(registry: Registry) -> None:
    """Its time is over while another one tends: the epoch ends. A gap for all moves everybody's time."""
    zero, one = record(registry, 0), record(registry, 1)
    epoch = zero.tend(0).epoch
    zero.tend(epoch)
    one.tend(epoch)
    key = registry.control.group("g")
    _shift(registry, key, ["until:0", "until:1", "tick"])
    assert zero.tend(epoch).epoch == epoch
    _shift(registry, key, ["until:1"])
    state = zero.tend(epoch)
    assert (state.epoch, state.kind) == (epoch + 1, "vanished")
    assert "rank 1" in state.why


def test_ranks_that_come_after_all_were_killed_have_their_places_in_a_while(registry: Registry) -> None:
    """Nobody tended the group for a minute. The old ones may only have lost the server: they have their time, once."""
    for rank in (0, 1):
        record(registry, rank).tend(1)
    key, new = registry.control.group("g"), record(registry, 0, "new")
    _shift(registry, key, ["until:0", "until:1", "tick"])
    for _ in range(3):
        with pytest.raises(RankTaken, match="served by w0"):
            new.tend(0)
        _shift(registry, key, ["until:0", "until:1", "tick"], 1_000)
    assert (new.tend(0).epoch, new.tend(2).ready) == (2, 1)


def test_people_see_who_is_missing_and_who_has_not_ended_its_process(registry: Registry) -> None:
    zero, one = record(registry, 0), record(registry, 1)
    zero.tend(zero.tend(0).epoch)
    (half,) = views(registry.client, registry.control, ["g", "no such group"]).values()
    assert (half.group, half.size, half.ready, half.waiting, half.missing) == ("g", 2, (0,), (), [1])
    one.tend(1)
    assert views(registry.client, registry.control, ["g"])["g"].formed
    one.end(1, "room", "rank 1 ran out of memory", 4)
    zero.tend(2)
    over = views(registry.client, registry.control, ["g"])["g"]
    assert (over.epoch, over.ready, over.waiting, over.missing, over.formed) == (2, (0,), (1,), [], False)
    assert (over.kind, over.why, over.cap) == ("room", "rank 1 ran out of memory", 4)


def _shift(registry: Registry, key: str, names: list[str], ms: int = 60_000) -> None:
    """A minute, or so long, passes for these."""
    for name in names:
        registry.client.hincrby(key, name, -ms)
