"""What a run is asked for, checked before anything is opened."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torchrelay.config.runs import CHUNK_BYTES, ReadOptions, WriteOptions
from torchrelay.errors import InputError
from torchrelay.producer.runs.pace import Progress
from torchrelay.queues.priority import Priority, parse_priority
from torchrelay.queues.tenants import parse_tenant

__all__ = ["RunKeywords", "RunOptions"]


# What is a number, and the least that it may be.
_NUMBERS = {"limit": 0, "max_errors": 0, "in_flight": 1, "chunk_rows": 1, "chunk_bytes": 1, "image_side": 1}
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _folder(output: object) -> str:
    """An absolute path, since workers may run in another folder, or a URL."""
    if not isinstance(output, str | os.PathLike) or not os.fspath(output):
        raise InputError(f"output {output!r:.60} is a folder or a URL")
    text = os.fspath(output)
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def _mark(delimiter: Any) -> Any:
    r"""A tab may be written as a shell has it, `\t`."""
    return "\t" if delimiter in ("\\t", "tab") else delimiter


def _types(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(isinstance(t, str) for pair in given.items() for t in pair):
        raise InputError(f"keep_types {given!r:.60} maps a kept column to its type: {{'price': 'float64'}}")
    return dict(given)


class RunKeywords(TypedDict, total=False):
    """What `Relay.run` takes by keyword; it says there what each means."""

    columns: Mapping[str, str] | None
    key: str | None
    keep: Sequence[str]
    keep_types: Mapping[str, str] | None
    input_format: str | None
    delimiter: str | None
    format: str
    resume: bool
    retry_errors: bool
    accept_version: bool
    into_existing: bool
    limit: int | None
    max_errors: int | None
    merge: bool
    chunk_rows: int | None
    chunk_bytes: int | None
    image_side: int | None
    priority: str | int
    in_flight: int | None
    on_progress: Callable[[Progress], object] | None
    run_id: str | None
    tenant: str | None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """One run as it was asked for. None lets the run decide: `chunk_rows`, and how many chunks are `in_flight`."""

    read: ReadOptions
    write: WriteOptions
    chunk_rows: int | None = None
    chunk_bytes: int = CHUNK_BYTES
    resume: bool = False
    retry_errors: bool = False
    limit: int | None = None
    max_errors: int | None = None
    merge: bool = False
    priority: int = Priority.LOW
    in_flight: int | None = None
    on_progress: Callable[[Progress], object] | None = None
    run_id: str | None = None
    accept_version: bool = False
    into_existing: bool = False
    keep_types: Mapping[str, str] = field(default_factory=dict)
    input_format: str | None = None
    tenant: str = ""

    @classmethod
    def parse(cls, output: str | os.PathLike[str], given: Mapping[str, Any]) -> RunOptions:
        """Raises InputError or ConfigError that names the option, the value and what it may be."""
        for name in given.keys() - RunKeywords.__annotations__.keys():
            near = difflib.get_close_matches(name, list(RunKeywords.__annotations__), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(RunKeywords.__annotations__)}"
            raise InputError(f"unknown option {name!r:.60}; {hint}")
        key, keep = given.get("key"), given.get("keep") or ()
        if isinstance(keep, str):
            raise InputError(f"keep {keep!r:.60} is a list of columns; write [{keep!r:.60}]")
        for name, least in _NUMBERS.items():
            value = given.get(name)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{name} {value!r:.60} must be a whole number from {least}")
        read = ReadOptions(
            dict(given.get("columns") or {}),
            key,
            tuple(keep),
            "",
            _mark(given.get("delimiter")),
            given.get("image_side"),
        )
        write = WriteOptions(_folder(output), given.get("format") or "parquet", key, tuple(keep))
        run_id = given.get("run_id")
        if run_id is not None and not (isinstance(run_id, str) and _RUN_ID.fullmatch(run_id)):
            raise InputError(f"run_id {run_id!r:.80} must be 1 to 64 letters, digits, _ and -")
        retry_errors = bool(given.get("retry_errors"))
        if given.get("accept_version") and not (given.get("resume") or retry_errors):
            raise InputError("accept_version is for a run that goes on; add resume or retry_errors")
        return cls(
            read,
            write,
            given.get("chunk_rows"),
            given.get("chunk_bytes") or CHUNK_BYTES,
            bool(given.get("resume")) or retry_errors,
            retry_errors,
            given.get("limit"),
            given.get("max_errors"),
            bool(given.get("merge")),
            parse_priority(given.get("priority", Priority.LOW)),
            given.get("in_flight"),
            given.get("on_progress"),
            run_id,
            bool(given.get("accept_version")),
            bool(given.get("into_existing")),
            _types(given.get("keep_types") or {}),
            given.get("input_format"),
            parse_tenant(given.get("tenant")),
        )
