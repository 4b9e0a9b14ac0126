"""run_local: the results, errors and checks of real workers, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import MakePipeline
from torchrelay import Pipeline
from torchrelay.errors import ConfigError, InputError, JobFailed, StageLoadError
from torchrelay.local import run_local

CODE = """
    from pathlib import Path

    from torchrelay import Stage
    from torchrelay.errors import RetryLater


    class Obey(Stage):
        def __init__(self, log: str = "") -> None:
            self.log = log

        def note(self, text):
            if self.log:
                with open(self.log, "a") as file:
                    file.write(text + "\\n")

        def load(self, context):
            self.note(f"load {context.device}")

        def forward(self, batch):
            self.note(f"forward {len(batch)}")
            out = []
            for i, (n, do) in enumerate(zip(batch["n"], batch["do"])):
                if do == "raise":
                    raise ValueError(f"cannot do {n}")
                if do == "later":
                    raise RetryLater(3600, f"not now {n}")
                if do == "reject":
                    batch.reject(i, f"no {n}")
                if do == "junk":
                    out.append(object())
                    continue
                if do == "flaky" and not Path(self.log + ".flaky").exists():
                    Path(self.log + ".flaky").touch()
                    raise OSError("once")
                out.append(f"{n}!{batch.meta[i].get('tag', '')}")
            return {"out": out}

        def close(self):
            self.note("close")
"""
YAML = """
    pipeline: obey
    input: {{n: str, do: str = "", x: "float32[2] = [0, 0]"}}
    output: [out, x]
    stages:
      - name: work
        use: stages.py:Obey
        inputs: [n, do]
        args: {{log: "{log}"}}
        batch: {{max_rows: {rows}}}
        retry: {{attempts: 3}}
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def obey(make_pipeline: MakePipeline, log: Path) -> Pipeline:
    return Pipeline.load(make_pipeline(YAML.format(log=log, rows=4), CODE))


def rows_of(*orders: str) -> list[dict[str, Any]]:
    return [{"n": f"r{i}", "do": do} for i, do in enumerate(orders)]


def test_rows_come_back_in_order_in_batches_of_max_rows(obey: Pipeline, log: Path) -> None:
    """Stages are loaded once, called with full batches, and closed."""
    results = run_local(obey, ({"n": f"r{i}", "x": [i, 0.5]} for i in range(10)), meta={"tag": "t"})
    assert [r["out"] for r in results] == [f"r{i}!t" for i in range(10)]
    assert results[3]["x"].dtype == np.float32
    assert results[3]["x"].tolist() == [3.0, 0.5]
    assert log.read_text().split("\n") == ["load cpu", "forward 4", "forward 4", "forward 2", "close", ""]


def test_no_rows_load_no_stage(obey: Pipeline, log: Path) -> None:
    """Nothing to do is nothing done."""
    assert run_local(obey, []) == []
    assert not log.exists()


def test_the_first_row_that_fails_raises(obey: Pipeline) -> None:
    """Its JobFailed says which row, at which stage, why, and after how many attempts."""
    with pytest.raises(JobFailed) as raised:
        run_local(obey, rows_of("", "", "", "", "", "", "raise", "raise", ""))
    error = raised.value
    assert (error.row, error.stage, error.error_type, error.message) == (6, "work", "ValueError", "cannot do r6")
    assert error.attempts == 3
    assert str(error) == "row 6 at stage 'work' after 3 attempts: ValueError: cannot do r6"
    assert "raise ValueError" in error.traceback
    assert isinstance(error.__cause__, ValueError)


def test_errors_stand_in_the_place_of_their_rows(obey: Pipeline) -> None:
    """Rejections, exceptions, RetryLater and what cannot travel hurt no other row."""
    results = run_local(obey, rows_of("", "reject", "raise", "", "later", "junk", ""), on_error="return")
    told = [(r.error_type, r.attempts, r.row) if isinstance(r, JobFailed) else r["out"] for r in results]
    assert told == [
        "r0!",
        ("Rejected", 1, 1),
        ("ValueError", 3, 2),
        "r3!",
        ("RetryLater", 3, 4),
        ("InputError", 3, 5),
        "r6!",
    ]
    assert [r.message for r in results if isinstance(r, JobFailed)][:3] == ["no r1", "cannot do r2", "not now r4"]


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_stage_that_fails_once_is_tried_again(obey: Pipeline, on_error: Any) -> None:
    """What passes at a later attempt is a result."""
    results = run_local(obey, rows_of("", "flaky", "", "", "", ""), on_error=on_error)
    assert [r["out"] for r in results] == [f"r{i}!" for i in range(6)]


def test_an_earlier_row_at_a_later_stage_is_the_first(make_pipeline: MakePipeline) -> None:
    """Row 2 fails at the first stage and row 1 at the second: row 1 is told of."""
    code = """
        def one(batch):
            if 2 in batch["n"].tolist():
                raise ValueError("two")
            return {}

        def two(batch):
            if 1 in batch["n"].tolist():
                raise ValueError("one")
            return {}
    """
    yaml = """
        pipeline: two
        input: {n: int64}
        output: [n]
        stages:
          - {name: one, use: "stages.py:one", retry: {attempts: 1}}
          - {name: two, use: "stages.py:two", retry: {attempts: 1}}
    """
    with pytest.raises(JobFailed, match="row 1 at stage 'two' after 1 attempt: ValueError: one"):
        run_local(Pipeline.load(make_pipeline(yaml, code)), [{"n": n} for n in range(5)])


def test_all_rows_of_a_list_are_checked_before_anything_runs(obey: Pipeline, log: Path) -> None:
    """A row that does not fit is named as a client names it."""
    rows = rows_of(*[""] * 2000)
    for bad, why in [
        ({"n": 1}, "row 1999: column 'n': str is expected, int 1 came"),
        ({"m": "x"}, "row 1999: the pipeline's input has no column 'm'; it declares n, do, x"),
        ("text", "row 1999: a row is a mapping of column to value, str of length 4 came"),
        ({"n": "a", "x": [1]}, r"row 1999: column 'x': float32\[2\] = "),
    ]:
        with pytest.raises(InputError, match=why):
            run_local(obey, [*rows[:1999], bad])
    assert not log.exists()


def test_rows_of_an_iterator_are_taken_as_they_go(obey: Pipeline) -> None:
    """The results of one chunk are there before the rows of a later one are asked for."""
    seen: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for i in range(3000):
            seen.append(i)
            yield {"n": "a", "do": "raise" if i == 5 else ""}

    with pytest.raises(JobFailed, match="row 5"):
        run_local(obey, rows())
    assert len(seen) < 2000


@pytest.mark.parametrize(
    ("given", "options", "error"),
    [
        ({"n": "a"}, {}, "rows are a list of mappings"),
        (7, {}, "rows are a list of mappings"),
        ([{"n": "a"}], {"on_error": "keep"}, "on_error"),
        ([{"n": "a"}], {"meta": 3}, "meta must be a mapping"),
    ],
)
def test_wrong_arguments_are_named(obey: Pipeline, given: Any, options: Any, error: str) -> None:
    with pytest.raises(InputError, match=error):
        run_local(obey, given, **options)


def test_a_device_that_is_none_is_named(obey: Pipeline) -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is none of"):
        run_local(obey, [{"n": "a"}], device="tpu")


def test_a_stage_that_does_not_load_closes_those_before_it(make_pipeline: MakePipeline, log: Path) -> None:
    """The error is StageLoadError, and every stage that was asked to load is closed."""
    code = (
        CODE
        + """
    class Broken(Obey):
        def load(self, context):
            raise OSError("no model")
    """
    )
    yaml = YAML.format(log=log, rows=4) + f'      - {{name: broken, use: "stages.py:Broken", args: {{log: "{log}"}}}}\n'
    with pytest.raises(StageLoadError, match="stage 'broken' does not load: OSError: no model"):
        run_local(Pipeline.load(make_pipeline(yaml, code)), [{"n": "a"}])
    assert log.read_text().split("\n") == ["load cpu", "close", "close", ""]


def test_undeclared_rows_of_several_kinds_are_each_taken_as_they_come(make_pipeline: MakePipeline) -> None:
    """Without declared types, rows of different columns, shapes and dtypes pass side by side."""
    code = """
        def echo(batch):
            return {"kind": [type(batch["a"]).__name__] * len(batch)}
    """
    pipeline = Pipeline.load(
        make_pipeline("{pipeline: echo, output: [a, kind], stages: [{name: e, use: 'stages.py:echo'}]}", code)
    )
    rows = [
        {"a": np.zeros(2, np.float32)},
        {"a": np.ones(2, np.float32)},
        {"a": np.ones(3, np.int8)},
        {"a": "text"},
        {"a": [1, None], "b": 1},
        {"a": np.float32(1.5)},
    ]
    results = run_local(pipeline, rows)
    assert [r["kind"] for r in results] == ["ndarray"] * 3 + ["list"] * 3
    for row, result in zip(rows, results, strict=True):
        assert np.array_equal(row["a"], result["a"])
    with pytest.raises(InputError, match="row 1: column 'a': cannot encode"):
        run_local(pipeline, [{"a": 1}, {"a": object()}, {"a": 2}])


def test_a_limit_on_rows_holds_for_each_submitted_row(make_pipeline: MakePipeline) -> None:
    """Many rows together may be above it; the row that grows too much fails alone."""
    code = """
        import numpy as np
        from torchrelay.stages import Expand

        def spread(batch):
            counts = batch["n"]
            return Expand({"part": np.arange(counts.sum())}, counts)
    """
    yaml = """
        pipeline: grow
        input: {n: int64}
        output: [part]
        limits: {rows_per_job: 10}
        stages:
          - {name: spread, use: "stages.py:spread", rows: expand, outputs: {part: int64}, retry: {attempts: 1}}
    """
    pipeline = Pipeline.load(make_pipeline(yaml, code))
    rows = [{"n": n} for n in (10, 9, 11, 0, 10)]
    results = run_local(pipeline, rows, on_error="return")
    assert [r.error_type if isinstance(r, JobFailed) else len(r["part"]) for r in results] == [
        10,
        9,
        "InputError",
        0,
        10,
    ]
    assert "made 11 rows of this job, above limits.rows_per_job (10)" in results[2].message


RAGGED_CODE = """
    import numpy as np
    from torchrelay import Expand, Stage

    def double(batch):
        return {"tokens": [row * 2 for row in batch["tokens"]]}

    def total(batch):
        for i, (row, mask) in enumerate(zip(batch["tokens"], batch.mask("tokens"))):
            if row[mask].sum() == 14:
                batch.reject(i, "fourteen")
        assert batch["tokens"].shape[1] in (4, 16)
        return {"total": batch["tokens"].sum(axis=1), "length": batch.lengths["tokens"]}

    def cut(batch):
        parts = [[row[i : i + 3] for i in range(0, len(row), 3)] for row in batch["tokens"]]
        return Expand({"part": [part for row in parts for part in row]}, [len(row) for row in parts])

    def pairs(batch):
        rows = zip(batch["part"], batch["tokens"], batch["other"])
        return {"pair": [np.stack([part, part + len(other)], 1) for part, tokens, other in rows]}
"""
RAGGED_YAML = """
    pipeline: ragged
    input: {tokens: "int32[*]", other: "float32[*, 2]"}
    output: [tokens, total, length, part, pair]
    stages:
      - name: double
        use: "stages.py:double"
        inputs: [tokens]
        outputs: {tokens: "int32[*]"}
        batch: {max_rows: 3}
      - name: total
        use: "stages.py:total"
        inputs: [tokens]
        outputs: {total: int64, length: int64}
        batch: {max_rows: 64, pad: {tokens: 0}, buckets: {tokens: [4, 16]}, max_cost: {column: tokens, total: 40}}
      - {name: cut, use: "stages.py:cut", inputs: [tokens], outputs: {part: "int32[*]"}, rows: expand}
      - {name: pairs, use: "stages.py:pairs", inputs: [part, tokens, other], outputs: {pair: "int32[*, 2]"}}
      - {name: whole, rows: {collapse: cut}}
"""


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("ragged")
    (folder / "stages.py").write_text(dedent(RAGGED_CODE))
    (folder / "pipeline.yaml").write_text(dedent(RAGGED_YAML))
    return Pipeline.load(folder / "pipeline.yaml")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 3)), max_size=12))
def test_ragged_rows_are_what_plain_python_says(ragged: Pipeline, values: list[tuple[list[int], int]]) -> None:
    """Passed on, padded, cut, repeated, grouped and rejected: each row's result is a list of its own arrays."""
    rows = [{"tokens": np.array(row, np.int32), "other": np.ones((n, 2), np.float32)} for row, n in values]
    results = run_local(ragged, rows, on_error="return")
    for (tokens, others), result in zip(values, results, strict=True):
        doubled = [2 * token for token in tokens]
        if sum(doubled) == 14:
            assert isinstance(result, JobFailed)
            assert result.message == "fourteen"
            continue
        assert isinstance(result, dict)
        parts = [doubled[i : i + 3] for i in range(0, len(doubled), 3)]
        assert (result["total"], result["length"]) == (sum(doubled), len(doubled))
        assert (result["tokens"].dtype, result["tokens"].tolist()) == (np.int32, doubled)
        assert type(result["part"]) is list
        assert [part.tolist() for part in result["part"]] == parts
        pairs = [[[token, token + others] for token in part] for part in parts]
        assert [(pair.dtype, pair.tolist()) for pair in result["pair"]] == [(np.int32, pair) for pair in pairs]
