"""One tensor on the wire: its dtypes, its header, and views over its bytes.

A tensor is msgpack extension 1. Its payload, all integers little-endian:

    u8 place, u8 length of the dtype's name, u8 ndim, the name in ASCII, ndim x u64 the shape
    place 0: zeros up to the next multiple of 16, then the elements in C order, little-endian
    place 1: nothing more; the elements are in the tail of the frame (`codec`)

Rows that differ in their first axis only are extension 6:

    u8 code of the extension in which their elements are (1, or 5 where they are narrowed), u32 rows,
    rows x u32 the length of each, then that extension's payload: a tensor [sum of the lengths, ...]

Promise: a header is believed only after its dtype, dimensions and byte count were checked. Imports neither torch
nor redis.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

__all__ = [
    "DTYPES",
    "ROWS_CODE",
    "TENSOR_CODE",
    "BadValue",
    "TensorHead",
    "check_lengths",
    "inline_payload",
    "make_array",
    "pack_head",
    "pack_rows",
    "parse_head",
    "split_rows",
    "wire_array",
]

TENSOR_CODE: Final = 1
ROWS_CODE: Final = 6
_ROWS_HEAD = struct.Struct("<BI")
INLINE, TAIL = 0, 1
INLINE_ALIGN, TAIL_ALIGN = 16, 64
_INT64_MAX = 2**63 - 1

_ML_NAMES = (
    "bfloat16",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_NUMPY_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
# The dtypes that a tensor may have on the wire, by name.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    **{name: np.dtype(name) for name in _NUMPY_NAMES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_NAMES},
}
_WIRE_NAME = {dtype: name.encode() for name, dtype in DTYPES.items()}
_BY_WIRE_NAME = {name.encode(): dtype for name, dtype in DTYPES.items()}
_BOOL = DTYPES["bool"]


class BadValue(ValueError):
    """What is wrong with a value or message; `codec` turns it into InputError or DecodeError."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.offset = offset


class TensorHead(NamedTuple):
    """A checked header: where the elements are, what they are, and the bytes that header and elements take."""

    place: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    head_bytes: int
    data_bytes: int


def wire_array(value: object, max_ndim: int) -> np.ndarray:
    """The array as it goes on the wire, in native byte order; not copied where it is so already.

    Raises:
        BadValue: it is no numpy array or scalar, is masked, or has a dtype or ndim that is not carried.
    """
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise BadValue(
            f"a {type(value).__module__}.{type(value).__qualname__} is not carried; "
            "send None, bool, int, float, str, bytes, lists, dicts or numpy arrays"
        )
    array = value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
    if array.dtype not in _WIRE_NAME:
        raise BadValue(f"an array of dtype {array.dtype} is not carried; use one of {', '.join(DTYPES)}")
    if array.ndim > max_ndim:
        raise BadValue(f"an array has {array.ndim} dimensions; at most {max_ndim} are carried")
    return array


def pack_head(array: np.ndarray, place: int) -> bytes:
    """The header of an array that `wire_array` gave."""
    name = _WIRE_NAME[array.dtype]
    shape = array.shape
    return struct.pack(f"<BBB{len(name)}s{len(shape)}Q", place, len(name), len(shape), name, *shape)


def inline_payload(array: np.ndarray) -> bytes:
    """Header and elements of a small array that `wire_array` gave; this copies the elements."""
    head = pack_head(array, INLINE)
    return head + bytes(-len(head) % INLINE_ALIGN) + array.tobytes()


def parse_head(payload: bytes, max_ndim: int) -> TensorHead:
    """Read and check a header, and for an inline tensor also that exactly its elements follow.

    Raises:
        BadValue: naming what does not fit.
    """
    if len(payload) < 3:
        raise BadValue("a tensor's header is cut off")
    place, name_bytes, ndim = payload[:3]
    if place > TAIL:
        raise BadValue(f"a tensor's place is {place}, not 0 or 1")
    if ndim > max_ndim:
        raise BadValue(f"a tensor has {ndim} dimensions; the limit is {max_ndim}")
    shape_at = 3 + name_bytes
    head_bytes = shape_at + 8 * ndim
    if len(payload) < head_bytes:
        raise BadValue("a tensor's header is cut off")
    dtype = _BY_WIRE_NAME.get(payload[3:shape_at])
    if dtype is None:
        raise BadValue(f"a tensor's dtype {payload[3:shape_at][:40]!r} is unknown")
    shape = struct.unpack_from(f"<{ndim}Q", payload, shape_at)
    data_bytes = math.prod(shape) * dtype.itemsize
    # A zero does not excuse the other dimensions: numpy computes strides from them.
    if (data_bytes or math.prod([size or 1 for size in shape]) * dtype.itemsize) > _INT64_MAX:
        raise BadValue(f"a tensor's shape {shape} overflows")
    if place == INLINE:
        head_bytes += -head_bytes % INLINE_ALIGN
        if len(payload) != head_bytes + data_bytes:
            raise BadValue(f"a tensor of {data_bytes} bytes comes with {len(payload) - head_bytes}")
    elif len(payload) != head_bytes:
        raise BadValue("a tensor's header has trailing bytes")
    return TensorHead(place, dtype, shape, head_bytes, data_bytes)


def make_array(head: TensorHead, data: bytes | memoryview, start: int) -> np.ndarray:
    """A read-only view, shaped as the header says, over read-only bytes from `start` on."""
    array: np.ndarray = np.ndarray(head.shape, head.dtype, buffer=data, offset=start)
    if head.dtype is _BOOL and array.size and array.view(np.uint8).max() > 1:
        raise BadValue("a bool tensor holds bytes other than 0 and 1")
    return array


def pack_rows(lengths: np.ndarray, code: int, max_items: int) -> bytes:
    """What stands before the elements in extension 6; raises BadValue above the limit."""
    if len(lengths) > max_items:
        raise BadValue(f"there are more than {max_items} items")
    return _ROWS_HEAD.pack(code, len(lengths)) + lengths.astype("<u4").tobytes()


def split_rows(payload: bytes, max_items: int) -> tuple[np.ndarray, int, bytes]:
    """The lengths, uint32 and not copied, of an extension 6, and the code and payload of its elements.

    Raises BadValue.
    """
    if len(payload) < _ROWS_HEAD.size:
        raise BadValue("the header of ragged rows is cut off")
    code, rows = _ROWS_HEAD.unpack_from(payload)
    if rows > max_items:
        raise BadValue(f"there are more than {max_items} items")
    end = _ROWS_HEAD.size + 4 * rows
    if end > len(payload):
        raise BadValue(f"there are fewer than the {rows} lengths that ragged rows announce")
    return np.frombuffer(payload, "<u4", rows, _ROWS_HEAD.size), code, payload[end:]


def check_lengths(lengths: np.ndarray, flat: np.ndarray) -> None:
    """Raises BadValue unless rows of these lengths are just what the array holds."""
    # Fewer than 2**32 lengths below 2**32: their sum cannot overflow.
    total = int(lengths.sum(dtype=np.uint64))
    if not flat.ndim or len(flat) != total:
        raise BadValue(f"ragged rows of {total} elements come with a tensor {list(flat.shape)}")
