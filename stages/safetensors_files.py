"""What a .safetensors file holds and where, read from its head; and the index of a model that lies in several.

Promise: nothing of the tensors themselves is read, and a file that is damaged or cut short is refused, not misread.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrelay.errors import StageLoadError

__all__ = ["INDEX", "Place", "first_line", "is_index", "must_be_there", "read_head", "read_index", "refuse"]

INDEX = ".safetensors.index.json"
"""How the name of an index ends."""
_MOST_HEAD = 100_000_000  # bytes, as the format's own reader allows
_MOST_DIMS = 64
# https://github.com/huggingface/safetensors: names of the format. Torch has some of the types only in newer versions.
_NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {
    short: getattr(torch, name) for short, name in _NAMES.items() if hasattr(torch, name)
}


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor: where its bytes begin, in bytes from the file's begin, and what they are."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many it has."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_index(path: Path) -> bool:
    """Whether this is the index of a model in several files."""
    return path.name.endswith(INDEX)


def read_index(path: Path) -> dict[str, Place]:
    """All tensors that an index names, from the files that lie beside it.

    Raises:
        StageLoadError: the index or one of its files is missing or damaged, or a file lacks what it should hold.
    """
    named = _index(path)
    heads = {file: read_head(path.with_name(file)) for file in sorted(set(named.values()))}
    for name, file in named.items():
        if name not in heads[file]:
            raise StageLoadError(f"weights {str(path)!r} say that {name!r} is in {file!r}, which has no such tensor")
    return {name: heads[file][name] for name, file in named.items()}


def _index(path: Path) -> dict[str, str]:
    must_be_there(path)
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise StageLoadError(f"weights {str(path)!r} are no JSON index ({first_line(error)})") from error
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise StageLoadError(f"weights {str(path)!r} have no weight_map of names to files; save the model again")
    for file in set(named.values()):
        if file != os.path.basename(file) or file in ("", ".", ".."):
            raise StageLoadError(f"weights {str(path)!r} name the file {file!r}; its files must lie beside it")
    return named


def read_head(path: Path) -> dict[str, Place]:
    """All tensors of one file.

    Raises:
        StageLoadError: the file is missing, damaged or of another kind, or has a type that this torch has not.
    """
    must_be_there(path)
    try:
        with path.open("rb") as file:
            first = file.read(8)
            total = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", first) if len(first) == 8 else (-1,)
            if not 2 <= length <= min(_MOST_HEAD, total - 8):
                raise refuse(path, f"its head would have {length} bytes" if len(first) == 8 else "it is too short")
            head = json.loads(file.read(length), object_pairs_hook=_no_twice)
    except (ValueError, RecursionError, OSError) as error:
        raise refuse(path, first_line(error)) from error
    if not isinstance(head, dict):
        raise refuse(path, "its head is no JSON object")
    head.pop("__metadata__", None)
    found = {name: _place(path, 8 + length, name, entry) for name, entry in head.items()}
    _must_fill(path, found, 8 + length, total)
    return found


def _place(path: Path, begin: int, name: str, entry: Any) -> Place:
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise refuse(path, f"{name!r} has no dtype, shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        what = f"weights {str(path)!r}: {name!r} is of type {entry['dtype']!s:.40}, which torch {torch.__version__}"
        raise StageLoadError(f"{what} does not read; save it as another type")
    if not _counts(shape) or len(shape) > _MOST_DIMS or not _counts(offsets) or len(offsets) != 2:
        raise refuse(path, f"{name!r} has shape {shape!s:.80} and data_offsets {offsets!s:.80}")
    place = Place(path, begin + offsets[0], dtype, tuple(shape))
    if offsets[1] - offsets[0] != place.bytes:
        raise refuse(path, f"{name!r} has {offsets[1] - offsets[0]} bytes, its shape {shape!s:.80} needs {place.bytes}")
    return place


def _must_fill(path: Path, found: Mapping[str, Place], begin: int, total: int) -> None:
    """The format has no gaps and no overlaps, so that each byte of a file is somebody's."""
    at = begin
    for name, place in sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if place.start != at:
            raise refuse(path, f"{name!r} begins at byte {place.start}, and the tensor before it ends at {at}")
        at += place.bytes
    if at != total:
        raise refuse(path, f"its tensors need {at} bytes and it has {total}; it may be cut short")


def refuse(path: Path, why: str) -> StageLoadError:
    """The error for a file that is none of this format."""
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        pass  # the reason given is enough
    # A pickle begins with its protocol, and torch.save wraps one in a zip archive.
    renamed = "; it looks like a pickle that was renamed" if start[:1] == b"\x80" or start[:2] == b"PK" else ""
    return StageLoadError(f"weights {str(path)!r} are no safetensors file ({why}){renamed}")


def must_be_there(path: Path) -> None:
    """Raises StageLoadError where there is no regular file."""
    if not path.is_file():
        raise StageLoadError(f"weights {str(path)!r} do not exist or are no regular file")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its head")
    return found


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
