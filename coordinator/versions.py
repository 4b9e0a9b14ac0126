"""Which versions are to have workers, and why. A version that takes no new jobs keeps them until its last job ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torchrelay.config.run_graph import base_ref

__all__ = ["QUIET_S", "Drains", "Served", "served_versions"]

QUIET_S = 5.0
"""A client that read which version is current may submit to it for a moment longer."""


class Served(NamedTuple):
    """Why a version has workers. One that is not `current` needs no more than its least."""

    why: str
    current: bool


@dataclass(frozen=True)
class Drains:
    """When each version was last seen to take jobs or to have some, by the caller's clock."""

    busy_at: Mapping[str, float] = field(default_factory=dict)


def served_versions(
    known: Sequence[str],
    current: Mapping[str, str],
    asked: frozenset[str],
    jobs: Mapping[str, int],
    state: Drains,
    now: float,
) -> tuple[dict[str, Served], Drains]:
    """The versions that are to have workers, of those that are known.

    Args:
        known: refs of which a host has the files, or which had workers until now.
        current: pipeline -> the ref that new jobs take.
        asked: refs that somebody wants served beforehand.
        jobs: jobs that have not ended, by the ref of their pipeline or of its run graph.
        state: what the last call returned; at the first, a version with workers counts as busy.
        now: seconds that grow.
    """
    taking = set(current.values())
    left: dict[str, int] = {}
    for ref, count in jobs.items():
        left[base_ref(ref)] = left.get(base_ref(ref), 0) + count
    busy_at = dict(state.busy_at)
    found: dict[str, Served] = {}
    for ref in sorted(known):
        if ref in taking:
            found[ref] = Served("new jobs take it", True)
        elif ref in asked:
            found[ref] = Served("it is to take jobs soon", False)
        elif left.get(ref):
            found[ref] = Served(f"it drains: {left[ref]} jobs are left", False)
        elif now - busy_at.get(ref, float("-inf")) < QUIET_S:
            found[ref] = Served("its last job ended a moment ago", False)
            continue
        else:
            busy_at.pop(ref, None)
            continue
        busy_at[ref] = now
    return found, replace(state, busy_at=busy_at)
