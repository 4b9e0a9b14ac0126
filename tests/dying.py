"""Processes that end at a chosen line of the code that they run through, without a word to anybody, as by kill -9."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any


def lines_of(act: Callable[[], object], folders: Sequence[str], die_at: int | None = None) -> list[tuple[str, int]]:
    """The lines of code in these folders that an act runs through; the process ends at number `die_at`."""
    events: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(tuple(folders)):
            return None
        if event == "line":
            if len(events) == die_at:
                os._exit(9)
            events.append((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return events


def deaths(act: Callable[[], object], folders: Sequence[str]) -> list[int]:
    """Where to die: when each line runs for the first time. Found in a child."""
    read_end, write_end = os.pipe()

    def rehearse() -> None:
        events = lines_of(act, folders)
        first = {event: i for i, event in reversed(list(enumerate(events)))}
        os.write(write_end, " ".join(map(str, sorted(first.values()))).encode())

    assert in_a_child(rehearse) == 0
    os.close(write_end)
    with os.fdopen(read_end) as told:
        return [int(word) for word in told.read().split()]


def die(act: Callable[[], object], folders: Sequence[str], at: int) -> None:
    """Runs the act in a child that ends at this line, without a word to anybody, as by kill -9."""
    assert in_a_child(lambda: lines_of(act, folders, at)) == 9


def in_a_child(act: Callable[[], object]) -> int:
    """The exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
