"""What a host offers: as NVML and the kernel tell, bounded by what this process may use, and by `--slots`."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchrelay.config.fleet import Gpu
from torchrelay.errors import ConfigError
from torchrelay.workers.slots import SlotReader, open_nvml, parse_slots

GIB = 2**30


class FakeNvml:
    """Four GPUs: 0 and 1 reach each other over NVLink, as do 2 and 3; number `silent` tells nothing of its memory."""

    class NVMLError(Exception):
        pass

    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0

    def __init__(self, count: int = 4, silent: int = -1, broken: bool = False) -> None:
        self.count, self.silent, self.broken = count, silent, broken
        self.asked = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        if self.broken:
            raise self.NVMLError("the driver is not loaded")
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}"

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle == self.silent:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(total=80 * GIB, free=(70 + handle) * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 3:
            raise self.NVMLError("not supported")
        return SimpleNamespace(gpu=10 * handle)

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        self.asked += 1
        assert index == 2
        return 0 if one // 2 == other // 2 else 1


def files(root: Path, **content: str) -> Path:
    """A root of a file system with /proc/meminfo and a control group of two levels."""
    group = root / "sys/fs/cgroup/outer/inner"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/outer/inner\n")
    (root / "proc/meminfo").write_text("MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\nHugePages_Total: 0\n")
    for name, text in content.items():
        level, _, file = name.partition("_")
        (group if level == "inner" else group.parent).joinpath(file.replace("_", ".")).write_text(text)
    return root


def test_gpus_are_as_nvml_tells_of_them(tmp_path: Path) -> None:
    """With groups of NVLink, which are asked for once; a device that does not tell its use is offered all the same."""
    nvml = FakeNvml()
    reader = SlotReader("auto", nvml, {}, tmp_path)
    offer = reader.read()
    assert offer.gpus[1] == Gpu(1, "GPU-11", "NVIDIA H100", 80 * GIB, 71 * GIB, 0.1)
    assert [gpu.utilisation for gpu in offer.gpus] == [0.0, 0.1, 0.2, None]
    assert offer.links == ((0, 1), (2, 3))
    asked = nvml.asked
    assert reader.read() == offer
    assert nvml.asked == asked


@pytest.mark.parametrize(
    ("visible", "uuids", "links"),
    [
        ("3,1", ["GPU-33", "GPU-11"], ()),
        ("GPU-22,3", ["GPU-22", "GPU-33"], ((0, 1),)),
        ("1,9,2", ["GPU-11"], ()),
        ("0,0,1", ["GPU-00"], ()),
        ("GPU-", [], ()),
        ("", [], ()),
        ("-1", [], ()),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(
    tmp_path: Path, visible: str, uuids: list[str], links: tuple[tuple[int, ...], ...]
) -> None:
    """By number or UUID, in that order, up to the first that is unknown or twice there."""
    offer = SlotReader("auto", FakeNvml(), {"CUDA_VISIBLE_DEVICES": visible}, tmp_path).read()
    assert [gpu.uuid for gpu in offer.gpus] == uuids
    assert [gpu.index for gpu in offer.gpus] == list(range(len(uuids)))
    assert offer.links == links


def test_what_nvml_cannot_tell_of_is_not_offered(tmp_path: Path) -> None:
    """A GPU that is lost goes alone; without a driver there is none."""
    assert [g.index for g in SlotReader("auto", FakeNvml(silent=1), {}, tmp_path).read().gpus] == [0, 2, 3]
    assert SlotReader("auto", FakeNvml(broken=True), {}, tmp_path).read().gpus == ()
    assert SlotReader("auto", None, {}, tmp_path).read().gpus == ()


def test_processors_and_memory_are_bounded_by_every_control_group(tmp_path: Path) -> None:
    """The least quota and limit of all levels counts; what is held of files counts as free."""
    root = files(
        tmp_path,
        inner_cpu_max="150000 100000\n",
        outer_cpu_max="50000 100000\n",
        inner_memory_max="max\n",
        inner_memory_current="1\n",
        outer_memory_max=f"{8 * GIB}\n",
        outer_memory_current=f"{3 * GIB}\n",
        outer_memory_stat=f"anon 5\ninactive_file {GIB}\n",
    )
    offer = SlotReader("auto", None, {}, root).read()
    assert (offer.cpus, offer.memory, offer.free_memory) == (0.5, 8 * GIB, 6 * GIB)


def test_without_bounds_the_host_is_offered_whole(tmp_path: Path) -> None:
    """As many processors as this process may use."""
    root = files(tmp_path, inner_cpu_max="max 100000", inner_memory_max="max")
    offer = SlotReader("auto", None, {}, root).read()
    assert (offer.memory, offer.free_memory) == (64 * GIB, 32 * GIB)
    assert offer.cpus == len(os.sched_getaffinity(0))
    assert SlotReader("auto", None, {}, tmp_path / "nothing").read().memory == 0


def test_slots_says_what_is_offered_and_nothing_else(tmp_path: Path) -> None:
    """A GPU that is named and not there is an error that says which there are."""
    offer = SlotReader("cpu=2.5,cuda:1,cuda:3", FakeNvml(), {}, tmp_path).read()
    assert (offer.cpus, [gpu.slot for gpu in offer.gpus]) == (2.5, ["cuda:1", "cuda:3"])
    assert SlotReader("cuda:0", FakeNvml(), {}, tmp_path).read().cpus == 0
    only = SlotReader("cpu", FakeNvml(), {}, tmp_path).read()
    assert (only.cpus, only.gpus) == (len(os.sched_getaffinity(0)), ())
    SlotReader("cuda:3", FakeNvml(), {}, tmp_path).check()
    with pytest.raises(ConfigError, match=r"cuda:4.*cuda:0, cuda:1, cuda:2, cuda:3|cuda:4, and the GPUs here are none"):
        SlotReader("cuda:4", FakeNvml(), {}, tmp_path).check()
    with pytest.raises(ConfigError, match="the GPUs here are none"):
        SlotReader("cuda:0", None, {}, tmp_path).check()


@pytest.mark.parametrize("text", ["", "gpu", "cpu=", "cpu=-1", "cpu=x", "cuda", "cuda:x", "cuda:0;cuda:1", "auto,cpu"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--slots"):
        parse_slots(text)


@pytest.mark.gpu
def test_a_real_gpu_is_offered_as_torch_sees_it() -> None:
    """Same number, name and memory; shares of it are what a stage may ask for."""
    torch = pytest.importorskip("torch", reason="GPU stages need torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    nvml = open_nvml()
    assert nvml is not None, "torch sees a GPU and NVML does not: is nvidia-ml-py installed?"
    offer = SlotReader("auto", nvml).read()
    assert [gpu.name for gpu in offer.gpus] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for gpu in offer.gpus:
        free, total = torch.cuda.mem_get_info(gpu.index)
        assert gpu.memory >= total > 0.9 * gpu.memory
        assert abs(gpu.free - free) < 0.1 * total
        assert str(torch.cuda.get_device_properties(gpu.index).uuid) in gpu.uuid
        assert gpu.utilisation is None or 0 <= gpu.utilisation <= 1
    for group in offer.links:
        for one in group:
            assert all(torch.cuda.can_device_access_peer(one, other) for other in group if other != one)
