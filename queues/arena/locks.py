"""File locks that the kernel gives back when their holder ends, whatever ends it."""

from __future__ import annotations


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether this process holds the lock now; it is gone with the last copy of the descriptor."""
    # Here, since Windows has no such module: its producers import this package and never lock.
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
