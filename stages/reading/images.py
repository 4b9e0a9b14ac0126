"""Image files as uint8 arrays [H, W, 3], decoded by Pillow in several threads.

Pillow lets go of the interpreter lock while it decodes, so threads use all processors. A file that cannot be decoded,
is cut, or announces more pixels than MOST_PIXELS is Unreadable.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.runs import Chunk
from torchrelay.errors import DecodeError, InputError
from torchrelay.stages.reading.files import is_url, need, open_file
from torchrelay.stages.reading.raw import MISSING, Raw, Unreadable, ids

__all__ = ["IMAGE_COLUMN", "IMAGE_SUFFIXES", "MOST_PIXELS", "PATH_COLUMN", "decode", "decode_column", "file_bytes"]
__all__ += ["read_images"]

IMAGE_COLUMN, PATH_COLUMN = "image", "path"
IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MOST_PIXELS: Final = 178_956_970
"""Twice the number at which Pillow warns of a bomb: 512 MiB as RGB."""
_FEWEST_FOR_THREADS = 4
_pool: ThreadPoolExecutor | None = None
_pool_pid = 0
_pool_lock = threading.Lock()


def decode(data: bytes, gray: bool = False, side: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image file's bytes as uint8 `[H, W, 3]`, or `[H, W]` for gray: the first frame, as stored, alpha dropped.

    With `side`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides stay at least as many pixels.
    Raises DecodeError where it is none, is cut, or is too large.
    """
    images = need("PIL.Image", "images")
    try:
        image = images.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise DecodeError(f"{image.width} x {image.height} pixels are over the limit of {MOST_PIXELS}")
        mode = "L" if gray else "RGB"
        # Only JPEG's decoder shrinks, and takes the gray plane alone, while it decodes.
        image.draft(mode, (side, side) if side else None)
        if image.mode.startswith("I;16"):
            # convert() would cut 16 bits off at 255.
            values = (np.asarray(image) >> 8).astype(np.uint8)
            return values if gray else np.repeat(values[:, :, None], 3, axis=2)
        array: np.ndarray[Any, Any] = np.asarray(image if image.mode == mode else image.convert(mode))
        return array
    except DecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise DecodeError(f"the image cannot be decoded: {error}", length=len(data)) from error


def decode_column(values: Sequence[Any], gray: bool = False, side: int | None = None) -> Column:
    """A column of image files' bytes decoded; of one size it is an array `[N, H, W, 3]`. Other values stay."""

    def one(value: Any) -> Any:
        if not isinstance(value, bytes):
            return value
        try:
            return decode(value, gray, side)
        except DecodeError as error:
            return Unreadable.of(error)

    return stacked(in_threads(one, values))


def stacked(values: list[Any]) -> Column:
    """Arrays of one dtype and shape as one array; else the list."""
    first = values[0] if values else None
    if not isinstance(first, np.ndarray):
        return values
    for value in values:
        if type(value) is not np.ndarray or value.shape != first.shape or value.dtype != first.dtype:
            return values
    return np.stack(values)


def in_threads(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    """`function` of each value, in order, on all processors that this process may use."""
    workers = _processors()
    if workers < 2 or len(values) < _FEWEST_FOR_THREADS:
        return [function(v) for v in values]
    return list(_threads(workers).map(function, values))


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _threads(workers: int) -> ThreadPoolExecutor:
    """The process's own pool: threads do not survive a fork."""
    global _pool, _pool_pid
    with _pool_lock:
        if _pool is None or _pool_pid != os.getpid():
            _pool, _pool_pid = ThreadPoolExecutor(min(workers, 32), thread_name_prefix="torchrelay-read"), os.getpid()
        return _pool


def file_bytes(path: str) -> bytes | Unreadable:
    """A whole file; Unreadable where it is missing or no regular file."""
    try:
        with open_file(path) as file:
            return file.read()
    except (OSError, InputError) as error:
        return Unreadable.of(error)


def read_images(chunk: Chunk, wanted: frozenset[str] | None) -> Raw:
    """The images of a chunk, each a source of one row: `image`, the file's bytes, and `path`, below the folder."""
    names: Sequence[str] = chunk.options["files"]
    slash = "/" if is_url(chunk.path) else os.sep
    folder = chunk.path.rstrip(slash) + slash
    columns: dict[str, Column] = {PATH_COLUMN: list(names)}
    content = [MISSING] * len(names)
    if wanted is None or wanted - {PATH_COLUMN}:
        content = in_threads(file_bytes, [folder + name for name in names])
        columns[IMAGE_COLUMN] = content
    nbytes = sum(len(c) for c in content if isinstance(c, bytes))
    sources = ids(range(chunk.source, chunk.source + len(names)))
    return Raw(sources, ids([0] * len(names)), columns, nbytes=nbytes, images=frozenset({IMAGE_COLUMN}))
