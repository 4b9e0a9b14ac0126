"""Tickets: what a block of shared memory holds where the column's own bytes lie in a GPU's memory.

A ticket says whose memory that is, how it is opened, and which bytes of it are meant. It is a whole message: msgpack
extension 7 around the list (exporter, segment, handle, offset, dtype, shape). The block is released, freed and checked
like any other, and its owner uses the device's bytes again only when it is gone: so whoever finds the block intact
after its copy has copied what was meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np

from torchrelay.config.device_rows import DeviceRows
from torchrelay.errors import DecodeError
from torchrelay.queues.tensors import DTYPES

if TYPE_CHECKING:
    from torchrelay.queues.codec import Frame

__all__ = ["TICKET_CODE", "DeviceMessage", "Ticket", "is_ticket"]

TICKET_CODE = 7
HANDLE_BYTES = 64
_EXT8, _EXT16 = 0xC7, 0xC8
_EXPORTER = re.compile(r"[0-9A-Za-z]{8}")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST = 1 << 47
_MOST_DIMS = 32


class Ticket(NamedTuple):
    """Rows in the memory of a device: `exporter` names the process that has it, `handle` opens its segment number
    `segment`, in which they begin at byte `offset`."""

    exporter: str
    segment: int
    handle: bytes
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def encode(self) -> bytes:
        parts = (self.exporter, self.segment, self.handle, self.offset, _NAMES[self.dtype], self.shape)
        packed: bytes = msgpack.packb(msgpack.ExtType(TICKET_CODE, msgpack.packb(parts)))
        return packed

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Ticket:
        """Raises DecodeError for what is no whole, sound ticket."""
        try:
            found = msgpack.unpackb(data)
            exporter, segment, handle, offset, name, shape = msgpack.unpackb(found.data)
            numbers = [segment, offset, *shape]
            sound = (
                found.code == TICKET_CODE
                and type(exporter) is str
                and _EXPORTER.fullmatch(exporter) is not None
                and type(handle) is bytes
                and len(handle) == HANDLE_BYTES
                and 0 < len(shape) <= _MOST_DIMS
                and all(type(n) is int and 0 <= n < _MOST for n in numbers)
            )
            ticket = cls(exporter, segment, handle, offset, DTYPES[name], tuple(shape))
        except Exception as error:
            raise DecodeError(f"a ticket does not decode: {error}", length=len(data)) from error
        if not sound or offset + ticket.nbytes >= _MOST:
            raise DecodeError("a ticket is malformed", length=len(data))
        return ticket


def is_ticket(data: bytes | memoryview) -> bool:
    """Whether this message is a ticket, by its first bytes."""
    first = data[0] if len(data) > 4 else 0
    return (first == _EXT8 and data[2] == TICKET_CODE) or (first == _EXT16 and data[3] == TICKET_CODE)


class DeviceMessage:
    """A column on a device, as the message that it would be on the host; `len()` is about that one's size.

    Args:
        rows: the column.
        encode: makes a message of an array.
    """

    __slots__ = ("_encode", "rows")

    def __init__(self, rows: DeviceRows, encode: Callable[[Any], bytes | Frame]) -> None:
        self.rows = rows
        self._encode = encode

    def __len__(self) -> int:
        return max(self.rows.nbytes, 1)

    def on_host(self) -> bytes | Frame:
        """The message, once its bytes are copied to the host."""
        return self._encode(np.asarray(self.rows))
