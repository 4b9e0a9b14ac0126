"""The types of columns, and the text in which pipeline files write them.

str  bytes  json  bool  int64  float32  bfloat16 ...     one value per row
uint8[H, W, 3]    dims: a number; a name, equal within one row; * ragged
float32?          null allowed
str = en          a default
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from torchrelay.errors import ConfigError

_NUMPY_NAMES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]
_ML_NAMES = [n for n in dir(ml_dtypes) if n == "bfloat16" or n.startswith("float8_")]
NUMERIC: dict[str, np.dtype[Any]] = {n: np.dtype(n) for n in _NUMPY_NAMES} | {
    n: np.dtype(getattr(ml_dtypes, n)) for n in _ML_NAMES
}
OBJECTS = ("str", "bytes", "json")
_TYPE = re.compile(r"^\s*([A-Za-z_]\w*)\s*(?:\[([^\]]*)\])?\s*(\?)?\s*$")
_DIM_NAME = re.compile(r"[A-Za-z_]\w*")
_DIM_SIZE = re.compile(r"[0-9]{1,12}")
COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_NDIM = 16
MAX_ROW_BYTES = 1 << 40


@dataclass(frozen=True)
class ColumnType:
    """What one row holds in a column. `shape` dims: int fixed, str equal within a row, None ragged.

    `literal` is the text of the default; two types are equal by it, because arrays do not compare to one bool.
    """

    dtype: str
    shape: tuple[int | str | None, ...] = ()
    nullable: bool = False
    has_default: bool = False
    default: Any = field(default=None, compare=False)
    literal: str = ""

    @cached_property
    def is_numeric(self) -> bool:
        """Whether values are numbers or arrays of them (bool included)."""
        return self.dtype in NUMERIC

    @cached_property
    def stacked(self) -> bool:
        """Whether N rows are one array [N, *shape]; else they are a list of N values."""
        return self.is_numeric and not self.nullable and all(isinstance(d, int) for d in self.shape)

    @cached_property
    def np_dtype(self) -> np.dtype[Any]:
        """The numpy dtype; KeyError for str, bytes and json."""
        return NUMERIC[self.dtype]

    def __str__(self) -> str:
        dims = ", ".join("*" if d is None else str(d) for d in self.shape)
        text = self.dtype + (f"[{dims}]" if self.shape else "") + ("?" if self.nullable else "")
        return f"{text} = {self.literal or _literal(self.default)}" if self.has_default else text


def parse_type(text: str) -> ColumnType:
    """Reads the grammar above; raises ConfigError that says what is wrong with the text."""
    if not isinstance(text, str):
        raise ConfigError(f"a column's type is a text such as float32[384], not {text!r:.60}")
    head, equals, tail = text.partition("=")
    match = _TYPE.match(head)
    if match is None:
        raise ConfigError(
            f"type {text!r:.80} is not understood; write for example str, float32[384] or uint8[H, W, 3]?"
        )
    dtype, dims, question = match.groups()
    if dtype not in NUMERIC and dtype not in OBJECTS:
        near = difflib.get_close_matches(dtype, [*NUMERIC, *OBJECTS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"type {text!r:.80}: unknown dtype {dtype!r:.40}{hint}")
    if dims is not None and dtype in OBJECTS:
        raise ConfigError(f"type {text!r:.80}: {dtype} takes no shape; json holds lists of anything")
    shape = () if dims is None else tuple(_dim(text, d.strip()) for d in dims.split(","))
    if len(shape) > MAX_NDIM:
        raise ConfigError(f"type {text!r:.80}: {len(shape)} dims, over the limit of {MAX_NDIM}")
    fixed = math.prod(d for d in shape if isinstance(d, int))
    if dtype in NUMERIC and fixed * NUMERIC[dtype].itemsize > MAX_ROW_BYTES:
        raise ConfigError(f"type {text!r:.80}: one row is over 1 TiB; make the dims smaller")
    column = ColumnType(dtype, shape, question is not None)
    if not equals:
        return column
    literal = tail.strip()
    return ColumnType(dtype, shape, question is not None, True, _default(text, column, literal), literal)


def grouped(kind: ColumnType) -> ColumnType:
    """What a reader outside an expansion gets per row: an array of a stacked column's rows, a list of other values."""
    return ColumnType(kind.dtype, (None, *kind.shape)) if kind.stacked else ColumnType("json")


def _dim(text: str, dim: str) -> int | str | None:
    if dim == "*":
        return None
    if _DIM_SIZE.fullmatch(dim):
        return int(dim)
    if _DIM_NAME.fullmatch(dim):
        return dim
    raise ConfigError(f"type {text!r:.80}: dim {dim!r:.40} is neither a number, a name nor *")


def _default(text: str, column: ColumnType, literal: str) -> Any:
    try:
        value = _yaml_value(literal)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if column.dtype not in ("str", "bytes"):
            raise ConfigError(f"type {text!r:.80}: the default is no YAML value; write for example = 0") from error
        value = literal
    if column.dtype == "str" and not isinstance(value, str | type(None)):
        value = literal
    if column.dtype == "bytes":
        value = literal.encode()
    if isinstance(value, str) and column.is_numeric:
        value = _as_float(value)
    if value is None and not column.nullable:
        raise ConfigError(f"type {text!r:.80}: the default is null; write ? to allow null")
    from torchrelay.config.columns import check_value  # columns imports this module
    from torchrelay.errors import InputError

    if value is None:
        return None
    try:
        if column.dtype == "json":
            json.dumps(value)
        checked = check_value("default", column, value)
    except (InputError, TypeError, ValueError) as error:
        raise ConfigError(f"type {text!r:.80}: {error}") from error
    if isinstance(checked, np.ndarray):
        # All rows share it.
        checked.setflags(write=False)
    return checked


def _yaml_value(literal: str) -> Any:
    if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(literal, yaml.SafeLoader)):
        raise ValueError("an alias could stand for very much")
    return yaml.safe_load(literal)


def _as_float(text: str) -> float | str:
    """YAML 1.1 takes 1e-5, nan and inf for text, people take them for numbers."""
    try:
        return float(text)
    except ValueError:
        return text


def _literal(default: Any) -> str:
    """A default that did not come from text, as YAML writes it."""
    if isinstance(default, bytes):
        return default.decode("utf-8", "replace")
    plain = default.tolist() if isinstance(default, np.ndarray | np.generic) else default
    return json.dumps(plain, ensure_ascii=False, default=str)
