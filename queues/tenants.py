"""Tenants: who jobs are for. Within a priority, those whose jobs wait share the entry of a pipeline by weight.

A tenant needs no registration; one without a weight of its own has 1. Weights belong to the namespace, and hold for
what is submitted from then on. How ranks follow from them stands in `lua/lib.lua`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torchrelay.errors import InputError
from torchrelay.queues.registry import Registry

MAX_WEIGHT = 1000.0
_TENANT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._@-]{0,63}")


def parse_tenant(tenant: object) -> str:
    """The tenant's name; '' for None. Raises InputError for anything but 1 to 64 letters, digits and `._@-`."""
    if tenant is None:
        return ""
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise InputError(f"tenant {tenant!r:.80} must be 1 to 64 letters, digits and . _ @ -, a letter or digit first")
    return tenant


def share_of(tenant: str, priority: int) -> str:
    """How a submit names whose turn its jobs take; '' where nobody's."""
    return f"{priority}:{tenant}" if tenant else ""


def set_weight(registry: Registry, tenant: str, weight: float) -> None:
    """Gives a tenant so many times the share of one with weight 1. Raises InputError."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise InputError(f"weight {weight!r:.60} must be a number above 0, and {MAX_WEIGHT:g} at most")
    name = parse_tenant(tenant)
    if not name:
        raise InputError("a weight is of a tenant; give its name")
    for lane in registry.lanes:
        if weight == 1:
            registry.client.hdel(lane.keys.tenants, name)
        else:
            registry.client.hset(lane.keys.tenants, name, repr(float(weight)))


def weights(registry: Registry) -> dict[str, float]:
    """Every weight other than 1."""
    found: Any = registry.client.hgetall(registry.lanes[0].keys.tenants)
    values = {name.decode(): float(value) for name, value in found.items()}
    return {name: value for name, value in sorted(values.items()) if math.isfinite(value)}
