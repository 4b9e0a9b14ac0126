"""Torch stages: models, weights, options, and tensors that go both ways bit for bit."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchrelay.config.ragged import RaggedRows
from torchrelay.config.spec import StageConfig, TorchSpec
from torchrelay.config.types import NUMERIC, parse_type
from torchrelay.errors import ConfigError, DeviceError, InputError, StageLoadError
from torchrelay.stages import Batch, Runner, StageContext, TorchStage, make_runner
from torchrelay.stages.batch import assemble
from torchrelay.stages.outputs import split
from torchrelay.stages.torch_stage import TorchOptions
from torchrelay.stages.weights import fill_model

SEEN: list[Any] = []


class Linear(TorchStage):
    def __init__(self, outputs: int = 2) -> None:
        self.outputs = outputs

    def build(self, context: StageContext) -> nn.Module:
        return nn.Linear(3, self.outputs)

    def forward(self, batch: Batch) -> dict[str, Any]:
        x = batch["x"]
        SEEN.append((torch.is_inference_mode_enabled(), x.device.type, x.dtype))
        x += 1
        return {"y": self.model(x)}


def runner_of(stage: TorchStage, weights: str | None = None, **options: Any) -> Runner:
    stage.configure(TorchOptions(**options), weights)
    return Runner(stage, "linear")


def numbers(rows: int = 2) -> np.ndarray:
    return np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)


def saved(path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_are_loaded_and_used(tmp_path: Path, name: str) -> None:
    """The model computes with the file's weights, in eval, without gradients, on writable private inputs."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    saved(tmp_path / name, model)
    runner = runner_of(Linear(), name)
    runner.load(StageContext(base_dir=tmp_path))
    loaded = runner.stage.model  # type: ignore[attr-defined]
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    x = numbers()
    x.flags.writeable = False
    ((out, *_),) = runner.run([{"x": x}], [2])
    with torch.no_grad():
        expected = model(torch.from_numpy(x.copy()) + 1).numpy()
    np.testing.assert_array_equal(out["y"], expected)
    np.testing.assert_array_equal(x, numbers())
    assert SEEN[-1] == (True, "cpu", torch.float32)
    runner.close()
    assert runner.stage.model is None  # type: ignore[attr-defined]


def test_make_runner_configures(tmp_path: Path) -> None:
    """The YAML's weights and torch options reach the stage."""
    saved(tmp_path / "w.pt", nn.Linear(3, 4))
    spec = StageConfig(name="s", use="a.py:L", args={"outputs": 4}, weights="w.pt", torch=TorchSpec(dtype="bfloat16"))
    runner = make_runner(Linear, spec)
    runner.load(StageContext(base_dir=tmp_path))
    assert runner.stage.model.weight.dtype == torch.bfloat16  # type: ignore[attr-defined]
    ((out, *_),) = runner.run([{"x": numbers().astype(ml_dtypes.bfloat16)}], [2])
    assert isinstance(out["y"], np.ndarray)
    assert (out["y"].dtype, out["y"].shape) == (ml_dtypes.bfloat16, (2, 4))


def test_several_jobs() -> None:
    """One forward over two jobs equals two forwards."""
    runner = runner_of(Linear())
    runner.load(StageContext())
    both = runner.run([{"x": numbers(1)}, {"x": numbers(2)}], [1, 2])
    alone = runner.run([{"x": numbers(2)}], [2])
    np.testing.assert_allclose(both[1].columns["y"], alone[0].columns["y"], rtol=1e-6)  # type: ignore[arg-type]


def test_options_are_applied() -> None:
    """dtype converts the model, and never the batch."""
    runner = runner_of(Linear(), dtype="float64", channels_last=True)
    runner.load(StageContext())
    ((out, *_),) = runner.run([{"x": numbers().astype(np.float64)}], [2])
    assert isinstance(out["y"], np.ndarray)
    assert out["y"].dtype == np.float64
    with pytest.raises(RuntimeError, match="dtype"):
        runner.run([{"x": numbers()}], [2])
    with pytest.raises(ConfigError, match="float16"):
        Linear().configure(TorchOptions(dtype="int8"), None)


class Tied(TorchStage):
    def build(self, context: StageContext) -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"y": self.model(batch["x"])}


def test_tied_weights_need_one_name_and_stay_tied(tmp_path: Path) -> None:
    """A file that holds a shared parameter once loads, and it is shared afterwards."""
    weight = torch.rand(5, 4)
    save_file({"1.weight": weight}, tmp_path / "w.safetensors")
    runner = runner_of(Tied(), "w.safetensors")
    runner.load(StageContext(base_dir=tmp_path))
    model = runner.stage.model  # type: ignore[attr-defined]
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, weight)


class Unsaved(nn.Module):
    def __init__(self, computes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("steps", torch.arange(3.0), persistent=False)
        self.plain = torch.tensor([10.0])
        if computes:
            self.limit = torch.linspace(0, 1, 3)[-1].item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight + self.steps + self.plain


class WithUnsaved(Linear):
    def __init__(self, computes: bool) -> None:
        self.computes = computes

    def build(self, context: StageContext) -> nn.Module:
        return Unsaved(self.computes)


@pytest.mark.parametrize("computes", [False, True])
def test_what_is_not_saved_keeps_its_value(tmp_path: Path, computes: bool) -> None:
    """Unsaved buffers and plain tensors have their built values, though the first build is on the meta device."""
    save_file({"weight": torch.full((3,), 100.0)}, tmp_path / "w.safetensors")
    runner = runner_of(WithUnsaved(computes), "w.safetensors")
    runner.load(StageContext(base_dir=tmp_path))
    ((out, *_),) = runner.run([{"x": np.zeros((1, 3), np.float32)}], [1])
    np.testing.assert_array_equal(out["y"], [[111, 112, 113]])


def test_weights_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    """A half-precision file fills a float32 model, as load_state_dict does."""
    save_file({"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).half()}, tmp_path / "w.safetensors")
    runner = runner_of(Linear(), "w.safetensors")
    runner.load(StageContext(base_dir=tmp_path))
    assert runner.stage.model.weight.dtype == torch.float32  # type: ignore[attr-defined]


class Made(TorchDispatchMode):
    """The types of all tensors with memory of their own that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.dtypes.add(made.dtype)
        return made


def test_weights_in_half_precision_are_never_held_in_full(tmp_path: Path) -> None:
    """A model of 40 GB in bfloat16 needs no 80 GB more to load, though modules are built in float32."""
    save_file({"weight": torch.ones(2, 3).bfloat16(), "bias": torch.zeros(2).bfloat16()}, tmp_path / "w.safetensors")
    runner = runner_of(Linear(), "w.safetensors", dtype="bfloat16")
    with Made() as made:
        runner.load(StageContext(base_dir=tmp_path))
    assert runner.stage.model.weight.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert torch.float32 not in made.dtypes


def test_converted_weights_do_not_stay_beside_what_they_were() -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    assert fill_model(model, state, "w", torch.float16) == []
    assert {name: t.data_ptr() for name, t in state.items()} == {n: p.data_ptr() for n, p in model.named_parameters()}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/nonexistent-dir/evil"),))


def bad_weights(folder: Path) -> dict[str, str]:
    save_file({"weight": torch.zeros(2, 3)}, folder / "missing.safetensors")
    save_file(
        {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, folder / "extra.safetensors"
    )
    save_file({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, folder / "shape.safetensors")
    torch.save({"weight": torch.zeros(2, 3)}, folder / "zip.safetensors")
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"weight": 1}))
    (folder / "announced.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"weight": Evil()}, folder / "evil.pth")
    torch.save({"state_dict": {"weight": torch.zeros(2, 3)}}, folder / "nested.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    (folder / "w.bin").write_bytes(b"abc")
    (folder / "folder.pt").mkdir()
    return {
        "missing.safetensors": "missing bias",
        "extra.safetensors": "unexpected extra",
        "shape.safetensors": "shape",
        "zip.safetensors": "pickle that was renamed",
        "pickle.safetensors": "pickle that was renamed",
        "announced.safetensors": "no safetensors file",
        "empty.safetensors": "no safetensors file",
        "empty.pt": "plain tensors",
        "evil.pt": "plain tensors",
        "evil.pth": "plain tensors",
        "nested.pt": "state_dict",
        "list.pt": "state_dict",
        "w.bin": "must be a .safetensors",
        "folder.pt": "no regular file",
        "absent.pt": "do not exist",
    }


def test_bad_weights_are_refused_by_name(tmp_path: Path) -> None:
    """Files that are damaged, renamed, hostile, or do not fit are each refused with what is wrong."""
    for name, says in bad_weights(tmp_path).items():
        with pytest.raises(StageLoadError, match=says) as caught:
            runner_of(Linear(), name).load(StageContext(base_dir=tmp_path))
        assert name in str(caught.value)
        assert "'linear'" in str(caught.value)


def test_build_must_return_a_module() -> None:
    """Anything else from build is a StageLoadError, as is an error in it."""

    class Wrong(Linear):
        def build(self, context: StageContext) -> Any:
            return {"a": 1}

    class NoBuild(TorchStage):
        def forward(self, batch: Batch) -> dict[str, Any]:
            return {}

    for stage in (Wrong(), NoBuild()):
        with pytest.raises(StageLoadError, match="build"):
            runner_of(stage).load(StageContext())


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_missing_device_is_named(device: str) -> None:
    """A device that is not there is a DeviceError with its name."""
    with pytest.raises(DeviceError, match=device):
        runner_of(Linear()).load(StageContext(device=device))


def shared_dtypes() -> list[str]:
    """Dtypes that torch has too."""
    return [name for name in NUMERIC if hasattr(torch, name)]


@pytest.mark.parametrize("name", shared_dtypes())
def test_every_dtype_goes_both_ways(name: str) -> None:
    """All byte patterns of each dtype come to torch and back unchanged, with torch's own dtype in between."""
    dtype = NUMERIC[name]
    raw = (b"\x00\x01" if name == "bool" else bytes(range(256))) * 16
    array = np.frombuffer(raw, dtype).reshape(2, -1)
    for tables, rows in ([{"x": array}], [2]), ([{"x": array[:1]}, {"x": array[1:]}], [1, 1]):
        batch = assemble(tables, rows).to_torch("cpu")
        assert batch["x"].dtype == getattr(torch, name)
        back = split({"x": batch["x"]}, [2], "s")[0].columns["x"]
        assert isinstance(back, np.ndarray)
        assert back.dtype == dtype
        assert back.tobytes() == array.tobytes()


def test_tensors_are_private_and_writable() -> None:
    """Writing a batch's tensors changes nothing that the jobs hold, one job or several, list or array."""
    x, ragged = np.zeros((2, 3)), [np.zeros(2), np.zeros(3)]
    tables: list[dict[str, Any]] = [{"x": x[:1], "r": ragged[:1]}, {"x": x[1:], "r": ragged[1:]}]
    for part, rows in (tables, [1, 1]), (tables[:1], [1]), ([{"x": x, "r": ragged}], [2]):
        batch = assemble(part, rows).to_torch("cpu")
        batch["x"].fill_(5)
        for tensor in batch["r"]:
            tensor.fill_(5)
    assert not x.any()
    assert not any(row.any() for row in ragged)


def test_ragged_rows_become_tensors_of_their_own() -> None:
    """One tensor a row, whatever lies behind: writable, apart from what the jobs hold and from the other rows."""
    for name in ("int32", "bfloat16", "float8_e3m4"):
        rows = [np.arange(n).astype(NUMERIC[name]) for n in range(5)]
        ragged = RaggedRows.of(rows)
        assert ragged is not None
        twice = ragged.take(np.array([4, 4, 0]))
        for tables, expected in (
            ([{"r": ragged}], rows),
            ([{"r": ragged[:2]}, {"r": ragged[2:]}], rows),
            ([{"r": twice}], [rows[4], rows[4], rows[0]]),
        ):
            for device_share in (False, True):
                counts = [len(table["r"]) for table in tables]
                batch = assemble(tables, counts).to_torch("cpu", share=device_share)
                back = split({"y": batch["r"]}, [len(expected)], "s")[0].columns["y"]
                assert [(r.dtype, r.tobytes()) for r in back] == [(r.dtype, r.tobytes()) for r in expected]
                if isinstance(batch["r"][0], torch.Tensor) and not device_share:
                    batch["r"][0].fill_(7)
                    assert [r.tobytes() for r in ragged] == [r.tobytes() for r in rows]
                    others = zip(batch["r"][1:], expected[1:], strict=True)
                    assert all(t.tolist() == r.astype(float).tolist() for t, r in others)


def test_padded_columns_in_torch() -> None:
    """Lengths and mask of a padded column are tensors too."""
    types = {"ids": parse_type("int64[*]"), "image": parse_type("uint8[H, W]")}
    table: dict[str, Any] = {
        "ids": [np.array([1, 2, 3]), np.array([4])],
        "image": [np.ones((1, 2), np.uint8), np.ones((2, 1), np.uint8)],
    }
    batch = assemble([table], [2], types, {"ids": 0, "image": 0}).to_torch("cpu")
    assert batch["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.lengths["ids"].tolist() == [3, 1]
    assert batch.mask("ids").tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(batch.mask("image"), batch["image"] != 0)
    batch["ids"].fill_(1)
    assert len(batch) == 2


def test_text_stays_text() -> None:
    """Columns that are no numbers reach a torch stage as they are."""
    batch = assemble([{"s": ["a", "b"], "j": [{"k": 1}, None]}], [2]).to_torch("cpu")
    assert (batch["s"], batch["j"]) == (["a", "b"], [{"k": 1}, None])


def test_outputs_of_many_kinds() -> None:
    """Tensors with gradients, strided, conjugated or in lists become arrays with equal values."""
    base = torch.arange(12.0).reshape(3, 4)
    ((out, *_),) = split(
        {
            "grad": base.clone().requires_grad_(),
            "strided": base.T[:3],
            "conj": torch.tensor([1j, 2j, 3j]).conj(),
            "rows": [torch.ones(2), torch.zeros(1), np.ones(3)],
            "half": base.to(torch.bfloat16).T[:3],
        },
        [3],
        "s",
    )
    np.testing.assert_array_equal(out["grad"], base.numpy())
    np.testing.assert_array_equal(out["strided"], base.numpy().T[:3])
    np.testing.assert_array_equal(out["conj"], [-1j, -2j, -3j])
    assert [type(row) for row in out["rows"]] == [np.ndarray] * 3
    assert isinstance(out["half"], np.ndarray)
    assert out["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(out["half"].astype(np.float32), base.numpy().T[:3])


@pytest.mark.parametrize("name", shared_dtypes())
def test_rows_of_tensors_come_back_as_one_array(name: str) -> None:
    """Those that differ in their first axis only, of every dtype; views, conjugates and gradients as they read."""
    whole = np.resize(np.arange(1, 50), (20, 2)).astype(NUMERIC[name])
    tensor = assemble([{"x": whole}], [20]).to_torch("cpu")["x"]
    if tensor.is_floating_point() and tensor.itemsize >= 4:
        tensor.requires_grad_()
    column = split({"y": [tensor[i : 2 * i] for i in range(6)]}, [6], "s")[0].columns["y"]
    assert isinstance(column, RaggedRows)
    expected = [whole[i : 2 * i] for i in range(6)]
    assert [(r.dtype, r.shape, r.tobytes()) for r in column] == [(r.dtype, r.shape, r.tobytes()) for r in expected]


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(0),
        torch.zeros(2, 2, 2),
        torch.zeros(2, 3),
        torch.zeros(()),
        torch.zeros(9000, 2),
        torch.nn.Parameter(torch.zeros(2, 2)),
        np.zeros((2, 2)),
        None,
    ],
)
def test_rows_of_several_kinds_come_back_one_by_one(odd: Any) -> None:
    """Nothing is cast, left out or put together with others."""
    rows = [torch.ones(n, 2) for n in range(5)]
    column = split({"y": [*rows, odd]}, [6], "s")[0].columns["y"]
    assert [row.tolist() for row in column[:5]] == [row.tolist() for row in rows]
    if odd is None:
        assert column[5] is None
    else:
        assert (column[5].shape, column[5].dtype.name) == (tuple(odd.shape), str(odd.dtype).removeprefix("torch."))


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")])
def test_tensors_that_cannot_travel(tensor: torch.Tensor) -> None:
    """Sparse and meta tensors are refused with stage and column."""
    with pytest.raises(InputError, match="'s': column 'x'"):
        split({"x": [tensor] * 5}, [5], "s")
    with pytest.raises(InputError, match="'s': column 'x'"):
        split({"x": tensor}, [2], "s")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    """The same stage gives the same numbers on a GPU, and all dtypes survive the way there and back."""
    model = nn.Linear(3, 2)
    saved(tmp_path / "w.safetensors", model)
    runner = runner_of(Linear(), "w.safetensors")
    runner.load(StageContext(device="cuda:0", base_dir=tmp_path))
    ((out, *_),) = runner.run([{"x": numbers()}], [2])
    assert SEEN[-1] == (True, "cuda", torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(numbers()) + 1).numpy()
    np.testing.assert_allclose(out["y"], expected, rtol=1e-3)  # type: ignore[arg-type]
    for name in shared_dtypes():
        raw = (b"\x00\x01" if name == "bool" else bytes(range(256))) * 16
        array = np.frombuffer(raw, NUMERIC[name])
        batch = assemble([{"x": array}], [len(array)]).to_torch("cuda:0")
        back = split({"x": batch["x"]}, [len(array)], "s")[0].columns["x"]
        assert isinstance(back, np.ndarray)
        assert back.tobytes() == raw


class Look(TorchStage):
    share = True

    def build(self, context: StageContext) -> nn.Module:
        return nn.Identity()

    def forward(self, batch: Batch) -> dict[str, Any]:
        SEEN.append(batch["x"])
        return {"y": batch["x"].sum(dim=1)}


def test_a_stage_that_shares_gets_the_jobs_own_memory() -> None:
    """`share = True` saves the copy on a CPU; what a job holds is not changed by it, nor by others' batches."""
    SEEN.clear()
    runner = runner_of(Look())
    runner.load(StageContext())
    x = numbers()
    x.flags.writeable = False
    (made,) = runner.run([{"x": x}], [2])
    np.testing.assert_array_equal(made.columns["y"], x.sum(axis=1))
    assert SEEN[0].data_ptr() == x.ctypes.data
    runner.run([{"x": x}, {"x": numbers(1)}], [2, 1])
    assert SEEN[1].data_ptr() != x.ctypes.data
