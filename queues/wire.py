"""What a stage's `wire` options do to columns: arrays of floats go narrower, whole messages go compressed.

The message itself says how to undo it, so that `codec.decode` needs no options. Integers are big-endian here:

    extension 5, a tensor that comes back in its original dtype:
        u8 length of the original dtype's name, the name in ASCII, a tensor as extension 1 has it (`tensors`)
    extension 4, only around a whole message, and not within another:
        0xc9, u32 count of the bytes after the type, 0x04, u8 algorithm (1 an lz4 block, 2 a zstd frame),
        u64 length of the message, the stream

Promise: an announced length is checked against the limit, and against what so short a stream can hold at all, before
anything is allocated. The compression libraries are imported when they are first used.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from torchrelay.config.ragged import RaggedRows
from torchrelay.errors import ConfigError
from torchrelay.queues.tensors import DTYPES, BadValue

__all__ = [
    "COMPRESSED_CODE",
    "NARROWED_CODE",
    "Narrowed",
    "NarrowedRows",
    "check_installed",
    "compress",
    "decompress",
    "is_compressed",
    "narrow",
    "split_narrowed",
    "widen",
]

COMPRESSED_CODE: Final = 4
NARROWED_CODE: Final = 5
# What saves less is not worth the reader's time.
_WORTH = 0.95
_HEAD = struct.Struct(">BIBBQ")
_AFTER_TYPE = 6
_ORIGINALS = {name: DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64")}
_NAMES = {dtype: name.encode() for name, dtype in _ORIGINALS.items()}
_TARGETS = frozenset(DTYPES[name] for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"))


@dataclass(frozen=True, slots=True)
class Narrowed:
    """An array as it travels, and the dtype in which it is read."""

    array: np.ndarray
    original: np.dtype[Any]

    @property
    def prefix(self) -> bytes:
        """What stands before the tensor in extension 5."""
        name = _NAMES[self.original]
        return bytes((len(name),)) + name

    @property
    def widened_bytes(self) -> int:
        return self.array.size * self.original.itemsize


@dataclass(frozen=True, slots=True)
class NarrowedRows:
    """Ragged rows whose elements travel narrowed; `lengths` int64 `[N]`."""

    flat: Narrowed
    lengths: np.ndarray


def narrow(column: object, dtype: str) -> object:
    """The column as it travels in narrower floats.

    Args:
        column: an array, ragged rows, or a list of rows, of which those that are arrays are narrowed.
        dtype: name of the float dtype to go to. Arrays of floats that are wider become Narrowed (or NarrowedRows),
            rounded and beyond the range as numpy casts do; all else is left as it is.
    """
    if isinstance(column, np.ndarray):
        return _narrowed(column, DTYPES[dtype])
    ragged = column if isinstance(column, RaggedRows) else RaggedRows.of(column) if isinstance(column, list) else None
    if ragged is not None:
        flat = _narrowed(ragged.dense(), DTYPES[dtype])
        return NarrowedRows(flat, ragged.lengths) if isinstance(flat, Narrowed) else ragged
    if isinstance(column, list | tuple):
        return [_narrowed(value, DTYPES[dtype]) if isinstance(value, np.ndarray) else value for value in column]
    return column


def _narrowed(array: np.ndarray, target: np.dtype[Any]) -> np.ndarray | Narrowed:
    original = array.dtype.newbyteorder("=")
    if original not in _NAMES or original.itemsize <= target.itemsize or isinstance(array, np.ma.MaskedArray):
        return array
    with np.errstate(all="ignore"):
        return Narrowed(array.astype(target, order="C"), original)


def split_narrowed(payload: bytes) -> tuple[np.dtype[Any], bytes]:
    """The original dtype and the tensor of an extension 5; raises BadValue."""
    end = 1 + payload[0] if payload else 1
    original = _ORIGINALS.get(payload[1:end].decode("ascii", "replace"))
    if original is None:
        raise BadValue(f"a narrowed tensor's dtype {payload[1:end][:40]!r} is none that is narrowed")
    return original, payload[end:]


def widen(array: np.ndarray, original: np.dtype[Any], max_bytes: int) -> np.ndarray:
    """A read-only copy in the original dtype; raises BadValue where it was no narrower, or is too large."""
    if array.dtype not in _TARGETS or array.dtype.itemsize >= original.itemsize:
        raise BadValue(f"a tensor of {array.dtype} was not narrowed from {original}")
    if array.size * original.itemsize > max_bytes:
        raise BadValue(f"a narrowed tensor takes {array.size * original.itemsize} bytes; the limit is {max_bytes}")
    with np.errstate(all="ignore"):  # signalling NaNs
        wide = array.astype(original)
    wide.flags.writeable = False
    return wide


def compress(message: bytes, name: str) -> bytes:
    """The message compressed with `name` (lz4 or zstd), or as it is where that saves less than 5 %."""
    algorithm = _ALGORITHMS[name]
    if len(message) > algorithm.max_bytes:
        return message
    stream = algorithm.compress(message)
    if _HEAD.size + len(stream) > _WORTH * len(message):
        return message
    announced = _HEAD.size - _AFTER_TYPE + len(stream)
    return _HEAD.pack(0xC9, announced, COMPRESSED_CODE, algorithm.code, len(message)) + stream


def is_compressed(message: bytes | memoryview) -> bool:
    """Whether it begins as a compressed message does."""
    return len(message) >= _AFTER_TYPE and message[0] == 0xC9 and message[5] == COMPRESSED_CODE


def decompress(message: memoryview, max_bytes: int) -> bytes:
    """The message within a compressed one, which is at most `max_bytes` long; raises BadValue."""
    if len(message) < _HEAD.size:
        raise BadValue("the compressed message is cut off", len(message))
    _, announced, _, code, raw_bytes = _HEAD.unpack_from(message)
    if announced != len(message) - _AFTER_TYPE:
        raise BadValue(f"the compressed message announces {announced} bytes after its header", _AFTER_TYPE)
    algorithm = next((a for a in _ALGORITHMS.values() if a.code == code), None)
    if algorithm is None:
        raise BadValue(f"compression {code} is unknown", _AFTER_TYPE)
    what, stream = f"the {algorithm.name} stream", message[_HEAD.size :]
    if raw_bytes > max_bytes:
        raise BadValue(f"{what} announces {raw_bytes} bytes, above the limit of {max_bytes}", _AFTER_TYPE + 1)
    if raw_bytes > algorithm.max_ratio * len(stream):
        raise BadValue(f"{what} has {len(stream)} bytes and cannot hold the {raw_bytes} it announces", _AFTER_TYPE + 1)
    try:
        raw = algorithm.decompress(stream, raw_bytes)
    except ImportError as error:
        raise BadValue(f"{what} {_needs(algorithm)}") from error
    except MemoryError:
        raise  # no fault of the stream
    except Exception as error:  # each library has errors of its own
        raise BadValue(f"{what} is corrupt, or longer than the {raw_bytes} bytes it announces: {error}") from error
    if len(raw) != raw_bytes:
        raise BadValue(f"{what} holds {len(raw)} bytes and announces {raw_bytes}", _AFTER_TYPE + 1)
    return raw


def check_installed(stage: str, name: str) -> None:
    """Raises ConfigError where the library that this stage's `wire.compress` needs is not installed."""
    algorithm = _ALGORITHMS[name]
    try:
        importlib.import_module(algorithm.module)
    except ImportError as error:
        raise ConfigError(f'stage "{stage}": wire.compress {name} {_needs(algorithm)}') from error


@dataclass(frozen=True, slots=True)
class _Algorithm:
    """One way to compress. No stream of n bytes holds more than `max_ratio` x n; above `max_bytes` none is made."""

    name: str
    code: int
    package: str
    module: str
    max_ratio: int
    max_bytes: int
    compress: Callable[[bytes], bytes]
    decompress: Callable[[memoryview, int], bytes]


def _needs(algorithm: _Algorithm) -> str:
    return f'needs the {algorithm.package} package: pip install "torchrelay[worker]"'


def _lz4_compress(message: bytes) -> bytes:
    import lz4.block

    stream: bytes = lz4.block.compress(message, store_size=False)
    return stream


def _lz4_decompress(stream: memoryview, raw_bytes: int) -> bytes:
    import lz4.block

    raw: bytes = lz4.block.decompress(stream, uncompressed_size=raw_bytes)
    return raw


def _zstd_compress(message: bytes) -> bytes:
    import zstandard

    # A compressor of its own, because two threads must not share one.
    return zstandard.ZstdCompressor(level=1).compress(message)


def _zstd_decompress(stream: memoryview, raw_bytes: int) -> bytes:
    import zstandard

    # The library allocates what the frame itself says, whatever it is told.
    said = zstandard.frame_content_size(stream)
    if said != raw_bytes:
        raise BadValue(f"its frame says {said} bytes")
    return zstandard.ZstdDecompressor().decompress(stream, max_output_size=raw_bytes, allow_extra_data=False)


_ALGORITHMS: Final = {
    # An lz4 byte stands for at most 255, a zstd block of 4 bytes for at most 128 KiB.
    "lz4": _Algorithm("lz4", 1, "lz4", "lz4.block", 255, 0x7E000000, _lz4_compress, _lz4_decompress),
    "zstd": _Algorithm("zstd", 2, "zstandard", "zstandard", 1 << 15, 2**32 - 1, _zstd_compress, _zstd_decompress),
}
