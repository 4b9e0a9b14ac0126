"""Processes that end at a chosen line of the code that they run through, without a word to anybody, as by kill -9."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


def lines_of(
    act: Callable[[], object],
    folders: Sequence[str],
    die_at: int | None = None,
    at_each: Callable[[], object] = lambda: None,
) -> list[tuple[str, int]]:
    """The lines of code in these folders that an act runs through; the process ends at number `die_at`."""
    events: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(tuple(folders)):
            return None
        if event == "line":
            if len(events) == die_at:
                os._exit(9)
            at_each()
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

    def rehearse() -> list[int]:
        events = lines_of(act, folders)
        first = {event: i for i, event in reversed(list(enumerate(events)))}
        return sorted(first.values())

    return _found_in_a_child(rehearse)


def deaths_that_differ(act: Callable[[], object], folders: Sequence[str], left: Path) -> list[int]:
    """Where to die, when all that a dead process leaves is below `left`: at the first line, and at each before which
    something changed there, however often the line runs. Who dies at the lines between leaves the same as at these."""

    def rehearse() -> list[int]:
        states: list[object] = []
        lines_of(act, folders, at_each=lambda: states.append(_content(left)))
        return [i for i, state in enumerate(states) if i == 0 or state != states[i - 1]]

    return _found_in_a_child(rehearse)


def _content(folder: Path) -> list[object]:
    """Each name below a folder, with what a reader can tell of it; the same bytes written anew are a change."""
    found: list[object] = []
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        told = (stat.st_ino, stat.st_mode, stat.st_nlink, stat.st_mtime_ns) if path.is_file() else (stat.st_mode,)
        found.append((str(path), told, path.read_bytes() if path.is_file() else b""))
    return found


def _found_in_a_child(rehearse: Callable[[], list[int]]) -> list[int]:
    read_end, write_end = os.pipe()

    def tell() -> None:
        os.write(write_end, " ".join(map(str, rehearse())).encode())

    assert in_a_child(tell) == 0
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
