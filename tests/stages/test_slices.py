"""Weights read by slices: what is read, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchrelay.errors import StageLoadError
from torchrelay.stages import slices
from torchrelay.stages.cuts import Cut
from torchrelay.stages.slices import open_weights
from torchrelay.stages.weights import read_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64, torch.uint16]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = int(torch.tensor(shape, dtype=torch.int64).prod()) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.contiguous().view(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Whole tensors of all types and shapes, scalars and empty ones too."""
    torch.manual_seed(1)
    state = {str(shape): random_bytes(shape, dtype) for shape in [(), (0, 3), (1,), (5, 3), (2, 3, 4, 5)]}
    save_file(state, tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights:
        assert sorted(weights.names()) == sorted(state)
        for name, tensor in state.items():
            assert (weights.shape(name), weights.dtype(name)) == (tensor.shape, dtype)
            same(weights.read(name), tensor)


CUTS = [
    Cut(0, ((2, 5),)),
    Cut(1, ((0, 2),)),
    Cut(1, ((1, 2), (4, 7))),
    Cut(0, ((0, 1), (3, 3), (5, 6)), 4),
    Cut(0, (), 2),
    Cut(2, ((1, 3),)),
    Cut(2, ((0, 1),), 3),
]


@pytest.mark.parametrize("piece", [1, 16, 4096])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_parts_are_what_indexing_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Cut, dtype: torch.dtype | None, piece: int
) -> None:
    """Parts along any dimension, of several ranges, padded with zeros, cast, by pieces of rows and whole rows; the
    buffer holds a few rows, or not even one."""
    torch.manual_seed(2)
    whole = torch.randn(6, 8, 3)
    save_file({"a": torch.randn(3), "w": whole, "z": torch.randn(2)}, tmp_path / "w.safetensors")
    parts = [whole.narrow(cut.dim, start, stop - start) for start, stop in cut.ranges]
    expected = torch.cat([*parts, whole.narrow(cut.dim, 0, 0)], dim=cut.dim)
    shape = list(expected.shape)
    shape[cut.dim] = 0 if cut.size is None else cut.size - cut.taken
    expected = torch.cat([expected, torch.zeros(shape)], dim=cut.dim).to(dtype)
    monkeypatch.setattr(slices, "_PIECE", piece)
    for buffer in (8, 40, 200, 1 << 20):
        monkeypatch.setattr(slices, "_BUFFER", buffer)
        with open_weights(tmp_path / "w.safetensors") as weights:
            found = weights.read("w", cut, dtype=dtype)
        assert cut.shape(whole.shape) == tuple(found.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(cut.of(whole).to(dtype), expected, rtol=0, atol=0)


def test_what_is_read_is_ones_own(tmp_path: Path) -> None:
    """It can be changed inside and outside inference mode, and later reads do not see that."""
    save_file({"w": torch.zeros(4)}, tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights, torch.inference_mode():
        found = weights.read("w")
        assert not found.is_inference()
        found += 1
        assert weights.read("w").tolist() == [0, 0, 0, 0]


def test_pickled_weights_are_read_whole(tmp_path: Path) -> None:
    """A .pt file serves too."""
    whole = torch.randn(4, 6)
    torch.save({"w": whole}, tmp_path / "w.pt")
    with open_weights(tmp_path / "w.pt") as weights:
        same(weights.read("w", Cut(1, ((2, 4),))), whole[:, 2:4].contiguous())
        assert (weights.names(), weights.shape("w"), weights.dtype("w")) == (["w"], (4, 6), torch.float32)


def sharded(folder: Path) -> Path:
    save_file({"a": torch.arange(4.0)}, folder / "model-1.safetensors")
    save_file({"b": torch.arange(6.0)}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    return index


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """The index leads to the files beside it, for slices and for a whole state dict."""
    index = sharded(tmp_path)
    with open_weights(index) as weights:
        assert sorted(weights.names()) == ["a", "b"]
        assert weights.read("b", Cut(0, ((1, 3),))).tolist() == [1, 2]
    assert {name: len(tensor) for name, tensor in read_weights(index, torch.device("cpu")).items()} == {"a": 4, "b": 6}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_map": {"a": "model-2.safetensors"}}, "'a' is in 'model-2.safetensors', which has no such"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors' do not exist"),
        ({"weight_map": {"a": "../model-1.safetensors"}}, "must lie beside it"),
        ({"weight_map": {"a": ".."}}, "must lie beside it"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
        ("{", "no JSON index"),
        ("[" * 100_000, "no JSON index"),
    ],
)
def test_an_index_that_leads_nowhere(tmp_path: Path, change: Any, match: str) -> None:
    """The error names the index and what is wrong with it."""
    index = sharded(tmp_path)
    index.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(StageLoadError, match=match):
        open_weights(index)


def file_of(head: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BAD = {
    "empty": (b"", "too short"),
    "short": (b"\x01\x02", "too short"),
    "pickle": (b"\x80\x04K\x01.", "pickle that was renamed"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle that was renamed"),
    "long head": (file_of({}, length=2**62), "its head would have"),
    "head past the end": (file_of({}, length=20), "its head would have"),
    "no json": (file_of(b"{]"), "no safetensors file"),
    "no utf-8": (file_of(b'{"\xff": 1}'), "no safetensors file"),
    "no object": (file_of([]), "no JSON object"),
    "nested": (file_of(b"[" * 100_000), "no safetensors file"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "stands twice"),
    "no entry": (file_of({"w": 3}), "'w' has no dtype"),
    "no offsets": (file_of({"w": {"dtype": "F32", "shape": []}}), "'w' has no dtype"),
    "unknown type": (file_of(entry([1], [0, 4], "Q7")), "'w' is of type Q7"),
    "negative": (file_of(entry([-1], [0, 4])), "has shape"),
    "true": (file_of(entry([True], [0, 4])), "has shape"),
    "65 dimensions": (file_of(entry([1] * 65, [0, 4])), "has shape"),
    "one offset": (file_of(entry([1], [0])), "data_offsets"),
    "bytes off by one": (file_of(entry([1], [0, 3]), bytes(3)), "has 3 bytes, its shape"),
    "huge": (file_of(entry([2**40, 2**40], [0, 4]), bytes(4)), "has 4 bytes, its shape"),
    "cut short": (file_of(entry([2], [0, 8]), bytes(7)), "cut short"),
    "trailing": (file_of(entry([1], [0, 4]), bytes(5)), "cut short"),
    "gap": (file_of(entry([1], [4, 8]), bytes(8)), "begins at byte"),
}


@pytest.mark.parametrize(("content", "match"), BAD.values(), ids=BAD)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    """Whatever is wrong with a file, the error names it and says what."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(StageLoadError, match=match) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Nothing there, a folder, a pipe, another kind of file."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "w.bin").write_bytes(b"x")
    for name in ("gone.safetensors", "pipe.safetensors", "."):
        with pytest.raises(StageLoadError, match="do not exist or are no regular file"):
            open_weights(tmp_path / name)
    with pytest.raises(StageLoadError, match=r"must be a \.safetensors"):
        open_weights(tmp_path / "w.bin")


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    """It is not waited for."""
    save_file({"w": torch.zeros(100)}, tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights:
        os.truncate(tmp_path / "w.safetensors", 200)
        with pytest.raises(StageLoadError, match="ended while they were read"):
            weights.read("w")


READER = """
import sys
from pathlib import Path
import torch
from torchrelay.stages.cuts import Cut
from torchrelay.stages.slices import open_weights
from torchrelay.stages.weights import read_weights
kept = {}
if sys.argv[1:]:
    path, cuts = Path(sys.argv[1]), {}
    with open_weights(path) as weights:
        for name in weights.names():
            rows, columns = weights.shape(name)
            cuts[name] = Cut(0, ((0, rows // 2),)) if name < "c" else Cut(1, ((columns // 2, columns),))
    kept = read_weights(path, torch.device("cpu"), cuts)
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) * 1024)
"""


def peak_bytes(*args: str) -> int:
    told = subprocess.run([sys.executable, "-c", READER, *args], check=True, capture_output=True, text=True).stdout
    return int(told)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of memory are read from /proc")
def test_no_more_in_memory_than_what_was_asked_for(tmp_path: Path) -> None:
    """Reading half of 200 MB, by rows and by columns, as a gathered shard does, a fresh process's peak is at most 15 %
    of them above the half."""
    path, each, shape = tmp_path / "w.safetensors", 50_000_000, [12_500, 1_000]
    head = {
        n: {"dtype": "F32", "shape": shape, "data_offsets": [i * each, (i + 1) * each]} for i, n in enumerate("abcd")
    }
    path.write_bytes(file_of(head))
    os.truncate(path, path.stat().st_size + 4 * each)
    more = peak_bytes(str(path)) - peak_bytes()
    assert 0.45 <= more / (4 * each) <= 0.5 + 0.15
