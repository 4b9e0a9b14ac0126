"""Log lines: JSON that parses, text that does not steer a terminal."""

from __future__ import annotations

import json
import logging
import sys

from torchrelay.workers.logs import LineFormatter

EVIL = "\x1b[31mred\x1b[0m \x9b2J \u202e cr\rlf\nline2 \x07"


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("torchrelay.test").makeRecord(
        "torchrelay.test", logging.WARNING, "file.py", 1, message, args, None, extra=extra or None
    )


def test_a_json_line_is_one_line_with_the_process_and_record_fields() -> None:
    """Whatever a message holds, one record is one parseable line."""
    formatter = LineFormatter("json", False, {"worker": "w1", "stage": "encode"})
    line = formatter.format(record("job failed: %s", EVIL, fields={"job": "J1", "weights": {1, 2}}))
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == f"job failed: {EVIL}"
    assert (parsed["worker"], parsed["stage"], parsed["job"], parsed["level"]) == ("w1", "encode", "J1", "warning")


def test_a_text_line_shows_control_characters_instead_of_obeying_them() -> None:
    """Escapes of 7 and of 8 bits, carriage returns and bells come from jobs, and must not reach the terminal."""
    line = LineFormatter("text", False, {"worker": "w1"}).format(record("%s", EVIL, fields={"why": EVIL}))
    assert all(c.isprintable() or c == "\n" for c in line)
    assert "\\x1b[31mred" in line
    assert "worker=w1" in line
    assert not any(later.startswith("line2") for later in line.splitlines())


def test_a_traceback_follows_in_both_forms() -> None:
    """In JSON as a field, in text on lines of its own."""
    try:
        raise ValueError("broken \x1b[31m")
    except ValueError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
    assert "ValueError: broken" in json.loads(LineFormatter("json", False, {}).format(made))["traceback"]
    text = LineFormatter("text", False, {}).format(made)
    assert "ValueError: broken \\x1b[31m" in text.splitlines()[-1]
