"""A child's part in a group of ranks: the process group of its epoch, and what its rank does there.

Rank 0 opens a TCPStore on a free port and writes where under its epoch; the others read it, check the store's own
token, and connect. So a child that is late for an epoch finds no address, or a token that is not its own, and ends.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis

from torchrelay.errors import StageLoadError
from torchrelay.queues import codec
from torchrelay.queues.groups import GroupRecord
from torchrelay.queues.keys import new_token
from torchrelay.queues.registry import Registry
from torchrelay.stages.group_line import Line, LineClosed, Switchboard
from torchrelay.stages.group_stage import Codec, GroupStage, Report, follow
from torchrelay.stages.runner import Runner
from torchrelay.workers.progress import DRAINING, READY, Progress, ProgressPage
from torchrelay.workers.row_cap import fewer

__all__ = ["Rank", "RankLost", "host_address", "join_group"]

log = logging.getLogger("torchrelay.group")
_MEET_S = 60.0
_POLL_S = 0.02
_TOLD_S = 2.0
_TOKEN = 64
CODEC = Codec(codec.encode, codec.decode)


class RankLost(StageLoadError):
    """The group's epoch is over before this rank was there, or a rank of it did not come."""


def host_address(client: redis.Redis, given: str = "") -> str:
    """Where other hosts reach this one: `given`, else the address by which it reaches Redis."""
    if given:
        return given
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.connect()
        link = getattr(connection, "_sock", None)
        name = link.getsockname() if isinstance(link, socket.socket) and link.family != socket.AF_UNIX else None
        return str(name[0]) if name else "127.0.0.1"
    finally:
        client.connection_pool.release(connection)


@dataclass
class Rank:
    """One rank of a group that has formed. `lines` reach the others from rank 0, and rank 0 from the others."""

    record: GroupRecord
    epoch: int
    lines: Sequence[Line]
    broken: bool = False

    def lead(self, runner: Runner, stop: Any, status_of: dict[str, int]) -> GroupStage:
        """Makes the runner's stage the group's; `status_of` are exit statuses for `room` and `died`."""

        def on_broken(rank: int, report: Report, rows: int, at_once: bool) -> None:
            self.broken = True
            room = report.room and rows > 1
            why = f"rank {rank} ran out of memory" if report.room else f"rank {rank} raised {report.kind}"
            log.error("%s in a forward of %d rows; the group ends and forms anew: %s", why, rows, report.text)
            if not at_once:
                stop.set()  # the error is charged to its job; then the group is over
                return
            self._tell("room" if room else "died", f"{why}: {report.text}", fewer(rows) if room else 0)
            os._exit(status_of["room" if room else "died"])

        for line in self.lines:
            line.receive()  # it has loaded
        inner: Any = runner.stage
        stage = GroupStage(inner, self.lines, CODEC, on_broken)
        runner.stage = stage
        stage.begin()
        return stage

    def _tell(self, kind: Any, why: str, cap: int) -> None:
        """Within a short time: the supervisor ends the epoch as well, and knows less."""

        def tell() -> None:
            try:
                self.record.end(self.epoch, kind, why, cap)
            except Exception as error:
                log.warning("the group was not told why it ends: %s", error)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(_TOLD_S)

    def serve(self, runner: Runner, page: ProgressPage, device: str) -> None:
        """What a rank but 0 does: computes what rank 0 announces, until that ends."""
        batches = rows = 0
        busy_s = since = 0.0

        def progress(running: bool, count: int) -> None:
            nonlocal batches, rows, busy_s, since
            now = time.monotonic()
            if running:
                since = now
            else:
                batches, rows, busy_s = batches + 1, rows + count, busy_s + now - since
            # No `forward_since`: rank 0's supervisor minds the time of the group's forwards.
            page.write(Progress(state=READY, beat=now, rows=rows, batches=batches, busy_s=busy_s))

        self.lines[0].send(codec.encode("loaded"))
        page.write(Progress(state=READY, beat=time.monotonic()))
        follow(runner.stage, self.lines[0], CODEC, device, progress)
        page.write(Progress(state=DRAINING, beat=time.monotonic(), rows=rows, batches=batches, busy_s=busy_s))


def join_group(registry: Registry, record: GroupRecord, epoch: int, device: str, timeout_s: float, given: str) -> Rank:
    """Forms the process group of this epoch with all other ranks. Raises RankLost."""
    import torch.distributed

    dist: Any = torch.distributed  # its stores are not in its stubs
    member, limit = record.member, timedelta(seconds=timeout_s + _MEET_S)
    address = host_address(registry.client, given)
    if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if member.rank == 0:
            token = new_token(_TOKEN)
            board = Switchboard(address, token)
            store = dist.TCPStore(address, 0, member.size, is_master=True, timeout=limit, wait_for_workers=False)
            store.set("token", token)
            if not record.announce(epoch, f"{token} {address} {store.port} {board.port}"):
                raise RankLost(f"epoch {epoch} of group {member.group!r} is over")
            lines = board.lines(member.size, _MEET_S)
        else:
            token, host, port, line_port = _address(record, epoch)
            store = dist.TCPStore(host, int(port), member.size, is_master=False, timeout=limit, wait_for_workers=False)
            if not store.check(["token"]) or store.get("token").decode() != token:
                raise RankLost(f"the store at {host}:{port} is of another epoch of group {member.group!r}")
            lines = [Line.to(host, int(line_port), token, member.rank, _MEET_S)]
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        within = dist.PrefixStore(token, store)
        dist.init_process_group(backend, store=within, rank=member.rank, world_size=member.size, timeout=limit)
    except RankLost:
        raise
    except (LineClosed, RuntimeError, OSError) as error:
        raise RankLost(f"rank {member.rank} of group {member.group!r} did not meet the others: {error}") from error
    return Rank(record, epoch, lines)


def _address(record: GroupRecord, epoch: int) -> tuple[str, str, str, str]:
    deadline = time.monotonic() + _MEET_S
    while time.monotonic() < deadline:
        found = record.address(epoch)
        if found is None:
            raise RankLost(f"epoch {epoch} of group {record.member.group!r} is over")
        if found:
            token, host, port, line_port = found.split(" ")
            return token, host, port, line_port
        time.sleep(_POLL_S)
    raise RankLost(f"rank 0 of group {record.member.group!r} did not say within {_MEET_S:g} s where to meet")
