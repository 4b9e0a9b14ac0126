"""What the command line prints of results."""

from __future__ import annotations

import json

import numpy as np

from torchrelay.terminal import plain


def test_any_result_is_strict_json() -> None:
    """Arrays, bytes, complex numbers, NaN and Inf included."""
    row = {"a": np.array([1.0, np.nan, np.inf], np.float32), "c": np.complex64(1 + 2j), "b": b"x", "d": {"e": [None]}}
    expected = {"a": [1.0, None, None], "c": [1.0, 2.0], "b": "eA==", "d": {"e": [None]}}
    assert json.loads(json.dumps(plain(row), allow_nan=False)) == expected
