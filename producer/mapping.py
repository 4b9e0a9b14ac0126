"""Rows in, results out, in order: a bounded number of jobs under way between them. No I/O of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from typing import Any

from torchrelay.errors import QueueFull, RunConflict
from torchrelay.producer.futures import JobFuture

Row = Mapping[str, Any]
Future = JobFuture[dict[str, Any]]
# Rows that come more slowly than this are sent as they come.
_PATIENCE_WITH_ROWS_S = 0.005


def map_in_order(
    rows: Iterator[Row],
    in_flight: int,
    submit: Callable[[list[Row], int], list[Future]],
    cancel: Callable[[list[str]], object],
) -> Generator[dict[str, Any], None, None]:
    """Yields each row's result in the order of the rows; `submit` takes some rows and the number of the first.

    Whatever ends it early (a failed job, closing the generator) cancels the jobs under way.
    """
    waiting: deque[Future] = deque()
    # Refilling in steps keeps the round trips few; a step of a quarter keeps three quarters under way.
    step = max(1, in_flight // 4)
    sent = 0
    try:
        while True:
            while len(waiting) <= in_flight - step:
                part = _some(rows, step)
                if not part:
                    break
                try:
                    waiting.extend(submit(part, sent))
                except (QueueFull, RunConflict) as refused:
                    # Part of it went in, and is to be cancelled with the rest.
                    waiting.extend(f for f in refused.accepted if isinstance(f, JobFuture))
                    raise
                sent += len(part)
                if waiting[0].done():
                    break  # rows that come slowly must not hold up results that are there
            if not waiting:
                return
            yield waiting[0].result()
            waiting.popleft()
    finally:
        if waiting:
            cancel([f.id for f in waiting if not f.done()])


def _some(rows: Iterator[Row], most: int) -> list[Row]:
    """The next rows, at most so many; fewer where they come slowly, none at the end."""
    part: list[Row] = []
    started = time.monotonic()
    for row in islice(rows, most):
        part.append(row)
        if time.monotonic() - started > _PATIENCE_WITH_ROWS_S:
            break
    return part
