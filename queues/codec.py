"""Values as bytes: msgpack, strict on the way in, views instead of copies on the way out.

A value is None, bool, int (64 bits), float, str, bytes, a list or tuple (comes back as a list), a dict with
str keys, or a numpy array or scalar of a listed dtype (a scalar comes back as a 0-d array; `np.float64` is a
Python float already and comes back as one). Arrays are msgpack extension 1, see `tensors`. A list of arrays that differ
in their first axis only, where it is the whole value, may travel as extension 6, and then comes back as RaggedRows.

Arrays over `INLINE_BYTES` make the message a frame, so that neither side copies them through msgpack. A frame is
itself one valid msgpack object, an ext 32 of type 3:

    0xc9, u32 big-endian count of the bytes after the type, 0x03,
    u32 little-endian size of the head, the head (msgpack), then per tensor, in the head's order:
    zeros up to the next multiple of 64 from the frame's first byte, the elements

`message` stops half way: it gives the parts of a frame with the large arrays still where they are, so that `copy_into`
can put them where they are wanted (a block of shared memory) with one copy.
A stage's `wire` options narrow arrays (extension 5) and compress whole messages (extension 4): see `wire`.

Promise: `decode` raises `DecodeError` and nothing else, whatever the bytes are; floats and arrays are carried bit
for bit. Imports neither torch nor redis.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import NoneType
from typing import Final, NoReturn

import msgpack
import numpy as np

from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.ragged import RaggedRows
from torchrelay.errors import DecodeError, InputError
from torchrelay.queues import tensors, wire
from torchrelay.queues.copying import copy_array
from torchrelay.queues.tensors import DTYPES, BadValue
from torchrelay.queues.tickets import DeviceMessage

__all__ = [
    "DEFAULT_LIMITS",
    "DTYPES",
    "INLINE_BYTES",
    "Frame",
    "HostMessage",
    "Limits",
    "Message",
    "copy_into",
    "decode",
    "encode",
    "join",
    "message",
    "on_host",
]

INLINE_BYTES: Final = 1024

_FRAME = 3
_FRAME_HEAD = struct.Struct(">BIB")
_U32 = struct.Struct("<I")
_FRAME_START = _FRAME_HEAD.size + _U32.size
# A packer never gives its buffer back; one that grew past this is dropped.
_KEEP_PACKER_BYTES = 1 << 20

_SCALARS = frozenset((NoneType, bool, int, float, str, bytes))
_LEAVES = _SCALARS | {np.ndarray}
_ROWS = (RaggedRows, wire.NarrowedRows)
# The containers, to look into, and what msgpack would carry and we do not.
_CHECKED = (dict, list, tuple, msgpack.Timestamp, memoryview, *_ROWS)
_STR_ONLY = frozenset((str,))
_SEQUENCES = (list, tuple)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a message may hold at most.

    Args:
        max_bytes: size of the whole message.
        max_depth: containers within containers; a bare value has depth 0, `[1]` has depth 1.
        max_ndim: dimensions of a tensor.
        max_items: elements of all lists and entries of all dicts together.
    """

    max_bytes: int = 2**31 - 1
    max_depth: int = 64
    max_ndim: int = 32
    max_items: int = 10_000_000


DEFAULT_LIMITS: Final = Limits()


class Frame:
    """A frame in parts: `len()` is the size of the whole. Keep its arrays unchanged until it is joined or copied."""

    __slots__ = ("_head", "_nbytes", "_tail")

    def __init__(self, head: bytes, tail: list[np.ndarray]) -> None:
        end = _FRAME_START + len(head)
        self._tail: list[tuple[int, np.ndarray]] = []
        for array in tail:
            end += -end % tensors.TAIL_ALIGN
            self._tail.append((end, array))
            end += array.nbytes
        self._nbytes = end
        self._head = _FRAME_HEAD.pack(0xC9, end - _FRAME_HEAD.size, _FRAME) + _U32.pack(len(head)) + head

    def __len__(self) -> int:
        return self._nbytes

    def join(self) -> bytes:
        """The whole message."""
        parts: list[bytes | memoryview] = [self._head]
        end = len(self._head)
        for start, array in self._tail:
            # Through uint8, because the buffer protocol does not know the dtypes of ml_dtypes.
            parts += (bytes(start - end), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            end = start + array.nbytes
        return b"".join(parts)

    def copy_into(self, room: memoryview) -> None:
        """Writes the message to the first `len(self)` of writable bytes; an array of any layout is copied once."""
        room[: len(self._head)] = self._head
        end = len(self._head)
        for start, array in self._tail:
            room[end:start] = bytes(start - end)
            copy_array(np.ndarray(array.shape, array.dtype, buffer=room, offset=start), array)
            end = start + array.nbytes


HostMessage = bytes | Frame
"""A message whose bytes are on the host."""
Message = HostMessage | DeviceMessage


def copy_into(message: HostMessage, room: memoryview) -> None:
    """Writes a message to the first `len(message)` of writable bytes."""
    if isinstance(message, Frame):
        message.copy_into(room)
    else:
        np.copyto(np.frombuffer(room, np.uint8, len(message)), np.frombuffer(message, np.uint8))


def join(message: Message) -> bytes:
    """A message as bytes."""
    message = on_host(message)
    return message.join() if isinstance(message, Frame) else message


def on_host(message: Message) -> HostMessage:
    """The message, with its bytes on the host."""
    return message.on_host() if isinstance(message, DeviceMessage) else message


def encode(value: object, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Turn a value into bytes.

    Args:
        value: see the module's docstring. A C-contiguous little-endian array is copied once; any other array is
            first brought into that form.
        limits: what the message may hold.

    Returns: the message.

    Raises:
        InputError: the value holds something that is not carried (another type, an array of dtype object,
            str, void, datetime or longdouble, a masked array, an int over 64 bits, a dict key that is not a str,
            a str that is not Unicode) or is above a limit.
    """
    return join(message(value, limits))


def message(value: object, limits: Limits = DEFAULT_LIMITS) -> Message:
    """What `encode` gives, with large arrays still uncopied, and rows on a device still there; raises as it does."""
    return DeviceMessage(value, _on_host) if isinstance(value, DeviceRows) else _on_host(value, limits)


def _on_host(value: object, limits: Limits = DEFAULT_LIMITS) -> HostMessage:
    try:
        if type(value) is list:
            value = RaggedRows.of(value) or value
        if isinstance(value, _CHECKED) and not isinstance(value, _ROWS):
            _check(value, limits)
        data = _local.encoder.encode(value, limits)
    except (ValueError, TypeError, OverflowError, BufferError, RecursionError) as error:
        _local.encoder = _Encoder()
        what = "list" if isinstance(value, _ROWS) else type(value).__name__
        raise InputError(f"cannot encode this {what}: {error}") from error
    if len(data) > limits.max_bytes:
        raise InputError(f"the encoded value has {len(data)} bytes; at most {limits.max_bytes} are carried")
    return data


def decode(data: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> object:
    """Turn bytes back into the value.

    Args:
        data: one whole message. Large tensors come back as views over it: keep it unchanged while they live.
        limits: what the message may hold.

    Returns: the value; every array in it is read-only.

    Raises:
        DecodeError: the bytes are not exactly one message within the limits; it carries their length, and the
            offset of the fault where that is known (both of what was compressed, once that is out).
    """
    try:
        if type(data) is not bytes:
            data = memoryview(data).cast("B")
        size = len(data)
        if size > limits.max_bytes:
            raise BadValue(f"the message is above the limit of {limits.max_bytes} bytes")
        if wire.is_compressed(data):
            data = wire.decompress(memoryview(data), limits.max_bytes)
            size = len(data)
        if size >= _FRAME_START and data[0] == 0xC9 and data[5] == _FRAME:
            value = _decode_frame(memoryview(data).toreadonly(), limits)
        else:
            value = _unpack(data, _inline_hook if limits is DEFAULT_LIMITS else _Tail(None, 0, limits).hook)
        if type(value) not in _LEAVES and type(value) is not RaggedRows:
            _check(value, limits)
        return value
    except _DECODE_FAULTS as error:
        _raise_decode_error(error, data)


def _check(value: object, limits: Limits) -> None:
    """Refuse what msgpack lets pass: depth, total items, keys that are not str, timestamps, raw extensions."""
    level: list[object] = [value]
    depth = items = 0
    while level:
        below: list[object] = []
        for node in level:
            children = _children(node)
            items += len(children)
            if not _LEAVES.issuperset(map(type, children)):
                below.extend(child for child in children if isinstance(child, _CHECKED))
        depth += 1
        if depth > limits.max_depth:
            raise BadValue(f"containers are nested deeper than {limits.max_depth}")
        if items > limits.max_items:
            raise BadValue(f"there are more than {limits.max_items} items")
        level = below


def _children(node: object) -> Collection[object]:
    if isinstance(node, dict):
        if not _STR_ONLY.issuperset(map(type, node)):
            for key in node:
                if not isinstance(key, str):
                    raise BadValue(f"a dict key must be a str, not {type(key).__name__}")
        return node.values()
    if isinstance(node, _SEQUENCES) and type(node) is not msgpack.ExtType:
        return node
    raise BadValue(f"a {type(node).__name__} is not carried")


class _Encoder:
    """A packer to use again (making one costs more than a small message) and the tail of the current message."""

    def __init__(self) -> None:
        self._packer = msgpack.Packer(default=self._pack_other, autoreset=True)
        self._tail: list[np.ndarray] = []
        self._tail_bytes = 0
        self._limits = DEFAULT_LIMITS

    def encode(self, value: object, limits: Limits) -> HostMessage:
        self._limits = limits
        head: bytes = self._packer.pack(value)
        if len(head) > _KEEP_PACKER_BYTES:
            self._packer = msgpack.Packer(default=self._pack_other, autoreset=True)
        if not self._tail:
            return head
        tail, self._tail, self._tail_bytes = self._tail, [], 0
        return Frame(head, tail)

    def _pack_other(self, value: object) -> msgpack.ExtType:
        if isinstance(value, _ROWS):
            flat = value.dense() if isinstance(value, RaggedRows) else value.flat
            code, payload = self._tensor(flat)
            rows = tensors.pack_rows(value.lengths, code, self._limits.max_items)
            return msgpack.ExtType(tensors.ROWS_CODE, rows + payload)
        return msgpack.ExtType(*self._tensor(value))

    def _tensor(self, value: object) -> tuple[int, bytes]:
        """The code and payload of an extension; a large array stays for the tail."""
        code, prefix, widened_bytes = tensors.TENSOR_CODE, b"", 0
        if type(value) is wire.Narrowed:
            code, prefix, widened_bytes, value = wire.NARROWED_CODE, value.prefix, value.widened_bytes, value.array
        array = tensors.wire_array(value, self._limits.max_ndim)
        if array.nbytes <= INLINE_BYTES:
            return code, prefix + tensors.inline_payload(array)
        self._tail_bytes += max(array.nbytes, widened_bytes)
        if self._tail_bytes > self._limits.max_bytes:
            raise BadValue(f"its arrays are above the limit of {self._limits.max_bytes} bytes")
        self._tail.append(array)
        return code, prefix + tensors.pack_head(array, tensors.TAIL)


class _Local(threading.local):
    """Each thread has an encoder of its own."""

    def __init__(self) -> None:
        self.encoder = _Encoder()


_local = _Local()


def _unpack(data: bytes | memoryview, ext_hook: Callable[[int, bytes], object]) -> object:
    # msgpack itself refuses strings, arrays and maps that announce more than the message's length.
    value: object = msgpack.unpackb(data, ext_hook=ext_hook, object_pairs_hook=_unique)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise BadValue("a map holds the same key twice")
    return mapping


def _decode_frame(view: memoryview, limits: Limits) -> object:
    announced, head_bytes = _FRAME_HEAD.unpack_from(view)[1], _U32.unpack_from(view, _FRAME_HEAD.size)[0]
    if announced != len(view) - _FRAME_HEAD.size:
        raise BadValue(f"the frame announces {announced} bytes after its header", _FRAME_HEAD.size)
    head_end = _FRAME_START + head_bytes
    if head_end > len(view):
        raise BadValue(f"the frame's head announces {head_bytes} bytes", _FRAME_HEAD.size)
    tail = _Tail(view, head_end, limits)
    value = _unpack(view[_FRAME_START:head_end], tail.hook)
    if tail.end != len(view):
        raise BadValue("the frame goes on after its last tensor", tail.end)
    return value


class _Tail:
    """Makes the arrays of one message; `end` is where the last one from the frame's tail ended."""

    def __init__(self, view: memoryview | None, end: int, limits: Limits) -> None:
        self._view = view
        self._limits = limits
        self.end = end

    def hook(self, code: int, payload: bytes) -> np.ndarray | RaggedRows:
        lengths = original = None
        if code == tensors.ROWS_CODE:
            lengths, code, payload = tensors.split_rows(payload, self._limits.max_items)
        if code == wire.NARROWED_CODE:
            original, payload = wire.split_narrowed(payload)
        elif code != tensors.TENSOR_CODE:
            raise BadValue(f"extension type {code} is unknown")
        array = self._array(payload)
        if lengths is not None:
            tensors.check_lengths(lengths, array)
        if original is not None:
            array = wire.widen(array, original, self._limits.max_bytes)
        return array if lengths is None else RaggedRows.adjacent(array, lengths.astype(np.int64))

    def _array(self, payload: bytes) -> np.ndarray:
        head = tensors.parse_head(payload, self._limits.max_ndim)
        if head.place == tensors.INLINE:
            return tensors.make_array(head, payload, head.head_bytes)
        if self._view is None:
            raise BadValue("a tensor refers to a tail, and the message has none")
        start = self.end + -self.end % tensors.TAIL_ALIGN
        if start + head.data_bytes > len(self._view):
            raise BadValue(f"a tensor of {head.data_bytes} bytes goes past the end", start)
        self.end = start + head.data_bytes
        return tensors.make_array(head, self._view, start)


_inline_hook = _Tail(None, 0, DEFAULT_LIMITS).hook

_DECODE_FAULTS = (
    ValueError,  # BadValue, invalid UTF-8, and msgpack's own for cut-off and malformed messages
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    BufferError,
    msgpack.exceptions.UnpackException,
)


def _raise_decode_error(error: BaseException, data: bytes | bytearray | memoryview) -> NoReturn:
    try:
        length = memoryview(data).nbytes
    except TypeError:
        raise DecodeError(f"cannot decode a {type(data).__name__}; give bytes") from error
    offset: int | None = None
    if isinstance(error, BadValue):
        message, offset = str(error), error.offset
    elif isinstance(error, msgpack.ExtraData):
        message, offset = "the message has trailing bytes", length - len(error.extra)
    elif isinstance(error, msgpack.StackError):
        message = "containers are nested too deep"
    elif isinstance(error, UnicodeDecodeError):
        message = f"a str is not UTF-8: {error.reason}"
    elif isinstance(error, msgpack.FormatError):
        message = "the bytes are not msgpack"
    elif "incomplete" in str(error):
        message, offset = "the message is cut off", length
    else:
        message = f"the message does not decode: {error}"
    raise DecodeError(message, length=length, offset=offset) from error
