"""Where the ranks of an epoch meet: nobody of another epoch, group or place in it is let in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchrelay.queues.groups import GroupRecord, Member
from torchrelay.queues.registry import Registry
from torchrelay.stages.group_line import Line, LineClosed, Switchboard
from torchrelay.workers.rank import RankLost, join_group

HERE = "127.0.0.1"


def record(registry: Registry, rank: int) -> GroupRecord:
    return GroupRecord(registry.client, registry.control, Member("g", rank, 2), f"w{rank}")


def test_a_follower_that_is_late_for_its_epoch_is_refused(registry: Registry) -> None:
    """Its epoch is over, or the store at the address that it read belongs to another one."""
    import torch.distributed

    zero, one = record(registry, 0), record(registry, 1)
    old = zero.tend(0).epoch
    store = torch.distributed.TCPStore(HERE, 0, 2, is_master=True, wait_for_workers=False)
    store.set("token", "the next epoch's")
    assert zero.announce(old, f"the-old-one {HERE} {store.port} 1")
    with pytest.raises(RankLost, match="is of another epoch of group 'g'"):
        join_group(registry, one, old, "cpu", 1.0, HERE)
    zero.end(old, "died", "")
    with pytest.raises(RankLost, match=f"epoch {old} of group 'g' is over"):
        join_group(registry, one, old, "cpu", 1.0, HERE)
    with pytest.raises(RankLost, match=f"epoch {old} of group 'g' is over"):
        join_group(registry, zero, old, "cpu", 1.0, HERE)
    assert not torch.distributed.is_initialized()


def test_a_line_is_only_for_those_who_know_the_epochs_token() -> None:
    """One with another token, or of a rank that is there already, is closed; the right one is heard."""
    board, token = Switchboard(HERE, "t" * 64), "t" * 64
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(board.lines, 3, 20.0)
        first = Line.to(HERE, board.port, token, 1, 5.0)
        for wrong, rank in (("o" * 64, 2), (token, 1), (token, 3), (token, 0)):
            refused = Line.to(HERE, board.port, wrong, rank, 5.0)
            with pytest.raises(LineClosed, match="rank 0 is gone"):
                refused.receive()
        second = Line.to(HERE, board.port, token, 2, 5.0)
        for line, mine in zip(found.result(10), (first, second), strict=True):
            mine.send(b"here")
            assert line.receive() == b"here"
            line.close()
            mine.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    board = Switchboard(HERE, "t" * 64)
    seen = threading.Thread(target=Line.to, args=(HERE, board.port, "t" * 64, 2, 5.0))
    seen.start()
    with pytest.raises(LineClosed, match="rank 1, 3 did not come within"):
        board.lines(4, 0.3)
    seen.join()
    board.close()
