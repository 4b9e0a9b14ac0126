"""Several stages in one runner: what each sees and returns is what it would alone, and tensors stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from torchrelay.config.fusing import Group
from torchrelay.config.graph_build import build_graph
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.spec import PipelineSpec
from torchrelay.errors import InputError
from torchrelay.stages import Batch, Runner, Stage, StageContext, TorchStage, make_group_runner
from torchrelay.stages.faults import blamed

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Plain(Stage):
    """Notes each batch that it sees, and does what it is told."""

    def __init__(self, forward: Callable[[Batch], Mapping[str, Any]]) -> None:
        self._forward = forward
        self.seen: list[Batch] = []

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        self.seen.append(batch)
        return self._forward(batch)


class Torch(TorchStage):
    """The same, of tensors."""

    def __init__(self, forward: Callable[[Batch], Mapping[str, Any]], *, share: bool = False) -> None:
        self._forward = forward
        self.seen: list[Batch] = []
        self.made: list[Mapping[str, Any]] = []
        self.share = share

    def build(self, context: StageContext) -> nn.Module:
        return nn.Identity()

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        self.seen.append(batch)
        self.made.append(self._forward(batch))
        return self.made[-1]


def fused(
    stages: dict[str, tuple[Stage, dict[str, Any]]],
    *,
    names: list[str] | None = None,
    device: str = "cpu",
    output: list[str] | None = None,
    types: Mapping[str, str] | None = None,
) -> Runner:
    """A loaded runner of these stages, each with its keys of a file."""
    listed = [{"name": name, "use": "s.py:Stage", **keys} for name, (_, keys) in stages.items()]
    top = {"pipeline": "p", "input": dict(types or {"x": "float32"}), "stages": listed, "fuse": [names or list(stages)]}
    spec = PipelineSpec.model_validate(top | ({"output": output} if output else {}))
    problems: list[str] = []
    graph = build_graph(spec, lambda place, text: problems.append(text))
    assert graph is not None, problems
    assert not problems
    runner = make_group_runner(lambda s: stages[s.name][0], Group.of(spec, graph, names or list(stages)))
    runner.load(StageContext(device=device))
    return runner


def column(values: Any, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(values, dtype)


def test_a_tensor_is_handed_over_as_it_is() -> None:
    """The next stage gets the very tensor; a plain stage behind reads an array over the same memory."""
    a, b = Torch(lambda batch: {"y": batch["x"] + 1}), Torch(lambda batch: {"z": batch["y"] * 2})
    c = Plain(lambda batch: {"w": batch["z"] + 0.5})
    runner = fused(
        {
            name: (stage, {"inputs": [read], "outputs": {made: "float32"}})
            for name, stage, read, made in (("a", a, "x", "y"), ("b", b, "y", "z"), ("c", c, "z", "w"))
        }
    )
    made = runner.run([{"x": column([1, 2])}, {"x": column([3])}], [2, 1])
    assert [m.columns["w"].tolist() for m in made] == [[4.5, 6.5], [8.5]]  # type: ignore[union-attr]
    assert b.seen[0]["y"].data_ptr() == a.made[0]["y"].data_ptr()
    assert c.seen[0]["z"].ctypes.data == b.made[0]["z"].data_ptr()
    assert not c.seen[0]["z"].flags.writeable
    assert [list(m.columns) for m in made] == [["w"], ["w"]]
    assert [s.seen[0].job_rows for s in (a, b, c)] == [(2, 1)] * 3


def test_a_stage_writes_to_no_tensor_that_others_need() -> None:
    """One that leaves, that a later stage reads, or whose memory it shares, is copied for a stage that may write."""

    def scribble(batch: Batch) -> Mapping[str, Any]:
        for name in batch:
            batch[name].fill_(-1)
        return {"z": torch.zeros(len(batch))}

    a = Torch(lambda batch: {"y": batch["x"] + 1, "same": batch["x"]})
    b, c = Torch(scribble), Torch(lambda batch: {"w": batch["x"] + batch["y"] + batch["same"]})
    runner = fused(
        {
            "a": (a, {"inputs": ["x"], "outputs": {"y": "float32", "same": "float32"}}),
            "b": (b, {"inputs": ["x", "y", "same"], "outputs": {"z": "float32"}}),
            "c": (c, {"inputs": ["x", "y", "same"], "outputs": {"w": "float32"}}),
        },
        output=["y", "w"],
    )
    ((columns, *_),) = runner.run([{"x": column([1, 2])}], [2])
    assert {name: values.tolist() for name, values in columns.items()} == {"y": [2, 3], "w": [4, 7]}  # type: ignore[union-attr]


def test_a_stage_that_shares_gets_the_tensor_itself() -> None:
    """`share: true` says that it writes to nothing."""
    a = Torch(lambda batch: {"y": batch["x"] + 1})
    b = Torch(lambda batch: {"z": batch["y"] * 2}, share=True)
    outputs = {"a": (a, {"outputs": {"y": "float32"}}), "b": (b, {"outputs": {"z": "float32"}})}
    fused(outputs, output=["y", "z"]).run([{"x": column([1])}], [1])
    assert b.seen[0]["y"].data_ptr() == a.made[0]["y"].data_ptr()


@pytest.mark.parametrize("kind", [Plain, Torch])
def test_each_stage_keeps_its_own_batch_size(kind: Any) -> None:
    """A smaller one is called for slices, in order, that know their jobs; a larger one gets what there is. What it
    returns may be its own buffer each time."""
    buffer = torch.zeros(3) if kind is Torch else np.zeros(3, np.float32)

    def reuse(batch: Batch) -> Mapping[str, Any]:
        rows = len(batch)
        buffer[:rows] = batch["y"]
        return {"z": buffer[:rows]}

    a = kind(lambda batch: {"y": batch["x"] + 1})
    b, c = kind(reuse), kind(lambda batch: {"w": batch["z"] * 2})
    runner = fused(
        {
            "a": (a, {"outputs": {"y": "float32"}, "batch": {"max_rows": 8}}),
            "b": (b, {"outputs": {"z": "float32"}, "batch": {"max_rows": 3}}),
            "c": (c, {"outputs": {"w": "float32"}, "batch": {"max_rows": 100}}),
        }
    )
    given = [{"x": column(range(4))}, {"x": column(range(4, 8))}]
    made = runner.run(given, [4, 4], [{"job": 0}, {"job": 1}], lambda: [False, True])
    assert [m.columns["w"].tolist() for m in made] == [[2, 4, 6, 8], [10, 12, 14, 16]]  # type: ignore[union-attr]
    assert [batch.job_rows for batch in b.seen] == [(3, 0), (1, 2), (0, 2)]
    assert [m["job"] for m in b.seen[1].meta] == [0, 1, 1]
    assert b.seen[1].cancelled == [False, True, True]
    assert [len(batch) for batch in c.seen] == [8]


@pytest.mark.parametrize("kind", [Plain, Torch])
def test_rejected_rows_go_no_further(kind: Any) -> None:
    """Rows that one stage rejects do not enter the next; each keeps its number, its words and who said them."""

    def reject(name: str, word: str, value: float) -> Callable[[Batch], Mapping[str, Any]]:
        def forward(batch: Batch) -> Mapping[str, Any]:
            source = batch["x"] if "x" in batch else batch["y"]
            for row in range(len(batch)):
                if float(source[row]) == value:
                    batch.reject(row, word)
            return {name: source + 10}

        return forward

    a, b = kind(reject("y", "no four", 4)), kind(reject("z", "no sixteen", 16))
    runner = fused(
        {
            "a": (a, {"outputs": {"y": "float32"}}),
            "b": (b, {"inputs": ["y"], "outputs": {"z": "float32"}, "batch": {"max_rows": 2}}),
        },
        output=["y", "z"],
    )
    made = runner.run([{"x": column([3, 4, 5])}, {"x": column([6, 7])}, {"x": column([4])}], [3, 2, 1])
    assert [dict(m.rejected) for m in made] == [{1: "no four"}, {0: "no sixteen"}, {0: "no four"}]
    assert [[why.stage for why in m.rejected.values()] for m in made] == [["a"], ["b"], ["a"]]  # type: ignore[attr-defined]
    assert [{n: c.tolist() for n, c in m.columns.items()} for m in made] == [  # type: ignore[union-attr]
        {"y": [13, 15], "z": [23, 25]},
        {"y": [17], "z": [27]},
        {"y": [], "z": []},
    ]
    assert [batch.job_rows for batch in b.seen] == [(2, 0, 0), (0, 2, 0)]


def test_all_rows_rejected_by_the_first() -> None:
    """The others are not called, and the declared columns come without rows."""

    def refuse(batch: Batch) -> Mapping[str, Any]:
        for row in range(len(batch)):
            batch.reject(row, "no")
        return {}

    b = Plain(lambda batch: {"z": batch["y"]})
    runner = fused({"a": (Plain(refuse), {"outputs": {"y": "float32"}}), "b": (b, {"outputs": {"z": "float32"}})})
    ((columns, _, rejected, _),) = runner.run([{"x": column([1, 2])}], [2])
    assert (b.seen, {n: len(c) for n, c in columns.items()}, dict(rejected)) == ([], {"z": 0}, {0: "no", 1: "no"})


@pytest.mark.parametrize("at", ["a", "b"])
@pytest.mark.parametrize("error", [ValueError("oh"), SystemExit(3)])
def test_what_a_stage_raises_carries_its_name(at: str, error: BaseException) -> None:
    """Whoever settles the job is told which of the stages it was."""

    def forward(name: str, returned: str) -> Callable[[Batch], Mapping[str, Any]]:
        def run(batch: Batch) -> Mapping[str, Any]:
            if name == at:
                raise type(error)(*error.args)
            return {returned: [1.0] * len(batch)}

        return run

    stages = {n: (Plain(forward(n, o)), {"outputs": {o: "float32"}}) for n, o in (("a", "y"), ("b", "z"))}
    with pytest.raises(type(error)) as raised:
        fused(stages).run([{"x": column([1])}], [1])
    assert blamed(raised.value) == at


@pytest.mark.parametrize("at", ["a", "b"])
@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"no": torch.zeros(2)}, "is not declared"),
        ({"y": torch.zeros(3)}, "needs 2 rows"),
        ({"y": torch.zeros(2, 5)}, r"float32\[5\]|came"),
        ({"y": torch.zeros(2, dtype=torch.complex64)}, "column 'y'"),
        ({"y": torch.zeros(2).to_sparse()}, "return a dense one"),
        ({"y": torch.zeros(())}, "no rows axis"),
        ({"y": torch.tensor([2**53 + 1, 0])}, "exactly"),
        ([1], "return a mapping"),
        ({}, "did not return column 'y'"),
    ],
)
def test_outputs_are_checked_at_each_stage(at: str, returned: Any, says: str) -> None:
    """Name, rows, type and kind of each column, also of those that stay inside; the stage is to blame."""
    kind = "float64" if says == "exactly" else "float32"
    stages: dict[str, tuple[Stage, dict[str, Any]]] = {
        "a": (Torch(lambda batch: returned if at == "a" else {"y": batch["x"]}), {"outputs": {"y": kind}}),
        "b": (Torch(lambda batch: returned), {"inputs": ["y"], "outputs": {"y": kind}}),
    }
    with pytest.raises(InputError, match=says) as raised:
        fused(stages).run([{"x": column([1, 2])}], [2])
    assert blamed(raised.value) == at
    assert f"stage '{at}'" in str(raised.value)


def test_types_are_those_that_are_declared() -> None:
    """A tensor of a narrower type comes converted, one of a ragged or nullable column as a list, as it would alone."""
    a = Torch(
        lambda batch: {
            "wide": batch["x"].to(torch.float16),
            "half": batch["x"].to(torch.bfloat16),
            "ragged": [batch["x"][:1], batch["x"][:2]],
            "square": torch.ones(2, 3),
            "text": ["a", "b"],
            "maybe": [None, torch.ones(2)],
        }
    )
    types = {"wide": "float32", "half": "bfloat16", "ragged": "float32[*]", "square": "float32[*]", "text": "str"}
    outputs = {**types, "maybe": "float32[2]?"}
    seen: list[dict[str, Any]] = []
    for kind in (Plain, Torch):
        b = kind(lambda batch: {"z": batch["text"]})
        fused({"a": (a, {"outputs": outputs}), "b": (b, {"inputs": list(outputs), "outputs": {"z": "str"}})}).run(
            [{"x": column([1, 2])}], [2]
        )
        seen.append(dict(b.seen[0].columns))
    plain, tensors = seen
    assert (plain["wide"].dtype, plain["half"].dtype) == (np.float32, ml_dtypes.bfloat16)
    assert (tensors["wide"].dtype, tensors["half"].dtype) == (torch.float32, torch.bfloat16)
    assert [type(v) for v in (plain["ragged"], plain["square"], tensors["ragged"], tensors["square"])] == [list] * 4
    assert [row.tolist() for row in plain["ragged"]] == [row.tolist() for row in tensors["ragged"]] == [[1], [1, 2]]
    assert [row.tolist() for row in tensors["square"]] == [[1, 1, 1], [1, 1, 1]]
    assert {type(row) for row in (*plain["ragged"], *plain["square"], plain["maybe"][1])} == {np.ndarray}
    assert {type(row) for row in (*tensors["ragged"], *tensors["square"], tensors["maybe"][1])} == {torch.Tensor}
    assert plain["text"] == tensors["text"] == ["a", "b"]


@pytest.mark.parametrize("kind", [Plain, Torch])
def test_padding_within_a_group(kind: Any) -> None:
    """A later stage has a ragged column padded, whether it comes from outside or from a stage before."""
    a = kind(lambda batch: {"twice": [row * 2 for row in batch["t"]]})

    def add(batch: Batch) -> Mapping[str, Any]:
        lengths = batch.lengths["t"] + batch.lengths["twice"]
        return {"sum": (batch["t"] + batch["twice"]).sum(1), "n": lengths, "mask": batch.mask("twice").sum(1)}

    b = kind(add)
    runner = fused(
        {
            "a": (a, {"inputs": ["t"], "outputs": {"twice": "float32[*]"}}),
            "b": (
                b,
                {
                    "inputs": ["t", "twice"],
                    "outputs": {"sum": "float32", "n": "int64", "mask": "int64"},
                    "batch": {"max_rows": 2, "pad": {"t": 0, "twice": 0}, "buckets": {"t": [4, 8], "twice": [4, 8]}},
                },
            ),
        },
        types={"t": "float32[*]"},
    )
    ragged = [column([1]), column([1, 2, 3]), column([4, 4])]
    ((columns, *_),) = runner.run([{"t": ragged, "1.t": ragged}], [3])
    found = {name: values.tolist() for name, values in columns.items()}  # type: ignore[union-attr]
    assert found == {"sum": [3, 18, 24], "n": [2, 6, 4], "mask": [1, 3, 2]}
    assert [tuple(batch["t"].shape) for batch in b.seen] == [(2, 4), (1, 4)]


@pytest.mark.parametrize("first", [Plain, Torch])
@pytest.mark.parametrize("second", [Plain, Torch])
def test_ragged_rows_in_one_array(first: Any, second: Any) -> None:
    """Rows that came as one array, or that many small tensors made: each stage sees a list of its own kind, also in
    slices and behind a rejection."""

    def twice(batch: Batch) -> Mapping[str, Any]:
        batch.reject(1, "no")
        return {"twice": [row * 2 for row in batch["t"]]}

    def add(batch: Batch) -> Mapping[str, Any]:
        return {"s": [float((x + y).sum()) for x, y in zip(batch["t"], batch["twice"], strict=True)]}

    a, b = first(twice), second(add)
    runner = fused(
        {
            "a": (a, {"inputs": ["t"], "outputs": {"twice": "float32[*]"}}),
            "b": (b, {"inputs": ["t", "twice"], "outputs": {"s": "float32"}, "batch": {"max_rows": 5}}),
        },
        types={"t": "float32[*]"},
        output=["twice", "s"],
    )
    rows = RaggedRows.of([column(range(n)) for n in range(8)])
    assert rows is not None
    ((columns, _, rejected, _),) = runner.run([{"t": rows}], [8])
    assert dict(rejected) == {1: "no"}
    assert list(columns["s"]) == [3 * sum(range(n)) for n in range(8) if n != 1]
    assert [row.tolist() for row in columns["twice"]] == [[2 * i for i in range(n)] for n in range(8) if n != 1]
    kind = np.ndarray if second is Plain else torch.Tensor
    assert {type(row) for batch in b.seen for name in ("t", "twice") for row in batch[name]} == {kind}
    assert {type(batch[name]) for batch in b.seen for name in ("t", "twice")} == {list}


def test_jobs_that_passed_the_first_stage_run_from_there() -> None:
    """`behind` runs what is left of the group, by the same loaded stages."""
    stages = {
        n: (Plain(lambda batch, o=o, i=i: {o: batch[i] + 1}), {"inputs": [i], "outputs": {o: "float32"}})  # type: ignore[misc]
        for n, i, o in (("a", "x", "y"), ("b", "y", "z"), ("c", "z", "w"))
    }
    runner = fused(stages)
    assert [list(m.columns.items()) for m in runner.behind(1).run([{"y": column([1])}], [1])] == [[("w", [3.0])]]
    assert [list(m.columns.items()) for m in runner.behind(2).run([{"z": column([1])}], [1])] == [[("w", [2.0])]]
    assert runner.behind(0) is runner


@pytest.mark.parametrize("kind", [Plain, Torch])
def test_side_by_side(kind: Any) -> None:
    """Prepared ahead and finished later, each batch keeps its own values."""
    a, b = kind(lambda batch: {"y": batch["x"] + 1}), kind(lambda batch: {"z": batch["y"] * 2})
    runner = fused({"a": (a, {"outputs": {"y": "float32"}}), "b": (b, {"outputs": {"z": "float32"}})})
    runner.overlap()
    prepared = [runner.prepare([{"x": column([i])}], [1]) for i in range(3)]
    launched = [runner.launch(p) for p in prepared]
    assert [float(runner.finish(one)[0].columns["z"][0]) for one in launched] == [2, 4, 6]


def test_no_rows_call_no_stage() -> None:
    """A job without rows passes with the declared columns of what leaves."""
    a, b = Plain(lambda batch: {"y": batch["x"]}), Plain(lambda batch: {"z": batch["y"]})
    runner = fused({"a": (a, {"outputs": {"y": "int64"}}), "b": (b, {"outputs": {"z": "str"}})}, output=["y", "z"])
    ((columns, *_),) = runner.run([{"x": column([])}], [0])
    assert (sorted(columns), a.seen, b.seen) == (["y", "z"], [], [])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("overlapped", [False, True])
def test_tensors_stay_on_a_gpu(overlapped: bool) -> None:
    """What one stage made is the tensor that the next one reads, on the device; a plain stage between them gets arrays,
    and what it makes goes back to the device."""
    a, b = (
        Torch(lambda batch: {"y": batch["x"] + 1}),
        Torch(lambda batch: {"z": batch["y"] * 2, "ragged": [batch["y"]]}),
    )
    c, d = Plain(lambda batch: {"w": batch["z"] + 1}), Torch(lambda batch: {"v": batch["w"] + batch["y"]})
    runner = fused(
        {
            "a": (a, {"inputs": ["x"], "outputs": {"y": "float32"}, "device": "gpu"}),
            "b": (b, {"inputs": ["y"], "outputs": {"z": "float32", "ragged": "float32[*]"}, "device": "gpu"}),
            "c": (c, {"inputs": ["z"], "outputs": {"w": "float32"}, "device": "gpu"}),
            "d": (d, {"inputs": ["w", "y"], "outputs": {"v": "float32"}, "device": "gpu"}),
        },
        device="cuda:0",
        output=["z", "v"],
    )
    given = ([{"x": column([1])}], [1])
    if overlapped:
        runner.overlap()
        made = runner.finish(runner.launch(runner.prepare(*given)))
    else:
        made = runner.run(*given)
    assert {name: values.tolist() for name, values in made[0].columns.items()} == {"z": [4], "v": [7]}  # type: ignore[union-attr]
    assert b.seen[0]["y"].is_cuda
    assert a.made[0]["y"].is_cuda
    assert isinstance(c.seen[0]["z"], np.ndarray)
    assert d.seen[0]["w"].is_cuda
    # `y` is needed by d as well, and so is copied for b, but not for d.
    assert d.seen[0]["y"].data_ptr() == a.made[0]["y"].data_ptr()


@pytest.mark.gpu
@GPU
def test_a_tensor_is_handed_over_on_a_gpu() -> None:
    """The very tensor, on the device."""
    a, b = Torch(lambda batch: {"y": batch["x"] + 1}), Torch(lambda batch: {"z": batch["y"] * 2})
    keys = {"device": "gpu"}
    runner = fused(
        {"a": (a, {"outputs": {"y": "float32"}} | keys), "b": (b, {"outputs": {"z": "float32"}} | keys)},
        device="cuda:0",
    )
    ((columns, *_),) = runner.run([{"x": column([1, 2])}], [2])
    assert columns["z"].tolist() == [4, 6]  # type: ignore[union-attr]
    assert b.seen[0]["y"].is_cuda
    assert b.seen[0]["y"].untyped_storage().data_ptr() == a.made[0]["y"].untyped_storage().data_ptr()
