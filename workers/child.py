"""The process that loads a stage and runs its loop. Started by the supervisor as `python -m torchrelay.workers.child`.

Its orders come as one JSON line on standard input, which then stays open: when it closes, the supervisor is gone, and
the child gives its work back and ends. Exit status: 0 drained, 2 it can never start, 3 the stage does not load,
4 retired, 5 the server is away, 6 the device failed under a batch, 1 anything else.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import redis

from torchrelay.config.flow import columns_of
from torchrelay.config.fusing import Group
from torchrelay.config.graph import is_runs
from torchrelay.config.imports import import_use
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.config.shards import PartConfig, shard_of
from torchrelay.config.spec import StageConfig
from torchrelay.errors import BrokerUnavailable, ConfigError, DeviceError, StageLoadError, TorchrelayError
from torchrelay.queues.connection import connect
from torchrelay.queues.groups import GroupRecord, Member
from torchrelay.queues.keys import ControlKeys
from torchrelay.queues.plans import KeptPlans
from torchrelay.queues.registry import Registry
from torchrelay.queues.scripts import WorkerRetired
from torchrelay.stages import Runner, StageContext, make_group_runner
from torchrelay.stages.group_line import LineClosed
from torchrelay.workers.device import pick_device
from torchrelay.workers.edge import check_codecs
from torchrelay.workers.logs import set_up_logs
from torchrelay.workers.loop import StageLoop
from torchrelay.workers.node import NodeContext
from torchrelay.workers.overlap import OverlappedLoop
from torchrelay.workers.parts import Surroundings
from torchrelay.workers.progress import ProgressPage
from torchrelay.workers.rank import Rank
from torchrelay.workers.run_stages import StillHeld, run_stage
from torchrelay.workers.splitting import is_split, split_stage
from torchrelay.workers.stop import Stop
from torchrelay.workers.storage import Ends, SharedMemory

log = logging.getLogger("torchrelay.worker")
EXIT_DRAINED, EXIT_FAILED, EXIT_CONFIG, EXIT_LOAD, EXIT_RETIRED, EXIT_BROKER, EXIT_DEVICE = range(7)
# Of a group: a forward did not fit on one rank; one rank failed, and the group is over.
EXIT_ROOM, EXIT_GROUP = 107, 108
_ORPHAN_GRACE_S = 3.0
# Batches made ready ahead, where the stage does not say.
_AHEAD = {"cuda": 2}


@dataclass(frozen=True, slots=True)
class Orders:
    """What the supervisor tells its child."""

    pipeline: str
    ref: str
    overrides: dict[str, str]
    stages: list[str]
    url: str
    namespace: str
    lanes: int
    lease_ms: int
    device: str
    incarnation: str
    worker: str
    page: str
    log: Literal["text", "json"]
    arena_bytes: int | None
    arena_dir: str
    device_arena_bytes: int
    run_writer: str = ""
    group: str = ""
    rank: int = 0
    ranks: int = 1
    epoch: int = 0
    group_address: str = ""
    row_cap: int = 0

    def encode(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def _watch_parent(stop: Stop) -> None:
    """Ends this process soon after its standard input closes, whatever the stage is doing."""

    def wait() -> None:
        os.read(0, 1)
        stop.set()
        time.sleep(_ORPHAN_GRACE_S)
        os._exit(EXIT_FAILED)

    threading.Thread(target=wait, name="torchrelay-parent", daemon=True).start()


def _read_orders() -> Orders:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            raise SystemExit(EXIT_FAILED)
        line += piece
    return Orders(**json.loads(line))


def _end_at_once(error: BaseException) -> None:
    """After a CUDA error that lasts: any call to CUDA, also of a destructor, could hang. The progress page still says
    which jobs were being computed."""
    log.error("the device failed, and is of no more use to this process", exc_info=error)
    os._exit(EXIT_DEVICE)


def _stage(spec: StageConfig, home: Pipeline, still_held: StillHeld, orders: Orders, where: StageContext) -> object:
    """What a stage's entry names; what reads and writes for runs is ours, and so is a part of a model."""
    if is_runs(spec.name):
        return run_stage(spec.name, home, still_held, orders.run_writer)
    if isinstance(spec, PartConfig) and is_split(spec):
        return _split_stage(spec, home, orders, where)
    return spec.use and import_use(spec.use, home.base_dir)


def _split_stage(spec: PartConfig, home: Pipeline, orders: Orders, where: StageContext) -> object:
    with connect(orders.url) as client:
        kept = KeptPlans(client, ControlKeys(orders.namespace))
        return split_stage(spec, home, where, lambda place, make: kept.agree(place, make, orders.worker))


def _context(home: Pipeline, group: Group, registry: Registry, orders: Orders) -> NodeContext:
    """Where it claims: the stages in their pipeline, and the same stages in the graph of its runs."""
    twin = None
    if home.twin is not None:
        mine = Group.of(home.twin.spec, home.twin.graph, group.names)
        twin = _context(home.twin, mine, registry, orders)
    number = registry.register(home, current=False).number
    lanes, lease_ms = registry.lanes, orders.lease_ms
    return NodeContext(home, number, group, lanes, orders.incarnation, orders.worker, lease_ms, twin=twin)


def serve(orders: Orders, stop: Stop) -> None:
    """Loads the stage and runs the loop until it drains."""
    pipeline = Pipeline.load(orders.pipeline, orders.overrides)
    if pipeline.ref != orders.ref:
        raise ConfigError(
            f"{orders.pipeline} or its code changed since this worker was started: it was {orders.ref} and is "
            f"{pipeline.ref} now; restart the worker to serve the new version"
        )
    home = pipeline.for_runs() if is_runs(orders.stages[0]) else pipeline
    # What is fused is tuning: it is as the supervisor read it, and told in its reports, whatever the file says now.
    group = Group.of(home.spec, home.graph, orders.stages)
    spec = group.stages[0]
    check_codecs(home.graph, group.last)
    device = pick_device(spec, orders.device)
    still_held = StillHeld(orders.lease_ms)
    where = _stage_context(orders, device, pipeline, spec)
    runner = make_group_runner(lambda s: _stage(s, home, still_held, orders, where), group)
    client = connect(orders.url)
    registry = Registry(client, orders.namespace, orders.lanes)
    rank = _join(orders, registry, device, max(stage.timeout_s for stage in group.stages))
    runner.load(where)
    if rank is not None and orders.rank:
        _follow(rank, runner, orders, device)
        return
    if rank is not None:
        rank.lead(runner, stop, {"room": EXIT_ROOM, "died": EXIT_GROUP})
    for member, node in zip(runner.members, group.nodes, strict=True):
        member.warm_up(columns_of(home.graph, node))
    registry.open()
    still_held.connect(client, registry.lanes)
    registry.register(pipeline, current=False)
    context = _context(home, group, registry, orders)
    page = ProgressPage(Path(orders.page))
    # Both sides hold it by now; its name would outlive a supervisor that is killed.
    page.path.unlink(missing_ok=True)
    for passed in range(len(group.nodes)):
        runner.behind(passed).on_device_lost = _end_at_once
    try:
        log.info("ready on %s", device)
        settings = Settings(
            namespace=orders.namespace,
            arena_bytes=orders.arena_bytes,
            arena_dir=orders.arena_dir,
            device_arena_bytes=orders.device_arena_bytes,
        )
        ahead = spec.batch.ahead if spec.batch.ahead is not None else _AHEAD.get(device.partition(":")[0], 0)
        # Only the overlapped loop knows how to copy from another device, and to leave columns on its own.
        ends = Ends(reads=runner.takes_tensors and group.follows_device(), writes=group.stages[-1].handoff == "device")
        memory = SharedMemory.open(registry, settings, pinned_for=device if ahead else "", ends=ends)
        around = Surroundings(context, client, page, memory, stop, orders.row_cap)
        # What was loaded stays for good: each full collection would look through all of it again, for every few jobs.
        gc.collect()
        gc.freeze()
        (OverlappedLoop(around, runner, ahead) if ahead else StageLoop(around, runner)).run()
        if rank is not None and rank.broken:
            # All is given back. A collective that the failed rank never joined may still hold the device.
            log.warning("one rank failed; the group forms anew")
            os._exit(EXIT_GROUP)
    finally:
        runner.close()


def _join(orders: Orders, registry: Registry, device: str, timeout_s: float) -> Rank | None:
    """The process group must be there before the stage loads."""
    if not orders.group:
        return None
    from torchrelay.workers.rank import join_group

    member = Member(orders.group, orders.rank, orders.ranks)
    record = GroupRecord(registry.client, registry.control, member, orders.worker)
    return join_group(registry, record, orders.epoch, device, timeout_s, orders.group_address)


def _stage_context(orders: Orders, device: str, pipeline: Pipeline, spec: StageConfig) -> StageContext:
    shard, shards = shard_of(spec) if orders.ranks == 1 else (orders.rank, orders.ranks)
    return StageContext(
        device=device,
        shard=shard,
        shards=shards,
        rank=orders.rank,
        world_size=orders.ranks,
        version=pipeline.version,
        base_dir=pipeline.base_dir,
    )


def _follow(rank: Rank, runner: Runner, orders: Orders, device: str) -> None:
    page = ProgressPage(Path(orders.page))
    page.path.unlink(missing_ok=True)
    try:
        log.info("ready on %s as rank %d of %d", device, orders.rank, orders.ranks)
        gc.collect()
        gc.freeze()
        rank.serve(runner, page, device)
    finally:
        runner.close()


def main() -> int:
    """Runs one child; returns its exit status."""
    orders = _read_orders()
    set_up_logs(orders.log, worker=orders.worker, stage="+".join(orders.stages))
    stop = Stop()
    signal.signal(signal.SIGTERM, stop.set)
    # A terminal sends Ctrl-C to the whole group; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    _watch_parent(stop)
    try:
        serve(orders, stop)
    except WorkerRetired:
        log.warning("this worker was retired while it was away; ending")
        return EXIT_RETIRED
    except LineClosed as error:
        log.warning("%s", error)
        return EXIT_GROUP
    except (ConfigError, DeviceError) as error:
        log.error("%s", error)
        return EXIT_CONFIG
    except SystemExit as error:
        log.error("stage %r ended the process with status %s while it loaded", "+".join(orders.stages), error.code)
        return EXIT_LOAD
    except StageLoadError as error:
        log.error("%s", error, exc_info=error.__cause__)
        return EXIT_LOAD
    except (BrokerUnavailable, redis.ConnectionError, redis.TimeoutError) as error:
        log.error("the server is away: %s", error)
        return EXIT_BROKER
    except TorchrelayError:
        log.exception("the worker cannot go on")
        return EXIT_FAILED
    return EXIT_DRAINED


if __name__ == "__main__":
    sys.exit(main())
