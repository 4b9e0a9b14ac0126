"""Tickets for rows on a device: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config.device_rows import DeviceRows, on_host
from torchrelay.errors import DecodeError
from torchrelay.queues import codec
from torchrelay.queues.tensors import DTYPES
from torchrelay.queues.tickets import DeviceMessage, Ticket, is_ticket


def ticket(**changed: Any) -> Ticket:
    parts = {"exporter": "Abc12345", "segment": 1, "handle": bytes(range(64)), "offset": 4096}
    return Ticket(**{**parts, "dtype": DTYPES["float16"], "shape": (3, 4), **changed})


class Memory:
    """Bytes that are looked at only on purpose."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = 0

    def copy_to(self, start: int, nbytes: int, address: int, stream: int) -> None:
        raise AssertionError("no device is there")

    def read(self, start: int, nbytes: int) -> Any:
        self.reads += 1
        return np.frombuffer(self.data, np.uint8)[start : start + nbytes].copy()


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 2000), min_size=1, max_size=4),
    st.integers(0, 2**40),
    st.binary(min_size=64, max_size=64),
)
def test_a_ticket_comes_out_as_it_went_in(dtype: str, shape: list[int], offset: int, handle: bytes) -> None:
    made = ticket(dtype=DTYPES[dtype], shape=tuple(shape), offset=offset, handle=handle)
    data = made.encode()
    assert is_ticket(data)
    assert is_ticket(memoryview(data))
    assert Ticket.decode(data) == made
    assert made.nbytes == int(np.prod(shape)) * DTYPES[dtype].itemsize


@given(st.binary(max_size=300))
def test_anything_else_is_no_ticket(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Ticket.decode(data)


@pytest.mark.parametrize(
    "value", [None, 1, "text", b"x" * 5000, [1, 2], {"a": 1}, np.zeros(3), np.zeros((100, 100)), [np.zeros(5)] * 9]
)
def test_no_other_message_is_taken_for_a_ticket(value: Any) -> None:
    assert not is_ticket(codec.encode(value))


@pytest.mark.parametrize(
    "parts",
    [
        ("../../etc", 1, b"h" * 64, 0, "float16", (3,)),
        ("Abc12345", -1, b"h" * 64, 0, "float16", (3,)),
        ("Abc12345", 1, b"h" * 63, 0, "float16", (3,)),
        ("Abc12345", 1, b"h" * 64, -4, "float16", (3,)),
        ("Abc12345", 1, b"h" * 64, 0, "object", (3,)),
        ("Abc12345", 1, b"h" * 64, 0, "float16", ()),
        ("Abc12345", 1, b"h" * 64, 0, "float16", (3.0,)),
        ("Abc12345", 1, b"h" * 64, 0, "float16", (2**40, 2**40)),
        ("Abc12345", 1, b"h" * 64, 0, "float16"),
    ],
)
def test_forged_tickets_are_refused(parts: tuple[Any, ...]) -> None:
    with pytest.raises(DecodeError):
        Ticket.decode(msgpack.packb(msgpack.ExtType(7, msgpack.packb(parts))))


def test_a_cut_ticket_is_refused() -> None:
    data = ticket().encode()
    for end in range(len(data)):
        with pytest.raises(DecodeError):
            Ticket.decode(data[:end])


def rows_of(array: np.ndarray[Any, Any]) -> tuple[DeviceRows, Memory]:
    memory = Memory(b"\xff" * 64 + array.tobytes())
    return DeviceRows(memory, 64, array.dtype, array.shape), memory


def test_rows_on_a_device_are_sliced_there_and_copied_where_they_are_looked_at() -> None:
    array = np.arange(24, dtype=np.int32).reshape(6, 4)
    rows, memory = rows_of(array)
    part = rows[2:5][1:]
    assert (len(part), part.shape, part.ndim, part.nbytes) == (2, (2, 4), 2, 32)
    assert (len(rows[4:2]), len(rows[9:])) == (0, 0)
    assert memory.reads == 0
    np.testing.assert_array_equal(np.asarray(part), array[3:5])
    np.testing.assert_array_equal(rows[-1], array[-1])
    np.testing.assert_array_equal(np.stack(list(rows)), array)
    assert on_host(array) is array
    with pytest.raises(IndexError):
        rows[6]
    with pytest.raises(IndexError, match="without a step"):
        rows[::2]


def test_a_message_of_rows_on_a_device_is_made_when_it_is_asked_for() -> None:
    array = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    rows, memory = rows_of(array)
    message = codec.message(rows)
    assert isinstance(message, DeviceMessage)
    assert len(message) == array.nbytes
    assert memory.reads == 0
    np.testing.assert_array_equal(codec.decode(codec.join(message)), array)  # type: ignore[arg-type]
    assert codec.encode(rows) == codec.encode(array)
