"""How many workers each stage is to have. Pure: loads, limits and the state of the last decision in, numbers out.

More come at once, fewer only when fewer were enough for a while: the longer a worker takes to load, the longer. What is
decided on one look at noisy figures and taken back on the next does harm, so a number is held that was lowered before
and had to be raised again while the load was the same, each time for twice as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.shards import PartConfig
from torchrelay.coordinator.demand import LOAD_S, Coming, Demand, Limits, demand_of
from torchrelay.coordinator.lately import Lately, looped
from torchrelay.coordinator.loads import Loads, Node, NodeLoad
from torchrelay.coordinator.pace import Pace, jammed
from torchrelay.coordinator.sharing import Fits, Wish, share
from torchrelay.coordinator.signals import sane
from torchrelay.coordinator.wholes import as_wholes, evened, of_wholes
from torchrelay.queues.waiting import CLASSES

__all__ = ["Limits", "Plan", "State", "decide", "limits_of"]

# Fewer must have been enough for so long, and for so much of the time that a worker loads. Those that were there to
# catch up leave sooner: their work is done.
_KEEP_S, _KEEP_LOADS, _KEEP_LATE_S, _LOWER_EVERY_S = 20.0, 0.25, 10.0, 10.0
# The highest of a few noisy looks is low by chance now and then: a number that stands for so long falls only to a need
# that is clearly less.
_STANDS_S = 120.0
_LEAST_HOLD_S, _MOST_HOLD_S = 300.0, 86_400.0
# A number that was lowered so recently, and is raised at a need like that, was lowered wrongly.
_REGRET_S = 600.0
_ALIKE = 0.75
# What comes to a group may be so many times what comes to those before it, before it is taken for their catching up.
_ALIKE_FLOW = 1.1
_GAIN_KEPT = 0.99
# Jobs wait too long, though there should be workers enough: for so long, it may be a burst.
_BEHIND_S = 6.0
_BEHIND_STEP = 0.1
_MOST_AT_ONCE, _MOST_GROWTH = 4, 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How many workers each group is to have, by (`name@version`, first stage); and in words, why."""

    replicas: Mapping[Node, int] = field(default_factory=dict)
    reasons: Mapping[Node, str] = field(default_factory=dict)


class Look(NamedTuple):
    """How many would have been enough at a time, how many would not have been clearly too many, and how many would have
    been enough for what came then, without what had to be caught up."""

    at_s: float
    enough: int
    slack: int
    lasting: int


@dataclass(frozen=True, slots=True)
class Group:
    """What is remembered of one group, watched since `since_s`, whose number changed at `changed_s`.

    `looks` are the last ones, newest last; none is below a later one in everything. `floor` holds until
    `floor_until_s`, while the need is not far below `floor_need`.
    """

    replicas: int
    since_s: float
    changed_s: float = -1e18
    looks: tuple[Look, ...] = ()
    lowered_s: float = -1e18
    lowered_need: float = 0.0
    floor: int = 0
    floor_need: float = 0.0
    floor_until_s: float = -1e18
    hold_s: float = 0.0
    behind_since_s: float | None = None
    behind_rows: float = 0.0
    came: float = 0.0
    sent: float = 0.0
    pace: Pace = field(default_factory=Pace)
    lately: Lately = field(default_factory=Lately)
    again: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """What one decision leaves for the next. With an empty one, a group has the workers that are alive."""

    groups: Mapping[Node, Group] = field(default_factory=dict)

    @classmethod
    def of(cls, replicas: Mapping[Node, int], now_s: float) -> State:
        """Where these numbers of workers were wanted before, by a leader that is gone."""
        return cls({key: Group(count, now_s, now_s) for key, count in replicas.items()})


def limits_of(pipeline: Pipeline, pinned: Mapping[str, int] | None = None, *, old: bool = False) -> tuple[Limits, ...]:
    """The limits of each group of stages of a version. `pinned` are numbers that a user set, by any stage of the group
    or the one that it is a part of; an `old` version takes no new jobs, and needs nobody once the last is done."""
    found = []
    for group in pipeline.groups:
        firsts = [pipeline.graph.nodes[p - 1].name for p in group.first.preds if p]
        delays = group.stages[0].scale.delay_ms
        part = group.stages[0]
        whole = part.of if isinstance(part, PartConfig) else ""
        pins = [pinned[name] for name in (*group.names, whole) if name in pinned] if pinned else []
        found.append(
            Limits(
                ref=pipeline.ref,
                stage=group.first.name,
                stages=tuple(group.names),
                after=tuple(pipeline.group_of(name).first.name for name in firsts),
                min=0 if old else max(s.replicas.min for s in group.stages),
                max=max(s.replicas.max for s in group.stages),
                device=group.stages[0].device,
                delay_ms={n: d for n in CLASSES if (d := getattr(delays, n)) is not None},
                pinned=pins[0] if pins else None,
                whole=whole,
            )
        )
    return tuple(found)


def decide(
    loads: Loads, limits: Iterable[Limits], fits: Fits, state: State | None = None, now_s: float | None = None
) -> tuple[Plan, State]:
    """One decision.

    Args:
        loads: what `LoadTracker.update` gave.
        limits: of every group that may have workers.
        fits: whether there is room for so many workers of each (`sharing.slots`, or an allocator).
        state: what the last decision left, None at first.
        now_s: on the clock of `loads`, by default the time of these.
    """
    now_s = loads.at_s if now_s is None else now_s
    groups = state.groups if state is not None else {}
    demands: dict[Node, Demand] = {}
    wishes: list[Wish] = []
    after: dict[Node, Group] = {}
    found = {one.key: one for one in limits}
    for one in _in_order(list(found.values())):
        nodes = [loads.nodes.get((one.ref, s), NodeLoad(one.ref, s)) for s in one.stages or (one.stage,)]
        group = groups.get(one.key) or Group(one.clamp(nodes[0].alive), now_s, now_s)
        followers = [loads.nodes[o.key] for o in found.values() if _follows(o, one) and o.key in loads.nodes]
        group = _watched(group, nodes[0], followers, now_s)
        nodes[0] = replace(nodes[0], seconds_per_row=sane(nodes[0].seconds_per_row, 1e9) * group.pace.factor)
        coming, group = _coming(one, nodes[0], group, loads, demands, found)
        before = [after[one.ref, a] for a in one.after if (one.ref, a) in after]
        group = _again(group, nodes[0], before, now_s)
        again = replace(coming, least=max(coming.least, group.again))
        demand = demand_of(one, nodes, group.replicas, again if looped(nodes[0]) else coming)
        wanted, group = _over_time(one, demand, group, nodes[0], now_s)
        demands[one.key], after[one.key] = demand, group
        wishes.append(_wish(one, wanted, group, demand, demand_of(one, nodes, group.replicas, again)))
    less = of_wholes({key: found[key].clamp(demand.less) for key, demand in demands.items()}, found)
    wishes = as_wholes(wishes, found)
    counts = evened(share(wishes, fits), found)
    plan = Plan(
        {key: counts[key] for key in found},
        {w.key: _reason(found[w.key], w, counts[w.key], demands[w.key], after[w.key], less[w.key]) for w in wishes},
    )
    return plan, State({key: _settled(group, counts[key], demands[key], now_s) for key, group in after.items()})


def _watched(group: Group, load: NodeLoad, followers: Sequence[NodeLoad], now_s: float) -> Group:
    """With what this look tells of its workers' pace."""
    return replace(group, pace=group.pace.seen(load, now_s, gated=any(map(jammed, followers))))


def _again(group: Group, load: NodeLoad, before: Sequence[Group], now_s: float) -> Group:
    """With the rate that may come again: of what came from outside a moment ago. A wave within the pipeline is none."""
    if not before:
        lately = group.lately.seen(load.arrivals_per_s, now_s)
        return replace(group, lately=lately, again=lately.highest)
    gain = min(group.came / group.sent, 1e6) if group.sent > 0 else 0.0
    return replace(group, again=gain * sum(one.again for one in before))


def _wish(one: Limits, wanted: int, group: Group, demand: Demand, again: Demand) -> Wish:
    """Where room is short, nobody is taken who is needed `again` when what came a moment ago comes again."""
    spare = max(wanted - max(one.clamp(max(demand.less, again.less)), one.least), 0) if demand.known else 0
    return Wish(one.key, one.least, wanted, one.clamp(group.replicas), spare, max(demand.need, again.need, 1e-3))


def _follows(one: Limits, before: Limits) -> bool:
    return one.ref == before.ref and before.stage in one.after


def _in_order(limits: Sequence[Limits]) -> list[Limits]:
    """Each behind those that it follows."""
    left, done, order = list(limits), set[Node](), list[Limits]()
    keys = {one.key for one in limits}
    while left:
        ready = [o for o in left if all((o.ref, a) in done or (o.ref, a) not in keys for a in o.after)]
        ready = ready or left[:1]  # no pipeline has a circle
        order += ready
        done.update(o.key for o in ready)
        left = [o for o in left if o.key not in done]
    return order


def _coming(
    one: Limits,
    load: NodeLoad,
    group: Group,
    loads: Loads,
    demands: Mapping[Node, Demand],
    limits: Mapping[Node, Limits],
) -> tuple[Coming, Group]:
    """What the groups before it will send once they have the workers that they want.

    How many rows come of one that they do is taken over minutes: the two rates do not move in the same moment.
    """
    before = [(one.ref, a) for a in one.after if (one.ref, a) in limits]
    done = sum(sane(loads.nodes[k].rows_per_s) for k in before if k in loads.nodes)
    group = replace(
        group, came=_GAIN_KEPT * group.came + sane(load.arrivals_per_s), sent=_GAIN_KEPT * group.sent + done
    )
    gain = min(group.came / group.sent, 1e6) if group.sent > 0 else 0.0
    flows = [demands[k].flow for k in before if k in demands]
    flow = sum(f for f in flows if f is not None)
    if not before or not gain or any(f is None for f in flows):
        return Coming(), group
    queued = gain * sum(demands[k].queued for k in before if k in demands)
    return Coming(gain * flow if flow > 1.15 * done else 0.0, _ALIKE_FLOW * gain * flow, queued), group


def _over_time(one: Limits, demand: Demand, group: Group, load: NodeLoad, now_s: float) -> tuple[int, Group]:
    """The number wanted, from what was wanted before; and the group with what is to be remembered of this look."""
    current = one.clamp(group.replicas)
    load_s = sane(load.load_s, 3600.0) or LOAD_S
    keep_s = _KEEP_S + _KEEP_LOADS * load_s
    group = _watch_behind(group, demand, load.ready < current, now_s)
    if demand.need < _ALIKE * group.floor_need or now_s >= group.floor_until_s:
        group = replace(group, floor=0)
    group = _looked(one, demand, group, keep_s, now_s)
    more = one.clamp(demand.more)
    since_s = group.behind_since_s
    if since_s is not None and more <= current and now_s - since_s >= _BEHIND_S:
        # Averages do not show it: bursts, or a few very slow batches.
        more = one.clamp(current + max(int(_BEHIND_STEP * current), 1))
        group = _held(replace(group, behind_since_s=None), more, demand, now_s)
    if more > current:
        wanted = min(more, max(current * _MOST_GROWTH, current + _MOST_AT_ONCE))
        if now_s - group.lowered_s < _REGRET_S and demand.need - demand.late < group.lowered_need / _ALIKE:
            group = _held(replace(group, lowered_s=-1e18), wanted, demand, now_s)
        return wanted, group
    most = max(look.enough if now_s - look.at_s <= _KEEP_LATE_S else look.lasting for look in group.looks)
    if now_s - group.changed_s > _STANDS_S and current <= max(look.slack for look in group.looks):
        most = current
    # Of a group that was not watched for long enough, it is not known what it needed.
    if now_s - group.since_s < keep_s or now_s - group.lowered_s < _LOWER_EVERY_S:
        return current, group
    return min(current, most), group


def _looked(one: Limits, demand: Demand, group: Group, keep_s: float, now_s: float) -> Group:
    """With this look; without those that are too old, or below it in everything."""
    enough = max(one.clamp(demand.less), min(group.floor, one.most))
    new = Look(now_s, enough, max(one.clamp(demand.slack), enough), min(one.clamp(demand.lasting), enough))
    kept = [
        look
        for look in group.looks
        if now_s - keep_s <= look.at_s < now_s and any(a > b for a, b in zip(look[1:], new[1:], strict=True))
    ]
    return replace(group, looks=(*kept, new))


def _watch_behind(group: Group, demand: Demand, loading: bool, now_s: float) -> Group:
    """Since when jobs of a class wait too long, and do not get fewer though all workers are there."""
    if not demand.behind or loading:
        return replace(group, behind_since_s=None, behind_rows=0.0)
    if group.behind_since_s is None or demand.behind_rows < 0.9 * group.behind_rows:
        return replace(group, behind_since_s=now_s, behind_rows=demand.behind_rows)
    return replace(group, behind_rows=max(group.behind_rows, demand.behind_rows))


def _held(group: Group, number: int, demand: Demand, now_s: float) -> Group:
    """Does not go below this number for a while, as long as the need stays alike."""
    need = demand.need - demand.late
    again = min(need, group.floor_need) >= _ALIKE * max(need, group.floor_need)
    hold_s = min(max(2.0 * group.hold_s * again, _LEAST_HOLD_S), _MOST_HOLD_S)
    return replace(group, floor=number, floor_need=need, floor_until_s=now_s + hold_s, hold_s=hold_s)


def _settled(group: Group, count: int, demand: Demand, now_s: float) -> Group:
    if count < group.replicas:
        group = replace(group, lowered_s=now_s, lowered_need=demand.need)
    return replace(group, replicas=count, changed_s=now_s if count != group.replicas else group.changed_s)


def _reason(one: Limits, wish: Wish, count: int, demand: Demand, group: Group, less: int) -> str:
    """`less`: how many may do, of the whole that it is a part of."""
    now = group.replicas
    change = f"stays at {count}" if count == now else f"{now} -> {count}"
    texts = [demand.why]
    if one.pinned is not None:
        texts.append(f"a user set {one.pinned}")
    elif one.clamp(demand.more) != demand.more and demand.more > one.most:
        texts.append(f"{demand.more} would be needed, max is {one.most}")
    if demand.behind:
        texts.append(f"{demand.behind} jobs wait longer than {one.delay_ms[demand.behind]:g} ms")
    if count < wish.wanted:
        texts.append(f"no room for {wish.wanted}" if wish.wanted > now else "others need the room more")
    elif less > one.clamp(demand.less):
        texts.append(f"as many as the other parts of {one.whole}")
    elif group.floor and count == group.floor:
        texts.append("fewer were too few for this load before")
    elif count > max(less, 0) and count == now and one.pinned is None:
        texts.append(f"{less} may do, if that lasts")
    return f"{change}: " + ", ".join(texts)
