"""Narrowed arrays come back in their dtype, compressed messages exactly, and hostile ones as DecodeError."""

from __future__ import annotations

import math
import struct
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.queues.test_codec import same, values
from torchrelay.config.ragged import RaggedRows
from torchrelay.errors import ConfigError, DecodeError, InputError
from torchrelay.queues import wire
from torchrelay.queues.codec import DTYPES, Limits, decode, encode
from torchrelay.queues.tensors import TAIL, pack_head

TARGETS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
WIDE = ("float32", "float64", "float16", "bfloat16")
ALGORITHMS = ("lz4", "zstd")
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.1, -3.14159, 448.0, 500.0, 7e4, 1e38, 1e-30]


def cast(array: np.ndarray, target: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(DTYPES[target]).astype(array.dtype)


@st.composite
def floats(draw: st.DrawFn, dims: int = 3) -> np.ndarray:
    """Arrays of every wide dtype, inline ones and ones in the tail, of 0 rows too."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=dims)))
    if draw(st.booleans()):
        shape = (shape[0] * 500, *shape[1:])
    some = draw(st.lists(st.floats(width=64) | st.sampled_from(SPECIAL), min_size=1, max_size=20))
    with np.errstate(all="ignore"):
        return np.resize(np.array(some), shape).astype(DTYPES[draw(st.sampled_from(WIDE))])


def is_narrowed(array: np.ndarray, target: str) -> bool:
    return array.dtype.itemsize > DTYPES[target].itemsize


@given(floats(), st.sampled_from(TARGETS))
def test_an_array_comes_back_rounded_in_its_own_dtype(array: np.ndarray, target: str) -> None:
    """Exactly what numpy's cast there and back gives, read-only; an array that is as narrow already is not touched."""
    back = decode(encode(wire.narrow(array, target)))
    assert isinstance(back, np.ndarray)
    assert not back.flags.writeable
    if not is_narrowed(array, target):
        assert same(array, back)
    else:
        assert same(back, cast(array, target))


@given(st.lists(floats(2) | st.none() | st.integers(0, 9) | st.floats(width=64) | st.text()), st.sampled_from(TARGETS))
def test_rows_of_a_list_are_narrowed_one_by_one(rows: list[Any], target: str) -> None:
    """Arrays of any shapes and dtypes in one column; rows that are none come back as they were."""
    back = decode(encode(wire.narrow(rows, target)))
    assert isinstance(back, list | RaggedRows)
    for old, new in zip(rows, back, strict=True):
        if isinstance(old, np.ndarray) and is_narrowed(old, target):
            assert same(new, cast(old, target))
        else:
            assert same(old, new)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [1, 300])
def test_ragged_rows_are_narrowed_in_one_go(target: str, scale: int) -> None:
    """As each row by itself would be; rows that are as narrow already travel as they are."""
    for name in WIDE:
        rows = [np.linspace(-3, 3, n * scale).astype(DTYPES[name]).reshape(-1, 1) for n in range(5)]
        for given_rows in (rows, RaggedRows.of(rows)):
            back = decode(encode(wire.narrow(given_rows, target)))
            assert isinstance(back, RaggedRows)
            narrowed = is_narrowed(rows[0], target)
            assert all(same(new, cast(old, target) if narrowed else old) for old, new in zip(rows, back, strict=True))
            assert not back.flat.flags.writeable


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_beyond_the_range(target: str) -> None:
    """Inf where the dtype has it; float8_e4m3fn has only NaN for it; NaN stays, and zeros keep their sign."""
    back: Any = decode(encode(wire.narrow(np.array([1e39, -1e39, math.nan, -0.0]), target)))
    beyond = [math.nan, math.nan] if target == "float8_e4m3fn" else [math.inf, -math.inf]
    np.testing.assert_array_equal(back, [*beyond, math.nan, -0.0])
    assert np.signbit(back[3])


@given(values, st.sampled_from(TARGETS))
def test_other_values_are_not_narrowed(value: Any, target: str) -> None:
    """Integers, booleans, complex numbers, 8-bit floats, texts and mappings are carried as without the option."""
    rows = [v for v in value if not is_float_array(v)] if isinstance(value, list) else [value]
    rows = [v for v in rows if not is_float_array(v)]
    assert encode(wire.narrow(rows, target)) == encode(rows)


def is_float_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.name in WIDE


def test_odd_arrays() -> None:
    """Big-endian and strided arrays are narrowed as well; masked ones are refused as ever."""
    base = np.arange(24, dtype=">f4").reshape(4, 6)
    for array in (base, base.T, base[::2, ::-1]):
        back: Any = decode(encode(wire.narrow(array, "float16")))
        assert back.dtype == np.float32
        np.testing.assert_array_equal(back, array)
    with pytest.raises(InputError, match="MaskedArray"):
        encode(wire.narrow(np.ma.masked_array([1.0], [True]), "float16"))


def test_a_narrowed_array_counts_as_large_as_it_is_read() -> None:
    """The limit of a message's bytes holds for what the reader allocates, on both sides."""
    narrowed = wire.narrow(np.zeros(2000, np.float64), "float8_e5m2")
    assert len(encode(narrowed)) < 2200
    with pytest.raises(InputError):
        encode(narrowed, Limits(max_bytes=15_999))
    with pytest.raises(DecodeError, match="16000 bytes"):
        decode(encode(narrowed), Limits(max_bytes=15_999))
    decode(encode(narrowed), Limits(max_bytes=16_000))


@given(values, st.sampled_from(ALGORITHMS))
def test_compressed_messages_come_back_bit_for_bit(value: Any, name: str) -> None:
    """Any value, once it is large enough to be worth it; what is not smaller stays the very message."""
    message = encode([value, b"ab" * 2000])
    packed = wire.compress(message, name)
    assert wire.is_compressed(packed)
    assert len(packed) < 0.95 * len(message)
    assert same(decode(packed), decode(message))
    assert same(decode(bytearray(packed)), decode(message))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_compression_must_save_a_twentieth(name: str) -> None:
    """Random bytes are sent as they are, and so is what would lose only a little."""
    noise = np.random.default_rng(4).bytes(100_000)
    for value in (noise, noise + bytes(3000)):
        message = encode(value)
        assert wire.compress(message, name) is message
    assert wire.compress(encode(noise + bytes(9000)), name) != encode(noise + bytes(9000))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_both_at_once(name: str) -> None:
    """Narrowed, framed and compressed: the reader sees the original dtype."""
    array = np.repeat(np.linspace(-1, 1, 50, dtype=np.float32), 100)
    message = encode(wire.narrow([array, array[:0], None], "bfloat16"))
    packed = wire.compress(message, name)
    assert len(packed) < len(message) / 4
    back: Any = decode(packed)
    np.testing.assert_array_equal(back[0], array.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert same(back[1:], [array[:0], None])


def wrapped(stream: bytes, raw_bytes: int, code: int = 1, announced: int | None = None) -> bytes:
    """A compressed message by hand."""
    count = 9 + len(stream) if announced is None else announced
    return struct.pack(">BIBBQ", 0xC9, count, 4, code, raw_bytes) + stream


def packed(message: bytes, name: str) -> bytes:
    """The message compressed, whatever that saves."""
    algorithm = wire._ALGORITHMS[name]
    return wrapped(algorithm.compress(message), len(message), algorithm.code)


MESSAGE = encode({"x": np.arange(300.0), "t": "abc" * 100})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_truncation_and_trailing_bytes(name: str) -> None:
    """A compressed message that is cut anywhere, or goes on, is refused, also where its header is made to fit."""
    whole = packed(MESSAGE, name)
    stream, code = whole[15:], whole[6]
    assert same(decode(whole), decode(MESSAGE))
    for cut in range(len(whole)):
        with pytest.raises(DecodeError):
            decode(whole[:cut])
    for cut in range(len(stream)):
        with pytest.raises(DecodeError):
            decode(wrapped(stream[:cut], len(MESSAGE), code))
    with pytest.raises(DecodeError, match="announces"):
        decode(whole + b"\0")
    for more in (b"\0", b"\0\0\0", stream):
        with pytest.raises(DecodeError):
            decode(wrapped(stream + more, len(MESSAGE), code))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_wrong_announced_length(name: str) -> None:
    """Too large, too small, none, or more than can be: refused, naming the stream, before anything is allocated."""
    stream, code = packed(MESSAGE, name)[15:], packed(MESSAGE, name)[6]
    for wrong in (0, 1, len(MESSAGE) - 1, len(MESSAGE) + 1, 2**20, 2**31 - 1, 2**31, 2**63, 2**64 - 1):
        with pytest.raises(DecodeError, match=f"the {name} stream"):
            decode(wrapped(stream, wrong, code))
    with pytest.raises(DecodeError, match="above the limit of 1000"):
        decode(packed(MESSAGE, name), Limits(max_bytes=1000))
    with pytest.raises(DecodeError, match="cannot hold"):
        decode(wrapped(stream[:20], 2**31 - 1, code))


def test_a_zstd_frame_that_says_another_size() -> None:
    """The library would believe the frame; one that says nothing, or more than is announced, is refused."""
    import zstandard

    silent = zstandard.ZstdCompressor(write_content_size=False).compress(MESSAGE)
    with pytest.raises(DecodeError, match="its frame says -1 bytes"):
        decode(wrapped(silent, len(MESSAGE), 2))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(DecodeError, match="its frame says 67108864 bytes"):
        decode(wrapped(bomb, 1000, 2))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bombs(name: str) -> None:
    """A compressed message within another is refused, at whatever depth, and one within a value too."""
    inner = packed(encode(bytes(1 << 20)), name)
    for _ in range(3):
        inner = packed(inner, name)
        with pytest.raises(DecodeError, match="extension type 4 is unknown"):
            decode(inner)
    with pytest.raises(DecodeError, match="extension type 4 is unknown"):
        decode(b"\x91" + packed(MESSAGE, name))
    with pytest.raises(DecodeError, match="trailing"):
        decode(packed(encode([5] * 50) * 2, name))


@given(
    st.sampled_from(ALGORITHMS),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_streams(name: str, changes: list[tuple[int, int]]) -> None:
    """A damaged message decodes to something or raises DecodeError, and nothing else."""
    data = bytearray(packed(encode(wire.narrow([np.arange(400.0), np.arange(9.0)], "float16")), name))
    for position, byte in changes:
        data[position % len(data)] = byte
    try:
        decode(data)
    except DecodeError:
        pass


def narrowed(name: bytes = b"float32", array: np.ndarray | None = None, place: int | None = None) -> bytes:
    """A narrowed tensor by hand, as a message."""
    array = np.zeros(4, np.float16) if array is None else array
    tensor = pack_head(array, place or 0)
    tensor += b"" if place else bytes(-len(tensor) % 16) + array.tobytes()
    payload = bytes((len(name),)) + name + tensor
    return struct.pack(">BIb", 0xC9, len(payload), 5) + payload


def test_a_narrowed_tensor_by_hand() -> None:
    """The layout in the docstring is the one that is read."""
    assert same(decode(narrowed()), np.zeros(4, np.float32))


HOSTILE = {
    "unknown algorithm": wrapped(b"abc", 3, 0),
    "another one": wrapped(b"abc", 3, 255),
    "junk as lz4": wrapped(b"\xff" * 40, 400),
    "junk as zstd": wrapped(b"\xff" * 40, 400, 2),
    "no stream": wrapped(b"", 0),
    "header of 2**32-1": wrapped(b"abc", 3, 1, 2**32 - 1),
    "header too short": wrapped(b"abc", 3, 1, 11),
    "unknown original": narrowed(b"float128"),
    "original of integers": narrowed(b"int64"),
    "original 8 bits wide": narrowed(b"float8_e5m2"),
    "original empty": narrowed(b""),
    "original of 255 bytes": struct.pack(">BIb", 0xC9, 1, 5) + b"\xff",
    "no original": struct.pack(">BIb", 0xC9, 0, 5),
    "no narrower": narrowed(b"float16"),
    "not narrowed at all": narrowed(array=np.zeros(4, np.float32)),
    "integers": narrowed(array=np.zeros(4, np.int8)),
    "complex": narrowed(b"float64", array=np.zeros(4, np.complex64)),
    "tail without a frame": narrowed(place=TAIL),
    "no tensor": struct.pack(">BIb", 0xC9, 8, 5) + b"\x07float32",
    "narrowed twice": struct.pack(">BIb", 0xC9, 8 + len(narrowed()), 5) + b"\x07float64" + narrowed(),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_messages(data: bytes) -> None:
    """Each is refused by name, alone and within a value."""
    for message in (data, b"\x91" + data):
        with pytest.raises(DecodeError):
            decode(message)


@pytest.mark.parametrize("value", [np.arange(20.0), np.arange(900.0), [np.arange(5.0), np.arange(700.0)]])
def test_narrowed_messages_cut_at_every_byte(value: Any) -> None:
    """A message with narrowed arrays, inline or in a frame, is refused when it is cut, or goes on."""
    data = encode(wire.narrow(value, "float16"))
    for cut in range(len(data)):
        with pytest.raises(DecodeError):
            decode(data[:cut])
    with pytest.raises(DecodeError):
        decode(data + b"\0")


@pytest.mark.parametrize(("name", "package"), [("lz4", "lz4"), ("zstd", "zstandard")])
def test_a_missing_library_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a worker starts as ConfigError with the stage, and in a reader as DecodeError, with what to install."""
    message = packed(MESSAGE, name)
    wire.check_installed("x", name)
    for module in ("lz4", "lz4.block", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    needs = f'needs the {package} package: pip install "torchrelay[worker]"'
    with pytest.raises(ConfigError) as refused:
        wire.check_installed("x", name)
    assert str(refused.value) == f'stage "x": wire.compress {name} {needs}'
    with pytest.raises(DecodeError) as unread:
        decode(message)
    assert needs in str(unread.value)
