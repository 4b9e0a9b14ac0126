"""Files of a dataset, local or behind an fsspec URL: opened for reading, and what tells that one has changed."""

from __future__ import annotations

import importlib
import io
import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from torchrelay.errors import ConfigError, InputError

__all__ = ["Facts", "facts", "file_below", "is_url", "local_path", "need", "open_file", "remote", "shown"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]*)*://")
# What a store says of a file's content, best first; the size goes with it.
_MARKS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


def need(module: str, what: str) -> Any:
    """An optional module; raises ConfigError that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f'{what} need {package}: pip install "torchrelay[runs]"') from error


def is_url(path: str) -> bool:
    return _URL.match(path) is not None and not path.startswith("file://")


def local_path(path: str) -> str:
    """An absolute path without `file://`; it is not resolved, so that links keep their names."""
    return os.path.abspath(path.removeprefix("file://"))


def remote(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) of a URL; raises ConfigError where none serves it."""
    try:
        found: tuple[Any, str] = need("fsspec.core", "URLs").url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{shown(url)} cannot be opened: {error}") from error
    return found


def shown(path: str) -> str:
    """A path for a message: URLs may hold a password before the @."""
    return repr(re.sub(r"(?<=//)[^/@]*@", "***@", path))[:400]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a listing says of one file."""

    nbytes: int
    fingerprint: str


def facts(path: str) -> Facts:
    """Size and fingerprint of a file; raises InputError where it is none, OSError where it cannot be looked at."""
    if not is_url(path):
        try:
            return of_stat(path, os.stat(path))
        except FileNotFoundError as error:
            raise InputError(f"{shown(path)} does not exist any more") from error
    filesystem, inside = remote(path)
    try:
        return of_info(filesystem.info(inside))
    except FileNotFoundError as error:
        raise InputError(f"{shown(path)} does not exist any more") from error


def of_stat(path: str, status: os.stat_result) -> Facts:
    """Facts of a local file; raises InputError for a device, a pipe or a folder, which could not be read twice."""
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{shown(path)} is no regular file")
    return Facts(status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def of_info(info: dict[str, Any]) -> Facts:
    """Facts of what fsspec says of a file."""
    mark = next((info[name] for name in _MARKS if info.get(name) is not None), "")
    # Some filesystems give a moment as a number in listings and as a datetime of one file.
    if isinstance(mark, datetime):
        mark = (mark if mark.tzinfo else mark.replace(tzinfo=UTC)).timestamp()
    if isinstance(mark, float):
        mark = f"{mark:.6f}"
    nbytes = int(info.get("size") or 0)
    return Facts(nbytes, f"{nbytes}-{str(mark).strip(chr(34))}")


def file_below(folder: str, path: str) -> str | None:
    """The path of a file that a dataset names, below its own folder; None where it lies elsewhere, by links too."""
    if is_url(folder):
        inside = not is_url(path) and not path.startswith("/") and ".." not in path.split("/")
        return f"{folder}/{path}" if inside else None
    root, found = os.path.realpath(folder), os.path.realpath(os.path.join(folder, path))
    return found if found.startswith(root.rstrip(os.sep) + os.sep) else None


def open_file(path: str, fingerprint: str | None = None) -> BinaryIO:
    """The file for reading, seekable; raises InputError where it is not the file that was planned."""
    if fingerprint is not None and is_url(path) and facts(path).fingerprint != fingerprint:
        raise _changed(path)
    if is_url(path):
        filesystem, inside = remote(path)
        opened: BinaryIO = filesystem.open(inside, "rb")
        # The filesystem in memory gives all readers one and the same file, with one position.
        return io.BytesIO(opened.getvalue()) if isinstance(opened, io.BytesIO) else opened
    # A pipe in the file's place would block `open` for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as error:
        raise InputError(f"{shown(path)} does not exist any more") from error
    try:
        now = of_stat(path, os.fstat(handle))
        if fingerprint is not None and now.fingerprint != fingerprint:
            raise _changed(path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _changed(path: str) -> InputError:
    return InputError(f"{shown(path)} has changed since the run was planned; start a new run for what it holds now")
