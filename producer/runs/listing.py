"""The files that an input names: one file, a folder at any depth, a glob, a Hugging Face dataset; local or a URL.

Only listings are read. The order is that of the paths' characters, so it is the same on every machine.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchrelay.errors import ConfigError, InputError
from torchrelay.stages.reading.files import Facts, facts, is_url, local_path, of_info, of_stat, open_file, remote, shown

__all__ = ["Listing", "list_input", "root_of_input"]

_GLOB = re.compile(r"[*?\[]")
_HIDDEN = (".", "_")


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an input in order, with what tells that they changed."""

    files: list[tuple[str, Facts]]
    arrow: bool = False
    """Whether it is a Hugging Face dataset, whose order is its own."""


def list_input(text: str) -> Listing:
    """The files of one input; raises ConfigError where there are none, with what was looked for."""
    if not text.strip() or "\0" in text:
        raise ConfigError(f"an input is a path, a glob or a URL, not {text!r:.80}")
    try:
        listing = _list_url(text) if is_url(text) else _list_local(local_path(text))
    except InputError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{shown(text)} cannot be listed: {error}") from error
    if not listing.files:
        raise ConfigError(f"{shown(text)} holds no files (names that begin with . or _ are left out)")
    return listing


def root_of_input(text: str) -> str:
    """The folder that an input's paths are shown below: itself, that of a file, or the fixed part of a glob."""
    path = text if is_url(text) else local_path(text)
    filesystem, inside = remote(path) if is_url(path) else (None, path)
    if filesystem.isdir(inside) if filesystem else os.path.isdir(inside):
        root = inside
    else:
        there = filesystem.exists(inside) if filesystem else os.path.lexists(inside)
        pattern = None if there else _GLOB.search(inside)
        root = (inside[: pattern.start()] if pattern else inside).rpartition("/")[0] or "/"
    return _full(filesystem, root).rstrip("/") if filesystem else root


def _list_local(path: str) -> Listing:
    if os.path.isdir(path):
        return _hugging_face(path) or Listing(sorted(_walk(path, set())))
    if os.path.lexists(path):
        return Listing([(path, facts(path))])
    if not _GLOB.search(path):
        raise ConfigError(f"{shown(path)} does not exist; is the path right, seen from {os.getcwd()!r}?")
    found = sorted(p for p in glob.glob(path, recursive=True) if not os.path.isdir(p))
    if not found:
        raise ConfigError(f"{shown(path)} matches no file")
    return Listing([(p, facts(p)) for p in found])


def _walk(folder: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, Facts]]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return  # a link to a folder above it
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_HIDDEN):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, above | {here})
            elif entry.is_file():
                yield entry.path, of_stat(entry.path, entry.stat())
            elif entry.is_symlink():
                raise ConfigError(f"{shown(entry.path)} is a link to nothing; remove it")


def _list_url(url: str) -> Listing:
    filesystem, inside = remote(url)
    if _GLOB.search(inside) and not filesystem.exists(inside):
        files = _url_files(filesystem, filesystem.glob(inside, detail=True), "")
        if not files:
            raise ConfigError(f"{shown(url)} matches no file")
        return Listing(files)
    if filesystem.isdir(inside):
        full = _full(filesystem, inside).rstrip("/")
        found = filesystem.find(inside, detail=True)
        return _hugging_face(full) or Listing(_url_files(filesystem, found, inside))
    if not filesystem.exists(inside):
        raise ConfigError(f"{shown(url)} does not exist")
    full = _full(filesystem, inside)
    return Listing([(full, of_info(filesystem.info(inside)))])


def _url_files(filesystem: Any, found: dict[str, Any], folder: str) -> list[tuple[str, Facts]]:
    files = []
    for name, info in sorted(found.items()):
        below = name.removeprefix(folder).split("/")
        if info.get("type") == "file" and not any(part.startswith(_HIDDEN) for part in below if folder):
            files.append((_full(filesystem, name), of_info(info)))
    return files


def _full(filesystem: Any, inside: str) -> str:
    return str(filesystem.unstrip_protocol(inside))


def _hugging_face(folder: str) -> Listing | None:
    """The Arrow files of what `save_to_disk` wrote, in the dataset's order; None for another folder."""
    splits = _json_of(folder, "dataset_dict.json")
    if splits is not None:
        names = [str(n) for n in splits.get("splits") or ()]
        if len(names) == 1:
            return _hugging_face(f"{folder}/{names[0]}")
        raise ConfigError(
            f"{shown(folder)} holds the splits {', '.join(names)}; give one, {folder}/{(names or ['?'])[0]}"
        )
    state = _json_of(folder, "state.json")
    if state is None or "_data_files" not in state:
        return None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ConfigError(f"{shown(folder)} is a selection of rows; save it again after .flatten_indices()")
    paths = [f"{folder}/{os.path.basename(str(f['filename']))}" for f in state["_data_files"]]
    return Listing([(p, facts(p)) for p in paths], arrow=True)


def _json_of(folder: str, name: str) -> dict[str, Any] | None:
    path = f"{folder}/{name}"
    try:
        with open_file(path) as file:
            value = json.loads(file.read())
    except (InputError, FileNotFoundError):
        return None
    except ValueError as error:
        raise ConfigError(f"{shown(path)} is no JSON: {error}") from error
    return value if isinstance(value, dict) else None
