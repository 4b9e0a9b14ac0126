"""Small random pipelines that expand, regroup, skip, join, reject and raise, and what they mean in plain Python.

A value of level k stands in column `v<k>`; level 0 is the submitted row. Each op works on the current level.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.errors import JobFailed

CODE = """
    import numpy as np

    from torchrelay import Expand


    def inc(batch, *, out):
        return {out: batch["x"] + 1}


    def double(batch, *, out):
        return {out: batch["x"] * 2}


    def add(batch, *, out):
        return {out: batch["x"] + batch["other"]}


    def pick(batch, *, out):
        for i, x in enumerate(batch["x"].tolist()):
            if x % 5 == 4:
                batch.reject(i, f"no {x}")
        return {out: batch["x"]}


    def risky(batch, *, out):
        bad = [x for x in batch["x"].tolist() if x % 11 == 10]
        if bad:
            raise ValueError(f"bad {bad[0]}")
        return {out: batch["x"]}


    def open_up(batch, *, out):
        counts = abs(batch["x"]) % 3
        made = [x * 3 + j for x, c in zip(batch["x"].tolist(), counts.tolist()) for j in range(c)]
        return Expand({out: np.array(made, np.int64), "text": [str(x) for x in made]}, counts)


    def total(batch, *, out):
        return {out: np.array([group.sum() for group in batch["x"]], np.int64)}


    def even(batch, *, out):
        return {out: batch["x"] % 2 == 0}
"""
OPS = ("inc", "pick", "risky", "open", "close", "total", "bump", "mix", "fork")


class _Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.last = "input"

    def add(self, name: str, use: str, inputs: dict[str, str], out: str, kind: str, more: str, after: str) -> None:
        pairs = ", ".join(f"{k}: {v}" for k, v in inputs.items())
        self.lines.append(
            f"  - {{name: {name}, after: {after}, use: 'stages.py:{use}', inputs: {{{pairs}}}, "
            f"outputs: {{{out}: {kind}}}, args: {{out: {out}}}, retry: {{attempts: 2, backoff_s: [0, 0]}}{more}}}"
        )
        self.last = name


def legal(ops: Sequence[str]) -> list[str]:
    """The ops that make sense where they stand; at most three levels."""
    kept: list[str] = []
    level = 0
    for op in ops:
        if op in ("close", "total"):
            if level == 0:
                continue
            level -= 1
        elif op == "open":
            if level == 3:
                continue
            level += 1
        kept.append(op)
    return kept


def write(folder: Path, ops: Sequence[str], max_rows: int) -> Path:
    """The pipeline's files in this folder."""
    made, level, opened, seen = _Lines(), 0, [], ["v0"]
    batch = f", batch: {{max_rows: {max_rows}}}"
    for i, op in enumerate(ops):
        v, name = f"v{level}", f"n{i}"
        if op in ("inc", "pick", "risky"):
            made.add(name, op, {"x": v}, v, "int64", batch, made.last)
        elif op == "open":
            level += 1
            out = f"v{level}"
            kinds = "int64, text: str"
            made.add(name, "open_up", {"x": v}, out, kinds, f", rows: expand{batch}", made.last)
            opened.append(name)
            seen += [] if out in seen else [out]
        elif op == "close":
            made.lines.append(f"  - {{name: {name}, after: {made.last}, rows: {{collapse: {opened.pop()}}}}}")
            made.last, level = name, level - 1
        elif op == "total":
            level -= 1
            made.add(name, "total", {"x": v}, f"v{level}", "int64", f", rows: {{collapse: {opened.pop()}}}", made.last)
        elif op == "bump":
            made.add(f"{name}f", "even", {"x": v}, f"f{level}", "bool", batch, made.last)
            made.add(name, "inc", {"x": v}, v, "int64", f", when: f{level}{batch}", made.last)
        elif op == "mix":
            made.add(name, "add", {"x": v, "other": "v0"}, v, "int64", batch, made.last)
        elif op == "fork":
            start = made.last
            made.add(f"{name}l", "inc", {"x": v}, f"l{level}", "int64", batch, start)
            made.add(f"{name}r", "double", {"x": v}, f"r{level}", "int64", batch, start)
            both = {"x": f"l{level}", "other": f"r{level}"}
            made.add(name, "add", both, v, "int64", batch, f"[{name}l, {name}r]")
    (folder / "stages.py").write_text(textwrap.dedent(CODE))
    path = folder / "model.yaml"
    head = f"pipeline: model\ninput: {{v0: int64}}\noutput: [{', '.join(seen)}]\nstages:\n"
    path.write_text(head + "\n".join(made.lines) + "\n")
    return path


class Failed(Exception):
    """The row has no result: (stage, error type, message)."""


Parents = tuple[list[int], ...]


def expected(ops: Sequence[str], value: int) -> dict[str, Any]:
    """The result of one row, lists in place of arrays; raises Failed."""
    columns: dict[int, tuple[list[int], Parents]] = {0: ([value], ())}
    parents: Parents = ()
    for i, op in enumerate(ops):
        level, name = len(parents), f"n{i}"
        x = columns[level][0]
        if op == "pick":
            bad = [n for n, a in enumerate(x) if a % 5 == 4]
            if bad:
                where = f"row {bad[0]}: " if len(x) > 1 else ""
                raise Failed(name, "Rejected", f"{where}no {x[bad[0]]}")
        elif op == "risky":
            wrong = [a for a in x if a % 11 == 10]
            if wrong:
                raise Failed(name, "ValueError", f"bad {wrong[0]}")
        elif op == "open":
            parents = (*parents, [n for n, a in enumerate(x) for _ in range(abs(a) % 3)])
            columns[level + 1] = ([a * 3 + j for a in x for j in range(abs(a) % 3)], parents)
        elif op in ("close", "total"):
            *outer, inner = parents
            parents = tuple(outer)
            if op == "total":
                sums = [sum(a for a, p in zip(x, inner, strict=True) if p == n) for n in range(_rows(parents))]
                columns[level - 1] = (sums, parents)
        else:
            steps = {
                "inc": lambda a: a + 1,
                "bump": lambda a: a + (a % 2 == 0),
                "mix": lambda a: a + columns[0][0][0],
                "fork": lambda a: a + 1 + a * 2,
            }
            columns[level] = ([steps[op](a) for a in x], parents)
    return {f"v{level}": _grouped(*column) for level, column in columns.items()}


def _rows(parents: Parents) -> int:
    return len(parents[-1]) if parents else 1


def _grouped(values: list[Any], parents: Parents) -> Any:
    while parents:
        *outer, inner = parents
        parents = tuple(outer)
        values = [[v for v, p in zip(values, inner, strict=True) if p == n] for n in range(_rows(parents))]
    return values[0]


def plain(value: Any) -> Any:
    """Lists in place of arrays, and a failed row as what it failed with."""
    if isinstance(value, JobFailed):
        return (value.stage, value.error_type, value.message)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def exact(value: Any) -> Any:
    """All of it that can be told apart: types, dtypes, shapes, bytes, order of columns, attempts."""
    if isinstance(value, JobFailed):
        return (value.stage, value.error_type, value.message, value.attempts)
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.flags.writeable, value.tobytes())
    if isinstance(value, dict):
        return [(k, exact(v)) for k, v in value.items()]
    return [exact(v) for v in value] if isinstance(value, list) else (type(value), value)
