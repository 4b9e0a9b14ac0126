"""Structured logs: a line of JSON for machines, or a line of text for people; each with worker and stage."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

_COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31m"}


def _clean(text: str) -> str:
    """Control characters from jobs or servers must not steer a terminal, nor their lines pass for ours."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown).replace("\n", "\n    ")


class LineFormatter(logging.Formatter):
    """Fields given as `extra={"fields": {...}}` follow the message."""

    def __init__(self, style: Literal["text", "json"], colour: bool, fields: dict[str, Any]) -> None:
        super().__init__()
        self._json = style == "json"
        self._colour = colour
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        fields = {**self._fields, **getattr(record, "fields", {})}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._json:
            head = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
            return json.dumps(head | fields, default=str)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        trace = fields.pop("traceback", None)
        tail = " ".join(f"{k}={v}" for k, v in fields.items())
        level = record.levelname.lower()
        if self._colour and record.levelname in _COLOURS:
            level = f"{_COLOURS[record.levelname]}{level}\033[0m"
        line = f"{clock} {level:<7} {_clean(record.getMessage())}  {_clean(tail)}".rstrip()
        return f"{line}\n{_clean(trace)}" if trace else line


def set_up_logs(style: Literal["text", "json"], stream: TextIO | None = None, **fields: Any) -> None:
    """Sends torchrelay's logs to `stream` (stderr) in this style, with these fields on every line."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(style, stream.isatty(), fields))
    root = logging.getLogger("torchrelay")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
