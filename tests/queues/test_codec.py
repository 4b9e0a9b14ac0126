"""The codec carries values bit for bit and answers every damaged message with DecodeError."""

from __future__ import annotations

import math
import struct
import threading
import warnings
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import NUMERIC
from torchrelay.errors import DecodeError, InputError
from torchrelay.queues.codec import DTYPES, INLINE_BYTES, Limits, decode, encode


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits; NaNs by their bytes, tuples as lists, ragged rows as lists."""
    b = list(b) if isinstance(b, RaggedRows) else b
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return type(b) is float and struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list | tuple):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count = math.prod(shape) * dtype.itemsize
    if draw(st.booleans()) and shape and count:
        shape = (shape[0] * 400, *shape[1:])
        count *= 400
    raw = draw(st.binary(min_size=16, max_size=16)) * (count // 16 + 1)
    if dtype == np.bool_:
        raw = bytes(byte & 1 for byte in raw)
    return np.frombuffer(raw[:count], dtype).reshape(shape)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=True, width=64)
    | st.text()
    | st.binary()
    | arrays()
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)


@given(values)
def test_round_trip(value: Any) -> None:
    """Whatever is encoded comes back the same, bit for bit."""
    assert same(value, decode(encode(value)))


@given(values, st.sampled_from([bytearray, memoryview]))
def test_round_trip_over_other_buffers(value: Any, buffer: Any) -> None:
    """A bytearray or memoryview decodes like bytes."""
    assert same(value, decode(buffer(encode(value))))


@st.composite
def ragged(draw: st.DrawFn) -> list[np.ndarray]:
    """Rows that differ in their first axis only, inline or large ones."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    row_shape = draw(st.sampled_from([(), (3,), (0, 2)]))
    scale = draw(st.sampled_from([1, 60]))
    lengths = draw(st.lists(st.integers(0, 5), min_size=4, max_size=8))
    return [np.resize(np.arange(90), (n * scale, *row_shape)).astype(dtype) for n in lengths]


@given(ragged())
def test_rows_that_differ_in_their_first_axis_travel_as_one(rows: list[np.ndarray]) -> None:
    """Dtype, shapes, order and bits are kept; a part of the rows is encoded like a list of them."""
    message = encode(rows)
    back = decode(message)
    assert isinstance(back, RaggedRows)
    assert same(rows, back)
    assert encode(back) == message
    assert not back.flat.flags.writeable
    for part in (back[1:3], back.take(np.array([2, 0, 0])), back[:0]):
        assert same(list(part), decode(encode(part)))
    for nested in ([back], {"x": back}):
        with pytest.raises(InputError, match="not carried"):
            encode(nested)


def test_the_elements_of_ragged_rows_are_not_copied_on_decode() -> None:
    """They are one aligned view over the message, which holds little else."""
    data = encode([np.zeros(n * 100) for n in range(5)])
    back: Any = decode(data)
    base = np.frombuffer(data, np.uint8)
    assert np.shares_memory(back.flat, base)
    assert (back.flat.ctypes.data - base.ctypes.data) % 64 == 0
    assert len(data) < 8 * 1000 + 200


def test_rows_one_by_one_are_read_as_before() -> None:
    """A list of tensors, as earlier versions wrote it and as mixed rows travel, comes back as a list."""
    rows = [np.arange(n, dtype=np.int32) for n in range(5)]
    packed = b"\x95" + b"".join(encode(row) for row in rows)
    assert type(decode(packed)) is list
    assert same(rows, decode(packed))
    for mixed in ([*rows, None], [*rows, np.zeros(2)], [*rows, np.zeros((2, 2), np.int32)], rows[:3]):
        assert type(decode(encode(mixed))) is list
        assert same(mixed, decode(encode(mixed)))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_and_every_byte(name: str) -> None:
    """Each listed dtype carries all byte patterns, NaN payloads included."""
    raw = bytes(range(256)) * 16 if name != "bool" else bytes([0, 1]) * 2048
    for count in (256, 4096):
        array = np.frombuffer(raw[:count], DTYPES[name])
        assert same([array, {"x": array}], decode(encode([array, {"x": array}])))


def test_every_declarable_dtype_is_carried() -> None:
    """What a pipeline file can declare is what the wire knows."""
    assert set(NUMERIC) == set(DTYPES)


def test_signalling_nan_float() -> None:
    """A Python float's NaN payload is carried."""
    (nan,) = struct.unpack("<d", struct.pack("<Q", 0x7FF8DEADBEEF0001))
    assert same(nan, decode(encode(nan)))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(1000, dtype=">f8"),
        np.arange(4000, dtype=np.float32).reshape(40, 100).T,
        np.arange(4000, dtype=np.float32)[::-3],
        np.asfortranarray(np.arange(4000.0).reshape(40, 100)),
        np.float16(1.5),
        np.bool_(True),
        np.array(7),
        np.arange(3).astype(ml_dtypes.bfloat16)[::2],
    ],
)
def test_other_memory_layouts(array: Any) -> None:
    """Big-endian, strided and Fortran arrays and scalars come back with equal values in C order."""
    back = decode(encode(array))
    assert isinstance(back, np.ndarray)
    assert back.flags.c_contiguous
    assert back.dtype.isnative
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("count", [4, 4 * INLINE_BYTES])
def test_arrays_are_read_only(count: int) -> None:
    """A decoded array cannot be written, also over a writable buffer."""
    back = decode(bytearray(encode(np.zeros(count))))
    assert isinstance(back, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1


def test_large_arrays_are_aligned_views() -> None:
    """A large array's elements are not copied on decode and are aligned in the message."""
    data = bytearray(encode({"a": np.zeros(5000, np.int8), "b": np.zeros(5000)}))
    value: Any = decode(data)
    base = np.frombuffer(data, np.uint8)
    for array in value.values():
        assert np.shares_memory(array, base)
        assert (array.ctypes.data - base.ctypes.data) % 64 == 0


def test_a_frame_is_valid_msgpack() -> None:
    """Any msgpack reader can skip over a message, framed or not."""
    for value in ({"x": np.zeros(3)}, {"x": np.zeros(3000)}):
        assert msgpack.unpackb(encode(value)) is not None


class Color:
    pass


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(2, "V4"),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.longdouble),
        np.ma.masked_array([1, 2], [True, False]),
        np.datetime64("2020-01-01"),
        2**64,
        -(2**63) - 1,
        {1: 2},
        {b"a": 2},
        [{"a": {None: 1}}],
        "\ud800",
        {"a": Color()},
        {1, 2},
        memoryview(b"a"),
        msgpack.Timestamp(1),
        [msgpack.Timestamp(1)],
        msgpack.ExtType(1, b""),
        [msgpack.ExtType(1, b"")],
    ],
)
def test_refused_values(value: Any) -> None:
    """What is not carried is refused by encode, and the encoder works on."""
    with pytest.raises(InputError):
        encode([np.zeros(5000), value])
    with pytest.raises(InputError):
        encode(value)
    assert decode(encode("next")) == "next"


def test_a_torch_like_object_is_named() -> None:
    """The refusal says which type came."""
    with pytest.raises(InputError, match="Color"):
        encode({"a": Color()})


def test_limits_hold_on_both_sides() -> None:
    """Size, depth, dimensions and items are limited in encode and in decode."""
    deep: Any = 1
    for _ in range(65):
        deep = [deep]
    circle: list[Any] = []
    circle += [circle, circle]
    for value in (deep, circle, np.zeros((1,) * 33)):
        with pytest.raises(InputError):
            encode(value)
    assert same(deep[0], decode(encode(deep[0])))
    for value, tight in [
        (deep[0], Limits(max_depth=63)),
        ([0] * 100, Limits(max_items=99)),
        ([[0] * 50] * 2, Limits(max_items=99)),
        (np.zeros((1, 1, 1)), Limits(max_ndim=2)),
        (np.zeros((1, 5000, 1)), Limits(max_ndim=2)),
        (np.zeros(5000), Limits(max_bytes=30_000)),
        ([np.zeros(500)] * 10, Limits(max_bytes=30_000)),
        ([np.zeros(2)] * 10, Limits(max_items=9)),
        ([np.zeros((2, 1, 1))] * 10, Limits(max_ndim=2)),
        (b"x" * 50, Limits(max_bytes=50)),
    ]:
        with pytest.raises(InputError):
            encode(value, tight)
        with pytest.raises(DecodeError):
            decode(encode(value), tight)


def tensor(name: bytes = b"uint8", shape: tuple[int, ...] = (4,), data: bytes = b"abcd", place: int = 0) -> bytes:
    head = struct.pack(f"<BBB{len(name)}s{len(shape)}q", place, len(name), len(shape), name, *shape)
    if place == 0:
        head += bytes(-len(head) % 16)
    return msgpack.packb(msgpack.ExtType(1, head + data))


def rows_of(lengths: tuple[int, ...], inner: bytes, code: int = 1, count: int | None = None) -> bytes:
    """Ragged rows over a tensor that `tensor` made."""
    head = struct.pack(f"<BI{len(lengths)}I", code, len(lengths) if count is None else count, *lengths)
    return msgpack.packb(msgpack.ExtType(6, head + msgpack.unpackb(inner).data))


def test_a_tensor_by_hand_decodes() -> None:
    """The layout in the docstrings is the one that is read."""
    assert same(np.frombuffer(b"abcd", np.uint8), decode(tensor()))
    rows = [np.frombuffer(text, np.uint8) for text in (b"a", b"", b"bcd")]
    assert same(rows, decode(rows_of((1, 0, 3), tensor())))
    assert encode([*rows, rows[1]]) == rows_of((1, 0, 3, 0), tensor())


HOSTILE = {
    "empty": b"",
    "nested 1,025 deep": b"\x91" * 1025 + b"\xc0",
    "nested 65 deep": b"\x91" * 65 + b"\xc0",
    "array of 2**32-1": b"\xdd\xff\xff\xff\xff",
    "map of 2**32-1": b"\xdf\xff\xff\xff\xff",
    "str of 2**32-1": b"\xdb\xff\xff\xff\xffabc",
    "bin of 2**32-1": b"\xc6\xff\xff\xff\xffabc",
    "ext of 2**32-1": b"\xc9\xff\xff\xff\xff\x01abc",
    "frame of 2**32-1": b"\xc9\xff\xff\xff\xff\x03abcdefgh",
    "frame head of 2**32-1": b"\xc9\x00\x00\x00\x05\x03\xff\xff\xff\xff\xc0",
    "empty frame": b"\xc9\x00\x00\x00\x00\x03",
    "frame with junk": b"\xc9\x00\x00\x00\x06\x03\x01\x00\x00\x00\xc0\x00",
    "frame in a frame": b"\xc9\x00\x00\x00\x0b\x03\x07\x00\x00\x00" + b"\xc7\x04\x03\x00\x00\x00\x00",
    "duplicate keys": b"\x82\xa1a\x01\xa1a\x02",
    "int key": b"\x81\x01\x02",
    "bytes key": b"\x81\xc4\x01a\x02",
    "list key": b"\x81\x90\x02",
    "trailing byte": b"\x01\x01",
    "invalid UTF-8": b"\xa2\xc3\x28",
    "surrogate in UTF-8": b"\xa3\xed\xa0\x80",
    "never used byte": b"\xc1",
    "unknown extension": msgpack.packb(msgpack.ExtType(7, b"abcd")),
    "timestamp": msgpack.packb(msgpack.Timestamp(1)),
    "timestamp in a list": msgpack.packb([msgpack.Timestamp(1)]),
    "dtype O": tensor(b"O"),
    "dtype object": tensor(b"object"),
    "dtype V": tensor(b"V4"),
    "dtype big-endian": tensor(b">i4"),
    "dtype unknown": tensor(b"int3"),
    "dtype with newline": tensor(b"int8\n"),
    "dtype empty": tensor(b""),
    "shape -1": tensor(shape=(-1,)),
    "shape 2**63-1": tensor(shape=(2**63 - 1,)),
    "product overflows to 4": tensor(shape=(2**62 + 1, 4)),
    "zero does not excuse an overflow": tensor(shape=(0, 2**62, 2**62), data=b""),
    "one byte short": tensor(data=b"abc"),
    "one byte over": tensor(data=b"abcde"),
    "65 dimensions": tensor(shape=(1,) * 65, data=b"a"),
    "255 dimensions announced": msgpack.packb(msgpack.ExtType(1, b"\x00\x05\xffuint8")),
    "bool of 2": tensor(b"bool", (1,), b"\x02"),
    "place 2": tensor(place=2),
    "tail without a frame": tensor(place=1, data=b""),
    "no header": msgpack.packb(msgpack.ExtType(1, b"")),
    "8 GiB float32": tensor(b"float32", (2**31,), b""),
    "rows: no header": msgpack.packb(msgpack.ExtType(6, b"\x01\x00")),
    "rows: no tensor": msgpack.packb(msgpack.ExtType(6, b"\x01\x00\x00\x00\x00")),
    "rows: lengths one short": rows_of((1, 2), tensor()),
    "rows: lengths one over": rows_of((1, 4), tensor()),
    "rows: lengths overflow to 4": rows_of((2**32 - 1, 5), tensor()),
    "rows: lengths of a dense scalar": rows_of((1,), tensor(shape=(), data=b"a")),
    "rows: 2**32-1 announced": rows_of((4,), tensor(), count=2**32 - 1),
    "rows: one more announced": rows_of((4,), tensor(), count=2),
    "rows: none announced": rows_of((4,), tensor(), count=0),
    "rows: none of 4": rows_of((), tensor()),
    "rows in rows": rows_of((4,), rows_of((4,), tensor()), code=6),
    "rows of an unknown extension": rows_of((4,), tensor(), code=7),
    "rows: tail without a frame": rows_of((4,), tensor(place=1, data=b"")),
    "rows of 8 GiB": rows_of((2**31,), tensor(b"float32", (2**31,), b"")),
    "rows: bool of 2": rows_of((1,), tensor(b"bool", (1,), b"\x02")),
    "rows in a list": msgpack.packb([msgpack.unpackb(rows_of((4,), tensor()))]),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_messages(data: bytes) -> None:
    """Each hostile message is refused by name, with its length."""
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert caught.value.length == len(data)
    nested = b"\x81\xa1x" + data
    with pytest.raises(DecodeError):
        decode(nested)


def test_offsets_of_faults() -> None:
    """Trailing bytes, a cut-off message and a tensor past its frame say where."""
    for data, offset in [(b"\x01\x01", 1), (b"\xa5abc", 4), (b"", 0)]:
        with pytest.raises(DecodeError) as caught:
            decode(data)
        assert caught.value.offset == offset


def test_not_bytes() -> None:
    """Something that is no buffer is refused the same way."""
    with pytest.raises(DecodeError, match="str"):
        decode("abc")  # type: ignore[arg-type]


SAMPLES = [
    {"a": [1, -5, 2.5, "h\u00e9llo", b"raw", None, True], "b": {"c": "x" * 40}},
    {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "flag": np.ones(3, np.bool_)},
    [np.arange(n, dtype=np.int16) for n in range(5)],
    [np.arange(n * 70.0) for n in range(5)],
    {"x": np.arange(400.0), "y": [np.arange(300, dtype=np.int64), np.ones(2000, np.bool_)]},
]


@pytest.mark.parametrize("value", SAMPLES)
def test_truncation_at_every_byte(value: Any) -> None:
    """A message cut anywhere, or one byte too long, is refused."""
    data = encode(value)
    for cut in range(len(data)):
        with pytest.raises(DecodeError):
            decode(data[:cut])
    with pytest.raises(DecodeError):
        decode(data + b"\x00")


@given(
    st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_mutated_messages(value: Any, changes: list[tuple[int, int]]) -> None:
    """A damaged message decodes to something or raises DecodeError, and nothing else."""
    data = bytearray(encode(value))
    for position, byte in changes:
        data[position % min(len(data), 120)] = byte
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            decode(data)
        except DecodeError:
            pass


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    """Random bytes decode to something or raise DecodeError, and nothing else."""
    try:
        decode(data)
    except DecodeError:
        pass


def test_threads_do_not_share_state() -> None:
    """Encoding at once in several threads gives each its own message."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            value = {"x": np.full(700, number, np.int64), "s": str(number)}
            if not same(value, decode(encode(value))):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
