"""Column types: the grammar is read, written back, and refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrelay.config.types import NUMERIC, ColumnType, parse_type
from torchrelay.errors import ConfigError

DIMS = st.lists(st.one_of(st.integers(0, 99), st.sampled_from(["H", "W", "n_1"]), st.none()), max_size=5)


@settings(deadline=None)
@given(st.sampled_from([*NUMERIC, "str", "bytes", "json"]), DIMS, st.booleans())
def test_text_round_trip(dtype: str, dims: list[int | str | None], nullable: bool) -> None:
    """Every type is read back from its own text as the same type."""
    shape = tuple(dims) if dtype in NUMERIC else ()
    kind = ColumnType(dtype, shape, nullable)
    assert parse_type(str(kind)) == kind


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("str = en", "en"),
        ("str = ''", ""),
        ("str = 5", "5"),
        ("str = a=b", "a=b"),
        ("str = 2024-99-99", "2024-99-99"),
        ("str? = null", None),
        ("bytes = abc", b"abc"),
        ("bool = true", True),
        ("int64 = 7", 7),
        ("bfloat16 = 1.5", 1.5),
        ("json = {a: [1, null]}", {"a": [1, None]}),
    ],
)
def test_default(text: str, default: object) -> None:
    """A default is a YAML value of the column's own type, and its text survives."""
    kind = parse_type(text)
    assert kind.has_default
    assert kind.default == default
    assert parse_type(str(kind)) == kind


def test_array_default() -> None:
    """A default array has the declared dtype, cannot be changed by a reader, and leaves types comparable."""
    kind = parse_type("float32[2] = [1, 2]")
    assert kind.default.dtype == np.float32
    assert not kind.default.flags.writeable
    assert kind == parse_type("float32[2] = [1, 2]")
    assert kind != parse_type("float32[2] = [1, 3]")
    hash(kind)


@pytest.mark.parametrize(
    "kind", [ColumnType("bytes", (), False, True, b"x"), ColumnType("str", (), False, True, "5: #")]
)
def test_default_without_text(kind: ColumnType) -> None:
    """A type built in Python writes its default so that it is read back with the same value."""
    assert parse_type(str(kind)).default == kind.default


def test_stacked() -> None:
    """Only numbers of one shape, never null, stack into one array."""
    stacked = {t: parse_type(t).stacked for t in ["int64", "uint8[2, 3]", "uint8[H, 3]", "float32[*]", "bool?", "str"]}
    assert stacked == {
        "int64": True,
        "uint8[2, 3]": True,
        "uint8[H, 3]": False,
        "float32[*]": False,
        "bool?": False,
        "str": False,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not understood"),
        ("float33", "did you mean 'float32'"),
        ("O", "unknown dtype"),
        ("float32[-1]", "neither a number"),
        ("float32[²]", "neither a number"),
        ("float32[" + "9" * 5000 + "]", "neither a number"),
        ("float32[1][2]", "not understood"),
        ("float32[]", "neither a number"),
        ("float32[" + "2," * 40 + "2]", "over the limit"),
        ("str[3]", "takes no shape"),
        ("str = ", "the default is null"),
        ("int8 = 300", "does not fit int8"),
        ("int64 = 1.5", "int64 is expected"),
        ("int64 = " + "1" * 5000, "no YAML value"),
        ("json = " + "[" * 3000, "no YAML value"),
        ("json = !!python/object/apply:os.system [ls]", "no YAML value"),
        ("json = 2024-01-01", "not JSON"),
    ],
)
def test_refused(text: str, says: str) -> None:
    """A text that is no type is a ConfigError that says why."""
    with pytest.raises(ConfigError, match=says):
        parse_type(text)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    """No text makes the parser raise anything but ConfigError."""
    try:
        parse_type(text)
    except ConfigError:
        pass
