"""Priorities: high, medium, low, or any whole number from 0 to 100; larger is sooner."""

from __future__ import annotations

from enum import IntEnum

from torchrelay.errors import InputError


class Priority(IntEnum):
    """The three named priorities. A job of priority p is placed `p * boost` milliseconds ahead of its arrival."""

    LOW = 0
    MEDIUM = 50
    HIGH = 100


def parse_priority(value: object) -> int:
    """0..100 of "high", "medium", "low", a Priority or an int; InputError for all else, True and NaN included."""
    if isinstance(value, str) and value.upper() in Priority.__members__:
        return int(Priority[value.upper()])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100:
        return int(value)
    raise InputError(f'priority {value!r:.60} is neither "high", "medium", "low" nor a whole number from 0 to 100')
