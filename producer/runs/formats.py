"""Which format a file has, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from torchrelay.errors import ConfigError
from torchrelay.stages.reading.images import IMAGE_SUFFIXES
from torchrelay.stages.reading.unpacking import COMPRESSIONS

__all__ = ["FORMATS", "check_format", "compression_of", "format_of", "is_companion", "one_format"]

SUFFIXES: Final = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".npy": "npy",
    ".npz": "npz",
    ".tar": "tar",
} | dict.fromkeys(IMAGE_SUFFIXES, "image")
FORMATS: Final = tuple(dict.fromkeys(SUFFIXES.values()))
_LINES: Final = frozenset({"jsonl", "csv", "tsv", "text"})
# What lies beside data and is none.
_COMPANIONS = frozenset({".md", ".json", ".yaml", ".yml", ".html", ".crc", ".md5", ".sha256", ".lock", ".py", ".pdf"})
_COMPANION_NAMES = ("readme", "license", "licence", "notice", "changelog", "success")
# What file managers leave in folders of photos.
_LEFT_NAMES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".picasa.ini", "picasa.ini", "icon\r"})
_SHOWN = 3


def check_format(format: str | None) -> None:
    """Raises ConfigError for a format that does not exist."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r:.40} is none of {', '.join(FORMATS)}")


def compression_of(path: str) -> str:
    """gz, zst or "" by the last suffix."""
    return COMPRESSIONS.get(PurePath(path).suffix.lower(), "")


def format_of(path: str) -> str | None:
    """The format that a file's name tells; None where it tells none."""
    pure = PurePath(path)
    packed = bool(compression_of(path))
    found = SUFFIXES.get((PurePath(pure.stem) if packed else pure).suffix.lower())
    return None if packed and found not in _LINES else found


def is_companion(path: str) -> bool:
    """Whether a file of no known format may lie in a dataset's folder without a word."""
    return PurePath(path).suffix.lower() in _COMPANIONS or _is_named_so(path)


def _is_named_so(path: str) -> bool:
    """Whether its name says that it is about the others, such as README.txt, or of a file manager's."""
    name = PurePath(path).name.lower()
    return name in _LEFT_NAMES or name.startswith((*_COMPANION_NAMES, "._"))


def one_format(paths: Sequence[str], given: str | None, where: str) -> tuple[str, list[bool]]:
    """(the format of these files, which of them have it); raises ConfigError where there is none or several.

    `given` is the user's word, and then counts for files whose names tell nothing.
    """
    formats = [format_of(p) for p in paths]
    if given is not None:
        mine = [f == given for f in formats]
        if not any(mine):
            mine = [f is None for f in formats]
        if not any(mine):
            raise ConfigError(f"{where} holds no {given} files; it holds {_counted(formats)}")
        return given, mine
    named = [None if _is_named_so(p) else f for p, f in zip(paths, formats, strict=True)]
    if any(named):
        formats = named
    known = sorted({f for f in formats if f is not None})
    strange = [p for p, f in zip(paths, formats, strict=True) if f is None and not is_companion(p)]
    if len(known) > 1:
        raise ConfigError(
            f"{where} holds files of several formats, {_counted(formats)}; give a glob, or the format that is "
            f"meant, --input-format {known[0]}"
        )
    if not known or strange:
        how = f"--input-format {known[0]}, which leaves them out" if known else "the format: --input-format"
        raise ConfigError(f"{where}: {_few(strange or paths)}; known are {', '.join(SUFFIXES)}; give a glob, or {how}")
    return known[0], [f is not None for f in formats]


def _few(paths: Sequence[str]) -> str:
    names = ", ".join(f"{PurePath(p).name!r:.120}" for p in paths[:_SHOWN])
    if len(paths) == 1:
        return f"{names} tells no format"
    more = len(paths) - _SHOWN
    return f"{names} and {more} more tell no format" if more > 0 else f"{names} tell no format"


def _counted(formats: Sequence[str | None]) -> str:
    names = sorted({f for f in formats if f is not None})
    counts = [f"{formats.count(n)} {n}" for n in names]
    return ", ".join(counts + ([f"{formats.count(None)} of none"] if None in formats else []))
