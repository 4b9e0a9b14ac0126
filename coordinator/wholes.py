"""Stages that are cut in parts: a job needs each of them, so all have as many workers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchrelay.coordinator.demand import Limits
from torchrelay.coordinator.loads import Node
from torchrelay.coordinator.sharing import Wish

__all__ = ["as_wholes", "evened", "of_wholes"]


def as_wholes(wishes: Sequence[Wish], limits: Mapping[Node, Limits]) -> list[Wish]:
    """All parts of a stage that is cut want as many as the one that wants most: a job needs each of them."""
    wholes: dict[Node, list[Wish]] = {}
    for wish in wishes:
        if whole := limits[wish.key].whole:
            wholes.setdefault((wish.key[0], whole), []).append(wish)
    found: dict[Node, Wish] = {}
    for parts in wholes.values():
        wanted, kept = max(w.wanted for w in parts), max(w.wanted - w.spare for w in parts)
        need = max(w.need for w in parts)
        found.update((w.key, replace(w, wanted=wanted, spare=max(wanted - kept, 0), need=need)) for w in parts)
    return [found.get(wish.key, wish) for wish in wishes]


def of_wholes(counts: Mapping[Node, int], limits: Mapping[Node, Limits]) -> dict[Node, int]:
    """The most of all parts of the same whole."""
    most: dict[Node, int] = {}
    for key, count in counts.items():
        whole = (key[0], limits[key].whole or key[1])
        most[whole] = max(count, most.get(whole, 0))
    return {key: most[key[0], limits[key].whole or key[1]] for key in counts}


def evened(counts: Mapping[Node, int], limits: Mapping[Node, Limits]) -> dict[Node, int]:
    """No part of a stage that is cut has more workers than there are of each, but for the least that it must have."""
    fewest: dict[Node, int] = {}
    for key, count in counts.items():
        whole = (key[0], limits[key].whole)
        fewest[whole] = min(count, fewest.get(whole, count))
    return {
        key: max(fewest[key[0], limits[key].whole], min(limits[key].least, count)) if limits[key].whole else count
        for key, count in counts.items()
    }
