"""Compressed text as a sequence of unpacked pieces, each with the place of the packed bytes it came from.

The file goes through the decompressor in slices of PACKED_SLICE bytes. The place of a piece is where its slice begins,
so chunks are ranges of the packed file, whose size is known, and every line has one place, whoever reads it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from torchrelay.errors import ConfigError, DecodeError
from torchrelay.stages.reading.files import need

__all__ = ["COMPRESSIONS", "PACKED_SLICE", "plain_pieces", "unpacked_pieces"]

COMPRESSIONS: Final = {".gz": "gz", ".zst": "zst"}
# Small enough that what a slice unpacks to at most (128 KiB for 4 bytes of zstd) fits the memory.
PACKED_SLICE: Final = 4096
_PLAIN_SLICE = 1 << 20
Piece = tuple[int, bytes]


def plain_pieces(file: BinaryIO) -> Iterator[Piece]:
    """The file as it is, with the offset of each piece."""
    at = 0
    while piece := file.read(_PLAIN_SLICE):
        yield at, piece
        at += len(piece)


def unpacked_pieces(file: BinaryIO, compression: str) -> Iterator[Piece]:
    """Pieces of the unpacked text, several members or frames in a row included.

    Raises DecodeError where the packed bytes are damaged or end too early, with how many of them were good.
    """
    at, member = 0, _member(compression)
    begun = False
    while packed := file.read(PACKED_SLICE):
        rest = packed
        while rest:
            if not begun and compression == "gz":
                # Tape blocks are padded with zeros; gzip itself ignores them too.
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
            begun = True
            try:
                piece = member.decompress(rest)
            except Exception as error:  # zlib.error or zstandard's own
                raise DecodeError(f"the {compression} stream is damaged near byte {at}: {error}") from error
            if piece:
                yield at, piece
            rest = b""
            if member.eof:
                rest, member, begun = member.unused_data, _member(compression), False
        at += len(packed)
    if begun:
        raise DecodeError(f"the {compression} stream ends early, after {at} bytes; the file was cut")


def _member(compression: str) -> Any:
    if compression == "gz":
        return zlib.decompressobj(wbits=31)
    if compression == "zst":
        return need("zstandard", ".zst files").ZstdDecompressor().decompressobj()
    raise ConfigError(f"compression {compression!r:.40} is none of {', '.join(COMPRESSIONS.values())}")
