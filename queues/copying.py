"""Copies large arrays with several threads, where there are processors to spare: one does not fill the memory bus.

Measured on a 16-core host, 19 MB at a time: 7 GB/s with one thread, 10 with two, 15 with four.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np

_LARGE_BYTES = 4 << 20
_THREADS = min(4, (os.cpu_count() or 1) // 4)


def copy_array(into: np.ndarray, array: np.ndarray) -> None:
    """Copies an array of any layout into one of the same shape and dtype."""
    if _THREADS < 2 or array.nbytes < _LARGE_BYTES or len(array) < _THREADS:
        np.copyto(into, array)
        return
    bounds = [len(array) * i // _THREADS for i in range(_THREADS + 1)]
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    others = [_pool().submit(np.copyto, into[part], array[part]) for part in parts[1:]]
    np.copyto(into[parts[0]], array[parts[0]])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS - 1, thread_name_prefix="torchrelay-copy")
