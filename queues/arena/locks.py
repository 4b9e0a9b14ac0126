"""File locks that the kernel gives back when their holder ends, whatever ends it."""

from __future__ import annotations

import os

_kept: set[int] = set()


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether this process holds the lock now; it is gone with the last copy of the descriptor."""
    # Here, since Windows has no such module: its producers import this package and never lock.
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def keep(descriptor: int) -> None:
    """A forked child gives its copy of this lock back, so that it does not outlive the process that took it."""
    _kept.add(descriptor)


def let_go(descriptor: int) -> None:
    """Closes a descriptor that was kept; nothing in a forked child, where that number may be another file's."""
    if descriptor in _kept:
        _kept.discard(descriptor)
        os.close(descriptor)


def _forked() -> None:
    for descriptor in _kept:
        os.close(descriptor)
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
