"""Models that are compiled or recorded per shape: any number of rows in and out, few shapes within."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchrelay.config.spec import BatchSpec, CostSpec, StageConfig, TorchSpec
from torchrelay.config.types import parse_type
from torchrelay.errors import StageLoadError
from torchrelay.stages import Batch, Runner, StageContext, TorchStage, graphs, make_runner, shapes
from torchrelay.stages.shapes import ShapedModel
from torchrelay.stages.warm_up import Unknown, row_bucket, row_buckets, shapes_of

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda:0", marks=gpu)]
TYPES = {"ids": parse_type("int64[*]"), "x": parse_type("float32[3]")}
# More shapes than torch compiles a model for by itself.
BATCH = BatchSpec(max_rows=12, pad={"ids": 0}, buckets={"ids": [4, 8]})


class Both(nn.Module):
    """Embeds ids and adds a linear of x; notes the shapes that it is traced or run with."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 5)
        self.linear = nn.Linear(3, 5)

    def forward(self, ids: torch.Tensor, *, x: torch.Tensor) -> dict[str, Any]:
        return {"y": self.embed(ids).mean(dim=1) + self.linear(x), "mean": x.mean(), "kind": "both"}


class Stage(TorchStage):
    def build(self, context: StageContext) -> nn.Module:
        torch.manual_seed(0)
        return Both()

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["ids"], x=batch["x"])["y"]}


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles without a C++ compiler: the same guards and shapes, in milliseconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def runner_of(stage: type[TorchStage] = Stage, device: str = "cpu", batch: BatchSpec = BATCH, **options: Any) -> Runner:
    spec = StageConfig(name="s", use="s.py:S", batch=batch, torch=TorchSpec(**options))
    runner = make_runner(stage, spec, TYPES)
    runner.load(StageContext(device=device))
    return runner


def table(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, 1 + i % length) for i in range(rows)]
    return {"ids": ids, "x": rng.standard_normal((rows, 3)).astype(np.float32)}


def answers(runner: Runner, *tables: dict[str, Any]) -> list[np.ndarray]:
    return [np.array(runner.run([t], [len(t["x"])])[0].columns["y"]) for t in tables]


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level and r.name == "torchrelay.stages"]


@given(st.integers(1, 300), st.integers(1, 200))
def test_row_buckets_are_powers_of_two_and_max_rows(rows: int, max_rows: int) -> None:
    """The smallest that holds the rows; also beyond max_rows, where a stage makes more rows for its model."""
    buckets = row_buckets(BatchSpec(max_rows=max_rows))
    bucket = row_bucket(rows, buckets)
    assert bucket >= rows
    assert bucket == max_rows or bucket & (bucket - 1) == 0
    if rows <= max_rows:
        assert bucket == min(b for b in buckets if b >= rows)


def test_row_buckets_can_be_chosen() -> None:
    """Those of the file, and max_rows; what is above max_rows is never seen."""
    assert row_buckets(BatchSpec(max_rows=100, row_buckets=[16, 64, 128])) == (16, 64, 100)


@pytest.mark.parametrize("device", DEVICES)
def test_no_number_of_rows_is_compiled_anew_after_the_warm_up(
    device: str, eager_backend: None, caplog: pytest.LogCaptureFixture
) -> None:
    """All shapes are compiled before the first job, and the numbers are those of the bare model."""
    caplog.set_level(logging.INFO)
    plain, compiled = runner_of(device=device), runner_of(device=device, compile=True)
    compiled.warm_up(["ids", "x"])
    (told,) = [line for line in lines(caplog, logging.INFO) if "warmed up" in line]
    assert "stage 's': warmed up 10 shapes in " in told  # rows 1, 2, 4, 8, 12 of 4 or 8 tokens
    assert len([line for line in lines(caplog, logging.INFO) if "compiled at first use" in line]) == 10
    tables = [table(rows, length, rows) for rows in range(1, 13) for length in (1, 4, 5, 8)]
    caplog.clear()
    for one, other in zip(answers(compiled, *tables), answers(plain, *tables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert lines(caplog, logging.INFO) == lines(caplog, logging.ERROR) == []


def test_a_new_shape_after_the_warm_up_is_an_error_in_the_log(
    eager_backend: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the shape, and the batch is computed all the same."""
    runner = runner_of(compile=True)
    runner.warm_up(["ids", "x"])
    out = answers(runner, {"ids": np.ones((3, 4), np.int64), "x": np.ones((3, 3), np.float64).astype(np.float32)})
    assert lines(caplog, logging.ERROR) == []
    runner.stage.model(torch.ones((3, 7), dtype=torch.int64), x=torch.ones((3, 3)))  # type: ignore[attr-defined]
    (line,) = lines(caplog, logging.ERROR)
    assert "Stage: compiled after warm-up for int64[4, 7], float32[4, 3], in " in line
    assert len(out[0]) == 3


def test_without_a_warm_up_the_first_batches_compile(eager_backend: None, caplog: pytest.LogCaptureFixture) -> None:
    """That is told, and is no error; the log says which column stands in the way."""
    caplog.set_level(logging.INFO)
    runner = make_runner(Stage, StageConfig(name="s", use="s.py:S", torch=TorchSpec(compile=True)), TYPES)
    runner.load(StageContext())
    runner.warm_up(["ids", "x"])
    runner.stage.model(torch.ones((3, 7), dtype=torch.int64), x=torch.ones((3, 3)))  # type: ignore[attr-defined]
    first, second = lines(caplog, logging.INFO)
    assert first.startswith("stage 's' is not warmed up: column 'ids' is int64[*]; add pad and buckets for it;")
    assert "compiled at first use for int64[4, 7]" in second
    assert lines(caplog, logging.ERROR) == []


@pytest.mark.parametrize(
    ("names", "kinds", "batch", "says"),
    [
        (None, {}, {}, "what it reads is not declared"),
        (["x"], {}, {}, "'x' has no declared type"),
        (["x"], {"x": "str"}, {}, "'x' is str, and no array"),
        (["x"], {"x": "json"}, {}, "no array"),
        (["x"], {"x": "float32[3]?"}, {}, "no array of known shape"),
        (["x"], {"x": "float32[*]"}, {"pad": {"x": 0}}, "add pad and buckets"),
    ],
)
def test_shapes_that_nobody_knows(names: Any, kinds: dict[str, str], batch: dict[str, Any], says: str) -> None:
    """Why, in words for the log."""
    with pytest.raises(Unknown, match=says):
        shapes_of(names, {n: parse_type(t) for n, t in kinds.items()}, BatchSpec(**batch))


def test_the_shapes_to_warm_up() -> None:
    """Every bucket of every ragged axis and of the rows, the largest first; none that a cost forbids; 64 at most."""
    types = {"image": parse_type("uint8[H, W, 3]"), "size": parse_type("int64")}
    pad: dict[str, Any] = {"pad": {"image": 0}, "buckets": {"image": [640, 960]}}
    found = shapes_of(["image", "size"], types, BatchSpec(max_rows=3, **pad))
    assert not found.left_out
    assert [rows for rows, _ in found.batches] == [3] * 4 + [2] * 4 + [1] * 4
    assert [s["image"] for _, s in found.batches[:4]] == [(960, 960, 3), (960, 640, 3), (640, 960, 3), (640, 640, 3)]
    cost = BatchSpec(max_rows=8, max_cost=CostSpec(column="image", total=2000), **pad)
    # Three rows of 640 fit, padded to four; of 960 two; and one row always may come.
    fits = {(rows, s["image"][0]) for rows, s in shapes_of(["image"], types, cost).batches}
    assert fits == {(4, 640), (2, 960), (2, 640), (1, 960), (1, 640)}
    many = BatchSpec(max_rows=1000, pad={"image": 0}, buckets={"image": list(range(1, 40))})
    found = shapes_of(["image"], types, many)
    assert (len(found.batches), found.left_out, found.batches[0][0]) == (64, True, 1000)


class Fails(Stage):
    error: Exception = ValueError("no zeros please")

    def forward(self, batch: Batch) -> dict[str, Any]:
        if len(batch) > 2:
            raise self.error
        return super().forward(batch)


def test_a_stage_that_raises_in_its_warm_up_does_not_load(eager_backend: None) -> None:
    """With the shape that it raised for."""
    with pytest.raises(StageLoadError, match=r"s. does not warm up with 12 rows of ids \[8\], x \[3\]: ValueError"):
        runner_of(Fails, compile=True).warm_up(["ids", "x"])


def test_a_shape_that_does_not_fit_the_memory_is_left_out(
    eager_backend: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker serves smaller batches; a warning says what to lower."""
    monkeypatch.setattr(Fails, "error", torch.OutOfMemoryError("CUDA out of memory."))
    runner = runner_of(Fails, compile=True)
    runner.warm_up(["ids", "x"])
    told = lines(caplog, logging.WARNING)
    assert len(told) == 6
    assert "12 rows of ids [8], x [3] do not fit the device's memory; lower batch.max_rows" in told[0]
    assert len(answers(runner, table(2, 4))[0]) == 2


class Spy:
    """A model that keeps the shapes it is called with."""

    def __init__(self, returns: Callable[..., Any]) -> None:
        self.returns = returns
        self.seen: list[list[tuple[int, ...]]] = []
        self.colour = "blue"

    def __call__(self, *args: torch.Tensor) -> Any:
        self.seen.append([tuple(a.shape) for a in args])
        return self.returns(*args)


def test_only_what_has_the_rows_is_padded_and_cut() -> None:
    """Tables that go with every row stay as they are, and so do outputs of another length."""
    spy = Spy(lambda a, b, c: (a * 2, [b.sum(), c], {"n": 5}))
    model = ShapedModel(spy, "spy", (1, 2, 4, 8))
    model.batch_rows = 3
    a, b = torch.arange(6.0).reshape(3, 2), torch.ones(7, 7)
    doubled, (total, scalar), rest = model(a, b, torch.tensor(1.0))
    assert spy.seen == [[(4, 2), (7, 7), ()]]
    torch.testing.assert_close(doubled, a * 2)
    assert (float(total), float(scalar), rest) == (49.0, 1.0, {"n": 5})
    assert model.colour == "blue"


def test_a_stage_may_give_its_model_more_rows_than_it_got() -> None:
    """Where all tensors agree on a length, that is the number of rows, also beyond max_rows."""
    spy = Spy(lambda a: a + 1)
    model = ShapedModel(spy, "spy", (1, 2, 4, 8))
    model.batch_rows = 3
    assert model(torch.zeros(11, 2)).shape == (11, 2)
    assert model(torch.zeros(5, 2)).shape == (5, 2)
    assert spy.seen == [[(16, 2)], [(8, 2)]]


def test_padding_keeps_the_layout_and_repeats_the_last_row() -> None:
    """Compiled code depends on strides too: padded and full batches must have the same."""
    seen: list[torch.Tensor] = []
    model = ShapedModel(lambda x: [seen.append(x), x][1], "look", (1, 2, 4, 8))
    for rows in (3, 4):
        images = torch.rand(rows, 5, 6, 3)
        for view in (images.permute(0, 3, 1, 2), images, images.transpose(1, 2)):
            torch.testing.assert_close(model(view), view)
    strides = [x.stride() for x in seen]
    assert strides[:3] == strides[3:]
    assert strides[0] == (90, 1, 18, 3)
    torch.testing.assert_close(seen[0][3], seen[0][2])


def test_a_model_that_returns_objects_is_not_padded(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could cut what is in them; the log says so once."""

    class Answer:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    model = ShapedModel(lambda x: Answer(x), "objects", (1, 2, 4, 8))
    for _ in range(2):
        assert model(torch.zeros(3, 2)).x.shape == (3, 2)
    assert len(lines(caplog, logging.WARNING)) == 1


def test_on_a_cpu_cuda_graphs_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A line says so, and the model is the bare one."""
    caplog.set_level(logging.INFO)
    runner = runner_of(cuda_graphs=True)
    assert any("where cuda_graphs does nothing" in line for line in lines(caplog, logging.INFO))
    assert isinstance(runner.stage.model, Both)  # type: ignore[attr-defined]


@pytest.fixture
def recorded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings without a GPU: a replay computes from the recorded memory and writes to the recorded memory."""

    def record(run: Callable[[], list[Any]], pool: Any) -> tuple[list[Any], Callable[[], None]]:
        outputs = [o.clone() if isinstance(o, torch.Tensor) else o for o in run()]

        def replay() -> None:
            for static, new in zip(outputs, run(), strict=True):
                if isinstance(static, torch.Tensor):
                    static.copy_(new)

        return outputs, replay

    monkeypatch.setattr(shapes, "record", record)
    monkeypatch.setattr(shapes, "can_record", lambda leaves: all(isinstance(x, torch.Tensor | str) for x in leaves))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))


def test_replays_give_the_numbers_of_the_model_and_keep_them(recorded_on_cpu: None) -> None:
    """For every number of rows; an answer stays what it was through later replays."""
    bare = Both()
    model = ShapedModel(bare, "both", (1, 2, 4), graphs=True)
    with torch.inference_mode():
        with model.warming():
            for rows in (1, 2, 4):
                model.batch_rows = rows
                model(torch.zeros((rows, 4), dtype=torch.int64), x=torch.zeros((rows, 3)))
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for rows in (4, 3, 2, 1, 3):
            model.batch_rows = rows
            ids, x = torch.randint(0, 50, (rows, 4)), torch.rand(rows, 3)
            out = model(ids, x=x)
            assert out["kind"] == "both"
            kept.append((out["y"], bare(ids, x=x)["y"]))
        for one, other in kept:
            torch.testing.assert_close(one, other)


def test_a_shape_that_was_not_recorded_runs_bare_and_is_told_once(
    recorded_on_cpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Recording later would stop the other threads of the worker."""
    model = ShapedModel(lambda x: x + 1, "late", (1, 2, 4), graphs=True)
    for _ in range(3):
        torch.testing.assert_close(model(torch.zeros(3, 2)), torch.ones(3, 2))
    assert lines(caplog, logging.WARNING) == ["late: runs without a CUDA graph for float32[4, 2]"]


def test_a_recorded_call_may_take_only_what_cannot_change() -> None:
    """Tensors of the CPU and objects could change behind a graph's back."""
    assert not graphs.can_record([torch.zeros(2)])
    assert not graphs.can_record([object()])
    assert graphs.can_record([1, None, "a", torch.float32])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_on_a_gpu(compile: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Replays give the numbers of the eager model for every number of rows, in any order, without a new shape."""
    caplog.set_level(logging.INFO)
    torch._dynamo.reset()
    plain = runner_of(device="cuda:0")
    recorded = runner_of(device="cuda:0", cuda_graphs=True, compile=compile)
    recorded.warm_up(["ids", "x"])
    caplog.clear()
    tables = [table(rows, length, rows) for rows in (12, 1, 5, 9, 2, 4, 3) for length in (8, 1, 4, 5)]
    for one, other in zip(answers(recorded, *tables), answers(plain, *tables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert lines(caplog, logging.INFO) == lines(caplog, logging.WARNING) == lines(caplog, logging.ERROR) == []
    assert recorded.stage.shaped is not None  # type: ignore[attr-defined]
    assert len(recorded.stage.shaped._recordings) == 10  # type: ignore[attr-defined]


class Reads(Stage):
    def build(self, context: StageContext) -> nn.Module:
        class Item(nn.Module):
            def forward(self, ids: torch.Tensor, *, x: torch.Tensor) -> dict[str, Any]:
                return {"y": x * float(ids.sum().item())}

        return Item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_model_that_reads_back_cannot_be_recorded() -> None:
    """The stage does not load, and the message says what to take out."""
    with pytest.raises(StageLoadError, match="cannot be recorded as a CUDA graph"):
        runner_of(Reads, device="cuda:0", cuda_graphs=True).warm_up(["ids", "x"])
